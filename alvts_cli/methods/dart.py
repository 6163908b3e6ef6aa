"""DART: keep what is least like a few pivots."""

import torch
from torch import Tensor

from ..engine import Plan
from ..engine.probe import Projected
from ..families.placing import where
from .base import PruneOnce, full_layers, nearest, pruned_once

PIVOTS = 4
"""Of each kind, visual and text."""


class Dart(PruneOnce):
    """Prune at the input of layer `K`, by duplication instead of attention.

    Pivots are the 4 visual tokens, and the 4 text tokens behind the image, whose post-rotary keys
    in layer `K - 1` have the largest L1 norm over all heads. In order of their positions, each
    pivot takes the visual tokens still available whose states (output of layer `K - 1` through the
    model's final norm) have the least cosine similarity to its own. Kept are the 4 visual pivots
    and the same number of tokens for each of the 8 pivots, in order, at their original positions.

    Departures: the number per pivot is solved from the layer average; a prompt with fewer than 4
    text tokens behind its image shares its tokens out among the pivots there are. `K` is 2, as
    published; it is 1 where the model has so few layers that two full ones and one token for each
    pivot are beyond the budget.
    """

    name = "dart"

    def schedule(self, visual_tokens: int, layers: int, budget: int) -> tuple[int, ...]:
        """The number per pivot that comes nearest; with none, the visual pivots stay alone."""
        first = full_layers(visual_tokens, layers, budget, least=3 * PIVOTS)
        per_pivot = range(visual_tokens // (2 * PIVOTS) + 2)
        kept = [min(visual_tokens, PIVOTS + 2 * PIVOTS * each) for each in per_pivot]
        return nearest([pruned_once(visual_tokens, layers, first, k) for k in kept], budget)

    def score(
        self, before: Projected, hidden: Tensor, plan: Plan, counts: tuple[int, ...]
    ) -> Tensor:
        """Finite for exactly the tokens to keep."""
        norms = before.key.float().abs().sum(dim=(1, 3)).to(hidden.device)
        norm = self.text_model.norm
        # In a model spread over devices, the final norm is not where the early layers are.
        states = norm(hidden.to(where(norm)[0])).to(hidden.device)
        states = torch.nn.functional.normalize(states.float(), dim=-1)
        scores = torch.full_like(norms, -torch.inf)
        for b, count in enumerate(counts):
            if count:
                taken = _take(norms[b], states[b], plan.visual[b], plan.text[b], count)
                scores[b, taken] = 0.0
        return scores


def _take(norms: Tensor, states: Tensor, visual: Tensor, text: Tensor, count: int) -> Tensor:
    """bool `[T]`: the `count` visual tokens of one sample to keep.

    Args:
        norms: of the keys, `[T]`.
        states: of unit length, `[T, D]`.
        visual, text: bool `[T]`.
        count: at least 1, at most the visual tokens.
    """
    behind = text & (visual.flip(0).cumsum(0).flip(0) == 0)
    taken = _largest(norms, visual, min(PIVOTS, count))
    pivots = (taken | _largest(norms, behind, PIVOTS)).nonzero()[:, 0].tolist()
    rest = count - int(taken.sum())
    for i, pivot in enumerate(pivots):
        share = rest // len(pivots) + (i < rest % len(pivots))
        likeness = (states @ states[pivot]).masked_fill(~visual | taken, torch.inf)
        taken[likeness.argsort(stable=True)[:share]] = True
    return taken


def _largest(values: Tensor, among: Tensor, count: int) -> Tensor:
    """bool `[T]`: the `count` largest `values` where `among`, or as many as there are."""
    order = values.masked_fill(~among, -torch.inf).argsort(descending=True, stable=True)
    found = torch.zeros_like(among)
    found[order[:count]] = True
    return found & among
