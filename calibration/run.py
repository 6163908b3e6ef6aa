"""The whole of a calibration, from samples to an artifact."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import count
from statistics import median
from typing import Any

import torch

from alvts_cli import __version__
from alvts_cli.artifact import Artifact, fingerprint
from alvts_cli.data import Reader, Sample
from alvts_cli.digests import of_processor, of_question
from alvts_cli.engine import Carry, default_carry_rank, default_rank, paper_rank
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of
from alvts_cli.families.placing import input_device
from alvts_cli.header import CalibrationRecord, LayerFit
from alvts_cli.prompts import build_inputs
from alvts_cli.spread import Group

from .answers import Answered, answered
from .arguments import each_sample, family_to_run, given, of_kind
from .capture import Captured, capture
from .carry import fit_carries
from .checkpoint import Checkpoint
from .policy import pick, steps, try_policies
from .settings import Settings
from .sweep import sweep


def _ignore(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Watch:
    """Called as a run goes on.

    Attributes:
        sample: after a sample went through the vision tower; gets their number so far.
        skipped: gets a line about a sample that could not be used.
        layer: after a layer is finished (and on disk, with a checkpoint); gets its index, from
            0, the number of layers, and how good the fit is.
        carried: after a layer's carried update was fitted; gets its index and the layers' number.
        trial: after a step of trying policies; gets their number so far, and that of all.
    """

    sample: Callable[[int], None] = _ignore
    skipped: Callable[[str], None] = _ignore
    layer: Callable[[int, int, LayerFit], None] = _ignore
    carried: Callable[[int, int], None] = _ignore
    trial: Callable[[int, int], None] = _ignore

    def __post_init__(self) -> None:
        """
        Raises:
            AlvtsError: one of them cannot be called.
        """
        for field in fields(self):
            value = getattr(self, field.name)
            if not callable(value):
                raise AlvtsError(f"{field.name} of a Watch is a function, not {value!r}")


def calibrate(
    model: Any,
    processor: Any,
    samples: Reader | Iterable[Sample],
    settings: Settings | None = None,
    *,
    data: str | None = None,
    model_id: str | None = None,
    revision: str | None = None,
    checkpoint: Checkpoint | None = None,
    watch: Watch | None = None,
    group: Group | None = None,
) -> Artifact:
    """Fit the selectors of every layer of `model`, which is left as it was.

        artifact = calibrate(model, processor, read_data(Source("photos/"), 256, seed=0))
        save_artifact(artifact, Path("my.alvts.safetensors"))

    The same model, samples and settings on the same machine and number of threads give the same
    selectors, also when resumed. The times of the policies are measured, so they differ; and where
    two policies are as good, so may the picked one.

    Args:
        model: of a known family, loaded whole and in eval mode.
        processor: of the model.
        samples: read one at a time; images are not held on to, but for those that policies are
            tried on. Which are fitted goes by their number, so they are to come in no particular
            order.
        settings: None for the defaults.
        data: what the samples are, in words; by default what a `Reader` says.
        model_id: hub id, name or folder, for the artifact; by default the model's own.
        revision: commit on the hub, for the artifact.
        checkpoint: keeps finished layers; the caller removes it once the artifact is written.
        watch: is told how far things are.
        group: of processes that share the work, each with the same model, samples and settings;
            all of them get the artifact.

    Raises:
        AlvtsError: an unknown architecture, a part of a model, an attached one, quantised weights,
            arguments of another kind, too few usable samples, a rank above the model's, numbers
            that are not finite, or a checkpoint of another run.
    """
    settings, watch, group = given(settings, Settings), given(watch, Watch), given(group, Group)
    if checkpoint is not None:
        of_kind(checkpoint, Checkpoint)
    family = family_to_run(model)
    config: Any = family.text_model(model).config
    layers: Any = family.layers(model)
    paper = settings.form == "paper"
    projections = family.query_key(layers[0])
    if paper and (projections.q_norm is not None or projections.k_norm is not None):
        raise AlvtsError(
            "the paper's form folds queries and keys into two matrices, which the norms that this "
            "model has between them do not allow; calibrate without --form paper"
        )
    most = min((projections.w_q if paper else projections.w_k).shape)
    usual = paper_rank if paper else default_rank
    rank = settings.rank or min(usual(config.hidden_size), most)
    if rank > most:
        raise AlvtsError(f"rank {rank} is more than this model allows; at most {most}")
    settings = replace(settings, rank=rank)
    values = fingerprint(model)
    versions = {
        "alvts": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }

    fitted, held_out, answers, ids, seen = _capture_all(
        model, processor, samples, settings, watch, group
    )
    data = in_words(samples) if data is None else data
    if checkpoint:
        checkpoint.begin(
            {
                "weights": hashlib.sha256(values.numpy().tobytes()).hexdigest(),
                "dtype": str(model.dtype),
                "data": data,
                "samples": _digest(seen),
                "processor": of_processor(processor),
                "settings": asdict(settings),
                "versions": versions,
            }
        )
    # Nobody writes a layer before all have looked.
    group.gather([group.rank])

    # Shallow copies: the sweep replaces the hidden states, and the others start at layer 0.
    again = [replace(one) for one in fitted[: settings.carry_samples]]
    tokens = [int(one.visual.sum()) for one in (*fitted, *held_out)]
    results = sweep(
        model,
        fitted,
        held_out,
        settings,
        rank,
        checkpoint,
        lambda i, fit: watch.layer(i, len(layers), fit),
        group,
    )
    counts = len(fitted), len(held_out)
    del fitted, held_out  # Their last hidden states are of no use, and large.
    selectors: tuple[Any, ...] = tuple(result.selector for result in results)
    carries: tuple[Carry, ...] = ()
    if not paper:
        carry_rank = default_carry_rank(config.hidden_size)
        carries = fit_carries(
            model, selectors, again, carry_rank, lambda i: watch.carried(i, len(layers))
        )
    record = CalibrationRecord(
        data=data,
        fitted=counts[0],
        held_out=counts[1],
        sample_ids=_digest(ids),
        settings=asdict(settings),
        versions=versions,
        layers=tuple(result.fit for result in results),
    )
    artifact = Artifact(
        layers=selectors,
        default_keep=settings.keep,
        schedules=(),
        model_id=model_id or config_name(model),
        revision=revision,
        family=family.name,
        fingerprint=values,
        calibration=record,
        carries=carries,
        visual_tokens=int(median(tokens)),
    )
    if paper:
        return artifact
    done = count(1)
    trials = try_policies(model, artifact, answers, lambda: watch.trial(next(done), steps()), group)
    return replace(artifact, picked=pick(trials), calibration=replace(record, trials=trials))


def in_words(samples: Reader | Iterable[Sample]) -> str:
    """What samples are, for a record."""
    return samples.description if isinstance(samples, Reader) else "samples given in memory"


def config_name(model: Any) -> str:
    """What the model was loaded from, as far as it knows."""
    return getattr(model.config, "_name_or_path", "") or "a model without a name"


def _capture_all(
    model: Any,
    processor: Any,
    samples: Iterable[Sample],
    settings: Settings,
    watch: Watch,
    group: Group,
) -> tuple[list[Captured], list[Captured], list[Answered], list[str], list[str]]:
    """What reaches layer 0 of the samples to fit on and of those to measure on, the first of the
    latter again with their answers (of a group, every process's share), and of all samples the ids
    and digests of what they hold."""
    text_config: Any = family_of(model).text_model(model).config
    fitted: list[Captured] = []
    held_out: list[Captured] = []
    answers: list[Answered] = []
    longest = text_config.max_position_embeddings - settings.answer_tokens
    stride = max(2, round(1 / settings.held_out))
    ids: list[str] = []
    seen: list[str] = []
    broken: list[str] = []
    for sample in each_sample(samples):
        measures = len(ids) % stride == 0
        try:
            # The prompt alone, without the answer: it is what prefill sees in use.
            inputs = build_inputs(processor, sample.images, sample.prompt, longest)
            inputs = inputs.to(input_device(model), model.dtype)
            (held_out if measures else fitted).append(capture(model, inputs))
        except AlvtsError as error:
            broken.append(f"{sample.id}: {error}")
            watch.skipped(broken[-1])
            continue
        number = len(held_out) - 1
        tries = measures and settings.form != "paper"
        if tries and number < settings.policy_samples and group.mine(number):
            answers.append(answered(model, inputs, settings.answer_tokens))
        ids.append(sample.id)
        seen.append(of_question(sample.images, sample.id, sample.prompt))
        watch.sample(len(ids))
    if isinstance(samples, Reader):
        broken = samples.skipped + broken
    if len(ids) < 3:
        why = f"; {len(broken)} were skipped, such as {broken[0]}" if broken else ""
        raise AlvtsError(f"only {len(ids)} usable samples, at least 3 are needed{why}")
    return fitted, held_out, answers, ids, seen


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
