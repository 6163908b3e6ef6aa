"""95 % intervals, by drawing the samples again with replacement."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95 % interval; all nan where the figure is not defined."""

    value: float
    low: float
    high: float


class Bootstrap:
    """The same resamples for every figure of a data set, which pairs what is compared."""

    def __init__(self, samples: int, seed: int) -> None:
        """
        Args:
            samples: of the data set, at least 1.
            seed: same seed, same intervals.
        """
        random = np.random.default_rng(seed)
        # [R, n]: how often a resample holds each sample.
        self._weights = random.multinomial(samples, np.full(samples, 1 / samples), size=RESAMPLES)

    def mean(self, values: np.ndarray) -> Interval:
        """The mean of `values` `[n]`. For a paired difference, give the differences."""
        return self._interval(values.mean(), self._weights @ values / len(values))

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Interval:
        """`sum(above) / sum(below)`, both `[n]`, of the same samples."""
        if below.sum() == 0:
            return Interval(float("nan"), float("nan"), float("nan"))
        tops, bottoms = self._weights @ above, self._weights @ below
        defined = bottoms > 0
        return self._interval(above.sum() / below.sum(), tops[defined] / bottoms[defined])

    def _interval(self, value: float, resampled: np.ndarray) -> Interval:
        low, high = np.percentile(resampled, (2.5, 97.5))
        return Interval(float(value), float(low), float(high))
