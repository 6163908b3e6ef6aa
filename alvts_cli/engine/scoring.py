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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .merging import gather_hidden
from .normed import Normed
from .scene import Scene, Together, with_marks
from .sizes import PLACES, ROWS

# Numbers of keys and of attention held at once, over all samples and heads: bounds memory. On a CPU
# fewer were slower (2**15 to 2**19), more no faster.
HELD = 2**28
CPU_HELD = 2**20


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
        """A copy for a layer's device and dtype, laid out as a file has it, for the last bit of a
        product depends on that. The small network stays in float32."""
        bias, norm = self.key_bias, self.key_norm
        return replace(
            self,
            down=self.down.to(device, dtype).contiguous(),
            up=self.up.to(device, dtype).contiguous(),
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
    """The queries of the text that asks.

    Attributes:
        query: `[B, H, M, d]`, the layer's own, with rotary positions.
        scaling: of a logit.
    """

    query: Tensor
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


def marked_places(visual: Tensor) -> Tensor:
    """`places`, then 1, then 1 where a token is not visual: float32 `[B, T, PLACES + 2]`."""
    return with_marks(places(visual), visual)


# Not -inf: a sample without visual tokens would be nan.
_HIDDEN = -1e30


def place_weights(selector: LayerSelector) -> Tensor:
    """What `marked_places` are to be multiplied with: float32 `[PLACES + 2, m + 1]`, for what they
    add to the hidden units and, last, to `log S_V2V`. That of other tokens is lowest there."""
    inner = functional.pad(selector.inner[:, -PLACES - 1 :].T, (0, 0, 0, 1))
    outer = functional.pad(selector.outer[-PLACES:], (0, 1))
    return torch.cat([inner, functional.pad(outer, (0, 1), value=_HIDDEN)[:, None]], dim=1)


def text_rows(layer: Any, hidden: Tensor, scene: Scene) -> TextRows:
    """The queries that `layer` will make of the text that asks.

    Args:
        layer: a decoder layer.
        hidden: its input `[B, T, D]`.
        scene: says which tokens ask.
    """
    normed = layer.input_layernorm(gather_hidden(hidden, scene.rows()))
    attention = layer.self_attn
    states = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, "q_norm", None)
    query = (states if norm is None else norm(states)).transpose(1, 2)
    query = rotate(query, scene.asked())
    scale = _scale(layer, scene)
    if scale is not None:
        query = query * scale.to(query)[:, None, :, None]
    return TextRows(query, attention.scaling)


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


