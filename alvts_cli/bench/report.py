"""The outcome of a benchmark: a table to read and an object to keep."""

import math
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
from .metrics import FORMAT
from .statistics import spread
from .timing import Generated

_TIMES = {
    "vision_ms": "vision tower, ms",
    "prefill_ms": "LM prefill, ms",
    "ttft_ms": "first token, ms",
    "decode_ms": "per new token, ms",
    "total_ms": "all together, ms",
}
_PHASES = {"score": "  of it scoring", "select": "  of it selecting", "merge": "  of it merging"}
_PROFILE = {
    "score": "score all visual tokens",
    "select": "select and gather",
    "layer": "run the layers",
    "merge": "merge",
}


def environment(model: Any) -> dict[str, Any]:
    """What the figures depend on beside the settings."""
    return {
        "alvts": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "hardware": hardware_name(model.device),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
    }


def to_json(
    measurement: Measurement, settings: Mapping[str, Any], surroundings: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole outcome as plain values."""

    def times(runs: tuple[Generated, ...], watched: tuple[Generated, ...] = ()) -> dict[str, Any]:
        columns = {name: [getattr(run, name) for run in runs] for name in _TIMES}
        for phase in watched[0].phase_ms if watched else ():
            columns[f"{phase}_ms"] = [run.phase_ms[phase] for run in watched]
        return {name: summary(column) for name, column in columns.items()}

    def summary(column: list[float]) -> dict[str, Any]:
        figures = spread(column)
        return {
            "median": figures.median,
            "quartiles": [figures.low, figures.high],
            "runs": column,
        }

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "format": FORMAT,
        "settings": dict(settings),
        "environment": dict(surroundings),
        "metrics": {name: known(value) for name, value in measurement.figures.items()},
        "intervals": {
            name: [known(end) for end in ends] for name, ends in measurement.intervals.items()
        },
        "times": {
            "dense": times(measurement.dense),
            "selective": times(measurement.selective, measurement.watched),
            "short": {"prefill_ms": summary([run.prefill_ms for run in measurement.short])},
        },
        "against": {
            name: {
                "visual_tokens_kept": peer.visual_tokens_kept,
                "prefill_speedup": peer.speedup[0],
                "interval": list(peer.speedup[1:]),
                "prefill_ms": summary([run.prefill_ms for run in peer.runs]),
            }
            for name, peer in measurement.peers.items()
        },
        "peak_bytes": {
            "dense": measurement.peak_dense,
            "selective": measurement.peak_selective,
        },
    }


def to_table(
    measurement: Measurement,
    settings: Mapping[str, Any],
    surroundings: Mapping[str, Any],
    profile: bool = False,
) -> RenderableType:
    """The same for the terminal; `profile` adds where the selective prefill goes."""
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
                # What runs compiled has no phases.
                if measurement.watched:
                    spent = [run.phase_ms[phase] for run in measurement.watched]
                    table.add_row(phase_label, "", _time(spent), "")
            table.add_row(
                "  the limit: selection for free",
                "",
                _time([run.prefill_ms for run in measurement.short]),
                _interval(figures["prefill_speedup_limit"], intervals["prefill_speedup_limit"]),
            )
            table.add_row(
                "  efficiency: how near to it",
                "",
                "",
                _interval(figures["efficiency"], intervals["efficiency"]),
            )
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
        "launches a layer: choosing, going on, text alone",
        f"{figures['launches_dense']:g}",
        ", ".join(
            f"{figures['launches_dense'] + figures[name]:g}"
            for name in ("launches_over_dense", "launches_going_on", "launches_text_only")
        ),
        "",
    )
    table.add_row(
        "launches over dense: once, whole prefill",
        "",
        f"{figures['launches_once']:g}, {figures['launches_prefill']:g}",
        "",
    )
    table.add_row(
        "waits for the device, copies to it, in the layers",
        "",
        f"{figures['host_syncs']:g}, {figures['host_copies']:g}",
        "",
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
    more = [_profile(measurement)] if profile else []
    if measurement.peers:
        more.append(_against(measurement))
    return Group(_title(settings), table, *more, about)


def _profile(measurement: Measurement) -> Table:
    """Where the selective prefill goes."""
    table = Table("selective prefill", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms", justify="right")
    table.add_column("percent", justify="right")
    runs = measurement.watched
    parts = {label: [run.phase_ms[phase] for run in runs] for phase, label in _PROFILE.items()}
    parts["rest: final norm, positions, hooks"] = [
        run.prefill_ms - sum(run.phase_ms.values()) for run in runs
    ]
    for label, column in parts.items():
        shares = [100 * ms / run.prefill_ms for ms, run in zip(column, runs, strict=True)]
        table.add_row(label, _time(column), f"{spread(shares).median:.1f}")
    return table


def _against(measurement: Measurement) -> Table:
    """The prefill of all methods."""
    table = Table("method", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("visual tokens, layer average", "LM prefill, ms", "dense / method (95 %)"):
        table.add_column(column, justify="right")
    figures, speedup = measurement.figures, "prefill_speedup"
    table.add_row(
        "alvts",
        f"{figures['visual_tokens_kept']:.1f}",
        _time([run.prefill_ms for run in measurement.selective]),
        _interval(figures[speedup], measurement.intervals[speedup]),
    )
    for name, peer in measurement.peers.items():
        table.add_row(
            name,
            f"{peer.visual_tokens_kept:.1f}",
            _time([run.prefill_ms for run in peer.runs]),
            _interval(peer.speedup[0], peer.speedup[1:]),
        )
    return table


def megabytes(size: float) -> str:
    """Bytes in MB (10^6), to three or more digits."""
    return f"{size / 1e6:.3g} MB" if size < 1e8 else f"{size / 1e6:,.0f} MB"


def _title(settings: Mapping[str, Any]) -> str:
    parts = [str(settings["model"])]
    if settings["random_weights"]:
        parts.append("random weights")
    if settings["compiled"]:
        parts.append("compiled, weights frozen" if settings["frozen_weights"] else "compiled")
    if settings["cut"]:
        parts.append(f"cut to {settings['layers']} layers of width {settings['hidden_size']}")
    parts += [
        f"{settings['visual_tokens']} visual + {settings['text_tokens']} text tokens",
        f"batch {settings['batch']}",
        f"keep {_keep(settings['keep'])}",
        str(settings["policy"]),
        f"{settings['selectors']} selectors of rank {settings['rank']}",
    ]
    return ", ".join(parts)


def _time(column: list[float]) -> str:
    figures = spread(column)
    digits = 2 if figures.median < 10 else 1 if figures.median < 100 else 0
    return f"{figures.median:,.{digits}f} ({figures.low:,.{digits}f}-{figures.high:,.{digits}f})"


def _interval(point: float, ends: tuple[float, float]) -> str:
    if math.isnan(point):
        return "n/a"
    return f"{point:.2f} ({ends[0]:.2f}-{ends[1]:.2f})"


def hardware_name(device: torch.device) -> str:
    """The GPU, or the processor by its name where the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
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
