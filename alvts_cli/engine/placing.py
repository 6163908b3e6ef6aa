"""Fitted maps where the layers are that they are for, laid out as the engine runs them there."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import AlvtsError
from ..families import check_whole, family_of
from ..families.layer import norm_weight, parts_of
from ..families.placing import where
from .carry import Carry
from .forward import Pieces
from .keep import Schedules
from .masks import check_bias
from .normed import fused, unfolded
from .paper import PaperSelector
from .policy import Picked, Policy, parse_policy
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


def check_selectors(selectors: Any, layers: Any) -> None:
    """Refuse what are no selectors, or some for another number of layers.

    Raises:
        AlvtsError: they are.
    """
    if not hasattr(selectors, "layers"):
        raise AlvtsError(
            "selectors are an Artifact, or the name of a file or of a repository with one, not a "
            f"{type(selectors).__name__}; see `alvts calibrate`"
        )
    if len(selectors.layers) != len(layers):
        raise AlvtsError(
            f"the selectors are for {len(selectors.layers)} layers but the model has "
            f"{len(layers)}; use selectors fitted for this model"
        )


def check_pieces(pieces: Any, layers: Any) -> None:
    """Refuse pieces that `make_pieces` did not make for these layers as they are now.

    Raises:
        AlvtsError: of another kind, for other layers, or in another place or precision.
    """
    if not isinstance(pieces, Pieces) or not isinstance(pieces.policy, Policy):
        raise AlvtsError(f"pieces come from make_pieces, not a {type(pieces).__name__}")
    wanted = {
        "selectors": (pieces.selectors, pieces.policy.compares),
        "carries": (pieces.carries, pieces.policy.carry),
    }
    for name, (found, needed) in wanted.items():
        if len(found) != (len(layers) if needed else 0):
            raise AlvtsError(
                f"the pieces hold {len(found)} {name} for {len(layers)} layers under the policy "
                f"{pieces.policy}; make them with make_pieces for this model"
            )
        for one, layer in zip(found, layers, strict=False):
            place = where(layer.input_layernorm)
            if one is not None and (one.down.device, one.down.dtype) != place:
                raise AlvtsError(
                    "the model has another dtype, or is on another device, than when its pieces "
                    "were made; detach, and make them again with make_pieces"
                )


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
    policy: Policy | str,
    placed: Sequence[Selector | None] | None = None,
) -> Pieces:
    """The tensors that `policy` needs, each where its layer of `model` is; `placed` are the
    selectors where they are already.

    Raises:
        AlvtsError: a part of a model, selectors of another one, an unknown policy, selectors that
            do not hold what it needs, or an attention kernel that cannot weigh tokens.
    """
    check_whole(model)
    family = family_of(model)
    layers: Any = family.layers(model)
    check_selectors(selectors, layers)
    policy = parse_policy(policy) if isinstance(policy, str) else policy
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
