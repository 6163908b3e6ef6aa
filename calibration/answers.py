"""The dense model's own answers, and what of them is left when its layers keep less."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from alvts_cli.batches import TOKENS, collate
from alvts_cli.engine import Policy, Selectors, attach
from alvts_cli.engine.calls import going_on
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of
from alvts_cli.prompts import padding_token
from alvts_cli.spread import Group


@dataclass(frozen=True)
class Answered:
    """A prompt with the dense model's own answer.

    Attributes:
        inputs: a batch of one, as the model takes it.
        answer: int64 `[1, A]`, its tokens.
        dense: log-probabilities `[A, V]`, float32, on the CPU.
    """

    inputs: dict[str, Any]
    answer: Tensor
    dense: Tensor


CAP = 1.0
"""Nats, to which an answer's loss counts where policies are compared: a few large ones make the
mean, and beyond this an answer is lost, however sure the model is of another one."""


@dataclass(frozen=True)
class Kept:
    """What is left of the answers.

    Attributes:
        loss: KL of the answers' tokens to the dense model's, in nats, mean over tokens, then over
            samples.
        same: share of the answers that are the dense model's own, token for token.
        capped: the mean over samples with none above `CAP`.
    """

    loss: float
    same: float
    capped: float


@torch.no_grad()
def answered(model: Any, inputs: Any, new_tokens: int) -> Answered:
    """Let the dense model answer greedily.

    Args:
        model: of a known family.
        inputs: a batch of one, on the model's device and in its dtype.
        new_tokens: the longest answer.
    """
    prompt = inputs["input_ids"].shape[1]
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        pad_token_id=padding_token(model),
        num_beams=1,
        do_sample=False,
        # What checkpoints bring along for sampling, and what would not be the model's own choice.
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    dense = torch.cat(output.logits).float().log_softmax(dim=-1)
    return Answered(dict(inputs), output.sequences[:, prompt:], dense.cpu())


@dataclass(frozen=True)
class Together:
    """Prompts with their answers, run at once.

    Attributes:
        inputs: padded on the left.
        answers: int64 `[B, A]`, filled on the right.
        dense: of each, as `Answered` has it.
    """

    inputs: dict[str, Any]
    answers: Tensor
    dense: tuple[Tensor, ...]


MOST, MOST_TOKENS = 8, 4096
"""Prompts that are run at once, and tokens that they have together at most, but for a single one:
what a small model, or one on a GPU, takes for few tokens is the host's time for each operator,
however many prompts it is of; and a large one has to have the memory."""


def put_together(model: Any, samples: Sequence[Answered]) -> list[Together]:
    """The samples in their order, neighbours in one batch where their pictures go into one.

    Args:
        model: whose padding token fills the prompts.
        samples: whose inputs are on the model's device. Done once, the batches serve many policies:
            within `families.vision.seen_once` their pictures are then seen once.
    """
    batches: list[list[Answered]] = []
    for one in samples:
        own = batches[-1] if batches else []
        longest = max(other.inputs["input_ids"].shape[1] for other in (*own, one))
        fits = len(own) < MOST and longest * (len(own) + 1) <= MOST_TOKENS
        if own and fits and _pictures(own[-1]) == _pictures(one):
            own.append(one)
        else:
            batches.append([one])
    return [_together(model, batch) for batch in batches]


def _pictures(one: Answered) -> dict[str, Any]:
    """What has to be the same for two prompts to be in one batch."""
    return {name: value.shape[1:] for name, value in one.inputs.items() if name not in TOKENS}


def _together(model: Any, batch: Sequence[Answered]) -> Together:
    fill = padding_token(model)
    inputs = dict(batch[0].inputs) if len(batch) == 1 else collate([b.inputs for b in batch], fill)
    most = max(one.answer.shape[1] for one in batch)
    rows = [functional.pad(b.answer, (0, most - b.answer.shape[1]), value=fill) for b in batch]
    return Together(inputs, torch.cat(rows), tuple(one.dense for one in batch))


def mean_kept(every: Sequence[tuple[float, bool]]) -> Kept:
    """The means of what `each_kept` found, the same in whatever order it is."""
    losses = [loss for loss, _ in every]
    same = sum(same for _, same in every)
    capped = fsum(min(loss, CAP) for loss in losses)
    return Kept(fsum(losses) / len(every), same / len(every), capped / len(every))


@torch.no_grad()
def each_kept(
    model: Any,
    selectors: Selectors,
    keep: float,
    policy: Policy,
    batches: Sequence[Together],
    group: Group | None = None,
) -> list[tuple[float, bool]]:
    """Loss of every answer and whether it is the same, as `mean_kept` takes them: prefill and cache
    as in use, the dense answer's tokens given one after the other.

    Args:
        model: of a known family.
        selectors: fitted for it.
        keep: ratio of visual tokens in every layer.
        policy: to try.
        batches: the dense answers; of a group, those of this process.
        group: of processes that have other samples; each gets what was found on all of them. Where
            these are all that there are, it is in the order of one process.

    Raises:
        AlvtsError: a loss is not finite.
    """
    group = group or Group()
    found_here: list[tuple[int, float, bool]] = []
    with attach(model, selectors, [keep] * len(selectors.layers), policy=policy):
        for batch in batches:
            predicted = _predict(model, batch).float().log_softmax(dim=-1).cpu()
            for dense, whole in zip(batch.dense, predicted, strict=True):
                found = whole[: len(dense)]
                loss = check_finite(float(answer_divergence(dense, found)), model.dtype)
                # Not the answer's tokens: a generation config may have ruled out the likeliest.
                same = bool((found.argmax(dim=-1) == dense.argmax(dim=-1)).all())
                found_here.append((group.number(len(found_here)), loss, same))
    return [(loss, same) for _, loss, same in sorted(group.gather(found_here))]


def _predict(model: Any, batch: Together) -> Tensor:
    """Logits `[B, A, V]` of the answers' tokens."""
    seen = batch.inputs["attention_mask"]
    more = _positions(model, seen, seen.shape[1])
    out = model(**batch.inputs, **more, use_cache=True, logits_to_keep=1)
    if batch.answers.shape[1] == 1:
        return out.logits
    given = batch.answers[:, :-1]
    # What fills a shorter answer is behind it, where nothing of it looks.
    seen = torch.cat([seen, torch.ones_like(given)], dim=1)
    more = _positions(model, seen, given.shape[1])
    behind = model(input_ids=given, attention_mask=seen, use_cache=True, **more, **going_on(out))
    return torch.cat([out.logits, behind.logits], dim=1)


