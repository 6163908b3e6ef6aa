"""Answers kept against the layer average: what `alvts eval` found."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AlvtsError
from .chart import INK, QUIET, Line, Name, Point, draw_lines, drawing, shares, write_names

Data = Mapping[str, Any]
"""A data set of what `alvts eval --json` writes."""


def plot_answers(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A panel for every data set: retention of every method at its layer average; and another one,
    where its rows were timed: at its speed-up.

    Args:
        runs: as `alvts eval --json` writes them; data sets of the same name share a panel.
        path: .svg or .png.

    Raises:
        AlvtsError: the dense model answers nothing right, or the file cannot be written.
    """
    sets: dict[str, list[Data]] = {}
    for run in runs:
        for data in run["data"]:
            if not data["head"]["dense"]:
                raise AlvtsError(
                    f"no plot: the dense model answers no question of {data['name']} right, so "
                    "there is nothing to keep"
                )
            sets.setdefault(data["name"], []).append(data)
    models = " and ".join(dict.fromkeys(model_of(run) for run in runs))
    title = f"{models}: answers kept with fewer visual tokens, 95 % intervals"
    names = [row["method"] for parts in sets.values() for part in parts for row in part["rows"]]
    panels = [
        (parts, timed)
        for parts in sets.values()
        for timed in (False, True)
        if not timed or any(_timed(row) for part in parts for row in part["rows"])
    ]
    with drawing(path, len(panels), title, [*names, *_LEVELS]) as axes:
        for one, (parts, timed) in zip(axes, panels, strict=True):
            _panel(one, parts, timed)


def model_of(run: Mapping[str, Any]) -> str:
    """The name of the model that a run was of."""
    settings = run.get("settings", {})
    return str(settings.get("name") or Path(str(settings.get("model", "?"))).name)


def retention(row: Mapping[str, Any]) -> tuple[float, tuple[float, float]]:
    """Of a row of a data set: retention and the ends of its interval, in percent."""
    return row["retention"], (row["retention_low"], row["retention_high"])


_LEVELS = ("dense", "grey picture")


def _timed(row: Mapping[str, Any]) -> bool:
    """Whether a row has a speed-up, of `alvts eval --time`."""
    return row.get("prefill_speedup") is not None


def _panel(axes: Any, parts: Sequence[Data], timed: bool) -> None:
    """Retention against the layer average or, `timed`, against the speed-up of prefill."""
    head, tokens = parts[0]["head"], parts[0]["visual_tokens"]
    rows = [row for part in parts for row in part["rows"] if _timed(row) or not timed]
    # From many tokens to few: a line goes on where less is kept.
    rows.sort(key=lambda row: -row["tokens"])
    lines = []
    for method in dict.fromkeys(row["method"] for part in parts for row in part["rows"]):
        points = []
        for row in (row for row in rows if row["method"] == method):
            kept, ends = retention(row)
            if timed:
                low, high = row["prefill_speedup_low"], row["prefill_speedup_high"]
                points.append(Point(row["prefill_speedup"], kept, (low, high), ends))
            else:
                points.append(Point(100 * row["tokens"] / tokens, kept, y_ends=ends))
        lines.append(Line(method, points, method == "alvts"))
    if timed:
        axes.set_xlabel("prefill of the language model, times as fast as dense")
    else:
        shares(axes, [point.x for line in lines for point in line.points])
        axes.set_xlabel(
            f"visual tokens that run through a layer, mean over layers, % of {tokens:.4g}"
        )
    tops = [point.y_ends[1] for line in lines for point in line.points if point.y_ends]
    axes.set_ylim(0, max(105, *tops) + 2)
    axes.set_ylabel(f"right answers, % of dense ({head['dense']:.1f} %)")
    axes.set_title(
        f"{parts[0]['name']}, {head['samples']} questions", fontsize=10, color=INK, loc="left"
    )
    names = draw_lines(axes, lines)
    for name, height in zip(_LEVELS, (100.0, 100 * head["blind"] / head["dense"]), strict=True):
        axes.axhline(height, color=QUIET, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        names.append(Name(axes.get_xlim()[1], height, name, QUIET))
    write_names(axes, names)
