"""The ceiling: what a perfect selector would do."""

from typing import Any

import torch
from torch import Tensor, nn

from ..engine import Plan
from ..engine.calls import POSITIONS
from ..engine.probe import attention_importance, project
from .base import Budgeted


class Oracle(Budgeted):
    """`alvts` with the importance of the layer's real attention in place of a selector's.

    The budget is spent under the same policy, so that the two differ in nothing else.
    The importance is computed on the hidden states the layer really sees, with what earlier layers
    skipped left as they left it. The gap from `alvts` to `oracle` is the selectors' fault, the gap
    from `oracle` to `dense` is the score's, or the budget's. It costs more than it saves.
    """

    name = "oracle"

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """`S*` of the layer."""
        projected = project(layer, hidden, layer_kwargs[POSITIONS])
        found = attention_importance(projected, plan.visual, plan.text)
        return found.masked_fill(~plan.visual, -torch.inf)
