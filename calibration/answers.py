"""The dense model's own answers, and what of them is left when layers keep less."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alvts_cli.engine import LayerSelector, importance, select
from alvts_cli.engine.merging import gather_hidden, gather_positions, merge
from alvts_cli.engine.scoring import asking, places, text_rows
from alvts_cli.engine.selecting import positions_of
from alvts_cli.errors import AlvtsError
from alvts_cli.prompts import padding_token

from .capture import Captured, capture, run_layer

BATCH_TOKENS = 16384
"""Tokens that go through a layer at once, at most, unless one sample has more."""


@dataclass
class Answered:
    """A prompt with the dense model's own answer behind it.

    Attributes:
        sample: hidden states and positions of prompt and answer, without the answer's last token.
        answer: tokens of the answer; the last so many rows predict them.
    """

    sample: Captured
    answer: int

    @property
    def asked(self) -> Tensor:
        """bool `[1, T]`: the text of the prompt. The answer's tokens neither score nor are scored,
        as in decoding."""
        asked = ~self.sample.visual
        asked[:, asked.shape[1] - self.answer + 1 :] = False
        return asked


@torch.no_grad()
def answered(model: Any, inputs: Any, new_tokens: int) -> Answered:
    """Let the dense model answer greedily, and capture what reaches layer 0 of both.

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
        return_dict_in_generate=False,
    )
    answer = output.shape[1] - prompt
    whole = dict(inputs)
    whole["input_ids"] = output[:, :-1]
    # One number per token: text is 1 in the attention mask and 0 among the kinds of token.
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in whole:
            whole[name] = torch.nn.functional.pad(whole[name], (0, answer - 1), value=value)
    return Answered(capture(model, whole), answer)


def run_restricted(
    layer: Any,
    implementation: str,
    hidden: Tensor,
    positions: tuple[Tensor, Tensor],
    text: Tensor,
    texts: int,
    scores: Tensor,
    kept: int,
) -> Tensor:
    """`run_layer` on the text and the `kept` visual tokens of highest score; the others pass by.

    Args:
        layer: a decoder layer.
        implementation: of its attention.
        hidden: `[B, T, D]`, not written to.
        positions: `(cos, sin)`, on the device of `hidden`.
        text: bool `[B, T]`, what is not visual.
        texts: how many these are, in every row.
        scores: `[B, T]`, -inf where not visual.
        kept: at most as many as there are.
    """
    counts = torch.full((len(hidden),), kept, device=hidden.device)
    rows, _ = select(scores, counts, text, kept + texts)
    out = run_layer(
        layer, implementation, gather_hidden(hidden, rows), gather_positions(positions, rows)
    )
    return merge(hidden, rows, out, None)


@dataclass(frozen=True)
class Asking:
    """What scoring wants to know of a prompt, the same in every layer.

    Attributes:
        visual: bool `[B, T]`.
        place: as `engine.scoring.places`.
        index, valid: `[B, M]`, the prompt's text that asks; not the answer behind it.
    """

    visual: Tensor
    place: Tensor
    index: Tensor
    valid: Tensor

    @classmethod
    def of(cls, visual: Tensor, asked: Tensor) -> "Asking":
        """From bool `[B, T]`, on the CPU: nothing here is to wait for a device."""
        rows = asking(visual, asked)
        length = int(rows.sum(dim=1).max())
        return cls(visual, places(visual), *positions_of(rows, length))

    def to(self, device: torch.device) -> "Asking":
        """The same on another device."""
        return Asking(*(t.to(device) for t in (self.visual, self.place, self.index, self.valid)))


def score(
    layer: Any,
    selector: LayerSelector,
    hidden: Tensor,
    positions: tuple[Tensor, Tensor],
    prompt: Asking,
) -> Tensor:
    """Importance `[B, T]` as prefill has it.

    Args:
        layer: of the model.
        selector: of that layer, on its device and in its dtype.
        hidden: its input `[B, T, D]`.
        positions: `(cos, sin)`.
        prompt: on the device of `hidden`.
    """
    rows = text_rows(layer, hidden, positions, prompt.index, prompt.valid)
    return importance(hidden, selector, rows, positions, prompt.visual, prompt.place)


def answer_divergence(dense: Tensor, found: Tensor) -> Tensor:
    """`KL(dense || found)` over the vocabulary, in nats, mean over an answer's tokens.

    Args:
        dense: log-probabilities `[B or 1, A, V]`, float32.
        found: the same of the restricted model, `[B, A, V]`.

    Returns:
        `[B]`.
    """
    return (dense.exp() * (dense - found)).sum(dim=-1).mean(dim=-1).clamp(min=0)


def check_finite(loss: float, dtype: torch.dtype) -> float:
    """`loss` itself.

    Raises:
        AlvtsError: it is not finite: some layer's output overflowed in `dtype`.
    """
    if not math.isfinite(loss):
        raise AlvtsError(
            f"what a restricted model answers overflows in {dtype}; use --dtype bfloat16 or "
            "float32, or --no-budget"
        )
    return loss
