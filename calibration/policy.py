"""Which policy keeps the model's answers, found by trying: models differ.

Every candidate is tried at every one of `RATIOS` on samples that nothing was fitted on, and the one
with the lowest loss is picked; of two that are as good, the cheaper. So what alvts does to a model
it was calibrated on is never worse, on those samples, than the paper's own way.

Measured before anything of this was in the engine (a throw-away script; percent of whole answers
equal to the dense model's, KL over the answer in brackets; pocket 105 questions, 16 layers; smol at
the adapter it started from 56 questions, 30 layers; the same number of tokens in every layer):

    of 256 tokens                     pocket 28    13           8            5
    each layer, importance (paper)    81.0 (.595)
    each, + diversity, carry          90.5 (.342)
    each, + carry, mass               96.2 (.063)  81.9 (.515)  74.3 (.659)  58.1 (1.43)
    each, + diversity, mass                        92.4 (.160)
    each, + diversity, carry, mass    99.0 (.011)  99.0 (.011)  95.2 (.105)  83.8 (.435)
    every 4th, the same               96.2 (.031)  97.1 (.053)  92.4 (.114)  77.1 (.623)
    every 2nd, the same                            95.2 (.056)
    once, + diversity, mass           95.2 (.047)  95.2 (.061)  90.5 (.184)  71.4 (.614)
    each, all and a summary           99.0 (.010)  97.1 (.023)  94.3 (.137)  91.4 (.220)

    of 256 tokens                     smol 28      13
    each, + diversity, carry          92.9 (.029)  87.5 (.095)
    each, + diversity, carry, mass    92.9 (.026)  85.7 (.108)
    every 4th, the same               94.6 (.008)  89.3 (.072)
    every 4th, + diversity, mass                   0.0 (10.6)
    once, + diversity, mass           98.2 (.010)  91.1 (.034)

- Stale tokens are poison to smol and not to pocket: hence the carry, or one choice for all layers.
- Diversity and mass by the latent of scoring in place of the whole state: as good (pocket, each,
  13: 98.1 (.019); once 94.3 (.064); smol, once, 13: 92.9 (.021)), and cheap: it is what is built.
- The exponent of importance: .6 in place of .3 on pocket 96.2 (.044) each, 93.3 (.072) once, on
  smol 89.3 (.037) once, all at 13.
- On smol importance hardly helps a single choice (120 other questions, the shipped selectors):
  exponent .03, .1, .3, .6 at 28: 95.0 (.024), -, 92.5 (.025), 91.7 (.029); at 13: 90.8 (.047),
  89.2 (.054), 87.5 (.069), 88.3 (.088); at 5: 83.3 (.328), 83.3 (.320), 80.8 (.388), 77.5 (.466).
  Every 8th and every 15th layer with carry, .3: at 28 90.8 (.039), 95.0 (.022); at 13 87.5 (.100),
  90.0 (.077); at 5 69.2 (.424), 73.3 (.465). So .05 is tried too.
- Every 4th with .6 had the lower loss on pocket's 64 at 2 % (.269 for .305) and kept no more of the
  490 test questions: 85.1 % (82-88) for 86.7 (84-90), at 3 % 94.0 (92-96) for 95.2 (93-97).
- A summary (one key and value from the mean of what is skipped) pays at 2 % on pocket and nowhere
  else; not built.
- Another number of tokens in every layer, by 40 moves on the loss of 70 other samples, under "each,
  all" on pocket: at 8 tokens .192 to .102 on the 105 questions, at 5 .301 to .879, while on the 70
  it fell from .448 to .244: it fits the samples. So schedules are no longer searched for; files
  of format 3 hold some, found so for the paper's way, and they are still spent.
- The carry above had rank 32 on pocket (24: the same, `carry.KEEP`) and 64 on smol; what ships has
  32 on both. Other ranks were not compared.
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

_AS_GOOD = 1.05, 0.001
"""So many times the lowest loss, and nats on top, are as good as it."""


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
