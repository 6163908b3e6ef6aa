"""Conditions on a figure: `NAME OP NUMBER`, such as `prefill_speedup>=2`. What names there are,
the benchmark and the table of accuracy say. No torch here: gates are read before anything heavy is
loaded."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .errors import AlvtsError

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_GATE = re.compile(r"\s*([^\s<>=]+)\s*(>=|<=|==|>|<)\s*(\S+)\s*")


@dataclass(frozen=True)
class Gate:
    """A condition on one metric."""

    metric: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.metric}{self.sign}{self.limit:.12g}"

    def check(self, figures: Mapping[str, float]) -> tuple[bool, str]:
        """Whether it holds, and a line that says so."""
        value = figures[self.metric]
        if _COMPARE[self.sign](value, self.limit):
            return True, f"gate passed: {self}, measured {value:.12g}"
        return False, (
            f"gate failed: {self}, measured {value:.12g}, off by {abs(value - self.limit):.6g}"
        )


def read_gate(text: str, name: str, example: str) -> Gate:
    """Read `NAME OP NUMBER`.

    Args:
        text: the gate.
        name: a regular expression that the whole name matches.
        example: what to write instead, for the message.

    Raises:
        AlvtsError: another form.
    """
    match = _GATE.fullmatch(text)
    if match is None or not re.fullmatch(name, match[1]):
        raise AlvtsError(f"{text!r} is not a gate; write {example}")
    try:
        limit = float(match[3])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise AlvtsError(f"{match[3]!r} in the gate {text!r} is not a number")
    return Gate(match[1], match[2], limit)
