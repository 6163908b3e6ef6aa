"""The selector of a layer at run time: importance of every visual token from the raw residual.

With the layer's own attention `A`, the paper's importance is `S(i) = S_V2V(i) * S_T2V(i)`, the mean
of `A[j, i]` over the visual rows `j` times the mean over the text rows. Both are made of one
low-rank key: `z = V n(x)` of `R` numbers per token, with the layer's input RMSNorm `n`.

- **Text rows.** The layer's own queries are made of a few text tokens; the keys are `U z`, in the
  layer's own heads and with rotary positions. `ROWS x T` per head, however long the text.
- **Visual rows.** What the image as a whole attends to shows in the token itself and in its place
  among the others: a network of a few units makes `log S_V2V(i)` of `z` and the place. The
  `N x N` attention is never made.

The paper has low-rank queries and keys in one joint head without positions, for all rows. Measured
in `calibration/align.py`: it is the text rows that this form cannot see.
"""

import math
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .merging import gather_hidden, gather_positions
from .sizes import ROWS

# Numbers of keys and of attention held at once, over all samples and heads: bounds memory. On a CPU
# fewer were slower (2**15 to 2**19), more no faster.
HELD = 2**26
CPU_HELD = 2**20
# Numbers copied to float32 at once on a CPU, to stay in its cache.
CPU_COPIED = 2**18


