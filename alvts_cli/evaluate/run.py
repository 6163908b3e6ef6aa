"""Every method and budget on the same samples.

Batch after batch, each batch through the dense model, the dense model on a grey picture, and every
method at every budget: the dense distributions are at hand when a method's are compared with them,
and what is finished is finished for all methods.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..batches import end_token
from ..engine import Prefill, Selection, new_cache, prefill_flops
from ..errors import AlvtsError
from ..families import family_of
from ..families.vision import seen_once
from ..methods.base import Method
from ..models import Loaded
from ..spread import Group
from .data import DataSet, Item
from .preparing import Prepared, Preparing
from .store import Store

GREY = (128, 128, 128)
"""What a blind model is shown."""

DENSE, BLIND = "dense", "blind"
"""Labels of the two runs that every table has."""


@dataclass(frozen=True)
class Run:
    """A method at a budget.

    Attributes:
        method: its name.
        budget: as the user wrote it.
    """

    method: str
    budget: str

    @property
    def label(self) -> str:
        """As gates name it."""
        return f"{self.method}@{self.budget}"


@dataclass(frozen=True)
class Plan:
    """What is to be run on every batch.

    Attributes:
        loaded: the model.
        dense: the dense method.
        runs: method and budget (an int of tokens or a float of a ratio), by run.
        batch: samples at once.
    """

    loaded: Loaded
    dense: Method
    runs: dict[Run, tuple[Method, int | float]]
    batch: int


@dataclass(frozen=True)
class Outcome:
    """One sample under one run.

    Attributes:
        answer: what the model said.
        kl: `KL(dense || this)` of the distributions of the answer's first token, in nats.
        kept: visual tokens by layer, as `(count, layers)` one after the other.
        flops: of the prefill: decoder layers and selectors. Of a conversation, here and in `slots`,
            the prefill of the turn that the pictures come with.
        slots: tokens in the KV cache after prefill, all layers together.
    """

    answer: str
    kl: float
    kept: tuple[tuple[int, int], ...]
    flops: int
    slots: int


Outcomes = dict[str, Outcome]
"""One sample, by the label of the run."""


@torch.inference_mode()
def evaluate(
    plan: Plan,
    data: DataSet,
    store: Store,
    advance: Callable[[int], None],
    group: Group | None = None,
) -> list[Outcomes]:
    """The outcomes of every sample, in the order of the data.

    Args:
        plan: of the runs.
        data: the questions.
        store: holds the batches finished by an interrupted run, and takes the others.
        advance: called with the number of runs of a batch that were just finished.
        group: of processes that share the batches; all of them get all outcomes.

    Raises:
        AlvtsError: a picture that cannot be read, a prompt that does not fit the model, or a
            store that cannot be written.
    """
    group = group or Group()
    results: list[tuple[int, bool, list[Outcomes]]] = []
    labels = [DENSE, BLIND, *(run.label for run in plan.runs)]
    for number, start in enumerate(range(0, len(data.items), plan.batch)):
        if not group.mine(number):
            continue
        items = data.items[start : start + plan.batch]
        saved = _unpack(store.load(number), labels, len(items))
        before = saved is not None
        if saved is None:
            with seen_once(plan.loaded.model):
                saved = _batch(plan, data, items, lambda: advance(1))
            store.save(number, [{k: vars(v) for k, v in one.items()} for one in saved])
        else:
            advance(len(labels))
        results.append((number, before, saved))
    ordered = sorted(group.gather(results), key=lambda one: one[0])
    store.taken = sum(before for _, before, _ in ordered)
    return [outcomes for *_, batch in ordered for outcomes in batch]


def _unpack(saved: Any, labels: list[str], count: int) -> list[Outcomes] | None:
    """Outcomes as they were saved, if they are of these runs and whole."""
    try:
        found = [
            {
                label: Outcome(**{**one[label], "kept": tuple(map(tuple, one[label]["kept"]))})
                for label in labels
            }
            for one in saved or []
        ]
    except (KeyError, TypeError):
        return None
    return found if len(found) == count else None


def _batch(
    plan: Plan, data: DataSet, items: Sequence[Item], done: Callable[[], None]
) -> list[Outcomes]:
    """All runs on one batch."""
    model = plan.loaded.model
    pictures = [item.images() for item in items]
    prepare = Preparing(plan.loaded, items, data.max_new_tokens)
    seen = prepare(pictures)
    dense, reference = _generate(plan, plan.dense, 1.0, seen, items, data, None)
    done()
    blind = [[Image.new("RGB", i.size, GREY) for i in images] for images in pictures]
    results = {
        DENSE: dense,
        BLIND: _generate(plan, plan.dense, 1.0, prepare(blind), items, data, reference)[0],
    }
    done()
    for run, (method, budget) in plan.runs.items():
        own = [method.images(model, plan.loaded.processor, images, budget) for images in pictures]
        same = all(a is b for a, b in zip(own, pictures, strict=True))
        inputs = seen if same else prepare(own)
        outcomes, _ = _generate(plan, method, budget, inputs, items, data, reference)
        results[run.label] = outcomes
        done()
    return [{label: column[i] for label, column in results.items()} for i in range(len(items))]


def _generate(
    plan: Plan,
    method: Method,
    budget: int | float,
    prepared: Prepared,
    items: Sequence[Item],
    data: DataSet,
    reference: Tensor | None,
) -> tuple[list[Outcome], Tensor]:
    """Answer a batch greedily.

    A later turn goes on with the KV cache of the one that the pictures came with, as a conversation
    does: what its layers see of them is what each chose for the first question.

    Args:
        reference: log-probabilities of the dense model, or None if this is it.

    Returns:
        The outcomes, and the log-probabilities `[B, V]` of the first token.
    """
    model, tokenizer = plan.loaded.model, plan.loaded.processor.tokenizer
    how = {"do_sample": False, "num_beams": 1, "pad_token_id": end_token(model, tokenizer)}
    given: dict[str, Any] = prepared.inputs
    with method.attached(model, budget, [item.id for item in items]) as attachment:
        if prepared.later is not None:
            cache = new_cache(family_of(model).text_model(model))
            # Of the token it makes nothing is kept: it is not in the cache.
            model.generate(**given, **cache, **how, max_new_tokens=1)
            given = {**prepared.whole(), **cache}
        # A later turn has no pictures to choose from.
        kept = attachment.last
        output = model.generate(
            **given,
            **how,
            max_new_tokens=data.max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
        kept = kept or attachment.last
    if kept is None:
        raise AlvtsError(f"the processor made no visual tokens of the images of {items[0].id}")
    said = tokenizer.batch_decode(
        output.sequences[:, given["input_ids"].shape[1] :], skip_special_tokens=True
    )
    first = output.logits[0].float().log_softmax(dim=-1)
    divergence = torch.zeros(len(items))
    if reference is not None:
        # A token that the dense model rules out adds nothing.
        terms = (reference.exp() * (reference - first)).nan_to_num(nan=0.0)
        divergence = terms.sum(dim=-1).clamp(min=0)
    tokens = prepared.inputs["attention_mask"].sum(dim=1).tolist()
    costs = _costs(model, kept, tokens, method)
    return [
        Outcome(answer.strip(), kl, *cost)
        for answer, kl, cost in zip(said, divergence.tolist(), costs, strict=True)
    ], first


def _costs(
    model: Any, kept: Prefill, tokens: Sequence[int], method: Method
) -> list[tuple[tuple[tuple[int, int], ...], int, int]]:
    """Per sample: `kept` of an `Outcome`, its `flops` and its `slots`."""
    text_model: Any = family_of(model).text_model(model)
    selection = Selection(method.rank, kept.policy, kept.carry_rank, method.paper)
    costs = []
    for b, total in enumerate(tokens):
        counts = [layer[b] for layer in kept.kept]
        text = total - kept.visual_tokens[b]
        per_layer = [text + count for count in counts]
        flops = prefill_flops(text_model.config, per_layer, selection, total, text).total
        costs.append((_run_lengths(counts), flops, sum(per_layer)))
    return costs


def _run_lengths(counts: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`[16, 16, 3, 3, 3]` as `((16, 2), (3, 3))`."""
    runs: list[tuple[int, int]] = []
    for count in counts:
        if runs and runs[-1][0] == count:
            runs[-1] = (count, runs[-1][1] + 1)
        else:
            runs.append((count, 1))
    return tuple(runs)
