"""Selectors with random numbers, for timing a model that has none fitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine import Carry, LayerSelector, Picked, default_carry_rank, default_rank
from ..families import family_of
from ..families.layer import norm_eps

DEFAULT_KEEP = 1 / 9
"""Of random selectors: 64 of 576 tokens, the paper's main setting."""


@dataclass(frozen=True)
class RandomSelectors:
    """What an artifact offers to `attach`; the same for the same model."""

    layers: list[LayerSelector]
    default_keep: float = DEFAULT_KEEP
    schedules: tuple[tuple[float, ...], ...] = ()
    carries: Sequence[Carry] = ()
    picked: Sequence[Picked] = ()
    visual_tokens: int = 0


def random_selectors(model: Any) -> RandomSelectors:
    """Selectors of `default_rank`, and updates to carry, on the model's device."""
    family = family_of(model)
    config: Any = family.text_model(model).config
    rank = default_rank(config.hidden_size)
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        # Of order one from numbers of order one, as fitted ones are.
        random = torch.randn(rows, columns, generator=generator, device="cpu") * columns**-0.5
        return random.to(model.device, model.dtype)

    def selector(layer: Any) -> LayerSelector:
        projections = family.query_key(layer)
        return LayerSelector(
            down=matrix(rank, config.hidden_size),
            up=matrix(projections.w_k.shape[0], rank),
            key_bias=projections.b_k,
            eps=projections.norm_eps,
            key_norm=projections.k_norm,
        )

    width, low = config.hidden_size, default_carry_rank(config.hidden_size)
    layers: Any = family.layers(model)
    eps = [norm_eps(layer.input_layernorm) for layer in layers]
    # Small: random updates are not to blow the states up.
    carries = [Carry(matrix(low, width), matrix(width, low) * 0.01, e) for e in eps]
    return RandomSelectors([selector(layer) for layer in layers], carries=carries)
