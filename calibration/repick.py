"""Picking the policies of fitted selectors again: on another machine, where other policies are
fast, on a quantised model, on other data, or on more samples than the fit held out."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from typing import Any

from alvts_cli.artifact import Artifact
from alvts_cli.data import Reader, Sample
from alvts_cli.errors import AlvtsError
from alvts_cli.header import TriedOn
from alvts_cli.spread import Group

from .arguments import family_to_run, given, of_kind
from .asking import answer_tokens, ask
from .policy import pick, steps, try_policies
from .run import Watch


def repick(
    model: Any,
    processor: Any,
    artifact: Artifact,
    samples: Reader | Iterable[Sample],
    *,
    watch: Watch | None = None,
    group: Group | None = None,
) -> Artifact:
    """Time every policy here, try it on `samples`, and pick.

        artifact = repick(model, processor, artifact, read_data(Source("photos/"), 256, seed=1))

    Args:
        model: that the selectors were fitted for, in any precision, in eval mode.
        processor: of the model.
        artifact: selectors with carried updates; of any format that has them.
        samples: best others than those that were fitted.
        watch: is told of every sample and trial.
        group: of processes that share the samples; all of them get the result.

    Returns:
        The same selectors with other policies, and the record of these trials.

    Raises:
        AlvtsError: selectors of another model, or some that policies cannot be tried with; a part
            of a model, or an attached one; what is no sample; fewer than `asking.FEWEST` usable
            ones.
    """
    watch, group = given(watch, Watch), given(group, Group)
    check_pickable(of_kind(artifact, Artifact, "the selectors"))
    family_to_run(model)
    artifact = artifact.check_model(model)
    asked = ask(model, processor, samples, answer_tokens(artifact), watch, group)
    done = count(1)
    trials = try_policies(
        model, artifact, asked.answers, lambda: watch.trial(next(done), steps()), group
    )
    tried_on = TriedOn(asked.data, asked.count)
    record = replace(artifact.calibration, trials=trials, tried_on=tried_on)
    return replace(artifact, picked=pick(trials), calibration=record)


def check_pickable(artifact: Artifact) -> None:
    """
    Raises:
        AlvtsError: the selectors have nothing to carry skipped tokens with.
    """
    if not artifact.carries:
        raise AlvtsError(
            f"the selectors of {artifact.model_id} have no carried updates (older formats and the "
            "paper's form have none), so not every policy can be tried; fit them again with alvts "
            "calibrate"
        )
