"""The whole of a calibration, from samples to an artifact."""

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from alvts_cli import __version__
from alvts_cli.artifact import Artifact, CalibrationRecord, LayerFit, fingerprint
from alvts_cli.engine import default_rank
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of
from alvts_cli.prompts import build_inputs

from .answers import Answered, answered
from .budget import RATIOS
from .capture import Captured, capture
from .checkpoint import Checkpoint
from .data import Reader, Sample
from .refine import Joint, find_schedules
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
        trial: after a schedule was tried; gets the number so far, and that of all.
    """

    sample: Callable[[int], None] = _ignore
    skipped: Callable[[str], None] = _ignore
    layer: Callable[[int, int, LayerFit], None] = _ignore
    trial: Callable[[int, int], None] = _ignore


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
) -> Artifact:
    """Fit the selectors of every layer of `model`, which is left as it was.

        artifact = calibrate(model, processor, read_data("photos/", None, 256, seed=0))
        save_artifact(artifact, Path("my.alvts.safetensors"))

    The same model, samples and settings on the same machine and number of threads give the same
    artifact, also when resumed.

    Args:
        model: of a known family, loaded whole and in eval mode.
        processor: of the model.
        samples: read one at a time; images are not held on to. Budgets are measured on the first
            of them, so they are to come in no particular order.
        settings: None for the defaults.
        data: what the samples are, in words; by default what a `Reader` says.
        model_id: hub id, name or folder, for the artifact; by default the model's own.
        revision: commit on the hub, for the artifact.
        checkpoint: keeps finished layers; the caller removes it once the artifact is written.
        watch: is told how far things are.

    Raises:
        AlvtsError: an unknown architecture, quantised weights, too few usable samples, a rank
            above the model's, numbers that are not finite, or a checkpoint of another run.
    """
    settings = settings or Settings()
    watch = watch or Watch()
    family = family_of(model)
    family.check(model)
    config: Any = family.text_model(model).config
    layers: Any = family.layers(model)
    most = min(family.query_key(layers[0], config).w_k.shape)
    rank = settings.rank or min(default_rank(config.hidden_size), most)
    if rank > most:
        raise AlvtsError(f"rank {rank} is more than this model allows; at most {most}")
    settings = replace(settings, rank=rank)
    values = fingerprint(model)
    versions = {
        "alvts": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }

    captured, answers, ids = _capture_all(model, processor, samples, settings, watch)
    fitted, held_out, order = _split(captured, settings)
    digest = hashlib.sha256("\n".join(ids[i] for i in order).encode()).hexdigest()
    if data is None:
        data = samples.description if isinstance(samples, Reader) else "samples given in memory"
    if checkpoint:
        checkpoint.begin(
            {
                "weights": hashlib.sha256(values.numpy().tobytes()).hexdigest(),
                "dtype": str(model.dtype),
                "data": data,
                "samples": digest,
                # Layers are fitted alike with a budget and without.
                "settings": {k: v for k, v in asdict(settings).items() if k != "budget"},
                "versions": versions,
            }
        )

    results = sweep(
        model,
        fitted,
        held_out,
        # Shallow copies: the sweep replaces the hidden states, and schedules start at layer 0.
        [replace(one, sample=replace(one.sample)) for one in answers[: settings.loss_samples]],
        settings,
        rank,
        checkpoint,
        lambda i, fit: watch.layer(i, len(layers), fit),
    )
    counts = len(fitted), len(held_out)
    del captured, fitted, held_out  # Their last hidden states are of no use, and large.
    selectors = tuple(result.selector for result in results)
    losses = tuple(result.losses for result in results) if answers else ()
    schedules: tuple[tuple[float, ...], ...] = ()
    if answers:
        joint = Joint(model, selectors, answers)
        schedules = find_schedules(joint, losses, settings.seed, watch.trial)
    return Artifact(
        layers=selectors,
        default_keep=settings.keep,
        schedules=schedules,
        model_id=model_id or config_name(model),
        revision=revision,
        family=family.name,
        fingerprint=values,
        calibration=CalibrationRecord(
            data=data,
            fitted=counts[0],
            held_out=counts[1],
            sample_ids=digest,
            settings=asdict(settings),
            versions=versions,
            layers=tuple(result.fit for result in results),
            ratios=RATIOS if answers else (),
            losses=losses,
        ),
    )


def config_name(model: Any) -> str:
    """What the model was loaded from, as far as it knows."""
    return getattr(model.config, "_name_or_path", "") or "a model without a name"


def _capture_all(
    model: Any, processor: Any, samples: Iterable[Sample], settings: Settings, watch: Watch
) -> tuple[list[Captured], list[Answered], list[str]]:
    """What reaches layer 0 of all samples that can be used, the first of them again with an answer
    where there is to be a budget, and their ids."""
    text_config: Any = family_of(model).text_model(model).config
    captured: list[Captured] = []
    answers: list[Answered] = []
    longest = text_config.max_position_embeddings
    if settings.budget:
        longest -= settings.answer_tokens
    ids: list[str] = []
    broken: list[str] = []
    for sample in samples:
        try:
            # The prompt alone, without the answer: it is what prefill sees in use.
            inputs = build_inputs(processor, sample.images, sample.prompt, longest)
            inputs = inputs.to(model.device, model.dtype)
            captured.append(capture(model, inputs))
        except AlvtsError as error:
            broken.append(f"{sample.id}: {error}")
            watch.skipped(broken[-1])
            continue
        if settings.budget and len(answers) < settings.budget_samples:
            answers.append(answered(model, inputs, settings.answer_tokens))
        ids.append(sample.id)
        watch.sample(len(ids))
    if isinstance(samples, Reader):
        broken = samples.skipped + broken
    if len(captured) < 3:
        why = f"; {len(broken)} were skipped, such as {broken[0]}" if broken else ""
        raise AlvtsError(f"only {len(captured)} usable samples, at least 3 are needed{why}")
    return captured, answers, ids


def _split(
    captured: list[Captured], settings: Settings
) -> tuple[list[Captured], list[Captured], list[int]]:
    """Samples to fit on, samples to measure on, and the order that was drawn."""
    order = list(range(len(captured)))
    random.Random(settings.seed).shuffle(order)
    count = min(len(order) - 2, max(1, round(len(order) * settings.held_out)))
    shuffled = [captured[i] for i in order]
    return shuffled[:-count], shuffled[-count:], order
