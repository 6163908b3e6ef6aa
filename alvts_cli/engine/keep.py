"""How many visual tokens each layer keeps.

One rule everywhere: an **int is a number of tokens**, a **float up to 1.0 is a ratio**. So `1` is
one token and `1.0` is all of them, and the same holds on the command line for "1" and "1.0". A
float above 1 must be whole (`64.0`) and is a number of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

from ..errors import AlvtsError

KeepArgument: TypeAlias = float | int | str | Sequence[float | int] | None

# 0.07 * 100 is 7.000000000000001 but 0.29 * 100 is 28.999999999999996: without this, a ratio that
# is exact on paper would lose a token.
_EPSILON = 1e-6


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


def resolve_keep(
    keep: KeepArgument, num_layers: int, schedule: Sequence[float] | None = None
) -> Keep:
    """Turn what a user may write into one value per layer.

    Args:
        keep: a ratio in (0, 1], a token count (meant as layer average: every layer keeps that
            many, or all when the prompt has fewer), one value per layer (0 is text alone, 1.0
            is dense), a string with any of these ("0.11", "64", "0.5,0.1,..."), or None.
        num_layers: number of decoder layers.
        schedule: one ratio per layer, used when `keep` is None.

    Raises:
        AlvtsError: not a number, a bool, nan, infinite, negative, zero for all layers, a
            fractional count, or a list of the wrong length.
    """
    if keep is None:
        if schedule is None:
            raise AlvtsError("no keep was given; pass a ratio such as 0.11 or a count such as 64")
        keep = schedule
    if isinstance(keep, str):
        keep = _parse(keep)
    if isinstance(keep, Sequence):
        if len(keep) != num_layers:
            raise AlvtsError(
                f"keep has {len(keep)} values but the model has {num_layers} layers; "
                "give one number, or one per layer"
            )
        return Keep(tuple(_value(v) for v in keep))
    value = _value(keep)
    if value == 0:
        raise AlvtsError("keep must be above 0; for layers on text alone give one value per layer")
    return Keep((value,) * num_layers)


def _value(value: Any) -> int | float:
    """One checked number: an int (tokens) or a float in [0, 1] (ratio)."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise AlvtsError(f"keep must be a number, not {value!r}")
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise AlvtsError(f"keep must be a finite number of at least 0, not {value!r}")
    if isinstance(value, Integral):
        return int(value)
    if number <= 1:
        return number
    if not number.is_integer():
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