def rotate(states: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions `(cos, sin)` `[B or 1, T, d]` on `[B, H, T, d]`, as all families have it."""
    cos, sin = (table.to(states)[:, None] for table in positions)
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


def importance(hidden: Tensor, selector: LayerSelector, rows: TextRows, scene: Scene) -> Tensor:
    """`S(i) = S_V2V(i) * S_T2V(i)` of every visual token.

    Args:
        hidden: `[B, T, D]`, the layer's input as it is (before its norm), any float dtype.
        selector: on the device and in the dtype of `hidden`.
        rows: the text; a sample without any is ranked by `S_V2V` alone.
        scene: what is the same in every layer.

    Returns:
        float32 `[B, T]`, -inf where not visual. Differentiable; never waits for the device.
    """
    from_visual, from_text = means(hidden, selector, rows, scene)
    return (from_visual * from_text).masked_fill(~scene.visual, -torch.inf)


def means(
    hidden: Tensor, selector: LayerSelector, rows: TextRows, scene: Scene
) -> tuple[Tensor, Tensor]:
    """The two factors of `importance`, `S_V2V` and `S_T2V`: float32 `[B, T]` each.

    `S_V2V` is scaled to a sum of 1, and 0 where not visual. `S_T2V` is that of all columns, and 1
    in a sample without text.
    """
    latent = Normed(hidden).times(selector.down, selector.eps)
    seen = latent.float() * scene.visual[..., None]
    part = scene.places @ place_weights(selector)
    from_visual = visual_mean(selector, seen, part) * scene.visual
    return from_visual, text_mean(latent.to(hidden.dtype), selector, rows, scene)


def visual_mean(selector: LayerSelector, latent: Tensor, part: Tensor) -> Tensor:
    """`S_V2V`, float32 `[B, T]`; next to nothing where not visual.

    Args:
        selector: of the layer.
        latent: float32 `[B, T, R]`.
        part: `[B, T, m + 1]`, the places' by `place_weights`.
    """
    units, rank = selector.inner.shape[0], latent.shape[-1]
    part = part.flatten(0, 1)
    inner = selector.inner[:, :rank].T
    hidden = functional.gelu(torch.addmm(part[:, :-1], latent.flatten(0, 1), inner))
    # float() is for autocast, which would mix precisions.
    log = torch.addmv(part[:, -1].float(), hidden.float(), selector.outer[:units])
    return log.view(latent.shape[:2]).softmax(dim=-1)


def text_mean(latent: Tensor, selector: LayerSelector, rows: TextRows, scene: Scene) -> Tensor:
    """`S_T2V`, float32 `[B, T]`: the mean over heads and text rows of their causal attention to
    `latent`'s keys; 1 in a sample without text. In blocks, which bounds memory."""
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
        keys = _rotate_columns(keys, cos, sin)
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
    return scene.where_asked(mean / heads, 1.0)


def text_sum(
    layer: Any,
    hidden: Tensor,
    latent: Tensor,
    selector: LayerSelector,
    scene: Scene,
    norm_weight: Tensor | None = None,
) -> tuple[Tensor, int]:
    """`text_mean` of the layer's own queries in few launches: queries and keys are turned in one
    tensor, and all heads that fit into memory attend at once.

    Args:
        layer: a decoder layer.
        hidden: its input `[B, T, D]`.
        latent: `[B, T, R]`, in its dtype.
        selector: of the layer.
        scene: what is the same in every layer.
        norm_weight: `[D]`, what the layer's input RMSNorm multiplies by; None to run it as it is.

    Returns:
        A sum, float32 `[B, T]`, and what it is to be divided by for the mean.
    """
    attention, norm = layer.self_attn, layer.input_layernorm
    width, eps = attention.head_dim, selector.eps
    groups = selector.up.shape[0] // width
    asking = gather_hidden(hidden, scene.rows())
    if norm_weight is None:
        asking = norm(asking)
    else:
        asking = functional.rms_norm(asking, asking.shape[-1:], norm_weight, eps)
    query = attention.q_proj(asking).unflatten(-1, (groups, -1, width))
    keys = functional.linear(latent, selector.up, selector.key_bias).unflatten(-1, (groups, width))
    if selector.key_norm is not None:
        query = attention.q_norm(query)
        keys = functional.rms_norm(keys, (width,), selector.key_norm, eps)
    scale = _scale(layer, scene)
    if scale is not None:
        query = query * scale.to(query)[..., None, None, None]
    sharing = query.shape[3]
    # Head by head, behind them the keys: [B, G, r M + T, d].
    states = torch.cat([*query.transpose(1, 2).unbind(3), keys.transpose(1, 2)], dim=2)
    some = min(groups, max(1, HELD // (states.numel() // groups)))
    tables = scene.together(states.dtype, some, sharing)
    total: Tensor | None = None
    for group in range(0, groups, some):
        part = _attend(states[:, group : group + some], tables, attention.scaling)
        total = part if total is None else total + part
    assert total is not None
    parts = groups * sharing * (1 if tables.weights is not None else max(1, query.shape[1]))
    return scene.where_asked(total, parts), parts


def _attend(states: Tensor, tables: Together, scaling: float) -> Tensor:
    """`[B, T]`: the attention of some key heads, summed over heads and rows."""
    batch, groups, _, width = states.shape
    turned = torch.addcmul(states * tables.cos, states.roll(width // 2, dims=-1), tables.sin)
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
