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
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformers import AttentionInterface

from ..errors import AlvtsError
from ..families import family_of
from ..families.layer import norm_weight, parts_of
from ..families.placing import where
from .calls import POSITIONS
from .scene import Scene
from .scoring import asking, rotate, text_rows

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
    """Carries what was handed to the attention kernel out of the attention.

    Attributes:
        projected: queries and keys.
        more: whatever else the kernel was told.
    """

    def __init__(self, projected: Projected, more: dict[str, Any]) -> None:
        self.projected = projected
        self.more = more


def _stop(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> NoReturn:
    raise _Reached(Projected(query, key, scaling), kwargs)


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


def project(layer: Any, hidden: Tensor, positions: tuple[Tensor, Tensor]) -> Projected:
    """What `layer` would hand to its attention kernel; no cache is touched.

    A layer that scales its queries by their positions is given those of a prompt without padding.

    Args:
        layer: a decoder layer.
        hidden: its input `[B, T, D]`.
        positions: `(cos, sin)` as the layer takes them.
    """
    ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
    return _reach(layer, hidden, positions, ids).projected


@torch.no_grad()
def _reach(
    layer: Any, hidden: Tensor, positions: tuple[Tensor, Tensor], position_ids: Tensor
) -> _Reached:
    device, _ = where(layer.input_layernorm)
    cos, sin = positions
    with _stopping(layer.self_attn.config):
        try:
            layer.self_attn(
                hidden_states=layer.input_layernorm(hidden.to(device)),
                **{POSITIONS: (cos.to(device), sin.to(device))},
                attention_mask=None,
                position_ids=position_ids.to(device),
            )
        except _Reached as reached:
            return reached
    raise RuntimeError(f"{type(layer.self_attn).__name__} did not call its attention kernel")


@torch.no_grad()
def check_layers(model: Any) -> None:
    """Refuse a model whose decoder makes its queries and keys in another way than scoring does.

    Two random tokens go through every layer's projections, norms and rotary positions as scoring
    knows them, and through the layer itself up to its attention kernel. That a model is of a known
    architecture says nothing of this: its text model varies.

    Raises:
        AlvtsError: they differ, the kernel is told more than alvts knows, or the layer's input goes
            through something else than an RMSNorm.
    """
    family = family_of(model)
    backbone = family.backbone(model)
    # Launches are counted on weights without numbers: nothing to compare.
    if backbone in _checked or any(map(is_fake, backbone.parameters())):
        return
    width = _table_width(family.text_model(model))
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(1, 2, width // 2, generator=generator, device="cpu") * 6
    layers: Any = family.layers(model)
    # One form for all layers, as scoring has it.
    rotary = parts_of(layers[0]).rotary
    angle = rotary.join(angle, angle, -1)
    for i, layer in enumerate(layers):
        own = parts_of(layer)
        # Queries and keys below are made with the layer's own; a selector starts from an RMSNorm.
        norm_weight(own.norm)
        device, dtype = where(own.norm)
        hidden = torch.randn(1, 2, len(own.norm.weight), generator=generator, device="cpu").to(
            device, dtype
        )
        positions = angle.cos().to(hidden), angle.sin().to(hidden)
        index = torch.arange(2, device=device)[None]
        # Far enough apart that a scale by position shows.
        ids = 10**6 * index
        why = None
        try:
            reached = _reach(layer, hidden, positions, ids)
            nothing = torch.zeros_like(index, dtype=torch.bool)
            scene = Scene(nothing, positions, index, ids=ids)
            rows = text_rows(layer, hidden, scene, rotary)
            keys = _heads(own.key(own.norm(hidden)), own.head_dim, own.key_norm)
            keys = rotate(keys, positions, rotary)
            if not _alike(rows.query, reached.projected.query):
                why = "makes its queries"
            elif not _alike(keys, reached.projected.key):
                why = "makes its keys"
            elif rows.scaling != reached.projected.scaling:
                why = "scales its logits"
            elif any(reached.more.get(name) is not None for name in _UNKNOWN_TO_SCORING):
                why = "makes its attention"
        except (TypeError, AttributeError, RuntimeError, IndexError) as error:
            # Whatever it wants that scoring does not give it.
            why = f"makes its queries ({type(error).__name__})"
        if why is not None:
            raise AlvtsError(
                f"layer {i} of this model, a {type(layer).__name__}, {why} in another way than "
                "alvts scores: it would choose the wrong tokens; run without alvts"
            )
    _checked.add(backbone)


_checked: WeakSet[nn.Module] = WeakSet()

_UNKNOWN_TO_SCORING = ("softcap", "s_aux")


def _table_width(text_model: Any) -> int:
    """Numbers in a row of the decoder's rotary tables.

    Raises:
        AlvtsError: it has no such tables.
    """
    buffers = getattr(text_model, "rotary_emb", nn.Module()).named_buffers()
    for name, frequencies in buffers:
        if name.endswith("inv_freq"):
            return 2 * frequencies.numel()
    raise AlvtsError(
        f"the decoder {type(text_model).__name__} has no rotary positions, "
        "which alvts does not know how to score; run without alvts"
    )


def _heads(states: Tensor, size: int, norm: Any) -> Tensor:
    """`[B, T, G * d]` as heads `[B, G, T, d]`, through their norm where there is one."""
    heads = states.unflatten(-1, (-1, size))
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _alike(ours: Tensor, its: Tensor) -> bool:
    """Equal but for rounding."""
    close = 0.03 * float(its.float().abs().max())
    return ours.shape == its.shape and bool(((ours.float() - its.float()).abs() <= close).all())


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
        S*(i)  = mean of A[j, i] over text rows j

    All text counts, not just those rows that `scoring.asking` picks.

    Args:
        projected: of the layer.
        visual, text: bool `[B, T]`; a position in neither is padding.

    Returns:
        float32 `[B, T]`, 0 where not visual.
    """
    return attention_means(projected, visual, text)[1]


def attention_means(projected: Projected, visual: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the real attention over visual rows, and that over text rows; float32 `[B, T]`
    each, 0 where not visual. The paper's importance is their product.

    Heads are averaged first, because the formula is written for one attention matrix; `heads x T x
    T` is never stored. Text rows in front of the image see no visual token; they are counted, which
    only scales a sample's mean by a constant. In a sample whose text sees nothing, both are that
    over visual rows.
    """
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
    alone = ~(asking(visual, text) & text).any(dim=1, keepdim=True)
    from_text = torch.where(alone, from_visual, from_text)
    return from_visual * visual, from_text * visual
