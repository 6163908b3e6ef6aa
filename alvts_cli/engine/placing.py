"""Fitted maps where the layers are that they are for, laid out as the engine runs them there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import AlvtsError
from ..families import family_of
from ..families.layer import norm_weight, parts_of
from ..families.placing import where
from .carry import Carry
from .forward import Pieces
from .keep import Schedules
from .masks import check_bias
from .normed import fused, unfolded
from .paper import PaperSelector
from .policy import Picked, Policy
from .scorer import SelectorScorer
from .scoring import LayerSelector

Selector = LayerSelector | PaperSelector
"""Of one layer, in our form or in the paper's."""


class Selectors(Protocol):
    """What a loaded artifact offers."""

    @property
    def layers(self) -> Sequence[Selector | None]: ...
    @property
    def default_keep(self) -> float: ...
    @property
    def schedules(self) -> Schedules: ...
    @property
    def carries(self) -> Sequence[Carry]: ...
    @property
    def picked(self) -> Sequence[Picked]: ...
    @property
    def visual_tokens(self) -> int: ...


def place_selectors(selectors: Sequence[Selector | None], layers: Any) -> Sequence[Selector | None]:
    """Each where its layer is, in the dtype of the norm, for that is never quantised; and as
    `normed.Normed` wants it there."""
    placed: list[Selector | None] = []
    for selector, layer in zip(selectors, layers, strict=True):
        norm = layer.input_layernorm
        one = selector and selector.to(*where(norm))
        if one is not None and fused(where(norm)[0]):
            weight = norm_weight(norm)
            if isinstance(one, PaperSelector):
                query, key = (unfolded(down, weight) for down in (one.query, one.key))
                one = replace(one, query=query, key=key)
            else:
                one = replace(one, down=unfolded(one.down, weight))
        placed.append(one)
    return placed


def place_carry(carry: Carry, norm: Any) -> Carry:
    """The same for the update of the layer that begins with `norm`."""
    placed = carry.to(*where(norm))
    if not fused(where(norm)[0]):
        return placed
    return replace(placed, down=unfolded(placed.down, norm_weight(norm)))


def shared_norms(layers: Any) -> Sequence[Tensor]:
    """What each layer's input RMSNorm multiplies by, `[D]`, where the maps have not folded it in;
    else nothing."""
    norms = [layer.input_layernorm for layer in layers]
    return [norm_weight(norm) for norm in norms] if fused(where(norms[0])[0]) else ()


def make_scorer(placed: Sequence[Selector | None], layers: Any) -> SelectorScorer:
    """What ranks tokens by selectors that `place_selectors` has put where `layers` are."""
    parts = [parts_of(layer) for layer in layers]
    norms = [None if own.query_norm is None else norm_weight(own.query_norm) for own in parts]
    return SelectorScorer(placed, norms, parts[0].rotary)


def make_pieces(
    model: Any,
    selectors: Selectors,
    policy: Policy,
    placed: Sequence[Selector | None] | None = None,
) -> Pieces:
    """The tensors that `policy` needs, each where its layer of `model` is; `placed` are the
    selectors where they are already.

    Raises:
        AlvtsError: the selectors do not hold them, or the attention kernel cannot weigh tokens.
    """
    family = family_of(model)
    layers: Any = family.layers(model)
    text_model: Any = family.text_model(model)
    norms = [layer.input_layernorm for layer in layers]
    if policy.mass:
        check_bias(text_model.config._attn_implementation)
    compared: list[LayerSelector | None] = []
    if policy.compares and placed is None:
        placed = place_selectors(selectors.layers, layers)
    for selector in placed or () if policy.compares else ():
        if isinstance(selector, PaperSelector):
            raise AlvtsError(
                "selectors of the paper's form choose by importance alone; use the policy paper, "
                "or calibrate without --form paper"
            )
        compared.append(selector)
    carries: list[Carry] = []
    if policy.carry:
        if len(selectors.carries) != len(norms):
            raise AlvtsError(
                "the policy carries what is skipped, but these selectors were fitted without that; "
                "calibrate again, or choose a policy without carry"
            )
        carries = [
            place_carry(carry, norm) for carry, norm in zip(selectors.carries, norms, strict=True)
        ]
    shared = shared_norms(layers)
    joined = [
        None if one is None or not shared else torch.cat([one.down, carry.down])
        for one, carry in zip(compared, carries, strict=False)
    ]
    return Pieces(policy, compared, carries, shared, joined)
