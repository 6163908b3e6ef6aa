"""The figures as tables to read and as an object to keep."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from ..bench.report import megabytes
from ..gates import Gate
from .data import DataSet
from .figures import Head, Row, Summary
from .gates import ALL_KEPT, FIGURES
from .run import Outcomes
from .scoring import SCORINGS

_GROUPS = 4
"""Groups of layers that fit in a cell: PyramidDrop's."""


def to_table(summary: Summary) -> RenderableType:
    """Method by budget, under what the figures stand against."""
    table = _table("method", summary)
    timed = any(not math.isnan(row.figures["prefill_speedup"]) for row in summary.rows)
    columns = (
        *("tokens", "by layer", "accuracy", "retention (95 %)", "over alvts (95 %)"),
        *("agree", "KL", "FLOPs", "KV"),
        *(("prefill (95 %)",) if timed else ()),
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    budget = None
    for row in summary.rows:
        if budget not in (None, row.run.budget):
            table.add_section()
        budget = row.run.budget
        f = row.figures
        table.add_row(
            row.run.method,
            budget,
            f"{f['tokens']:.1f}",
            by_layer(row.kept),
            f"{f['accuracy']:.1f}",
            _interval(f, "retention", ""),
            "" if row.run.method == "alvts" else _interval(f, "over_alvts", "+"),
            f"{f['agreement']:.1f}",
            f"{f['kl']:.3f}",
            f"{f['flops']:.1f}",
            f"{f['kv']:.1f}",
            *((_speed(f),) if timed else ()),
        )
    head = summary.head
    skipped = f"{summary.skipped} skipped, " if summary.skipped else ""
    title = (
        f"{summary.name}: {head.samples} questions, {skipped}{summary.scoring} scoring, "
        f"{summary.visual_tokens:.4g} visual tokens\n"
        f"dense {head.dense:.1f} %, blind (grey picture) {head.blind:.1f} %, "
        f"chance (commonest answer of the kind) {head.chance:.1f} %; "
        f"KV cache of a dense prompt {megabytes(summary.kv_bytes)}"
    )
    note = (
        "tokens: visual tokens, mean over layers; by layer: tokens x layers (first question). "
        "accuracy, agreement with the dense answer,\nFLOPs and KV cache after prefill in percent, "
        "the last two of dense; retention: accuracy in percent of dense; over alvts: in points;\n"
        "KL: of the first token's distribution to dense, in nats. The scores of the peers are not "
        "counted as FLOPs, the selectors of alvts are; prefill: times as fast as dense, all told."
    )
    return Group(title, table, note)


def by_kind(summary: Summary) -> RenderableType:
    """Accuracy per kind of question."""
    table = _table("accuracy, %", summary)
    for kind in (*summary.kinds, "all"):
        table.add_column(kind, justify="right", no_wrap=True)
    heads = (*summary.kinds.values(), summary.head)

    def add(name: str, keep: str, cells: Sequence[str]) -> None:
        table.add_row(name, keep, *cells)

    add("questions", "", [str(head.samples) for head in heads])
    for name in ("dense", "blind", "chance"):
        add(name, "", [f"{getattr(head, name):.1f}" for head in heads])
    budget = None
    for row in summary.rows:
        if row.run.budget != budget:
            table.add_section()
        budget = row.run.budget
        values = (*row.kinds.values(), row.figures["accuracy"])
        add(row.run.method, budget, [f"{value:.1f}" for value in values])
    return table


def _table(name: str, summary: Summary) -> Table:
    """A table that begins with whose row it is: that is cut short on no terminal, however narrow.

    Args:
        name: of the first column, which holds the methods.
        summary: whose rows there will be.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column, values in (
        (name, [row.run.method for row in summary.rows]),
        ("keep", [row.run.budget for row in summary.rows]),
    ):
        longest = max(map(len, (column, *values)))
        table.add_column(column, no_wrap=True, min_width=longest)
    return table


def by_layer(kept: tuple[tuple[int, int], ...]) -> str:
    """`((256, 1), (13, 15))` as `256x1 13x15`; of many different numbers the least and the most."""
    if len(kept) > _GROUPS:
        counts = [count for count, _ in kept]
        return f"{min(counts)} to {max(counts)}"
    return " ".join(f"{count}x{layers}" for count, layers in kept)


def to_json(
    summary: Summary, data: DataSet, results: Sequence[Outcomes], kinds: bool
) -> dict[str, Any]:
    """The same as plain values, and every sample's answers.

    Args:
        kinds: also per kind of question.
    """

    def head(figures: Head) -> dict[str, Any]:
        return asdict(figures)

    def row(one: Row) -> dict[str, Any]:
        more = {"kinds": one.kinds} if kinds else {}
        figures = {name: _defined(one.figures[name]) for name in FIGURES}
        return {
            "method": one.run.method,
            "keep": one.run.budget,
            "by_layer": one.kept,
            **figures,
            **more,
        }

    score = SCORINGS[data.scoring]
    samples = [
        {
            "id": item.id,
            "kind": item.kind,
            **({"earlier": item.earlier} if item.earlier else {}),
            "question": item.question,
            "right": item.answers,
            "said": {
                label: {
                    "answer": outcome.answer,
                    "right": score(outcome.answer, item.answers),
                    "kl": outcome.kl,
                }
                for label, outcome in outcomes.items()
            },
        }
        for item, outcomes in zip(data.items, results, strict=True)
    ]
    by = {"kinds": {kind: head(one) for kind, one in summary.kinds.items()}} if kinds else {}
    return {
        "name": summary.name,
        "scoring": summary.scoring,
        "skipped": summary.skipped,
        "visual_tokens": summary.visual_tokens,
        "kv_bytes_dense": summary.kv_bytes,
        "head": head(summary.head),
        **by,
        "rows": [row(one) for one in summary.rows],
        "samples": samples,
    }


def figures_by_name(summary: Summary) -> Mapping[str, float]:
    """What gates are checked against: `METHOD@BUDGET.FIGURE`."""
    return {
        f"{row.run.label}.{name}": value
        for row in summary.rows
        for name, value in row.figures.items()
    }


def blind(summary: Summary) -> str:
    """A line on a model that does not see its pictures; empty if it does."""
    if summary.sees:
        return ""
    head = summary.head
    return (
        f"on these {head.samples} questions dense ({head.dense:.1f} %) is not surely better than "
        f"blind ({head.blind:.1f} %): what compares with dense says nothing"
    )


def check_gate(gate: Gate, summary: Summary) -> tuple[bool, str]:
    """Whether it holds, and a line that says so; as `Gate.check`, but what compares with dense
    holds only where that says something."""
    label, _, figure = gate.metric.rpartition(".")
    (row,) = (row for row in summary.rows if row.run.label == label)
    nothing = ALL_KEPT if row.all_kept else blind(summary)
    if FIGURES[figure].of_dense and nothing:
        return False, f"gate failed: {gate}, {nothing}"
    return gate.check(figures_by_name(summary))


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _speed(figures: Mapping[str, float]) -> str:
    value, low, high = (figures[f"prefill_speedup{end}"] for end in ("", "_low", "_high"))
    return f"{value:.2f}x ({low:.2f} to {high:.2f})"


def _interval(figures: Mapping[str, float], name: str, sign: str) -> str:
    value = figures[name]
    if math.isnan(value):
        return "-"
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    return f"{value:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"
