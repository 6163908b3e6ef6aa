"""Conditions on a figure: `NAME OP NUMBER`, such as `prefill_speedup>=2`. What names there are,
the benchmark and the table of accuracy say. No torch here: gates are read before anything heavy is
loaded."""

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .errors import AlvtsError

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Values:
    """What a figure can be.

    Attributes:
        least, most: ends of its range, both of them possible.
        percent: whether it is in percent: a limit up to 1 is meant as a share.
    """

    least: float = -math.inf
    most: float = math.inf
    percent: bool = False

    def __str__(self) -> str:
        least = "above 0" if self.least == POSITIVE.least else f"at least {self.least:g}"
        if math.isinf(self.most):
            return least
        return f"{least} and at most {self.most:g}"


POSITIVE = Values(least=math.ulp(0.0))
AT_LEAST_0 = Values(least=0)
ANY = Values()

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

    def check_limit(self, values: Values) -> None:
        """Refuse what says nothing about the figure, whatever it turns out to be.

        Args:
            values: what it can be.

        Raises:
            AlvtsError: a share where percent are wanted, or a limit that all values meet, or none.
        """
        if values.percent and 0 < self.limit <= 1:
            instead = replace(self, limit=100 * self.limit)
            raise AlvtsError(f"the gate {str(self)!r} is on a figure in percent: write {instead}")
        # All signs but == hold up to some value or from one on: at both ends, then everywhere.
        ends = (values.least, values.most)
        holds = [_COMPARE[self.sign](end, self.limit) for end in ends]
        inside = self.sign == "==" and values.least < self.limit < values.most
        if all(holds) or not (any(holds) or inside):
            never = "fail" if all(holds) else "hold"
            raise AlvtsError(
                f"the gate {str(self)!r} can never {never}: the figure is {values} in any case"
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
