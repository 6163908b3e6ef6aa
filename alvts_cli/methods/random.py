"""Baselines that look at nothing."""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Plan
from .base import Budgeted, Method


class Random(Method):
    """Every layer keeps the budget's number of visual tokens, drawn anew in each layer.

    A draw depends on the seed, the sample's name and the layer, and on nothing else: not on the
    batch, nor on what ran before.
    """

    name = "random"

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """Uniform random numbers."""
        draw = self.drawn(layer_index)
        draws = [
            torch.rand(count, generator=_generator(f"{self.seed} {sample} {draw}"), device="cpu")
            for sample, count in zip(self.samples, plan.visual_counts, strict=True)
        ]
        scores = torch.full(plan.visual.shape, -torch.inf, device=hidden.device)
        scores[plan.visual] = torch.cat(draws).to(hidden.device)
        return scores

    def drawn(self, layer_index: int) -> int:
        """Which draw a layer uses."""
        return layer_index


class RandomStatic(Random):
    """The same, drawn once: all layers keep the same tokens."""

    name = "random-static"

    def drawn(self, layer_index: int) -> int:
        """The only one."""
        return 0


class RandomPolicy(Budgeted, Random):
    """Drawn anew in each layer, under the policy of `alvts`: what that is worth without the
    importance of a token. Where the policy compares tokens, they still differ from each other."""

    name = "random-policy"


def _generator(text: str) -> torch.Generator:
    digest = hashlib.sha256(text.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
