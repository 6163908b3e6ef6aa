"""PyramidDrop: drop in stages, by what the last token is about to look at."""

from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Plan
from ..engine.calls import POSITIONS
from ..engine.probe import project, row_attention
from .base import Method, full_layers, last_tokens, nearest

LATER = (10 / 32, 20 / 32)
"""Where the second and third stages begin, as a share of the depth."""


class PyramidDrop(Method):
    """Drop tokens in front of three layers; what is dropped does not come back.

    Score: the output of the layer before goes through the *coming* layer's input norm and
    query/key projections with rotary positions; the query is the prompt's last token; softmax in
    float32 over what is left; mean over heads. The best stay, in order.

    Departures: the published stages (before layers 8, 16 and 24 of 32, to a half, a quarter and an
    eighth) average 270 of 576 tokens and cannot go below 144, so for lower budgets **this schedule
    is ours**: stages before layer 2 and at 10/32 and 20/32 of the depth that keep 4 : 2 : 1 (of
    576 tokens in 32 layers, 312/156/78 average 192); before layer 1 where two full layers alone
    are beyond the budget. Budgets that ask for more than all tokens in the first stage widen the
    next. The original re-numbers positions after each drop; here, as in all
    methods, tokens keep theirs.
    """

    name = "pyramiddrop"
    _plan: Plan | None = None
    _counts: tuple[int, ...]
    _scores: Tensor
    _left: Tensor

    def schedule(self, visual_tokens: int, layers: int, budget: int) -> tuple[int, ...]:
        """The nearest to the budget; the last stage keeps at least one token."""
        early = full_layers(visual_tokens, layers, budget, least=1)
        starts = [early, *(max(early, round(share * layers)) for share in LATER)]
        stage = [sum(layer >= start for start in starts) for layer in range(layers)]

        def counts(first: int) -> tuple[int, ...]:
            kept = [visual_tokens, first, first // 2, first // 4]
            return tuple(min(visual_tokens, kept[s]) for s in stage)

        return nearest([counts(first) for first in range(4, 4 * visual_tokens + 1)], budget)

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """New scores where a stage begins, the same ones within it."""
        if self._plan is not plan:
            self._plan, self._counts, self._left = plan, (), plan.visual
        counts = plan.keep_counts[layer_index]
        if counts != self._counts:
            left = self._left.to(hidden.device)
            projected = project(layer, hidden, layer_kwargs[POSITIONS])
            row = row_attention(projected, last_tokens(plan), left | plan.text)
            self._scores = row.masked_fill(~left, -torch.inf)
            rank = self._scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            self._left = rank < plan.keep_tensor[layer_index][:, None]
            self._counts = counts
        return self._scores.to(hidden.device)
