"""Predictions as tables and as plain values."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from .cards import Ceilings
from .predict import Prediction, longest_batch
from .roofline import Phase
from .work import Case

FORMAT = 1
"""Of the JSON object; raised when a name in it changes its meaning."""

BIASED = (
    "Kept tokens that count for others add a number to their logits, which the flash kernel has no "
    "place for: attention takes another kernel in the layers that select. Of the prefill "
    "that is"
)


def to_table(predictions: Sequence[Prediction], machine: Ceilings) -> RenderableType:
    """All predictions of one case, at several batches."""
    case = predictions[0].case
    parts: list[RenderableType] = [_title(case, machine)]
    parts += [_phases(prediction, machine) for prediction in predictions]
    parts.append(_cache(predictions, machine))
    if case.policy.mass and case.selects:
        more = [f"{_ms(one.bias)} ms at batch {one.case.batch}" for one in predictions]
        parts.append(f"{BIASED} {', '.join(more)}.")
    parts.append(machine.about)
    return Group(*parts)


def to_json(predictions: Sequence[Prediction], machine: Ceilings) -> dict[str, Any]:
    """The same as plain values: seconds, bytes, FLOPs."""
    case = predictions[0].case
    return {
        "format": FORMAT,
        "model": case.shape.name,
        "machine": asdict(machine),
        "policy": str(case.policy),
        "visual_tokens": case.visual_tokens,
        "text_tokens": case.text_tokens,
        "kept_per_layer": list(case.kept),
        "longest_batch": {
            "dense": longest_batch(case.dense(), machine),
            "selective": longest_batch(case, machine),
        },
        "batches": [
            {
                "batch": one.case.batch,
                "bias_seconds": one.bias,
                "kv_bytes": {"dense": one.cache_dense, "selective": one.cache},
                "phases": {
                    name: {
                        "dense": _plain(one.dense[name]),
                        "selective": _plain(one.selective[name]),
                        "speedup_eager": one.speedup(name),
                        "speedup_graph": one.speedup(name, graph=True),
                    }
                    for name in one.dense
                },
            }
            for one in predictions
        ],
    }


def _plain(phase: Phase) -> dict[str, Any]:
    graph = None if phase.graph is None else phase.graph_binds
    return {**asdict(phase), "binds_eager": phase.binds, "binds_graph": graph}


def _title(case: Case, machine: Ceilings) -> str:
    kept = sum(case.kept) / len(case.kept)
    return (
        f"{case.shape.name} on {machine.name}, {machine.dtype}: {case.visual_tokens} visual + "
        f"{case.text_tokens} text tokens, {kept:.1f} visual tokens kept a layer, {case.policy}. "
        "Predicted, not measured."
    )


def _phases(prediction: Prediction, machine: Ceilings) -> Table:
    """Every phase at one batch: dense, selective, and how many times faster."""
    case = prediction.case
    fits = [
        "" if longest_batch(side, machine) >= case.batch else f"{name} does not fit"
        for name, side in (("dense", case.dense()), ("selective", case))
    ]
    title = ", ".join([f"batch {case.batch}", *filter(None, fits)])
    table = Table("", "", box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    heads = ("tokens", "TFLOPs", "GB read", "launches", "arith.", "memory", "launch", "eager, ms")
    for column in (*heads, "graph, ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, dense in prediction.dense.items():
        selective = prediction.selective[name]
        table.add_row(name, "dense", _tokens(name, case.dense()), *_cells(dense))
        if name == "vision":
            continue
        table.add_row("", "selective", _tokens(name, case), *_cells(selective))
        graph = prediction.speedup(name, graph=True)
        ratios = [f"{prediction.speedup(name):.2f} x", "" if graph is None else f"{graph:.2f} x"]
        table.add_row("", "", *[""] * 7, *ratios)
    return table


def _tokens(name: str, case: Case) -> str:
    """Of a prompt: those that a phase runs on, or the decoded one attends to; layer average."""
    if name == "vision":
        return f"{case.visual_tokens:,}"
    return f"{sum(case.running) / len(case.running):,.1f}".removesuffix(".0")


def _cells(phase: Phase) -> list[str]:
    graph = "-" if phase.graph is None else f"{_ms(phase.graph)} {phase.graph_binds[0]}"
    return [
        f"{_short(phase.flops / 1e12)}",
        f"{phase.read / 1e9:.3g}",
        f"{phase.launches:,}",
        *(_ms(time) for time in (phase.arithmetic, phase.memory, phase.launching)),
        f"{_ms(phase.eager)} {phase.binds[0]}",
        graph,
    ]


def _ms(seconds: float) -> str:
    return _short(1000 * seconds)


def _short(value: float) -> str:
    """To three digits, or more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cache(predictions: Sequence[Prediction], machine: Ceilings) -> Table:
    """What is held, and how much more of it would fit."""
    table = Table("KV cache after the prompt", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("dense", "selective"):
        table.add_column(column, justify="right")
    for one in predictions:
        sizes = (f"{size / 1e9:.3g} GB" for size in (one.cache_dense, one.cache))
        table.add_row(f"batch {one.case.batch}", *sizes)
    case = predictions[0].case
    longest = (longest_batch(side, machine) for side in (case.dense(), case))
    table.add_row(
        f"longest batch that fits in {machine.memory / 1e9:,.0f} GB",
        *(f"{batch:,}" if batch else "the weights do not fit" for batch in longest),
    )
    return table
