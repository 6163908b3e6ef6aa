"""How many visual tokens each layer keeps.

One rule everywhere: an **int is a number of tokens**, a **float up to 1.0 is a ratio**. So `1` is
one token and `1.0` is all of them, and the same holds on the command line for "1" and "1.0". A
float above 1 must be whole (`64.0`) and is a number of tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from numbers import Integral, Real
from typing import Any, TypeAlias

from ..errors import AlvtsError

KeepArgument: TypeAlias = float | int | str | Sequence[float | int] | None

Schedules: TypeAlias = Sequence[Sequence[float]]
"""Ways of spending a budget over the layers: each is one ratio in [0, 1] per layer, sorted by their
means, no two of which are equal."""

# 0.07 * 100 is 7.000000000000001 but 0.29 * 100 is 28.999999999999996: without this, a ratio that
# is exact on paper would lose a token.
_EPSILON = 1e-6

_MOST = 2**31
"""Tokens: more than any prompt has."""


@dataclass(frozen=True)
class Keep:
    """One value per layer: an int is a number of tokens, a float a ratio in [0, 1]."""

    values: tuple[int | float, ...]

    def count(self, layer: int, visual_tokens: int) -> int:
        """`k` of a layer for a sample with `visual_tokens` visual tokens.

        `floor(ratio * N)`, at least one token when the ratio is not zero; never more than `N`.
        """
        value = self.values[layer]
        if isinstance(value, int):
            return min(value, visual_tokens)
        if value == 0 or visual_tokens == 0:
            return 0
        return min(visual_tokens, max(1, math.floor(value * visual_tokens + _EPSILON)))

    def chooses(self, layer: int) -> bool:
        """Whether the layer may have to rank tokens: neither text alone nor everything."""
        value = self.values[layer]
        return value > 0 if isinstance(value, int) else 0 < value < 1


@dataclass(frozen=True)
class Solved(Keep):
    """Counts that depend on how many visual tokens a sample has, layer by layer.

    `values` only says how many layers there are, and what was asked for.

    Attributes:
        solve: visual tokens of a sample, at least 1 -> tokens kept, one number per layer.
    """

    solve: Callable[[int], Sequence[int]]

    def count(self, layer: int, visual_tokens: int) -> int:
        """`k` of a layer for a sample with `visual_tokens` visual tokens."""
        return self.solve(visual_tokens)[layer] if visual_tokens else 0

    def chooses(self, layer: int) -> bool:
        """Depends on the sample, so it may."""
        return True


def resolve_keep(
    keep: KeepArgument, num_layers: int, schedules: Schedules = (), default: float | None = None
) -> Keep:
    """Turn what a user may write into what each layer keeps.

    Args:
        keep: a ratio in (0, 1] or a token count, both meant as layer average: spent as
            `schedules` say, or the same in every layer (all tokens when the prompt has fewer);
            one value per layer (0 is text alone, 1.0 is dense); a string with any of these
            ("0.11", "64", "0.5,0.1,..."); or None for `default`.
        num_layers: number of decoder layers.
        schedules: found by calibration, see `spend`.
        default: taken for None.

    Raises:
        AlvtsError: not a number, a bool, nan, infinite, negative, zero for all layers, a
            fractional count, or a list of the wrong length.
    """
    if keep is None:
        keep = default
    if keep is None:
        raise AlvtsError("no keep was given; pass a ratio such as 0.11 or a count such as 64")
    if isinstance(keep, str):
        keep = _parse(keep)
    if isinstance(keep, Sequence):
        each = Keep(tuple(_value(v) for v in keep))
        check_length(each, num_layers)
        return each
    value = _value(keep)
    if value == 0:
        raise AlvtsError("keep must be above 0; for layers on text alone give one value per layer")
    uniform = Keep((value,) * num_layers)
    if not schedules:
        return uniform
    average = partial(uniform.count, 0)
    return Solved(uniform.values, cache(lambda tokens: spend(schedules, average(tokens), tokens)))


def check_length(keep: Keep, num_layers: int) -> None:
    """Refuse values for another number of layers.

    Raises:
        AlvtsError: there are more or fewer.
    """
    if len(keep.values) != num_layers:
        raise AlvtsError(
            f"keep has {len(keep.values)} values but the model has {num_layers} layers; "
            "give one number, or one per layer"
        )


def spend(schedules: Schedules, average: int, visual_tokens: int) -> tuple[int, ...]:
    """Tokens kept per layer, `average * L` in all, shared out as the schedules do.

    Between two schedules every layer goes from its ratio in one to that in the other, in step with
    the mean; below the first one from nothing, above the last one to everything. Rounded down, and
    what is left over goes to the largest remainders, earlier layers first.

    Args:
        schedules: at least one.
        average: tokens per layer, at most `visual_tokens`.
        visual_tokens: of the sample, at least 1.
    """
    layers = len(schedules[0])
    wanted = average / visual_tokens
    points = [[0.0] * layers, *schedules, [1.0] * layers]
    means = [sum(ratios) / layers for ratios in points]
    upper = next(i for i in range(1, len(points)) if means[i] >= wanted or i == len(points) - 1)
    low, high = means[upper - 1], means[upper]
    step = (wanted - low) / (high - low) if high > low else 1.0
    exact = [
        (a + step * (b - a)) * visual_tokens
        for a, b in zip(points[upper - 1], points[upper], strict=True)
    ]
    counts = [math.floor(value + _EPSILON) for value in exact]
    for i in sorted(range(layers), key=lambda i: counts[i] - exact[i]):
        if sum(counts) >= average * layers:
            break
        counts[i] = min(visual_tokens, counts[i] + 1)
    return tuple(counts)


def _value(value: Any) -> int | float:
    """One checked number: an int (tokens) or a float in [0, 1] (ratio)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise AlvtsError(f"keep must be a number, not {value!r}")
    # Before it is made a float: whole numbers may be too large for one.
    if isinstance(value, Integral) and int(value) > _MOST:
        raise AlvtsError(f"keep must be a ratio up to 1.0 or at most {_MOST} tokens")
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise AlvtsError(f"keep must be a finite number of at least 0, not {number}")
    if isinstance(value, Integral):
        return int(value)
    if number <= 1:
        return number
    if not number.is_integer() or number > _MOST:
        raise AlvtsError(
            f"keep={value!r} is neither a ratio up to 1.0 nor a whole number of tokens"
        )
    return int(number)


def _parse(text: str) -> int | float | list[int | float]:
    """A number, or a list of them separated by commas."""
    numbers = [_number(part, text) for part in text.split(",")]
    return numbers if "," in text else numbers[0]


def _number(part: str, text: str) -> int | float:
    try:
        return int(part)
    except ValueError:
        pass
    try:
        return float(part)
    except ValueError:
        raise AlvtsError(
            f"keep={text!r} is not a number or a list of numbers such as 0.5,0.1,0.1"
        ) from None
