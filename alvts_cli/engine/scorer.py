"""The method itself: low-rank selectors rank the tokens of every layer."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .calls import POSITIONS
from .normed import Normed, fused
from .paper import PaperSelector, paper_importance, paper_means
from .plan import Plan
from .scene import Scene
from .scoring import LayerSelector, place_weights, text_mean, text_rows, text_sum, visual_mean


class SelectorScorer:
    """One selector per layer, each on its layer's device and in its dtype.

    What is the same in every layer is made once a forward. On a GPU few operators count, on a CPU
    small blocks.
    """

    fills = True

    def __init__(
        self,
        layers: Sequence[LayerSelector | PaperSelector | None],
        norms: Sequence[Tensor] | None = None,
    ) -> None:
        """
        Args:
            layers: one selector per layer, None where no tokens are ranked.
            norms: `[D]`, what each layer's input RMSNorm multiplies by, for running it as one
                operator.
        """
        self.layers = layers
        self._norms = norms
        ours = [one if isinstance(one, LayerSelector) else None for one in layers]
        widths = [0 if one is None else len(one.inner) + 1 for one in ours]
        self._parts = [slice(*ends) for ends in pairwise(accumulate(widths, initial=0))]
        weights = [place_weights(one) for one in ours if one is not None]
        # Those of all layers side by side: the places are the same everywhere.
        self._weights = (
            torch.cat([one.to(weights[0].device) for one in weights], dim=1) if weights else None
        )

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """`scoring.importance`, or the paper's; where not visual, what ranking wants there."""
        scene, selector = self._scene(plan, layer_kwargs), self.layers[layer_index]
        normed = plan.normed or Normed(hidden)
        assert selector is not None
        share = 1.0
        if isinstance(selector, LayerSelector):
            latent, seen = normed.latent(selector.down, selector.eps, scene.present())
            from_visual = visual_mean(selector, seen.float(), self._part(layer_index, plan))
            latent = latent.to(hidden.dtype)
            if fused(hidden.device):
                norm = None if self._norms is None else self._norms[layer_index]
                from_text, count = text_sum(layer, hidden, latent, selector, scene, norm)
                share = 1 / count
            else:
                rows = text_rows(layer, hidden, scene)
                from_text = text_mean(latent, selector, rows, scene)
        elif fused(hidden.device):
            from_visual, from_text = paper_means(normed, selector, scene)
        else:
            found = paper_importance(hidden, selector, plan.visual, plan.text, plan.padded)
            from_visual, from_text = found.masked_fill(~plan.visual, 0), torch.ones_like(found)
        if plan.compares:
            # The first factor is 0 where not visual.
            return from_visual * from_text
        return torch.addcmul(scene.fill(), from_visual, from_text, value=share)

    def _scene(self, plan: Plan, layer_kwargs: dict[str, Any]) -> Scene:
        return plan.scene(layer_kwargs[POSITIONS], layer_kwargs.get("position_ids"))

    def _part(self, layer_index: int, plan: Plan) -> Tensor:
        """`[B, T, m + 1]`: the places' part of the layer's network."""
        if plan.parts is None:
            assert self._weights is not None
            plan.parts = plan.places @ self._weights.to(plan.places.device)
        return plan.parts[..., self._parts[layer_index]]
