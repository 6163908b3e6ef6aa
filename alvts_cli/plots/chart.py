"""One look for all plots: lines with their names at the ends, and their intervals.

Colours are Okabe and Ito's (2008), which people with any kind of colour vision tell apart; beyond
seven lines the strokes differ too.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AlvtsError
from ..files import check_writable, write_whole
from ..terminal import safe

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STROKES = ("-", "--", ":")
_MARKERS = "osD^vPX"
INK, QUIET = "#1b1f24", "#55606c"

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.grid": True,
    "grid.color": "#e3e7eb",
    "axes.axisbelow": True,
    # A name with a dollar in it is no formula.
    "text.parse_math": False,
    # The same file for the same figures.
    "svg.hashsalt": "alvts",
}


@dataclass(frozen=True)
class Point:
    """A figure with its 95 % interval, in both directions; without one where it is exact."""

    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """A method's points.

    Attributes:
        name: it stands where the last point is.
        points: at least one.
        emphasis: whether it is drawn thicker.
        marks: numbers of the points with a mark; None for all of them.
        quiet: whether it is no method but what methods stand against.
    """

    name: str
    points: Sequence[Point]
    emphasis: bool = False
    marks: Sequence[int] | None = None
    quiet: bool = False


@dataclass(frozen=True)
class Name:
    """What a line is called, and where it ends."""

    x: float
    y: float
    text: str
    colour: str


def check_plot(path: Path, read: Iterable[Path | str | None] = ()) -> None:
    """Find out before a long run whether a plot can be drawn and written.

    Args:
        path: to write to.
        read: as `check_writable` has it.

    Raises:
        AlvtsError: neither .svg nor .png, no matplotlib, a place that cannot be written to, or a
            file that is read.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise AlvtsError(f"cannot plot to {path}: its name must end in .svg or .png")
    if find_spec("matplotlib") is None:
        raise AlvtsError('plots need matplotlib; install it with: pip install "alvts[plot]"')
    check_writable(path, read=read)


@contextmanager
def drawing(path: Path, panels: int, title: str, names: Sequence[str]) -> Iterator[list["Axes"]]:
    """So many axes beside each other, written to the file when the block ends.

    Args:
        path: .svg or .png.
        panels: at least 1.
        title: over all of them.
        names: that will stand at the right of an axes.

    Raises:
        AlvtsError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    # In inches.
    left, wide, right = 0.75, 4.9, 0.4 + 0.08 * max(map(len, names), default=0)
    bottom, high, top = 0.6, 3.4, 0.75
    width, height = panels * (left + wide + right), bottom + high + top
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150)
        figure.text(left / width, 1 - 0.3 / height, title, fontsize=11.5, color=INK)
        yield [
            figure.add_axes(
                (
                    (i * (left + wide + right) + left) / width,
                    bottom / height,
                    wide / width,
                    high / height,
                )
            )
            for i in range(panels)
        ]
        # Names come from anywhere, and not every character may stand in an SVG, which is XML.
        for text in figure.findobj(Text):
            text.set_text(safe(text.get_text()))
        file = BytesIO()
        kind = path.suffix.lower().removeprefix(".")
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    write_whole(path, file.getvalue())


def draw_lines(axes: "Axes", lines: Sequence[Line]) -> list[Name]:
    """Draw lines with their intervals.

    Args:
        axes: to draw on.
        lines: the first ones get the most distinct colours. One without points is not drawn, but
            has its colour all the same, so that panels agree.

    Returns:
        Their names, for `write_names`.
    """
    names = []
    for i, line in enumerate(sorted(lines, key=lambda line: line.quiet)):
        if not line.points:
            continue
        colour = QUIET if line.quiet else COLOURS[i % len(COLOURS)]
        xs, ys = [p.x for p in line.points], [p.y for p in line.points]
        axes.errorbar(
            xs,
            ys,
            xerr=_reach(xs, [p.x_ends for p in line.points]),
            yerr=_reach(ys, [p.y_ends for p in line.points]),
            color=colour,
            linestyle=_STROKES[i // len(COLOURS) % len(_STROKES)],
            linewidth=2.6 if line.emphasis else 1.3,
            marker=_MARKERS[i % len(_MARKERS)],
            markevery=None if line.marks is None else list(line.marks),
            markersize=6 if line.emphasis else 4,
            elinewidth=0.9,
            capsize=2,
            zorder=3 if line.emphasis else 2,
        )
        names.append(Name(xs[-1], ys[-1], line.name, colour))
    return names


def write_names(axes: "Axes", names: Sequence[Name]) -> None:
    """Write names at the right of the axes, as near to the heights of their lines' ends as there is
    room; to be called when the scales and limits of the axes are set."""
    to_share = axes.transData + axes.transAxes.inverted()
    ends = {name: to_share.transform((name.x, name.y)) for name in names}
    ordered = sorted(names, key=lambda name: ends[name][1])
    # The height of a line of text, in shares of the axes.
    step = 1.3 * _STYLE["font.size"] / 72 * axes.figure.dpi / axes.bbox.height
    for name, y in zip(ordered, spread([ends[n][1] for n in ordered], step), strict=True):
        axes.annotate(
            name.text,
            xy=tuple(ends[name]),
            xytext=(1.04, y),
            xycoords=axes.transAxes,
            textcoords=axes.transAxes,
            color=INK,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": name.colour,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )


def shares(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis of percents that holds `values`, from many to few."""
    low, high = min(values), max(values)
    axes.set_xscale("log")
    axes.set_xlim(high * 1.12, low / 1.12)
    ticks = [tick for tick in (100, 50, 33, 20, 11, 5, 3, 2, 1) if low <= 1.1 * tick <= 1.2 * high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def spread(wanted: Sequence[float], step: float) -> list[float]:
    """Heights as near to those wanted as they go, ascending, at least `step` apart.

    Args:
        wanted: ascending.
        step: above 0.
    """
    # Groups that touch are moved together, about the mean of what they want.
    groups: list[list[float]] = []
    for height in wanted:
        groups.append([height])
        while len(groups) > 1 and _first(groups[-1], step) < _last(groups[-2], step) + step:
            last = groups.pop()
            groups[-1] += last
    return [_first(group, step) + i * step for group in groups for i in range(len(group))]


def _first(group: list[float], step: float) -> float:
    return sum(group) / len(group) - step * (len(group) - 1) / 2


def _last(group: list[float], step: float) -> float:
    return sum(group) / len(group) + step * (len(group) - 1) / 2


def _reach(
    values: list[float], ends: list[tuple[float, float] | None]
) -> tuple[list[float], list[float]] | None:
    """How far the intervals go below and above, as matplotlib wants it; None without any."""
    if all(end is None for end in ends):
        return None
    pairs = [(v, v) if end is None else end for v, end in zip(values, ends, strict=True)]
    return (
        [max(0.0, v - low) for v, (low, _) in zip(values, pairs, strict=True)],
        [max(0.0, high - v) for v, (_, high) in zip(values, pairs, strict=True)],
    )
