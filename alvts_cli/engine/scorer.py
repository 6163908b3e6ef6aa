"""The method itself: low-rank selectors rank the tokens of every layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..families.rotary import Rotary
from .calls import POSITIONS
from .normed import Normed, fused
from .paper import PaperSelector, paper_importance, paper_means
from .plan import Plan
from .scoring import LayerSelector, text_mean, text_rows, text_sum


class SelectorScorer:
    """One selector per layer, each on its layer's device and in its dtype.

    What is the same in every layer is made once a forward. On a GPU few operators count, on a CPU
    small blocks.
    """

    fills = True

    def __init__(
        self,
        layers: Sequence[LayerSelector | PaperSelector | None],
        query_norms: Sequence[Tensor | None],
        rotary: Rotary,
    ) -> None:
        """
        Args:
            layers: one selector per layer, None where no tokens are ranked.
            query_norms: what each layer's RMSNorm of a query head multiplies by, `[d]`; None where
                it has none.
            rotary: how all layers turn their heads.
        """
        self.layers = layers
        self._query_norms = query_norms
        self._rotary = rotary

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """`scoring.importance`, or the paper's; where not visual, what ranking wants there."""
        scene = plan.scene(layer_kwargs[POSITIONS], layer_kwargs.get("position_ids"))
        selector, normed = self.layers[layer_index], plan.normed or Normed(hidden)
        if selector is None:
            # A layer on text alone, and a chunk out of an image, without any (see `make_plan`).
            return scene.fill()
        if isinstance(selector, PaperSelector):
            if fused(hidden.device):
                return torch.addcmul(scene.fill(), *paper_means(normed, selector, scene))
            found = paper_importance(
                hidden, selector, plan.visual, plan.text, plan.real is not None
            )
            return torch.where(plan.visual, found, scene.fill())
        latent = normed.times(selector.down, selector.eps).to(hidden.dtype)
        if fused(hidden.device):
            norm = self._query_norms[layer_index]
            found, count = text_sum(layer, normed, latent, selector, scene, norm, self._rotary)
        else:
            rows = text_rows(layer, hidden, scene, self._rotary)
            found, count = text_mean(latent, selector, rows, scene), 1
        if plan.compares:
            # Of order one; text and padding are like no visual token, whatever they have here.
            return found
        return torch.add(scene.fill(), found, alpha=1 / count)
