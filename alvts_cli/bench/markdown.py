"""The README's table from the JSON file of a suite."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AlvtsError
from ..files import read_text
from ..schema import parse_json, refuse_newer

FORMAT = 1
"""Of a suite's JSON object; raised when a name in it changes its meaning."""

_HEAD = (
    *("shape", "batch", "policy", ""),
    *("prefill", "limit", "first token", "decode", "launches a layer", "kernels traced"),
)


def read_table(path: Path) -> str:
    """`to_markdown` of the file of an earlier `alvts bench --suite`.

    Raises:
        AlvtsError: no such file, not such a report, or one of a newer format.
    """
    try:
        report = parse_json(read_text(path, "report"))
        refuse_newer(report, FORMAT, path)
        return to_markdown(report)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        raise AlvtsError(f"{path} is not a report of alvts bench --suite") from None


def to_markdown(report: Mapping[str, Any]) -> str:
    """Two tables, of prefill and of decoding: ratios of dense over selective with 95 % intervals,
    and counts; then what was left out."""
    first = report["entries"][0]
    place, settings = first["environment"], first["settings"]
    lines = [
        f"{place['hardware']}, {settings['dtype']}, torch {place['torch']}, transformers "
        f"{place['transformers']}, alvts {place['alvts']}; {settings['text_tokens']} text tokens, "
        f"keep {settings['keep']:.3g}, random weights.",
        "",
        *_table(_HEAD, [_prefill_row(entry) for entry in report["entries"]]),
        "",
        *_table(
            ("decoding", "policy", "batch", "dense, tokens/s", "selective, tokens/s", "ratio"),
            [row for entry in report["entries"] for row in _decode_rows(entry)],
        ),
    ]
    lines += [f"\nLeft out: {one['entry']} ({one['why']})." for one in report["left_out"]]
    return "\n".join(lines) + "\n"


def _prefill_row(entry: Mapping[str, Any]) -> list[str]:
    settings, figures = entry["settings"], entry["metrics"]
    ways = ["compiled" if settings["compiled"] else "eager"]
    if settings["cut"]:
        ways.append(f"{settings['layers']} layers of width {settings['hidden_size']}")
    names = ("prefill_speedup", "prefill_speedup_limit", "ttft_speedup", "decode_speedup")
    dense = figures["launches_dense"]
    traced = entry["traced"]
    return [
        f"{settings['model']}, {settings['visual_tokens']} visual tokens",
        str(settings["batch"]),
        settings["policy"],
        ", ".join(ways),
        *(_interval(figures[name], entry["intervals"][name]) for name in names),
        f"{dense:g}, choosing {dense + figures['launches_over_dense']:g}, "
        f"going on {dense + figures['launches_going_on']:g}",
        "-" if traced is None else f"{traced['dense']}, {traced['selective']}",
    ]


def _decode_rows(entry: Mapping[str, Any]) -> list[list[str]]:
    settings = entry["settings"]
    return [
        [
            settings["model"],
            settings["policy"],
            str(one["batch"]),
            f"{one['tokens_per_second_dense']:,.1f}",
            f"{one['tokens_per_second']:,.1f}",
            _interval(one["speedup"], one["interval"]),
        ]
        for one in entry["decode"]
    ]


def _table(head: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _interval(point: float, ends: list[float | None]) -> str:
    low, high = ends
    return f"{point:.2f}" if low is None or high is None else f"{point:.2f} ({low:.2f}-{high:.2f})"
