"""A layer's real queries and keys, and the attention they make.

They are taken where the layer hands them to its attention kernel: after norm, projections, biases
and rotary positions, whatever the architecture and the release of transformers make of these. No
attention implementation has to give its weights away, so sdpa and FlashAttention do as well as
eager.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import AttentionInterface

from .calls import POSITIONS
from .scoring import asking

_NAME = "alvts_probe"

ROW_BLOCK = 1024
"""Rows of the attention matrix held at once."""


@dataclass(frozen=True)
class Projected:
    """Queries `[B, H, T, d]` and keys `[B, G, T, d]` of a layer, and what scales their product.

    With grouped queries, `H / G` consecutive query heads share a key head.
    """

    query: Tensor
    key: Tensor
    scaling: float


class _Reached(Exception):
    """Carries what was handed to the attention kernel out of the attention."""

    def __init__(self, projected: Projected) -> None:
        self.projected = projected


def _stop(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> NoReturn:
    raise _Reached(Projected(query, key, scaling))


AttentionInterface.register(_NAME, _stop)


@contextmanager
def _stopping(config: Any) -> Iterator[None]:
    """Let the layers of this config end in `_stop`."""
    usual = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = usual


@torch.no_grad()
def project(layer: Any, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Projected:
    """What `layer` would hand to its attention kernel; no cache is touched.

    Args:
        layer: a decoder layer.
        hidden: its input `[B, T, D]`.
        positions: `(cos, sin)` as the layer takes them.
    """
    device = layer.input_layernorm.weight.device
    cos, sin = positions
    with _stopping(layer.self_attn.config):
        try:
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden.to(device)),
                **{POSITIONS: (cos.to(device), sin.to(device))},
                attention_mask=None,
            )
        except _Reached as reached:
            return reached.projected
    raise RuntimeError(f"{type(layer.self_attn).__name__} did not call its attention kernel")


def row_attention(projected: Projected, rows: Tensor, columns: Tensor) -> Tensor:
    """One row of attention per sample, mean over heads: `H x T` numbers, never `T x T`.

    Args:
        projected: of a layer.
        rows: int64 `[B]`, the position whose query attends.
        columns: bool `[B, T]`, what it may attend to; at least one, none behind the row.

    Returns:
        float32 `[B, T]`, 0 where it may not attend; each sample sums to 1.
    """
    batch, heads, _, width = projected.query.shape
    groups = projected.key.shape[1]
    index = rows.to(projected.query.device)[:, None, None, None].expand(batch, heads, 1, width)
    query = projected.query.gather(2, index).float()
    query = query.view(batch, groups, heads // groups, width) * projected.scaling
    logits = query @ projected.key.float().transpose(2, 3)
    columns = columns.to(logits.device)[:, None, None, :]
    attention = logits.masked_fill(~columns, -torch.inf).softmax(dim=-1)
    return attention.flatten(1, 2).mean(dim=1)


def attention_importance(projected: Projected, visual: Tensor, text: Tensor) -> Tensor:
    """`S*`: the importance of every visual token in the layer's real attention.

        A      = mean over heads of softmax(q k^T * scaling), rows causal as in the model
        S*(i)  = mean of A[j, i] over visual rows j  *  mean of A[j, i] over text rows j

    Heads are averaged before the product, because the formula of the importance is written for one
    attention matrix. Text rows in front of the image see no visual token; they are counted in the
    mean as the formula says, which only scales a sample's `S*` by a constant. As in
    `scoring.importance`, a sample whose text sees nothing has the first factor alone.

    Args:
        projected: of the layer.
        visual, text: bool `[B, T]`; a position in neither is padding.

    Returns:
        float32 `[B, T]`, 0 where not visual.
    """
    from_visual, from_text = attention_means(projected, visual, text)
    return from_visual * from_text


def attention_means(projected: Projected, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The two factors of `attention_importance`, each 0 where not visual; the second is 1 in a
    sample whose text sees nothing. `heads x T x T` is never stored."""
    _, heads, tokens, _ = projected.query.shape
    key = projected.key.repeat_interleave(heads // projected.key.shape[1], dim=1)
    rows = torch.stack([visual, text], dim=1).float()
    rows = rows / rows.sum(dim=-1, keepdim=True).clamp(min=1)
    padding = ~(visual | text)[:, None, :]
    positions = torch.arange(tokens, device=rows.device)
    # Not -inf: a padding row in front has no column at all, and its nan would spoil the means.
    lowest = torch.finfo(torch.float32).min
    means = torch.zeros_like(rows)
    for head in range(heads):
        k = key[:, head].float().transpose(1, 2) * projected.scaling
        for start in range(0, tokens, ROW_BLOCK):
            block = slice(start, start + ROW_BLOCK)
            logits = projected.query[:, head, block].float() @ k
            hide = padding | (positions[None, :] > positions[block, None])
            attention = logits.masked_fill_(hide, lowest).softmax(dim=-1)
            means += rows[:, :, block] @ attention
    from_visual, from_text = (means / heads).unbind(dim=1)
    from_text = torch.where(asking(visual, text).any(dim=1, keepdim=True), from_text, 1.0)
    return from_visual * visual, from_text * visual
