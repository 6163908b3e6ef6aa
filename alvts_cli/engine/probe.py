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
from .scoring import rotate, text_rows

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
            nothing = torch.zeros_like(index, dtype=torch.bool)
            scene = Scene(nothing, positions, index, ids=ids)
            with _without_dropout(layer):
                reached = _reach(layer, hidden, positions, ids)
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


@contextmanager
def _without_dropout(layer: nn.Module) -> Iterator[None]:
    """The layer as it answers, not as it is trained: a LoRA draws its dropout anew every time."""
    training = [module for module in layer.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    seen = (visual.cumsum(dim=1) > 0) & text
    # In a sample whose text sees nothing, the visual tokens ask.
    alone = ~seen.any(dim=1, keepdim=True)
    return attention_mean(projected, torch.where(alone, visual, text), visual | text) * visual


def attention_mean(projected: Projected, rows: Tensor, real: Tensor) -> Tensor:
    """The mean of a layer's real attention over some rows: float32 `[B, T]`.

    Heads are averaged first, because the formulas are written for one attention matrix; of that, no
    more is held than a head's `ROW_BLOCK` of these rows.

    Args:
        projected: of the layer.
        rows: bool `[B, T]`, whose attention it is. Text in front of an image, which does not see
            it, may be among them: it only scales what is found for the image by a constant.
        real: bool `[B, T]`, False at padding.
    """
    _, heads, tokens, width = projected.query.shape
    sharing = heads // projected.key.shape[1]
    count = rows.sum(dim=1)
    # Those rows first, in their order; of a sample with fewer, some that count for nothing.
    index = rows.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    index = index[:, : int(count.max())]
    weights = rows.gather(1, index).float() / count[:, None].clamp(min=1)
    positions = torch.arange(tokens, device=rows.device)
    # Not -inf: a padding row in front has no column at all, and its nan would spoil the means.
    lowest = torch.finfo(torch.float32).min
    total = torch.zeros(rows.shape, device=rows.device)
    for head in range(heads):
        k = projected.key[:, head // sharing].float().transpose(1, 2) * projected.scaling
        for start in range(0, index.shape[1], ROW_BLOCK):
            block = index[:, start : start + ROW_BLOCK, None]
            query = projected.query[:, head].gather(1, block.expand(-1, -1, width))
            hide = ~real[:, None, :] | (positions > block)
            logits = (query.float() @ k).masked_fill_(hide, lowest)
            part = weights[:, None, start : start + ROW_BLOCK] @ logits.softmax(dim=-1)
            total += part[:, 0]
    return total / heads
