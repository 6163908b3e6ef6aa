"""Conditions on the figures of a table: `METHOD@BUDGET.FIGURE OP NUMBER`.

Such as `alvts@64.retention>=97`, with the budget as `--keep` takes it. No torch here: gates are
read before anything heavy is loaded.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from ..engine.keep import resolve_keep
from ..errors import AlvtsError
from ..gates import AT_LEAST_0, POSITIVE, Gate, Values, read_gate
from ..methods import check_method

FORMAT = 1
"""Of the JSON object with these figures; raised when a name in it changes its meaning."""


@dataclass(frozen=True)
class Figure:
    """A column of the table.

    Attributes:
        about: what it is, in a few words.
        values: what it can be.
        of_dense: whether it compares answers with those of the dense model: it says nothing where
            everything is kept, nor of a model that does not see its pictures.
    """

    about: str
    values: Values
    of_dense: bool = False


_SHARE = Values(0, 100, percent=True)
_PERCENT = Values(0, percent=True)
_POINTS = Values(-100, 100)

FIGURES = {
    "accuracy": Figure("percent of answers that are right", _SHARE),
    "retention": Figure("accuracy in percent of dense accuracy", _PERCENT, of_dense=True),
    "retention_low": Figure("lower end of its 95 % interval", _PERCENT, of_dense=True),
    "retention_high": Figure("upper end", _PERCENT, of_dense=True),
    "difference": Figure("accuracy minus dense accuracy, in points", _POINTS, of_dense=True),
    "difference_low": Figure("lower end of its 95 % interval", _POINTS, of_dense=True),
    "difference_high": Figure("upper end", _POINTS, of_dense=True),
    "over_alvts": Figure(
        "accuracy minus that of alvts at the same budget, in points", _POINTS, of_dense=True
    ),
    "over_alvts_low": Figure("lower end of its 95 % interval", _POINTS, of_dense=True),
    "over_alvts_high": Figure("upper end", _POINTS, of_dense=True),
    "agreement": Figure("percent of answers that are the dense model's", _SHARE, of_dense=True),
    "kl": Figure(
        "of the first token's distribution to the dense one, in nats", AT_LEAST_0, of_dense=True
    ),
    "tokens": Figure("visual tokens, mean over layers and samples", AT_LEAST_0),
    "tokens_after": Figure("visual tokens in the last layer, mean over samples", AT_LEAST_0),
    "flops": Figure("of the prefill, in percent of dense", _PERCENT),
    "kv": Figure("KV cache after prefill, in percent of dense", _SHARE),
    "prefill_speedup": Figure("dense prefill over this one, with --time", POSITIVE),
    "prefill_speedup_low": Figure("lower end of its 95 % interval", POSITIVE),
    "prefill_speedup_high": Figure("upper end", POSITIVE),
}

ALL_KEPT = "everything is kept there, which is what dense does"
"""Why a figure that compares with dense says nothing."""

_NAME = r"([\w-]+)@([\d.]+(?:[eE][+-]?\d+)?)\.([a-z]\w*)"


def read_budget(text: str) -> tuple[str, int | float]:
    """A budget, and the one way it is written in tables and gates: `1e-1` and `0.10` are `0.1`,
    `64.0` is `64`.

    Args:
        text: as the user wrote it.

    Raises:
        AlvtsError: as `resolve_keep` has it.
    """
    (value,) = resolve_keep(text.strip(), 1).values
    return format(Decimal(str(value)), "f"), value


def parse_gate(text: str, methods: Sequence[str], budgets: Sequence[str], timed: bool) -> Gate:
    """Read a gate on a table of these methods and budgets; its metric is `METHOD@BUDGET.FIGURE`.

    Args:
        text: as the user wrote it.
        methods, budgets: of the table, budgets as `read_budget` writes them.
        timed: whether prefills are timed.

    Raises:
        AlvtsError: another form, a name that the table will not have, or a gate that says nothing,
            whatever comes out.
    """
    example = "METHOD@BUDGET.FIGURE>=NUMBER with >=, <=, ==, > or <, such as alvts@64.retention>=97"
    gate = read_gate(text, _NAME, example)
    method, written, figure = re.findall(_NAME, gate.metric)[0]
    budget, value = read_budget(written)
    check_method(method)
    if method not in methods:
        raise AlvtsError(f"the gate {text!r} is about {method}, which --methods leaves out")
    if method == "dense":
        raise AlvtsError("dense has no budget to be gated at; gate another method against it")
    if budget not in budgets:
        raise AlvtsError(f"the gate {text!r} is about keeping {written}, which --keep leaves out")
    if figure not in FIGURES:
        raise AlvtsError(f"unknown figure {figure!r}; known: {', '.join(FIGURES)}")
    if figure.startswith("prefill_speedup") and not timed:
        raise AlvtsError(f"the gate {text!r} needs --time")
    if figure.startswith("over_alvts") and "alvts" not in methods:
        raise AlvtsError(f"the gate {text!r} needs alvts, which --methods leaves out")
    if figure.startswith("over_alvts") and method == "alvts":
        raise AlvtsError(f"the gate {text!r} is about alvts over itself, which is always 0")
    if FIGURES[figure].of_dense and value == 1.0 and isinstance(value, float):
        raise AlvtsError(f"the gate {text!r} says nothing: {ALL_KEPT}")
    gate = replace(gate, metric=f"{method}@{budget}.{figure}")
    gate.check_limit(FIGURES[figure].values)
    return gate
