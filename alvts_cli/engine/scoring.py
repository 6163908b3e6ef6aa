"""The selector of a layer at run time: importance of every visual token from the raw residual.

A token is as important as the text that follows it finds it: with the layer's own attention `A`,
`S(i)` is the mean of `A[j, i]` over text rows `j`, and over heads. It is made of low-rank keys:
`z = V n(x)` of `R` numbers per token, with the layer's input RMSNorm `n`; the keys are `U z`, in
the layer's own heads and with rotary positions, for the layer's own queries of a few text tokens.
So there are `ROWS x T` logits per head, however long the text; the `T x T` attention is never made.

The paper multiplies this by the mean over visual rows, and has low-rank queries and keys in one
joint head without positions, for all rows (see `paper`). Neither keeps more answers: see
`calibration/README.md`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..families.rotary import Rotary
from .merging import gather_hidden
from .normed import Normed
from .scene import Scene, Together
from .sizes import ROWS

# Numbers of keys and of attention held at once, over all samples and heads: bounds memory. On a CPU
# fewer were slower (2**15 to 2**19), more no faster.
HELD = 2**28
CPU_HELD = 2**20


@dataclass(frozen=True)
class LayerSelector:
    """The fitted selector of one layer, with `G` key heads of size `d`.

    Attributes:
        down: `[R, D]`, from the residual stream to `z`, the norm weight folded in.
        up: `[G * d, R]`, from `z` to the keys in front of the rotary positions.
        key_bias: `[G * d]`, of the model's own keys, or None.
        eps: of the layer's input RMSNorm, and of the keys'.
        key_norm: `[d]`, the weight of the model's own RMSNorm of each key head, in front of the
            rotary positions; None where it has none.
    """

    down: Tensor
    up: Tensor
    key_bias: Tensor | None
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
        """A copy for a layer's device and dtype, laid out as a file has it, for the last bit of a
        product depends on that."""
        bias, norm = self.key_bias, self.key_norm
        return replace(
            self,
            down=self.down.to(device, dtype).contiguous(),
            up=self.up.to(device, dtype).contiguous(),
            key_bias=None if bias is None else bias.to(device, dtype),
            key_norm=None if norm is None else norm.to(device, dtype),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name; without the bias and the norm where there are none."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}


@dataclass(frozen=True)
class TextRows:
    """The queries of the text that asks.

    Attributes:
        query: `[B, H, M, d]`, the layer's own, with rotary positions.
        scaling: of a logit.
        rotary: how these turn a head.
    """

    query: Tensor
    scaling: float
    rotary: Rotary


def asking(visual: Tensor, text: Tensor) -> Tensor:
    """The tokens that ask for visual ones: bool `[B, T]`.

    Text that sees one, behind the first, for other text has no part in `S` but to scale it; in a
    sample without such text, the visual tokens themselves. Of more than `ROWS` so many, evenly
    spaced, the last among them.
    """
    seeing = text & (visual.cumsum(dim=1) > 0)
    seeing = seeing | (visual & ~seeing.any(dim=1, keepdim=True))
    order = seeing.cumsum(dim=1)
    count = order[:, -1:].clamp(min=1)
    return seeing & (order * ROWS // count > (order - 1) * ROWS // count)


def text_rows(layer: Any, hidden: Tensor, scene: Scene, rotary: Rotary) -> TextRows:
    """The queries that `layer` will make of the text that asks.

    Args:
        layer: a decoder layer.
        hidden: its input `[B, T, D]`.
        scene: says which tokens ask.
        rotary: how the layer turns its heads.
    """
    normed = layer.input_layernorm(gather_hidden(hidden, scene.rows()))
    attention = layer.self_attn
    states = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, "q_norm", None)
    query = (states if norm is None else norm(states)).transpose(1, 2)
    query = rotate(query, scene.asked(), rotary)
    scale = _scale(layer, scene)
    if scale is not None:
        query = query * scale.to(query)[:, None, :, None]
    return TextRows(query, attention.scaling, rotary)


def _scale(layer: Any, scene: Scene) -> Tensor | None:
    """`[B, M]`: what the queries of the text that asks are multiplied with, see
    `scaled_by_position`."""
    scaled, ids = scaled_by_position(layer), scene.ids
    if scaled is None or ids is None:
        return None
    beta, longest = scaled
    ids = ids.to(scene.index.device).expand(len(scene.index), -1).gather(1, scene.index)
    return 1 + beta * (1 + ids // longest).log()


def scaled_by_position(layer: Any) -> tuple[float, int] | None:
    """Of a layer that multiplies its queries at position `p` by `1 + beta * log(1 + p // longest)`,
    as Llama 4 and Ministral 3 do: `beta` and `longest`; else None."""
    rope = getattr(getattr(layer.self_attn, "config", None), "rope_parameters", None) or {}
    beta = rope.get("llama_4_scaling_beta")
    return None if beta is None else (beta, rope["original_max_position_embeddings"])


def rotate(states: Tensor, positions: tuple[Tensor, Tensor], rotary: Rotary) -> Tensor:
    """Rotary positions `(cos, sin)` `[B or 1, T, w]` on `[B, H, T, d]`, as the layers do it."""
    cos, sin = (table.to(states)[:, None] for table in positions)
    turning = states[..., : cos.shape[-1]]
    first, second = rotary.split(turning, -1)
    return _and_rest(turning * cos + rotary.join(-second, first, -1) * sin, states, -1)


def _and_rest(turned: Tensor, states: Tensor, dim: int) -> Tensor:
    """What was turned of `states`, and behind it what was not, if there is any."""
    width = turned.shape[dim]
    rest = states.shape[dim] - width
    return torch.cat([turned, states.narrow(dim, width, rest)], dim) if rest else turned


def importance(hidden: Tensor, selector: LayerSelector, rows: TextRows, scene: Scene) -> Tensor:
    """`S(i)` of every visual token.

    Args:
        hidden: `[B, T, D]`, the layer's input as it is (before its norm), any float dtype.
        selector: on the device and in the dtype of `hidden`.
        rows: the tokens that ask.
        scene: what is the same in every layer.

    Returns:
        float32 `[B, T]`, -inf where not visual. Differentiable; never waits for the device.
    """
    latent = Normed(hidden).times(selector.down, selector.eps)
    found = text_mean(latent.to(hidden.dtype), selector, rows, scene)
    return found.masked_fill(~scene.visual, -torch.inf)


def text_mean(latent: Tensor, selector: LayerSelector, rows: TextRows, scene: Scene) -> Tensor:
    """`S` of all columns, float32 `[B, T]`: the mean over heads and text rows of their causal
    attention to `latent`'s keys. In blocks, which bounds memory."""
    batch, heads, count, width = rows.query.shape
    tokens = latent.shape[1]
    # Consecutive query heads share a key head.
    groups = selector.up.shape[0] // width
    query = (rows.query * rows.scaling).unflatten(1, (groups, -1))
    weights, unseen = scene.weights(), scene.unseen()
    # Keys as columns, as the product wants them: turning them round would cost more than the rest.
    latent = latent.transpose(1, 2)
    cos, sin = scene.columns(latent.dtype)
    up = selector.up.unflatten(0, (groups, width))
    bias = None if selector.key_bias is None else selector.key_bias.view(groups, width, 1)

    held = CPU_HELD // (batch * tokens)
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
        keys = _rotate_columns(keys, cos, sin, rows.rotary)
        start = 0
        while start < count:
            block = slice(start, start + size)
            hide = unseen[:, block]
            # float() is for autocast, which would make them half precision.
            logits = (query[:, part, :, block].flatten(2, 3) @ keys).float()
            logits = logits.view(batch, -1, hide.shape[1], tokens)
            # Not -inf: a fill row may be padding, without any column.
            lowest = torch.finfo(torch.float32).min
            attention = logits.masked_fill(hide[:, None], lowest).softmax(dim=-1)
            mean = mean + (weights[:, None, None, block] @ attention).sum(dim=(1, 2))
            start += size
        group += some
    return mean / heads


