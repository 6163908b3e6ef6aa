"""Comparing with the JSON file of an earlier run.

Only ratios and counts are compared: absolute times say as much about the day as about the code.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from ..errors import AlvtsError
from ..files import read_text
from ..schema import Record, check, parse_json, refuse_newer
from .metrics import FORMAT, METRICS

# Selectors of another calibration may be compared, those of another rank not.
SAME = (
    "model",
    "random_weights",
    "layers",
    "hidden_size",
    "dtype",
    "device",
    "batch",
    "visual_tokens",
    "text_tokens",
    "new_tokens",
    "keep",
    "kept_per_layer",
    "policy",
    "rank",
    "compiled",
    "frozen_weights",
)
"""Settings that must be equal for a comparison to mean anything."""

_ALWAYS = (
    *("model", "random_weights", "layers", "dtype", "device", "batch", "visual_tokens"),
    *("text_tokens", "new_tokens", "keep", "rank"),
)
"""Those of them that every version has written down."""

COMPARED = tuple(name for name, metric in METRICS.items() if metric.portable and metric.better)
"""Metrics that are compared."""

_POSITIVE = (
    *("prefill_speedup", "ttft_speedup", "decode_speedup", "total_speedup", "flops"),
    *("flops_ratio", "kv_bytes", "kv_ratio", "visual_tokens_kept"),
)
"""Those of them that every version has written down; none of them can be 0."""


class _Report(Record):
    """What is used of a report of `alvts bench`."""

    format: Literal[1]
    settings: dict[str, Any]
    metrics: dict[str, float | None]

    @model_validator(mode="after")
    def _can_fail(self) -> "_Report":
        """
        Raises:
            AlvtsError: something is missing without which every run would pass.
        """
        for name in _ALWAYS:
            if name not in self.settings:
                raise AlvtsError(f"'settings' has no {name!r}")
        for name in COMPARED:
            value = self.metrics.get(name)
            if name in _POSITIVE and not (value or 0) > 0:
                raise AlvtsError(f"'metrics' has no {name!r} above 0")
            if name in self.metrics and (value is None or value < 0):
                raise AlvtsError(f"'metrics' has no {name!r} of at least 0")
        return self


def read_baseline(path: Path) -> dict[str, Any]:
    """The report of an earlier run.

    Raises:
        AlvtsError: no such file, one of a newer format, or not such a report: one that any run
            would pass.
    """
    text = read_text(path, "baseline")
    try:
        report = parse_json(text)
    except ValueError as error:
        raise AlvtsError(f"{path} is not JSON: {error}") from None
    refuse_newer(report, FORMAT, path)
    return check(_Report, report, f"{path} is not a report of alvts bench: it").model_dump()


def check_comparable(baseline: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a baseline of something else.

    Raises:
        AlvtsError: with the first setting that differs.
    """
    for name in SAME:
        now = settings[name]
        # What an older version did not write down could not be set then either.
        before = baseline["settings"].get(name, now)
        if before != now:
            raise AlvtsError(
                f"the baseline was measured with {name}={before}, this run has {name}={now}; "
                "they cannot be compared"
            )


def regressions(
    baseline: Mapping[str, Any], figures: Mapping[str, float], tolerance: float
) -> list[str]:
    """A line for every metric that is worse than before by more than `tolerance` (a share).

    A metric that the baseline does not have, being of an older version, is left out.
    """
    lines = []
    for name in COMPARED:
        before, now = baseline["metrics"].get(name), figures[name]
        if before is None:
            continue
        worse = before - now if METRICS[name].better > 0 else now - before
        # Of nothing, anything more is infinitely worse.
        worse = worse / before if before else math.inf * worse if worse else 0.0
        # Not to fail on the last bit of a division when nothing is tolerated.
        if worse > tolerance + 1e-9:
            lines.append(
                f"regression: {name} was {before:.6g}, is {now:.6g}, {100 * worse:.1f} % worse "
                f"({100 * tolerance:g} % allowed)"
            )
    return lines
