"""The dense model's own answers, and what of them is left when its layers keep less."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alvts_cli.engine import Policy, Selectors, attach
from alvts_cli.engine.calls import going_on
from alvts_cli.errors import AlvtsError
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


def kept_answers(
    model: Any,
    selectors: Selectors,
    keep: float,
    policy: Policy,
    samples: Sequence[Answered],
    group: Group | None = None,
) -> Kept:
    """What is left of the dense model's answers under a policy: the means of `each_kept`, whose
    arguments and errors these are."""
    every = each_kept(model, selectors, keep, policy, samples, group)
    loss, same = (sum(values) / len(every) for values in zip(*every, strict=True))
    return Kept(loss, same, sum(min(loss, CAP) for loss, _ in every) / len(every))


@torch.no_grad()
def each_kept(
    model: Any,
    selectors: Selectors,
    keep: float,
    policy: Policy,
    samples: Sequence[Answered],
    group: Group | None = None,
) -> list[tuple[float, bool]]:
    """Loss of every answer and whether it is the same, as `Kept` has their means: prefill and cache
    as in use, the dense answer's tokens given one after the other.

    Args:
        model: of a known family.
        selectors: fitted for it.
        keep: ratio of visual tokens in every layer.
        policy: to try.
        samples: the dense answers, at least one; of a group, those of this process.
        group: of processes that have other samples; each gets all of them, in the order of one
            process, since sums depend on it.

    Raises:
        AlvtsError: a loss is not finite.
    """
    group = group or Group()
    found_here: list[tuple[int, float, bool]] = []
    with attach(model, selectors, [keep] * len(selectors.layers), policy=policy):
        for i, one in enumerate(samples):
            found = _predict(model, one).float().log_softmax(dim=-1).cpu()
            loss = check_finite(float(answer_divergence(one.dense, found)), model.dtype)
            # Not the answer's tokens: a generation config may have ruled out the likeliest.
            same = bool((found.argmax(dim=-1) == one.dense.argmax(dim=-1)).all())
            found_here.append((i * group.size + group.rank, loss, same))
    return [(loss, same) for _, loss, same in sorted(group.gather(found_here))]


def _predict(model: Any, one: Answered) -> Tensor:
    """Logits `[A, V]` of the answer's tokens."""
    out = model(**one.inputs, use_cache=True, logits_to_keep=1)
    logits = [out.logits[0]]
    if one.answer.shape[1] > 1:
        more = model(input_ids=one.answer[:, :-1], use_cache=True, **going_on(out))
        logits.append(more.logits[0])
    return torch.cat(logits)


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
