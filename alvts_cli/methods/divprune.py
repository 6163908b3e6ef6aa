"""DivPrune (arXiv 2503.02175): the tokens that are least alike, whatever they say."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..engine import Pieces, Plan, Policy
from .base import Method


class DivPrune(Method):
    """Keeps, in all layers, the visual tokens whose nearest neighbours are farthest away.

    Chosen once, from what reaches the first layer, by the max-min distance problem's greedy answer:
    first the token whose nearest other is farthest from it, then again and again the one farthest
    from all that were chosen; distance is `1 - cos`. Original positions stay. Several images of a
    sample share one choice. CDPruner's relevance to the question is asked of CLIP's text tower,
    which the models' checkpoints do not hold: it is not here.
    """

    name = "divprune"

    def pieces(self, model: Any, budget: int | float) -> Pieces | None:
        """One choice for all layers."""
        return Pieces(Policy(every=0))

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """The earlier a token is chosen, the larger."""
        most = max(plan.keep_counts[layer_index])
        directions = functional.normalize(hidden.float(), dim=-1)
        far = 1 - directions @ directions.transpose(1, 2)
        # What is not visual is nobody's neighbour, and nor is a token its own.
        itself = torch.eye(plan.tokens, dtype=torch.bool, device=hidden.device)
        far = far.masked_fill(itself | ~plan.visual[:, None, :], torch.inf)
        nearest = far.amin(dim=-1).masked_fill(~plan.visual, -torch.inf)
        scores = torch.zeros_like(nearest)
        for place in range(most):
            if place:
                nearest = nearest.masked_fill(scores > 0, -torch.inf)
            chosen = nearest.argmax(dim=-1, keepdim=True)
            # A shorter sample may have none left: its scores are not looked at any more.
            scores = scores.scatter(1, chosen, float(most - place))
            to_chosen = far.gather(1, chosen[..., None].expand(-1, -1, plan.tokens))[:, 0]
            nearest = to_chosen if place == 0 else nearest.minimum(to_chosen)
            nearest = nearest.masked_fill(~plan.visual, -torch.inf)
        return scores.masked_fill(~plan.visual, -torch.inf)
