"""Conditions on the figures of a table: `METHOD@BUDGET.FIGURE OP NUMBER`.

Such as `alvts@64.retention>=97`, with the budget as `--keep` takes it. No torch here: gates are
read before anything heavy is loaded.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal

from ..engine.keep import resolve_keep
from ..errors import AlvtsError
from ..gates import Gate, read_gate
from ..methods import check_method

FORMAT = 1
"""Of the JSON object with these figures; raised when a name in it changes its meaning."""

FIGURES = {
    "accuracy": "percent of answers that are right",
    "retention": "accuracy in percent of dense accuracy",
    "retention_low": "lower end of its 95 % interval",
    "retention_high": "upper end",
    "difference": "accuracy minus dense accuracy, in points",
    "difference_low": "lower end of its 95 % interval",
    "difference_high": "upper end",
    "over_alvts": "accuracy minus that of alvts at the same budget, in points",
    "over_alvts_low": "lower end of its 95 % interval",
    "over_alvts_high": "upper end",
    "agreement": "percent of answers that are the dense model's",
    "kl": "of the first token's distribution to the dense one, in nats",
    "tokens": "visual tokens, mean over layers and samples",
    "tokens_after": "visual tokens in the last layer, mean over samples",
    "flops": "of the prefill, in percent of dense",
    "kv": "KV cache after prefill, in percent of dense",
    "prefill_speedup": "dense prefill over this one, with --time",
    "prefill_speedup_low": "lower end of its 95 % interval",
    "prefill_speedup_high": "upper end",
}

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
        AlvtsError: another form, or a name that the table will not have.
    """
    example = "METHOD@BUDGET.FIGURE>=NUMBER with >=, <=, ==, > or <, such as alvts@64.retention>=97"
    gate = read_gate(text, _NAME, example)
    method, written, figure = re.findall(_NAME, gate.metric)[0]
    budget, _ = read_budget(written)
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
    return replace(gate, metric=f"{method}@{budget}.{figure}")
