"""What the dense model answers to samples that nothing is fitted on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from alvts_cli.artifact import Artifact
from alvts_cli.data import Reader, Sample
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of
from alvts_cli.families.placing import input_device
from alvts_cli.prompts import build_inputs
from alvts_cli.spread import Group

from .answers import Answered, answered
from .arguments import each_sample
from .run import Watch, in_words
from .settings import Settings

FEWEST = 16
"""With fewer, hardly any difference would be beyond chance."""


@dataclass(frozen=True)
class Asked:
    """Samples with the dense model's answers.

    Attributes:
        answers: of a group, those of this process.
        count: of all processes' samples.
        data: what they are, in words.
    """

    answers: list[Answered]
    count: int
    data: str


def ask(
    model: Any,
    processor: Any,
    samples: Reader | Iterable[Sample],
    answer_tokens: int,
    watch: Watch,
    group: Group,
) -> Asked:
    """Let the dense model answer every sample.

    Args:
        model: of a known family.
        processor: of the model.
        samples: to ask about.
        answer_tokens: the longest answer.
        watch: is told of every sample that was answered or skipped.
        group: of processes that share the samples.

    Raises:
        AlvtsError: what is no sample, or fewer than `FEWEST` usable ones.
    """
    answers: list[Answered] = []
    broken: list[str] = []
    count = 0
    text_config: Any = family_of(model).text_model(model).config
    longest = text_config.max_position_embeddings - answer_tokens
    for sample in each_sample(samples):
        try:
            inputs = build_inputs(processor, sample.images, sample.prompt, longest)
        except AlvtsError as error:
            broken.append(f"{sample.id}: {error}")
            watch.skipped(broken[-1])
            continue
        if group.mine(count):
            inputs = inputs.to(input_device(model), model.dtype)
            answers.append(answered(model, inputs, answer_tokens))
        count += 1
        watch.sample(count)
    if isinstance(samples, Reader):
        broken = samples.skipped + broken
    if count < FEWEST:
        why = f"; {len(broken)} were skipped, such as {broken[0]}" if broken else ""
        raise AlvtsError(f"only {count} usable samples, at least {FEWEST} are needed{why}")
    return Asked(answers, count, in_words(samples))


def answer_tokens(artifact: Artifact) -> int:
    """The longest answer when the selectors were calibrated, so that figures are comparable."""
    then = artifact.calibration.settings.get("answer_tokens")
    return then if isinstance(then, int) else Settings.answer_tokens
