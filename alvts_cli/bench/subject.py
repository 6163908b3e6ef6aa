"""What is measured: a model, a batch of equal prompts, selectors, and how much they keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifact import load_artifact
from ..engine import Keep, Policy, Selectors, keep_of, parse_policy, policy_of
from ..families import family_of
from ..hub import selectors_file
from ..memory import memory_need, prefill_need, require_memory
from ..models import find_selectors, load_model, parse_device, parse_dtype, usual_dtype
from ..prompts import build_inputs, read_image
from ..shapes import cut_tower, random_model, shape_config
from .compiled import weights_frozen
from .inputs import check_length, synthetic_inputs, usual_visual_tokens
from .selectors import random_selectors

NEW_TOKENS = 16
"""Tokens of every generation, its end token ignored."""


@dataclass(frozen=True)
class Prompt:
    """Size of the prompt, per sample."""

    visual_tokens: int
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Both kinds."""
        return self.visual_tokens + self.text_tokens


@dataclass(frozen=True)
class Subject:
    """All that a measurement needs.

    Attributes:
        model: in eval mode.
        inputs: on the model's device, without padding, the same prompt `batch` times.
        prompt: its size.
        selectors: of this model.
        keep: what each layer keeps.
        policy: which pieces are in use.
        compile: run all decoders through `torch.compile`.
        settings: plain values that say what this is, for the report.
    """

    model: Any
    inputs: dict[str, Tensor]
    prompt: Prompt
    selectors: Selectors
    keep: Keep
    policy: Policy
    compile: bool
    settings: dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What the user asks for.

    Attributes:
        name: of the model.
        selectors: file of fitted ones, or None for those that are found or made up.
        keep: as `resolve_keep` reads it; None for what the selectors say.
        policy: name of one, or None for what was picked for `keep`.
        batch: equal prompts at once.
        visual_tokens, text_tokens: of a made-up prompt, as in `synthetic_inputs`.
        device, dtype: as in `load_model`.
        compile: run all decoders through `torch.compile`.
        trust_remote_code: as in `load_model`.
        other_weights: as in `Artifact.check_model`.
    """

    name: str
    selectors: str | None
    keep: str | None
    policy: str | None
    batch: int
    visual_tokens: int | None
    text_tokens: int
    device: str
    dtype: str | None
    compile: bool
    trust_remote_code: bool = False
    other_weights: bool = False


def random_subject(
    wanted: Wanted,
    layers: int | None,
    hidden_size: int | None,
    say: Callable[[str], None],
    tower_layers: int | None = None,
) -> Subject:
    """A known model's shape with random weights and, unless a file is named, random selectors.

    Args:
        wanted: with the name of a known model.
        layers: decoder layers to cut it to, or None for all.
        hidden_size: width to cut it to, or None for its own.
        say: told the memory need before anything is built.
        tower_layers: layers to cut the vision tower to, or None for all.

    Raises:
        AlvtsError: an unknown name, too little memory, or what `synthetic_inputs` and
            `resolve_keep` refuse.
    """
    place = parse_device(wanted.device)
    precision = usual_dtype(place) if wanted.dtype is None else parse_dtype(wanted.dtype)
    config = shape_config(wanted.name, layers, hidden_size)
    if tower_layers is not None:
        cut_tower(config, tower_layers)
    visual = wanted.visual_tokens or usual_visual_tokens(config)
    check_length(config, visual + wanted.text_tokens)
    tokens = visual + wanted.text_tokens + NEW_TOKENS
    need = memory_need(config, precision, tokens, wanted.batch)
    say(require_memory(wanted.name, need, place))
    model = random_model(config, precision, place)
    inputs = synthetic_inputs(model, wanted.batch, wanted.visual_tokens, wanted.text_tokens)
    selectors: Selectors = random_selectors(model)
    if wanted.selectors is not None:
        selectors = _fitted(selectors_file(wanted.selectors), model, wanted)
    origin = wanted.selectors or "random"
    cut = layers is not None or hidden_size is not None
    return _subject(wanted, model, inputs, selectors, origin, True, cut)


def loaded_subject(wanted: Wanted, images: Sequence[Path], prompt: str) -> Subject:
    """A model as it is, with its selectors; the prompt is made up where there are no images.

    Raises:
        AlvtsError: whatever of all this cannot be had.
    """
    pictures = [read_image(path) for path in images]
    loaded = load_model(wanted.name, wanted.device, wanted.dtype, wanted.trust_remote_code)
    model = loaded.model
    path = find_selectors(loaded, wanted.selectors)
    selectors = _fitted(path, model, wanted)
    if pictures:
        longest = model.config.text_config.max_position_embeddings - NEW_TOKENS
        one = build_inputs(loaded.processor, pictures, prompt, longest)
        one = one.to(model.device, model.dtype)
        _require_room(wanted, model, one["input_ids"].shape[1])
        inputs = {key: torch.cat([value] * wanted.batch) for key, value in one.items()}
    else:
        visual = wanted.visual_tokens or usual_visual_tokens(model.config)
        _require_room(wanted, model, visual + wanted.text_tokens)
        inputs = synthetic_inputs(model, wanted.batch, wanted.visual_tokens, wanted.text_tokens)
    return _subject(wanted, model, inputs, selectors, str(path), False, False)


def variant(subject: Subject, batch: int, policy: str, compile: bool) -> Subject:
    """The same model and prompt, run otherwise.

    Args:
        subject: at batch 1.
        batch: equal prompts at once.
        policy: by its name.
        compile: run all decoders through `torch.compile`.
    """
    changed = parse_policy(policy)
    return replace(
        subject,
        inputs={key: torch.cat([value] * batch) for key, value in subject.inputs.items()},
        policy=changed,
        compile=compile,
        settings={
            **subject.settings,
            "batch": batch,
            "policy": str(changed),
            "compiled": compile,
            "frozen_weights": compile and weights_frozen(),
        },
    )


def rank_of(selectors: Selectors) -> int:
    """`R`, the largest where layers differ; 0 without any selector."""
    return max((layer.rank for layer in selectors.layers if layer is not None), default=0)


def _require_room(wanted: Wanted, model: Any, tokens: int) -> None:
    """
    Raises:
        AlvtsError: no memory for the batch beside the loaded model, or prompts longer than it
            reads.
    """
    check_length(model.config, tokens)
    need = prefill_need(model.config, model.dtype, tokens + NEW_TOKENS, wanted.batch)
    require_memory(f"a batch of {wanted.batch}", need, model.device)


def _fitted(path: Path, model: Any, wanted: Wanted) -> Selectors:
    return load_artifact(path).check_model(model, wanted.name, wanted.other_weights)


def _subject(
    wanted: Wanted,
    model: Any,
    inputs: dict[str, Tensor],
    selectors: Selectors,
    origin: str,
    random_weights: bool,
    cut: bool,
) -> Subject:
    """Put the parts together and say what they are."""
    family = family_of(model)
    visual = int(family.visual_mask(model, inputs["input_ids"])[0].sum())
    prompt = Prompt(visual, inputs["input_ids"].shape[1] - visual)
    depth = len(family.layers(model))
    resolved = keep_of(selectors, wanted.keep)
    picked = wanted.policy is None
    policy = policy_of(selectors, resolved) if picked else parse_policy(wanted.policy or "")
    alike = len(set(resolved.values)) == 1
    settings = {
        "model": wanted.name,
        "random_weights": random_weights,
        "layers": depth,
        "hidden_size": model.config.text_config.hidden_size,
        "cut": cut,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch": wanted.batch,
        "visual_tokens": prompt.visual_tokens,
        "text_tokens": prompt.text_tokens,
        "new_tokens": NEW_TOKENS,
        "keep": resolved.values[0] if alike else list(resolved.values),
        # The same average spent otherwise over the layers is another measurement.
        "kept_per_layer": [resolved.count(i, visual) for i in range(depth)],
        "policy": str(policy),
        "selectors": origin,
        **({"other_weights": True} if getattr(selectors, "other_weights", False) else {}),
        "rank": rank_of(selectors),
        "compiled": wanted.compile,
        "frozen_weights": wanted.compile and weights_frozen(),
    }
    return Subject(model, inputs, prompt, selectors, resolved, policy, wanted.compile, settings)
