"""For all tests: one thread a process, since several processes share the cores; no lines of
progress in this process, however busy the machine is; and what Hypothesis draws is the same every
time, unless `--hypothesis-profile long` asks for more. `ALVTS_TEST_DEVICE=cuda` makes every model
and input of the engine's tests on a GPU."""

import math
import os
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from alvts_cli import terminal

terminal.NOW_AND_THEN = math.inf

# Before torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if "ALVTS_TEST_DEVICE" in os.environ:
    import torch

    torch.set_default_device(os.environ["ALVTS_TEST_DEVICE"])


@pytest.fixture
def same_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every policy takes as long in one calibration as in the next, which measured it would not."""
    monkeypatch.setattr(
        "calibration.policy.time_policies",
        lambda model, selectors, choices, *_: {choice: choice[0] for choice in choices},
    )


@pytest.fixture
def quick_calibration(same_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of what is around a calibration: ten steps a layer, three candidates, no times."""
    from calibration import policy, sweep

    align, chosen = sweep.align, [policy.CANDIDATES[i] for i in (0, 5, 8)]

    def few_steps(factors: Any, *more: Any) -> Any:
        projections, targets, settings, seed = more
        few = replace(settings, steps=min(settings.steps, 10))
        return align(factors, projections, targets, few, seed)

    monkeypatch.setattr(sweep, "align", few_steps)
    monkeypatch.setattr(policy, "_CHOICES", [(k, one) for k in policy.RATIOS for one in chosen])


_ALWAYS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("ci", _ALWAYS, max_examples=25, derandomize=True)
settings.register_profile("long", _ALWAYS, max_examples=500)
settings.load_profile("ci")


_COUNTED: dict[tuple[object, ...], Any] = {}


@pytest.fixture
def counted_once(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[object, ...], Any]:
    """`alvts bench` counts the launches of a model, a policy and a prompt once a process, not in
    every run: that takes seconds, and gives the same numbers. The dict holds what was counted."""
    from alvts_cli.bench import measure

    count = measure.count_launches

    def remembered(config: Any, *more: Any) -> Any:
        key = (config.to_json_string(use_diff=False), config._attn_implementation, *more)
        if key not in _COUNTED:
            _COUNTED[key] = count(config, *more)
        return _COUNTED[key]

    monkeypatch.setattr(measure, "count_launches", remembered)
    return _COUNTED
