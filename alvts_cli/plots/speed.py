"""Measured prefill speed-up, against the layer average or with the answers kept at it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AlvtsError
from .answers import model_of, retention
from .chart import INK, QUIET, Line, Point, draw_lines, drawing, shares, write_names

Run = Mapping[str, Any]
"""What `alvts bench --json` or `alvts eval --json` writes."""

SAME = 0.05
"""By how much layer averages may differ, as a share, where a speed-up and a score are put together:
a prompt of another length has another rounding."""

LIMIT = "selection for free"


def plot_speed(benches: Sequence[Run], answers: Sequence[Run], path: Path) -> None:
    """Every method's speed-up at its layer averages; with `answers`, the answers kept against the
    speed-up.

    Args:
        benches: each measured at one keep.
        answers: of the same model, or of one that it stands for; the first data set of each.
        path: .svg or .png.

    Raises:
        AlvtsError: no speed-up has a score at its layer average, or the file cannot be written.
    """
    measured = _measured(benches)
    timed = " and ".join(dict.fromkeys(_described(bench) for bench in benches))
    if answers:
        data = answers[0]["data"][0]
        lines = _lines(_with_answers(measured, answers))
        title = "answers kept at the speed gained, 95 % intervals"
        about = (
            f"answers: {model_of(answers[0])}, {data['name']}, {data['head']['samples']} questions"
            f"\nprefill: {timed}"
        )
    else:
        lines = _lines(measured)
        title, about = "speed gained with fewer visual tokens, 95 % intervals", timed
    with drawing(path, 1, title, [line.name for line in lines]) as (axes,):
        names = draw_lines(axes, lines)
        axes.set_title(about, fontsize=9, color=INK, loc="left")
        axes.set_ylim(bottom=0)
        if answers:
            for mark in (axes.axhline(100), axes.axvline(1)):
                mark.set(color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
            axes.set_xlabel("prefill of the language model, times as fast as dense")
            axes.set_ylabel(f"right answers, % of dense ({data['head']['dense']:.1f} %)")
        else:
            shares(axes, [point.x for line in lines for point in line.points])
            axes.set_xlabel("visual tokens that run through a layer, mean over layers, %")
            axes.set_ylabel("prefill, times as fast as dense")
        write_names(axes, names)


def _measured(benches: Sequence[Run]) -> dict[str, list[Point]]:
    """Per method: speed-up `y` at a layer average `x` in percent of the visual tokens."""
    found: dict[str, list[Point]] = {}
    # From many tokens to few: a line goes on where less is kept.
    for bench in sorted(benches, key=lambda one: -_kept(one)):
        metrics, intervals, kept = bench["metrics"], bench["intervals"], "visual_tokens_kept"
        entries = [
            (name, metrics[kept], metrics[metric], intervals[metric])
            for name, metric in (("alvts", "prefill_speedup"), (LIMIT, "prefill_speedup_limit"))
        ]
        entries += [
            (name, peer[kept], peer["prefill_speedup"], peer["interval"])
            for name, peer in bench["against"].items()
        ]
        for name, tokens, speedup, (low, high) in entries:
            share = 100 * tokens / metrics["visual_tokens"]
            found.setdefault(name, []).append(Point(share, speedup, y_ends=(low, high)))
    return found


def _with_answers(
    measured: Mapping[str, Sequence[Point]], answers: Sequence[Run]
) -> dict[str, list[Point]]:
    """Answers kept `y` at a speed-up `x`, for all that have both."""
    found: dict[str, list[Point]] = {}
    for name, points in measured.items():
        scores = [
            (100 * row["tokens"] / run["data"][0]["visual_tokens"], *retention(row))
            for run in answers
            for row in run["data"][0]["rows"]
            if row["method"] == name and row["retention"] is not None
        ]
        for point in points:
            near = min(scores, key=lambda score: abs(score[0] - point.x), default=None)
            if near is not None and abs(near[0] - point.x) <= SAME * point.x:
                both = Point(point.y, near[1], x_ends=point.y_ends, y_ends=near[2])
                found.setdefault(name, []).append(both)
    if not found:
        averages = ", ".join(f"{point.x:.3g} %" for point in measured.get("alvts", ()))
        raise AlvtsError(
            f"none of the methods has a score at the layer average that was timed ({averages}); "
            "run alvts eval with that --keep"
        )
    return found


def _lines(points: Mapping[str, Sequence[Point]]) -> list[Line]:
    return [
        Line(name, each, emphasis=name == "alvts", quiet=name == LIMIT)
        for name, each in points.items()
    ]


def _kept(bench: Run) -> float:
    """The layer average, as a share of the visual tokens."""
    metrics = bench["metrics"]
    return float(metrics["visual_tokens_kept"] / metrics["visual_tokens"])


def _described(bench: Run) -> str:
    """The model that was timed, and on what."""
    settings = bench["settings"]
    parts = [str(settings["model"])]
    if settings["cut"]:
        parts.append(f"cut to {settings['layers']} layers of width {settings['hidden_size']}")
    parts += [
        f"{settings['visual_tokens']} + {settings['text_tokens']} tokens",
        str(bench["environment"]["hardware"]),
    ]
    return ", ".join(parts)
