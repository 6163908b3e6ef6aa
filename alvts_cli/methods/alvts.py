"""This project's method, and what it would be without its budget."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..engine import Attachment, Selectors, attach
from ..errors import AlvtsError
from .base import Method


class Alvts(Method):
    """Every layer ranks all visual tokens with its fitted selector and keeps the budget's number.

    What one layer skips the next may take. The budget is spent over the layers as calibration found
    it to pay.
    """

    name = "alvts"

    def __init__(self, selectors: Selectors | None = None, seed: int = 0) -> None:
        """
        Raises:
            AlvtsError: there are no selectors.
        """
        super().__init__(selectors, seed)
        if selectors is None:
            raise AlvtsError("the method alvts needs selectors")
        self.fitted = selectors
        self.rank = max(layer.down.shape[0] for layer in selectors.layers if layer is not None)

    @contextmanager
    def attached(
        self, model: Any, budget: int | float, samples: Sequence[str]
    ) -> Iterator[Attachment]:
        """As every user attaches it."""
        with attach(model, self.fitted, budget) as attachment:
            yield attachment


class AlvtsUniform(Alvts):
    """The same selectors, the same number of tokens in every layer, as in the paper."""

    name = "alvts-uniform"

    @contextmanager
    def attached(
        self, model: Any, budget: int | float, samples: Sequence[str]
    ) -> Iterator[Attachment]:
        """With one number per layer, which no schedule changes."""
        with attach(model, self.fitted, [budget] * len(self.fitted.layers)) as attachment:
            yield attachment
