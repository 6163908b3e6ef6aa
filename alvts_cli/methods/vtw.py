"""VTW: visual tokens withdrawn."""

from .base import Method


class Vtw(Method):
    """All visual tokens up to layer `K`, none from there on, in prefill; positions stay.

    Departure: the original finds `K` on about 20 samples (the first layer from 5 on for which the
    KL of the last token's distribution against the full model is at most 0.003). To be compared at
    equal cost, `K` here is the one whose layer average `N K / L` is nearest to the budget; it can
    hit a budget only to within `N / 2L`.
    """

    name = "vtw"

    def schedule(self, visual_tokens: int, layers: int, budget: int) -> tuple[int, ...]:
        """At least one layer sees the image."""
        first = min(layers, max(1, round(budget * layers / visual_tokens)))
        return (visual_tokens,) * first + (0,) * (layers - first)