def text_sum(
    layer: Any,
    normed: Normed,
    latent: Tensor,
    selector: LayerSelector,
    scene: Scene,
    query_norm: Tensor | None,
    rotary: Rotary,
) -> tuple[Tensor, int]:
    """`text_mean` of the layer's own queries in few launches: queries and keys are turned in one
    tensor, and all heads that fit into memory attend at once.

    Args:
        layer: a decoder layer.
        normed: its input, normed with the weight.
        latent: `[B, T, R]`, in its dtype.
        selector: of the layer.
        scene: what is the same in every layer.
        query_norm: `[d]`, what the RMSNorm of a query head multiplies by, if there is one.
        rotary: how the layer turns its heads.

    Returns:
        A sum, float32 `[B, T]`, and what it is to be divided by for the mean.
    """
    attention, width, eps = layer.self_attn, layer.self_attn.head_dim, selector.eps
    groups = selector.up.shape[0] // width
    asking = gather_hidden(normed.states(eps), scene.rows())
    query = attention.q_proj(asking).unflatten(-1, (groups, -1, width))
    # Flat: of a part of a tensor, torch would add the bias by an operator of its own.
    keys = functional.linear(latent.flatten(0, 1), selector.up, selector.key_bias)
    keys = keys.view(*latent.shape[:2], groups, width)
    if query_norm is not None and selector.key_norm is not None:
        query = functional.rms_norm(query, (width,), query_norm, eps)
        keys = functional.rms_norm(keys, (width,), selector.key_norm, eps)
    scale = _scale(layer, scene)
    if scale is not None:
        query = query * scale.to(query)[..., None, None, None]
    sharing = query.shape[3]
    # Head by head, behind them the keys: [B, G, r M + T, d].
    states = torch.cat([*query.transpose(1, 2).unbind(3), keys.transpose(1, 2)], dim=2)
    some = min(groups, max(1, HELD // (states.numel() // groups)))
    tables = scene.together(states.dtype, some, sharing, width, rotary)
    total: Tensor | None = None
    for group in range(0, groups, some):
        part = _attend(states[:, group : group + some], tables, attention.scaling)
        total = part if total is None else total + part
    assert total is not None
    return total, groups * sharing * (1 if tables.weights is not None else query.shape[1])


def _attend(states: Tensor, tables: Together, scaling: float) -> Tensor:
    """`[B, T]`: the attention of some key heads, summed over heads and rows."""
    batch, groups, _, width = states.shape
    if tables.partners is None:
        others = states.roll(width // 2, dims=-1)
    else:
        others = states.index_select(-1, tables.partners)
    turned = torch.addcmul(states * tables.cos, others, tables.sin)
    rows = tables.unseen.shape[2]
    query, keys = turned[:, :, :rows], turned[:, :, rows:]
    unseen = tables.unseen[:, :groups].flatten(0, 1)
    logits = torch.baddbmm(
        unseen, query.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=scaling
    )
    attention = logits.softmax(dim=-1).view(batch, groups, rows, keys.shape[2])
    if tables.weights is None:
        return attention.sum(dim=(1, 2), dtype=torch.float32)
    return (tables.weights[:, None] @ attention.float()).sum(dim=(1, 2))


def _norm_columns(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMSNorm of weight `[d]` on every column of `[B, G, d, T]`."""
    scale = torch.rsqrt(states.float().square().mean(dim=2, keepdim=True) + eps)
    return states * (scale * weight[:, None]).to(states.dtype)


def _rotate_columns(states: Tensor, cos: Tensor, sin: Tensor, rotary: Rotary) -> Tensor:
    """`rotate` for `[B, G, d, T]`, the tables `[B or 1, 1, w, T]`."""
    first, second = rotary.split(states[:, :, : cos.shape[2]], 2)
    (cos_first, cos_second), (sin_first, sin_second) = rotary.split(cos, 2), rotary.split(sin, 2)
    # Whole halves: written into parts of one tensor, a compiled graph would look at every number.
    turned = rotary.join(
        (first * cos_first).addcmul_(second, sin_first, value=-1),
        (second * cos_second).addcmul_(first, sin_second),
        2,
    )
    return _and_rest(turned, states, 2)
