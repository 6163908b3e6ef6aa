"""Selectors with random numbers, for timing a model that has none fitted."""

from dataclasses import dataclass
from typing import Any

import torch

from ..engine import LayerSelector, default_rank
from ..families import family_of

DEFAULT_KEEP = 1 / 9
"""Of random selectors: 64 of 576 tokens, the paper's main setting."""


@dataclass(frozen=True)
class RandomSelectors:
    """What an artifact offers to `attach`; the same for the same model."""

    layers: list[LayerSelector]
    causal: bool = True
    default_keep: float = DEFAULT_KEEP
    schedules: tuple[tuple[float, ...], ...] = ()


def random_selectors(model: Any) -> RandomSelectors:
    """Selectors of `default_rank`, on the model's device."""
    text_model: Any = family_of(model).text_model(model)
    width = text_model.config.hidden_size
    rank = default_rank(width)
    generator = torch.Generator().manual_seed(0)

    def matrix() -> torch.Tensor:
        # Logits of order one, as fitted selectors have.
        random = torch.randn(rank, width, generator=generator) * (width**-0.5 * rank**-0.25)
        return random.to(model.device, model.dtype)

    return RandomSelectors(
        [
            LayerSelector(matrix(), matrix(), None, layer.input_layernorm.variance_epsilon)
            for layer in text_model.layers
        ]
    )
