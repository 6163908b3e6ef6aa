"""95 % intervals, by drawing the samples again with replacement."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000

_SAME = 1e-9
"""Resampled values no further apart are equal: the last bits of a sum depend on its terms."""


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

    def mean(self, values: np.ndarray, least: float = 0, most: float = 1) -> Interval:
        """The mean of `values` `[n]`. For a paired difference, give the differences.

        Args:
            values: of the samples.
            least, most: what a value can be.
        """
        resampled = self._weights @ values / len(values)
        value, unseen = values.mean(), _unseen(len(values))
        low, high = value - unseen * (value - least), value + unseen * (most - value)
        return self._interval(value, resampled, (low, high))

    def ratio(self, above: np.ndarray, below: np.ndarray) -> Interval:
        """`sum(above) / sum(below)`, both `[n]` and from 0 to 1, of the same samples."""
        if below.sum() == 0:
            return Interval(float("nan"), float("nan"), float("nan"))
        tops, bottoms = self._weights @ above, self._weights @ below
        defined = bottoms > 0
        value = above.sum() / below.sum()
        # Only of samples that count below could it be seen that something above is lost.
        low = value * (1 - _unseen(int(np.count_nonzero(below))))
        high = value + _unseen(len(above)) * (len(above) - above.sum()) / below.sum()
        return self._interval(value, tops[defined] / bottoms[defined], (low, high))

    def _interval(
        self, value: float, resampled: np.ndarray, unvaried: tuple[float, float]
    ) -> Interval:
        """Of the resamples, or `unvaried` where these are all the same: that no sample differs from
        the others says more the more there are, and of one alone next to nothing."""
        low, high = np.percentile(resampled, (2.5, 97.5))
        if np.ptp(resampled) < _SAME:
            low, high = unvaried
        return Interval(float(value), float(low), float(high))


def _unseen(samples: int) -> float:
    """How often something may happen, at most, that none of the samples shows: the exact bound of
    the binomial (Clopper and Pearson), of an interval of 95 %."""
    return 1 - 0.025 ** (1 / samples)
