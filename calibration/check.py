"""Whether selectors still serve a model whose weights are not those they were fitted on: what they
keep of its answers, beside what their file says that they kept when they were fitted."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from alvts_cli.artifact import Artifact
from alvts_cli.data import Reader, Sample
from alvts_cli.errors import AlvtsError
from alvts_cli.evaluate.bootstrap import Bootstrap, Interval
from alvts_cli.families.vision import seen_once
from alvts_cli.header import Trial
from alvts_cli.spread import Group

from .answers import each_kept, put_together
from .arguments import family_to_run, given, of_kind
from .asking import answer_tokens, ask
from .run import Watch

CHANCE = 0.01
"""Fewer answers are kept than then, if chance alone would make it so more seldom than this."""

LOSS = 3.0
"""The loss is higher than then, if all of its 95 % interval is above so many times the other, which
is a mean of few large values, too, of which no interval is known."""


@dataclass(frozen=True)
class Held:
    """What is left of the answers at one keep ratio.

    Attributes:
        then: what the selectors' file says of the weights that they were fitted on, under the
            policy that was picked for the ratio.
        samples_then: so many samples that was measured on.
        same: share of the answers that are the dense model's own, token for token, under the same
            policy now, with its 95 % interval.
        loss: KL of the answers' tokens to the dense model's, in nats, likewise.
        samples: so many samples these were measured on.
    """

    then: Trial
    samples_then: int
    same: Interval
    loss: Interval
    samples: int

    @property
    def fewer(self) -> bool:
        """Whether fewer answers are kept than then, beyond chance."""
        now = round(self.same.value * self.samples)
        then = round(self.then.same * self.samples_then)
        return chance_of_so_few(now, self.samples, then, self.samples_then) < CHANCE

    @property
    def worse(self) -> bool:
        """Whether the selectors do worse than then: fewer answers, or a much higher loss."""
        return self.fewer or self.loss.low > LOSS * self.then.loss


@dataclass(frozen=True)
class Check:
    """Whether selectors still serve a model.

    Attributes:
        other_weights: whether the model has other weights than those they were fitted on.
        data: what was measured on, in words.
        data_then: what the file's own figures were measured on.
        held: one entry for each keep ratio that a policy was picked for, ascending.
    """

    other_weights: bool
    data: str
    data_then: str
    held: tuple[Held, ...]

    @property
    def serves(self) -> bool:
        """Whether they do as well as then, as far as so few samples can tell."""
        return not any(one.worse for one in self.held)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        ratios = [{**asdict(one), "worse": one.worse} for one in self.held]
        return {
            "serves": self.serves,
            "other_weights": self.other_weights,
            "data": self.data,
            "data_then": self.data_then,
            "ratios": ratios,
        }


def check(
    model: Any,
    processor: Any,
    artifact: Artifact,
    samples: Reader | Iterable[Sample],
    *,
    watch: Watch | None = None,
    group: Group | None = None,
) -> Check:
    """Measure what `artifact` keeps of the answers of `model`, at every keep ratio that a policy
    was picked for, and set it beside the artifact's own record.

        found = check(tuned, processor, artifact, read_data(Source("photos/"), 32, seed=1))
        found.serves

    The record tells of the base model's answers, and so it is a fair measure where the samples are
    of the same kind. Some of the loss may be there with selectors of the model's own, too: whether
    to fit again is then for the fit to show.

    Args:
        model: of the shape that the selectors were fitted for, in eval mode.
        processor: of the model.
        artifact: with a record of tried policies.
        samples: 32 of them are enough; best others than those that were fitted.
        watch: is told of every sample that was answered or skipped.
        group: of processes that share the samples; all of them get the result.

    Raises:
        AlvtsError: selectors of another shape, a file without such a record, a part of a model, an
            attached one, what is no sample, fewer than `asking.FEWEST` usable ones.
    """
    watch, group = given(watch, Watch), given(group, Group)
    then = recorded(of_kind(artifact, Artifact, "the selectors"))
    family_to_run(model)
    artifact = artifact.check_model(model, other_weights=True)
    asked = ask(model, processor, samples, answer_tokens(artifact), watch, group)
    resampled = Bootstrap(asked.count, seed=0)
    record = artifact.calibration
    held = []
    batches = put_together(model, asked.answers)
    with seen_once(model):
        for trial in then:
            every = each_kept(model, artifact, trial.keep, trial.policy, batches, group)
            loss, same = (np.array(values, dtype=float) for values in zip(*every, strict=True))
            now = resampled.mean(same), resampled.mean(loss)
            held.append(Held(trial, record.samples_tried, *now, asked.count))
    return Check(artifact.other_weights, asked.data, record.data_tried, tuple(held))


def recorded(artifact: Artifact) -> tuple[Trial, ...]:
    """The trials of the policies that were picked, by ascending keep ratio.

    Raises:
        AlvtsError: the file has none.
    """
    picked = {(one.keep, one.policy) for one in artifact.picked}
    found = [one for one in artifact.calibration.trials if (one.keep, one.policy) in picked]
    if not found:
        raise AlvtsError(
            f"the selectors of {artifact.model_id} have no record of the answers they keep (older "
            "formats and the paper's form have none), so there is nothing to check against; fit "
            "them again with alvts calibrate"
        )
    return tuple(sorted(found, key=lambda one: one.keep))


def chance_of_so_few(now: int, of_now: int, then: int, of_then: int) -> float:
    """How often chance alone gives the first group so few, or fewer, of all that are the same:
    Fisher's exact test, one-sided.

    Args:
        now, of_now: so many of so many.
        then, of_then: in the other group.
    """
    every, same = of_now + of_then, now + then
    ways = sum(
        math.comb(of_now, n) * math.comb(of_then, same - n)
        for n in range(max(0, same - of_then), now + 1)
    )
    return ways / math.comb(every, same)