def _positions(model: Any, seen: Tensor, count: int) -> dict[str, Tensor]:
    """Where the last `count` of the tokens `seen` `[B, T]` stand, the padding left out, as
    `generate` tells a model. Models that count a picture's tokens in three dimensions find out by
    themselves where a prompt's stand, but not where several behind it do."""
    backbone: Any = family_of(model).backbone(model)
    at = (seen.cumsum(dim=-1) - 1).clamp(min=0)[:, -count:]
    if not hasattr(backbone, "rope_deltas"):
        return {"position_ids": at}
    if count == seen.shape[1]:
        return {}
    return {"position_ids": (at + backbone.rope_deltas.to(at.device)).expand(3, -1, -1)}


def answer_divergence(dense: Tensor, found: Tensor) -> Tensor:
    """`KL(dense || found)` over the vocabulary, in nats, mean over an answer's tokens.

    Args:
        dense: log-probabilities `[A, V]`, float32.
        found: the same of the restricted model.

    Returns:
        A scalar.
    """
    return (dense.exp() * (dense - found)).sum(dim=-1).mean().clamp(min=0)


def check_finite(loss: float, dtype: torch.dtype) -> float:
    """`loss` itself.

    Raises:
        AlvtsError: it is not finite: some layer's output overflowed in `dtype`.
    """
    if not math.isfinite(loss):
        raise AlvtsError(
            f"what a restricted model answers overflows in {dtype}; use --dtype bfloat16 or float32"
        )
    return loss
