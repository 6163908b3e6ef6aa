"""The model as it is."""

from .base import Method


class Dense(Method):
    """Every layer keeps every token, whatever the budget.

    It runs on the engine all the same, so that all rows of a table have the same cache under them.
    """

    name = "dense"

    def schedule(self, visual_tokens: int, layers: int, budget: int) -> tuple[int, ...]:
        """All tokens."""
        return (visual_tokens,) * layers
