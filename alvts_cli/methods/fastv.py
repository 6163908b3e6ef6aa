"""FastV: prune once, early, by what the last token looks at."""

from torch import Tensor

from ..engine import Plan
from ..engine.probe import Projected, row_attention
from .base import PruneOnce, full_layers, last_tokens, pruned_once, real


class FastV(PruneOnce):
    """Prune at the input of layer `K`, in prefill.

    Score: attention probabilities of layer `K - 1`, mean over heads, in the row of the last prompt
    token. The best `k` stay, in order and at their original positions. Layers before `K` keep a
    full cache, layers from `K` on the reduced one; decoding is unchanged.

    Departures: the original runs layer `K - 1` with eager attention and reads one row of the
    weights it returns; here the row is computed from the layer's queries and keys, which gives the
    same numbers under any attention implementation. `k` is solved from the layer average,
    `(K N + (L - K) k) / L`, where the original takes the share to drop. `K` is 2, as published; it
    is 1 where the model has so few layers that two full ones alone are beyond the budget.
    """

    name = "fastv"

    def schedule(self, visual_tokens: int, layers: int, budget: int) -> tuple[int, ...]:
        """At least one token from layer `K` on."""
        first = full_layers(visual_tokens, layers, budget, least=1)
        kept = round((budget * layers - first * visual_tokens) / (layers - first))
        return pruned_once(visual_tokens, layers, first, min(visual_tokens, max(1, kept)))

    def score(
        self, before: Projected, hidden: Tensor, plan: Plan, counts: tuple[int, ...]
    ) -> Tensor:
        """The last token's attention in layer `K - 1`."""
        row = row_attention(before, last_tokens(plan), real(plan)).to(hidden.device)
        return row.masked_fill(~plan.visual, -float("inf"))
