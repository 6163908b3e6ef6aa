"""Which policy keeps the model's answers, found by trying: models differ.

Every candidate is tried at every one of `RATIOS` on samples that nothing was fitted on, and its
prefill is timed on the machine at hand. A candidate is out at a ratio where another one, on more
tokens, keeps more of the answers **in the same time**; of the others, the one with the lowest loss
(an answer's counts up to `answers.CAP`) is picked, or the cheapest of those that are as good. So
what alvts does to a model it was calibrated on is not clearly worse, on those samples, than the
paper's own way in that time. Those that are clearly behind after the first samples are not tried on
the others. What was measured, and what was tried and is no candidate, stands in the README of this
folder.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from alvts_cli.engine import NAMED, PAPER, Picked, Selectors
from alvts_cli.families.vision import seen_once
from alvts_cli.header import Trial
from alvts_cli.spread import Group

from .answers import Answered, each_kept, mean_kept, put_together
from .timing import Choice, time_policies, turns

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

_CHOICES = [(keep, policy) for keep in RATIOS for policy in CANDIDATES]

_AS_GOOD = 1.25, 0.001
"""So many times the lowest loss, and nats on top, are as good as it: 64 samples tell no less. With
1.05, every fourth layer was picked for smol at 2 % (.138 for .153), which kept 76 % (72-81) of 490
test questions, less than the cheaper choice once."""

_SAME_TIME = 0.95
"""Of a candidate's time is what another one has to do it in: timings of the same work were 2 to
10 % apart (two exponents of importance, pocket, 11 rounds, two idle cores), and between few tokens
and fewer a small model's prefill hardly gets faster, so that chance would pick."""

_LOOKS = 16, 32, 64, 128
"""Samples after which candidates are dropped, where there are more."""

_CLEARLY = 2.0
"""So many times what is as good as the best is clearly behind. Of 64 samples, drawn from other
questions again and again, this left 56 % of the work on pocket and 58 on smol, and picked policies
that kept as much."""


def prefills(samples: int) -> float:
    """Dense prefills that the trials cost at most, about, by their share of visual tokens, as if
    nothing was dropped; the timing too, as if it saved nothing."""
    return samples * len(CANDIDATES) * sum(RATIOS) + turns(_CHOICES)


def steps() -> int:
    """How often `try_policies` calls `on_step`."""
    return len(_CHOICES) * (len(_LOOKS) + 1) + turns(_CHOICES)


def try_policies(
    model: Any,
    selectors: Selectors,
    samples: Sequence[Answered],
    on_step: Callable[[], None],
    group: Group | None = None,
) -> tuple[Trial, ...]:
    """Every candidate at every ratio.

    Args:
        model: of a known family.
        selectors: with carries.
        samples: that nothing was fitted on; of a group, those of this process.
        on_step: called after each of `steps()`.
        group: of processes that share the samples.
    """
    group = group or Group()
    times = time_policies(model, selectors, _CHOICES, samples, on_step, group)
    total = sum(group.gather([len(samples)]))
    # Of every answer, its loss and whether it is the same.
    found: dict[Choice, list[tuple[float, bool]]] = {choice: [] for choice in _CHOICES}
    left = {*_CHOICES}
    with seen_once(model):
        for first, stop in pairwise((0, *_LOOKS, math.inf)):
            own = [one for i, one in enumerate(samples) if first <= group.number(i) < stop]
            batches = put_together(model, own)
            for choice in _CHOICES:
                if choice in left and first < total:
                    found[choice] += each_kept(model, selectors, *choice, batches, group)
                on_step()
            if stop < total:
                good = _as_good(_trials(found, times), _CLEARLY)
                left = {(one.keep, one.policy) for those in good.values() for one in those}
    return _trials(found, times)


def _trials(
    found: Mapping[Choice, Sequence[tuple[float, bool]]], times: Mapping[Choice, float]
) -> tuple[Trial, ...]:
    """Of what was found so far; whoever saw fewer samples than others was dropped."""
    most = max(len(every) for every in found.values())
    trials = []
    for choice, every in found.items():
        kept = mean_kept(every)
        dropped_after = len(every) if len(every) < most else None
        trials.append(
            Trial(*choice, kept.loss, kept.same, times[choice], kept.capped, dropped_after)
        )
    return tuple(trials)


def pick(trials: Sequence[Trial]) -> tuple[Picked, ...]:
    """The best policy for each ratio, ascending.

    Args:
        trials: all with their times; of the same ratio, the cheapest first.
    """
    return tuple(Picked(keep, good[0].policy) for keep, good in _as_good(trials).items())


def _as_good(trials: Sequence[Trial], slack: float = 1.0) -> dict[float, list[Trial]]:
    """For each ratio, ascending, those that are as good as the best of those that are worth their
    time, or `slack` times as bad; of dropped ones none."""
    found = {}
    for keep in sorted({one.keep for one in trials}):
        those = [one for one in trials if one.keep == keep and one.dropped_after is None]
        behind = [
            _times_as_much(_loss(one), _least_in(_SAME_TIME * _time(one), trials)) for one in those
        ]
        # Where none is worth its time, those that are nearest to it.
        most = _AS_GOOD[0] * max(1.0, min(behind))
        least = min(_loss(one) for one, by in zip(those, behind, strict=True) if by <= most)
        found[keep] = [
            one
            for one, by in zip(those, behind, strict=True)
            if by <= slack * most and _times_as_much(_loss(one), least) <= slack * _AS_GOOD[0]
        ]
    return found


def _times_as_much(loss: float, least: float) -> float:
    """`loss` over `least`, but for what tells nothing."""
    return max(0.0, loss - _AS_GOOD[1]) / max(least, 1e-9)


def _least_in(time: float, trials: Sequence[Trial]) -> float:
    """What the best candidate loses in a time; infinite where none is as fast.

    What a candidate loses between two ratios lies on a line of the logarithms of the losses, over
    the time; at the end of every such line stands the dense model, which loses nothing.
    """
    least = math.inf
    for policy in {one.policy for one in trials}:
        points = [(_time(one), _loss(one)) for one in trials if one.policy == policy]
        least = min(least, _loss_at(time, sorted([*points, (1.0, 0.0)])))
    return least


def _loss(trial: Trial) -> float:
    assert trial.capped is not None, "only files from before have none"
    return trial.capped


def _time(trial: Trial) -> float:
    assert trial.time is not None, "only files from before have none"
    return trial.time


def _loss_at(time: float, points: Sequence[tuple[float, float]]) -> float:
    """Loss after `time`, between the points before and behind it; infinite before the first."""
    more = _AS_GOOD[1]
    least = min((loss for at, loss in points if at <= time), default=math.inf)
    for (before, high), (after, low) in pairwise(points):
        if before <= time < after:
            step = (time - before) / (after - before)
            logarithm = (1 - step) * math.log(high + more) + step * math.log(low + more)
            least = min(least, math.exp(logarithm) - more)
    return least
