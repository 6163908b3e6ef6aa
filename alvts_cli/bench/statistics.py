"""Medians, quartiles, and how sure a ratio of medians is."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

_RESAMPLES = 2000


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one figure over the runs."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; a single one is its own quartiles."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float, float]:
    """`median(above) / median(below)` and the ends of its 95 % bootstrap interval.

    The two are resampled in pairs: `above[i]` and `below[i]` were measured one after the other, so
    a slow moment of the machine hit both. The same values give the same interval.
    """
    pairs = list(zip(above, below, strict=True))
    rng = random.Random(0)
    ratios = sorted(_ratio_of_medians(rng.choices(pairs, k=len(pairs))) for _ in range(_RESAMPLES))
    low, high = ratios[int(0.025 * _RESAMPLES)], ratios[int(0.975 * _RESAMPLES) - 1]
    return _ratio_of_medians(pairs), low, high


def _ratio_of_medians(pairs: Sequence[tuple[float, float]]) -> float:
    return median(above for above, _ in pairs) / median(below for _, below in pairs)
