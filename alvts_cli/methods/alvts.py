"""This project's method, and what its selectors would be worth without its policy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..engine import PAPER, Attachment, PaperSelector, Selectors, attach
from ..errors import AlvtsError
from .base import Method


class Alvts(Method):
    """Layers rank all visual tokens with fitted selectors and keep the budget's number, under the
    policy that calibration picked for that budget (see `engine.policy`)."""

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
        self.rank = max(layer.rank for layer in selectors.layers if layer is not None)

    @contextmanager
    def attached(
        self, model: Any, budget: int | float, samples: Sequence[str]
    ) -> Iterator[Attachment]:
        """As every user attaches it."""
        with attach(model, self.fitted, budget) as attachment:
            yield attachment


class AlvtsPaper(Alvts):
    """The paper's own: its form of selectors, fitted as it says, the same number of tokens in each
    layer, and nothing on top."""

    name = "alvts-paper"
    paper = True

    def __init__(self, selectors: Selectors | None = None, seed: int = 0) -> None:
        """
        Raises:
            AlvtsError: there are no selectors of the paper's form.
        """
        super().__init__(selectors, seed)
        if not all(isinstance(layer, PaperSelector) for layer in self.fitted.layers):
            raise AlvtsError(
                "alvts-paper needs selectors of the paper's form; make some with: "
                "alvts calibrate --form paper"
            )


class AlvtsPlain(Alvts):
    """The same selectors, used as in the paper: every layer keeps the same number of the most
    important tokens, and what it skips stays as it was."""

    name = "alvts-plain"

    @contextmanager
    def attached(
        self, model: Any, budget: int | float, samples: Sequence[str]
    ) -> Iterator[Attachment]:
        """Without policy or schedule."""
        keep = [budget] * len(self.fitted.layers)
        with attach(model, self.fitted, keep, policy=PAPER) as attachment:
            yield attachment
