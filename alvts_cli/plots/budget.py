"""Where the budget goes: what an artifact lets every layer keep, and where it chooses."""

from collections.abc import Sequence
from pathlib import Path

from ..artifact import Artifact
from ..engine import keep_of, policy_of
from .chart import INK, Line, Point, draw_lines, drawing, write_names

KEEPS = (0.33, 0.11, 0.05)
"""Layer averages drawn where calibration picked no policies."""


def plot_budget(artifact: Artifact, name: str, path: Path) -> None:
    """Share of the visual tokens that each layer keeps, at every keep ratio that calibration tried;
    a mark where tokens are ranked anew.

    Args:
        artifact: with or without schedules and picked policies.
        name: of the file.
        path: .svg or .png.

    Raises:
        AlvtsError: the file cannot be written.
    """
    ratios = [one.keep for one in artifact.picked] or sorted({*KEEPS, artifact.default_keep})
    # Of one prompt as calibration saw them; only the rounding depends on it.
    tokens = artifact.visual_tokens or 1000
    lines = []
    for ratio in reversed(ratios):
        keep = keep_of(artifact, ratio)
        policy = policy_of(artifact, keep)
        counts = [keep.count(i, tokens) for i in range(len(artifact.layers))]
        points = [Point(i, 100 * count / tokens) for i, count in enumerate(counts)]
        lines.append(
            Line(f"{ratio:.3g}: {policy}", points, marks=_anew(counts, tokens, policy.every))
        )
    title = f"{name}: where the budget goes"
    with drawing(path, 1, title, [line.name for line in lines]) as (axes,):
        names = draw_lines(axes, lines)
        axes.set_ylim(0, 1.15 * max(point.y for line in lines for point in line.points))
        axes.set_xlabel("decoder layer")
        axes.set_ylabel(f"visual tokens kept, % of {tokens}")
        axes.set_title(
            "marks: layers that choose anew; between them a choice holds",
            fontsize=10,
            color=INK,
            loc="left",
        )
        write_names(axes, names)


def _anew(counts: Sequence[int], tokens: int, every: int) -> list[int]:
    """The layers that rank tokens: the first that selects any, and then those in which the choice
    before does not hold any more."""
    found: list[int] = []
    for layer, count in enumerate(counts):
        if 0 < count < tokens and (not found or (every and layer - found[-1] >= every)):
            found.append(layer)
    return found