@dataclass(frozen=True)
class LayerSelector:
    """The fitted selector of one layer, with `G` key heads of size `d` and `m` hidden units.

    Attributes:
        down: `[R, D]`, from the residual stream to `z`, the norm weight folded in.
        up: `[G * d, R]`, from `z` to the keys in front of the rotary positions.
        key_bias: `[G * d]`, of the model's own keys, or None.
        inner: `[m, R + PLACES + 1]`, from `z`, the place and a 1 to the hidden units.
        outer: `[m + PLACES]`, from the hidden units and the place to `log S_V2V`.
        eps: of the layer's input RMSNorm, and of the keys'.
        key_norm: `[d]`, the weight of the model's own RMSNorm of each key head, in front of the
            rotary positions; None where it has none.
    """

    down: Tensor
    up: Tensor
    key_bias: Tensor | None
    inner: Tensor
    outer: Tensor
    eps: float
    key_norm: Tensor | None = None

    @property
    def rank(self) -> int:
        """`R`."""
        return self.down.shape[0]

    @property
    def width(self) -> int:
        """`D`."""
        return self.down.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> "LayerSelector":
        """A copy for a layer's device and dtype. The small network stays in float32."""
        bias, norm = self.key_bias, self.key_norm
        return replace(
            self,
            down=self.down.to(device, dtype),
            up=self.up.to(device, dtype),
            key_bias=None if bias is None else bias.to(device, dtype),
            inner=self.inner.to(device, torch.float32),
            outer=self.outer.to(device, torch.float32),
            key_norm=None if norm is None else norm.to(device, dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name; without the bias and the norm where there are none."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class TextRows:
    """The text that attends to the image.

    Attributes:
        query: `[B, H, M, d]`, the layer's own, with rotary positions.
        index: int64 `[B, M]`, their positions in the sequence.
        valid: bool `[B, M]`, False at the fill of shorter samples.
        scaling: of a logit.
    """

    query: Tensor
    index: Tensor
    valid: Tensor
    scaling: float


def asking(visual: Tensor, text: Tensor) -> Tensor:
    """The text tokens that ask for visual ones: bool `[B, T]`.

    Those that see one, behind the first, for the others have no part in `S_T2V` but to scale it;
    and of more than `ROWS` so many, evenly spaced, the last among them.
    """
    seeing = text & (visual.cumsum(dim=1) > 0)
    order = seeing.cumsum(dim=1)
    count = order[:, -1:].clamp(min=1)
    return seeing & (order * ROWS // count > (order - 1) * ROWS // count)


def places(visual: Tensor) -> Tensor:
    """Where each visual token is among those of its sample: float32 `[B, T, PLACES]`.

    With `a` from 0 at the first to 1 at the last: `log(1 - a)`, `a` and `log a`, each brought to
    mean 0 and variance 1 over an image. Causal rows make the mean of a column a matter of place.
    """
    order = visual.cumsum(dim=1)
    count = order[:, -1:].clamp(min=1)
    a = ((order - 0.5) / count).clamp(min=0.25 / count)
    return torch.stack([(1 - a).log() + 1, (a - 0.5) * math.sqrt(12), a.log() + 1], dim=-1)


def text_rows(
    layer: Any,
    hidden: Tensor,
    positions: tuple[Tensor, Tensor],
    index: Tensor,
    valid: Tensor,
    position_ids: Tensor | None = None,
) -> TextRows:
    """The queries that `layer` will make of some tokens.

    Args:
        layer: a decoder layer.
        hidden: its input `[B, T, D]`.
        positions: `(cos, sin)` as the layer takes them, `[B or 1, T, d]`.
        index, valid: `[B, M]`, as `selecting.positions_of` gives them.
        position_ids: int64 `[B or 1, T]`, for a layer that scales its queries by them.
    """
    attention = layer.self_attn
    states = attention.q_proj(layer.input_layernorm(gather_hidden(hidden, index)))
    states = states.unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, "q_norm", None)
    query = (states if norm is None else norm(states)).transpose(1, 2)
    query = rotate(query, gather_positions(positions, index))
    scaled = scaled_by_position(layer)
    if scaled is not None and position_ids is not None:
        beta, longest = scaled
        ids = position_ids.expand(len(index), -1).gather(1, index)
        query = query * (1 + beta * (1 + ids // longest).log()).to(query)[:, None, :, None]
    return TextRows(query, index, valid, attention.scaling)


def scaled_by_position(layer: Any) -> tuple[float, int] | None:
    """Of a layer that multiplies its queries at position `p` by `1 + beta * log(1 + p // longest)`,
    as Llama 4 and Ministral 3 do: `beta` and `longest`; else None."""
    rope = getattr(getattr(layer.self_attn, "config", None), "rope_parameters", None) or {}
    beta = rope.get("llama_4_scaling_beta")
    return None if beta is None else (beta, rope["original_max_position_embeddings"])


def rotate(states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions `(cos, sin)` `[B or 1, T, d]` on `[B, H, T, d]`, as all families have it."""
    cos, sin = (table.to(states)[:, None] for table in positions)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def importance(
    hidden: Tensor,
    selector: LayerSelector,
    rows: TextRows,
    positions: tuple[Tensor, Tensor],
    visual: Tensor,
    place: Tensor,
    real: Tensor | None = None,
) -> Tensor:
    """`S(i) = S_V2V(i) * S_T2V(i)` of every visual token.

    Args:
        hidden: `[B, T, D]`, the layer's input as it is (before its norm), any float dtype.
        selector: on the device and in the dtype of `hidden`.
        rows: the text; a sample without any is ranked by `S_V2V` alone.
        positions: `(cos, sin)` as the layer takes them, `[B or 1, T, d]`.
        visual: bool `[B, T]`.
        place: as `places(visual)`.
        real: bool `[B, T]`, False at padding, which is no column; None when nothing is padded.

    Returns:
        float32 `[B, T]`, -inf where not visual. Differentiable; never waits for the device.
    """
    from_visual, from_text = means(hidden, selector, rows, positions, visual, place, real)
    return (from_visual * from_text).masked_fill(~visual, -torch.inf)


def means(
    hidden: Tensor,
    selector: LayerSelector,
    rows: TextRows,
    positions: tuple[Tensor, Tensor],
    visual: Tensor,
    place: Tensor,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two factors of `importance`, `S_V2V` and `S_T2V`: float32 `[B, T]` each.

    `S_V2V` is scaled to a sum of 1, and 0 where not visual. `S_T2V` is that of all columns, and 1
    in a sample without text.
    """
    latent = latent_of(hidden, selector)
    from_text = _text_mean(latent.to(hidden.dtype), selector, rows, positions, real)
    from_text = torch.where(rows.valid.any(dim=1, keepdim=True), from_text, 1.0)
    return _visual_mean(selector, latent.float(), visual, place), from_text


def latent_of(hidden: Tensor, selector: LayerSelector) -> Tensor:
    """`z = V n(x)` of every token of `hidden` `[B, T, D]`: float32 `[B, T, R]`."""
    return functional.linear(hidden, selector.down) * inverse_rms(hidden, selector.eps)


def inverse_rms(hidden: Tensor, eps: float) -> Tensor:
    """What an RMSNorm scales the rows of `hidden` `[B, T, D]` by: float32 `[B, T, 1]`."""
    return torch.rsqrt(_norm(hidden).square() / hidden.shape[-1] + eps)


def _visual_mean(selector: LayerSelector, latent: Tensor, visual: Tensor, place: Tensor) -> Tensor:
    weights, bias = selector.inner[:, :-1], selector.inner[:, -1]
    units = functional.gelu(functional.linear(torch.cat([latent, place], dim=-1), weights, bias))
    log = torch.cat([units, place], dim=-1) @ selector.outer
    # Not -inf: a sample without visual tokens would be nan.
    return log.masked_fill(~visual, torch.finfo(log.dtype).min).softmax(dim=-1) * visual


def _text_mean(
    latent: Tensor,
    selector: LayerSelector,
    rows: TextRows,
    positions: tuple[Tensor, Tensor],
    real: Tensor | None,
) -> Tensor:
    """`[B, T]`: the mean over heads and text rows of their causal attention to `latent`'s keys."""
    batch, heads, count, width = rows.query.shape
    tokens = latent.shape[1]
    # Consecutive query heads share a key head.
    groups = selector.up.shape[0] // width
    query = (rows.query * rows.scaling).unflatten(1, (groups, -1))
    weights = rows.valid / rows.valid.sum(dim=1, keepdim=True).clamp(min=1)
    columns = torch.arange(tokens, device=latent.device)
    # Keys as columns, as the product wants them: turning them round would cost more than the rest.
    latent = latent.transpose(1, 2)
    cos, sin = (table.to(latent).transpose(1, 2)[:, None].contiguous() for table in positions)
    up = selector.up.unflatten(0, (groups, width))
    bias = None if selector.key_bias is None else selector.key_bias.view(groups, width, 1)

    held = (CPU_HELD if latent.device.type == "cpu" else HELD) // (batch * tokens)
    some = min(groups, max(1, held // width))
    size = max(1, held // (some * (heads // groups)))
    mean = torch.zeros(batch, tokens, device=latent.device)
    # Not ranges: torch.compile would make constants of the numbers of tokens and rows.
    group = 0
    while group < groups:
        part = slice(group, group + some)
        keys = (up[part].flatten(0, 1) @ latent).unflatten(1, (-1, width))
        keys = keys if bias is None else keys + bias[part]
        if selector.key_norm is not None:
            keys = _norm_columns(keys, selector.key_norm, selector.eps)
        keys = _rotate_columns(keys, cos, sin)
        start = 0
        while start < count:
            block = slice(start, start + size)
            seen = columns <= rows.index[:, block, None]
            if real is not None:
                seen = seen & real[:, None, :]
            # float() is for autocast, which would make them half precision.
            logits = (query[:, part, :, block].flatten(2, 3) @ keys).float()
            logits = logits.view(batch, -1, rows.index[:, block].shape[1], tokens)
            # Not -inf: a fill row may be padding, without any column.
            lowest = torch.finfo(torch.float32).min
            attention = logits.masked_fill(~seen[:, None], lowest).softmax(dim=-1)
            mean = mean + (weights[:, None, None, block] @ attention).sum(dim=(1, 2))
            start += size
        group += some
    return mean / heads


def _norm_columns(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMSNorm of weight `[d]` on every column of `[B, G, d, T]`."""
    scale = torch.rsqrt(states.float().square().mean(dim=2, keepdim=True) + eps)
    return states * (scale * weight[:, None]).to(states.dtype)


def _rotate_columns(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate` for `[B, G, d, T]`, the tables `[B or 1, 1, d, T]`."""
    first, second = states.chunk(2, dim=2)
    (cos_first, cos_second), (sin_first, sin_second) = cos.chunk(2, dim=2), sin.chunk(2, dim=2)
    # Whole halves: written into parts of one tensor, a compiled graph would look at every number.
    return torch.cat(
        [
            (first * cos_first).addcmul_(second, sin_first, value=-1),
            (second * cos_second).addcmul_(first, sin_second),
        ],
        dim=2,
    )


def _norm(hidden: Tensor) -> Tensor:
    """The length `[B, T, 1]` of every row of `hidden` `[B, T, D]`, at least float32."""
    batch, _, width = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    norm = partial(torch.linalg.vector_norm, dim=-1, keepdim=True, dtype=wide)
    # A GPU's kernel has a float32 accumulator; a CPU's is given a float32 copy, so it gets small
    # parts. Not in a compiled graph, which would have their number for a constant.
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return norm(hidden)
    size = max(1, CPU_COPIED // (batch * width))
    return torch.cat([norm(part) for part in hidden.split(size, dim=1)], dim=1)
