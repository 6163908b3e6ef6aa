"""The outcome of a benchmark: a table to read and an object to keep."""

import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table

from .. import __version__
from .measure import Measurement
from .statistics import spread
from .timing import Generated

FORMAT = 1
"""Of the JSON object; raised when a name in it changes its meaning."""

_TIMES = {
    "vision_ms": "vision tower, ms",
    "prefill_ms": "LM prefill, ms",
    "ttft_ms": "first token, ms",
    "decode_ms": "per new token, ms",
    "total_ms": "all together, ms",
}
_PHASES = {"score": "  of it scoring", "select": "  of it selecting", "merge": "  of it merging"}


def environment(model: Any) -> dict[str, Any]:
    """What the figures depend on beside the settings."""
    place = model.device
    hardware = torch.cuda.get_device_name(place) if place.type == "cuda" else _cpu_name()
    return {
        "alvts": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "hardware": hardware,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
    }


def to_json(
    measurement: Measurement, settings: Mapping[str, Any], surroundings: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole outcome as plain values."""

    def times(runs: tuple[Generated, ...]) -> dict[str, Any]:
        columns = {name: [getattr(run, name) for run in runs] for name in _TIMES}
        for phase in _PHASES:
            columns[f"{phase}_ms"] = [run.phase_ms[phase] for run in runs]
        return {
            name: {
                "median": spread(column).median,
                "quartiles": [spread(column).low, spread(column).high],
                "runs": column,
            }
            for name, column in columns.items()
        }

    return {
        "format": FORMAT,
        "settings": dict(settings),
        "environment": dict(surroundings),
        "metrics": measurement.figures,
        "intervals": {name: list(ends) for name, ends in measurement.intervals.items()},
        "times": {"dense": times(measurement.dense), "selective": times(measurement.selective)},
        "peak_bytes": {
            "dense": measurement.peak_dense,
            "selective": measurement.peak_selective,
        },
    }


def to_table(
    measurement: Measurement, settings: Mapping[str, Any], surroundings: Mapping[str, Any]
) -> RenderableType:
    """The same for the terminal."""
    figures, intervals = measurement.figures, measurement.intervals
    table = Table("median (quartiles)", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("dense", "selective"):
        table.add_column(column, justify="right")
    table.add_column("ratio (95 %)", justify="right")
    for name, label in _TIMES.items():
        speedup = name.replace("_ms", "_speedup")
        table.add_row(
            label,
            _time([getattr(run, name) for run in measurement.dense]),
            _time([getattr(run, name) for run in measurement.selective]),
            _interval(figures[speedup], intervals[speedup]) if speedup in figures else "",
        )
        if name == "prefill_ms":
            for phase, phase_label in _PHASES.items():
                spent = [run.phase_ms[phase] for run in measurement.selective]
                table.add_row(phase_label, "", _time(spent), "")
    table.add_section()
    table.add_row(
        "visual tokens",
        f"{figures['visual_tokens']:g}",
        f"{figures['visual_tokens_kept']:.1f}",
        "",
    )
    table.add_row(
        "prefill GFLOPs",
        f"{figures['flops_dense'] / 1e9:,.1f}",
        f"{figures['flops'] / 1e9:,.1f}",
        f"{figures['flops_ratio']:.2f}",
    )
    table.add_row(
        "KV cache",
        megabytes(figures["kv_bytes_dense"]),
        megabytes(figures["kv_bytes"]),
        f"{figures['kv_ratio']:.2f}",
    )
    table.add_row(
        "peak above weights",
        *(
            "n/a" if peak is None else megabytes(peak)
            for peak in (measurement.peak_dense, measurement.peak_selective)
        ),
        "",
    )
    about = (
        f"{surroundings['hardware']}, {surroundings['threads']} threads, {settings['dtype']}, "
        f"torch {surroundings['torch']}, transformers {surroundings['transformers']}; "
        f"{len(measurement.dense)} runs each, in turn"
    )
    return Group(_title(settings), table, about)


def megabytes(size: float) -> str:
    """Bytes in MB (10^6), to three or more digits."""
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def _title(settings: Mapping[str, Any]) -> str:
    parts = [str(settings["model"])]
    if settings["random_weights"]:
        parts.append("random weights")
    if settings["cut"]:
        parts.append(f"cut to {settings['layers']} layers")
    parts += [
        f"{settings['visual_tokens']} visual + {settings['text_tokens']} text tokens",
        f"batch {settings['batch']}",
        f"keep {_keep(settings['keep'])}",
        f"{settings['selectors']} selectors of rank {settings['rank']}",
    ]
    return ", ".join(parts)


def _time(column: list[float]) -> str:
    figures = spread(column)
    digits = 2 if figures.median < 10 else 1 if figures.median < 100 else 0
    return f"{figures.median:,.{digits}f} ({figures.low:,.{digits}f}-{figures.high:,.{digits}f})"


def _interval(point: float, ends: tuple[float, float]) -> str:
    return f"{point:.2f} ({ends[0]:.2f}-{ends[1]:.2f})"


def _cpu_name() -> str:
    """The processor by its name where the system tells."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _keep(value: int | float | list[int | float]) -> str:
    """One value or one per layer, without the digits nobody reads."""
    if isinstance(value, list):
        return ",".join(_keep(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
