"""Medians, quartiles, and how sure a figure made of medians is."""

import math
import random
from collections.abc import Callable, Sequence
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
    """Median over the rounds of `above / below`, and the ends of its 95 % bootstrap interval.

    What makes a round slow for both, its prompt or the machine, is not in its ratio.
    """
    return _estimate(float, [a / b for a, b in zip(above, below, strict=True)])


def efficiency(
    dense: Sequence[float], selective: Sequence[float], short: Sequence[float]
) -> tuple[float, float, float]:
    """`(dense - selective) / (dense - short)` of the medians: the part of what there is to gain
    that is gained; and the ends of its 95 % bootstrap interval.

    All are nan where `short` is not clearly faster than `dense`, so that nothing is to be gained.
    """

    def figure(dense: float, selective: float, short: float) -> float:
        return (dense - selective) / (dense - short) if dense > short else math.nan

    return _estimate(figure, dense, selective, short)


def _estimate(
    figure: Callable[..., float], *columns: Sequence[float]
) -> tuple[float, float, float]:
    """`figure` of the medians of the columns, and the ends of its 95 % bootstrap interval.

    The columns are resampled together: their values of one round were measured one after the
    other, so a slow moment of the machine hit all. The same values give the same interval.
    """
    rounds = list(zip(*columns, strict=True))
    rng = random.Random(0)

    def of_medians(some: Sequence[tuple[float, ...]]) -> float:
        return figure(*(median(column) for column in zip(*some, strict=True)))

    found = sorted(of_medians(rng.choices(rounds, k=len(rounds))) for _ in range(_RESAMPLES))
    if any(map(math.isnan, found)):
        return math.nan, math.nan, math.nan
    low, high = found[int(0.025 * _RESAMPLES)], found[int(0.975 * _RESAMPLES) - 1]
    return of_medians(rounds), low, high
