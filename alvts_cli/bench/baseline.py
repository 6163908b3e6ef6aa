"""Comparing with the JSON file of an earlier run.

Only ratios and counts are compared: absolute times say as much about the day as about the code.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AlvtsError
from .metrics import METRICS

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


def read_baseline(path: Path) -> dict[str, Any]:
    """The report of an earlier run.

    Raises:
        AlvtsError: no such file, or not such a report.
    """
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError:
        raise AlvtsError(f"there is no baseline {path}") from None
    except OSError as error:
        raise AlvtsError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise AlvtsError(f"{path} is not JSON") from None
    if not isinstance(report, dict) or not all(
        isinstance(report.get(part), dict) for part in ("settings", "metrics")
    ):
        raise AlvtsError(f"{path} is not a report of alvts bench")
    return report


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
    for name, metric in METRICS.items():
        before = baseline["metrics"].get(name)
        if not (metric.portable and metric.better) or not isinstance(before, int | float):
            continue
        now = figures[name]
        worse = before - now if metric.better > 0 else now - before
        # Of nothing, anything more is infinitely worse.
        worse = worse / before if before else math.inf * worse if worse else 0.0
        # Not to fail on the last bit of a division when nothing is tolerated.
        if worse > tolerance + 1e-9:
            lines.append(
                f"regression: {name} was {before:.6g}, is {now:.6g}, {100 * worse:.1f} % worse "
                f"({100 * tolerance:g} % allowed)"
            )
    return lines
