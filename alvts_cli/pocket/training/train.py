"""The training recipe: three phases, resumable, the same stream of examples for the same seed.

1. `speech`: the vision tower alone (see `vision`).
2. `answers`: everything together, on the 64 visual tokens that show objects (and some ground). Most
   of a picture is ground; leaving it out doubles the speed while retrieval is being learned.
3. `whole`: the same on all 256 visual tokens, with the learning rate falling to zero.

In `answers` and `whole` a phrase that names a thing ("the red circle") also has to speak, after
`FOUND` layers, what the thing is and where, in the same words and scored the same way as a patch;
and, after `JUDGED` layers, what it comes down to (see `questions.Phrase`). What was tried, with the
running share of right answers on training scenes, each hardly ever seen twice:

- The answers' loss alone, 400 steps, 1 to 3 things: colour .74, reading .68, place .64, what
  guessing among the things in sight gives. Attention that starts as similarity (keys equal to
  queries, outputs the transpose of values) is no better: .74, .66, .58.
- With the things' words, 400 steps, 2 to 4 things: .87, .94, .95; presence follows by itself
  (.91 after 800), counting and relations stay at chance (.44, .50 after 800).
- With the side and the number as well, relations asked as "left or right of" are right after
  another 600 steps (.98), but 3,000 steps leave yes-or-no relations at chance: until the end of the
  prompt holds both the side and the word it is compared with, neither is of use. With that, .63
  after 200 steps and .99 after 800.
- Counting learned on the 64 tokens is too low on all 256 ("how many objects": .22 of 37 right after
  2,200 steps): it measures shares of attention. Hence `whole`.

Scenes grow from 2-4 things to 2-6 over the first 800 steps of `answers`.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from ...errors import AlvtsError
from ...models import cpu_computes_bfloat16
from ..build import VISUAL_TOKENS, make_model
from ..easy import EasyImage, load_easy
from ..words import COLOR_WORDS, PATCH_GROUPS, PHRASE_GROUPS, make_tokenizer
from .examples import Example, easy_example, scene_example
from .packed import packed_logits
from .segments import QUESTIONS, make_segments
from .vision import CellProbe, encode, loudness_loss, speech_loss

SPEECH_WEIGHT = 0.1
LOUDNESS_WEIGHT = 0.05
PHRASE_WEIGHT = 0.3
FOUND, JUDGED = 5, 9
"""Layers after which a phrase has found the thing it names, and what it comes down to."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training.

    Attributes:
        steps, batch: optimiser steps, and pictures in each.
        visible: visual tokens the language model is given; 0 trains the tower alone.
        rate, tower_rate: learning rates of the language model, and of tower and projector.
        decay: share of the steps, at the end, over which the rates fall to zero.
    """

    name: str
    steps: int
    batch: int
    visible: int
    rate: float
    tower_rate: float
    decay: float


PHASES = (
    Phase("speech", 2200, 16, 0, 0.0, 2e-3, 0.4),
    Phase("answers", 3000, 8, 64, 1e-3, 2e-4, 0.0),
    Phase("whole", 1500, 8, VISUAL_TOKENS, 1e-3, 2e-4, 0.7),
)
WARM_UP = 100
SAVE_EVERY = 200


@dataclass
class Step:
    """What the caller is told after each step; `number` counts from 1 within the phase."""

    phase: Phase
    number: int
    loss: float


def train(
    folder: Path,
    seed: int = 0,
    phases: tuple[Phase, ...] = PHASES,
    on_step: Callable[[Step], None] = lambda step: None,
) -> LlavaForConditionalGeneration:
    """Train a pocket from nothing, or from `folder`'s checkpoint where there is one.

    Args:
        folder: holds the checkpoint, written whole every `SAVE_EVERY` steps and at the end of each
            phase.
        seed: of weights and examples.
        phases: the recipe.
        on_step: called after every step.

    Returns:
        The trained model, in float32.

    Raises:
        AlvtsError: the checkpoint is of another recipe or seed, or easy-VQA is not installed.
    """
    run = _Run(folder, seed, phases)
    for number in range(run.phase, len(phases)):
        run.enter(number)
        for step in range(run.step, phases[number].steps):
            loss = run.advance(step)
            on_step(Step(phases[number], step + 1, loss))
            if (step + 1) % SAVE_EVERY == 0:
                run.save(number, step + 1)
        run.save(number + 1, 0)
    return run.model


class _Run:
    """Everything that changes in training, with its checkpoint."""

    def __init__(self, folder: Path, seed: int, phases: tuple[Phase, ...]) -> None:
        self.folder, self.seed, self.phases = folder, seed, phases
        self.model = make_model(seed)
        self.probe = CellProbe(self.model.lm_head.in_features)
        self.easy = load_easy("train")
        self.tokenizer = make_tokenizer()
        self.key = {"seed": seed, "phases": [vars(phase) for phase in phases]}
        self.phase = self.step = 0
        self.moments: dict[str, Tensor] = {}
        if (folder / "state.json").exists():
            self._load()
        # The step is bound by small element-wise kernels; fusing them doubles the tower's speed.
        for layer in self.model.model.vision_tower.encoder.layers:
            layer.compile()

    def enter(self, number: int) -> None:
        """Start, or go on with, phase `number`."""
        phase = self.phases[number]
        if number != self.phase:
            self.step, self.moments = 0, {}
        language = [*self.model.model.language_model.parameters()]
        tower = [
            *self.model.model.vision_tower.parameters(),
            *self.model.model.multi_modal_projector.parameters(),
            *self.probe.parameters(),
        ]
        groups = [{"params": tower, "peak": phase.tower_rate}]
        if phase.visible:
            groups.append({"params": language, "peak": phase.rate})
        self.model.model.language_model.requires_grad_(phase.visible > 0)
        self.trained = tower + language if phase.visible else tower
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), weight_decay=0.02)
        if self.moments:
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in self.moments.items():
                index, what = name.split(".")
                state.setdefault(int(index), {})[what] = value
            now = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**now, "state": state})
        self.phase = number

    def advance(self, step: int) -> float:
        """One optimiser step; returns its loss."""
        phase = self.phases[self.phase]
        left = (phase.steps - step) / (phase.decay * phase.steps) if phase.decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min(1.0, (step + 1) / WARM_UP, max(0.02, left))
        # Keyed by the step, so that a resumed run sees what an uninterrupted one would.
        torch.manual_seed(hash((self.seed, self.phase, step)))
        loss = self._loss(phase, self._examples(phase, step))
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.item()

    def _examples(self, phase: Phase, step: int) -> list[Example]:
        """One picture in four is easy-VQA's, the others are scenes, each seen once."""
        rng = random.Random(f"{self.seed} {phase.name} {step}")
        before = sum(earlier.steps * earlier.batch for earlier in self.phases[: self.phase])
        most = min(6, 4 + step // 400) if self.phase == 1 else 6
        examples = []
        for i in range(phase.batch):
            if i % 4 == 0:
                source: EasyImage = rng.choice(self.easy)
                examples.append(easy_example(source, QUESTIONS, rng))
            else:
                index = before + step * phase.batch + i
                examples.append(scene_example(index, QUESTIONS, 2, most))
        return examples

    def _autocast(self) -> torch.autocast:
        """Products in bfloat16, where this machine is faster at them."""
        fast = cpu_computes_bfloat16()
        return torch.autocast("cpu", torch.bfloat16, enabled=fast)

    def _loss(self, phase: Phase, examples: list[Example]) -> Tensor:
        labels = torch.stack([example.labels for example in examples])
        cells = torch.stack([example.cells for example in examples])
        language = self.model.model.language_model
        with self._autocast():
            visual = encode(self.model, torch.stack([example.pixels for example in examples]))
        words = language.embed_tokens.weight
        speech = (
            speech_loss(visual, words.detach(), labels, PATCH_GROUPS)
            + self.probe(visual, cells)
            + LOUDNESS_WEIGHT * loudness_loss(visual)
        )
        if not phase.visible:
            return speech
        segments = make_segments(examples, self.tokenizer)
        where = _visible(labels, phase.visible)
        seen = visual.gather(1, where[..., None].expand(-1, -1, visual.shape[-1]))
        with self._autocast():
            logits, (found, judged) = packed_logits(
                self.model, seen, where, segments.text, (FOUND, JUDGED)
            )
        found, judged = found.flatten(1, 2), judged.flatten(1, 2)
        phrases = (
            speech_loss(found, words, segments.things, PATCH_GROUPS)
            + self.probe(found, segments.cells)
            + speech_loss(found, words, segments.asked, PHRASE_GROUPS)
            + speech_loss(judged, words, segments.findings, PHRASE_GROUPS)
        )
        loss = torch.nn.functional.cross_entropy(
            logits[:, :, :-1].float().flatten(0, 2),
            segments.text[:, :, 1:].flatten(),
            reduction="none",
        )
        weight = segments.weight[:, :, :-1]
        asked = (weight > 0).any(-1).sum()
        answers = (loss * weight.flatten()).sum() / asked
        return answers + PHRASE_WEIGHT * phrases + SPEECH_WEIGHT * speech

    def save(self, phase: int, step: int) -> None:
        """Write the checkpoint: tensors under new names first, then the file that names them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stamp = f"{phase}-{step}"
        old = [path for path in self.folder.glob("*.safetensors") if stamp not in path.name]
        weights = {
            f"model.{k}": v for k, v in self.model.state_dict().items() if "lm_head" not in k
        }
        weights |= {f"probe.{k}": v for k, v in self.probe.state_dict().items()}
        moments = {
            f"{index}.{what}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for what, value in state.items()
        }
        save_file(
            {k: v.contiguous() for k, v in weights.items()},
            self.folder / f"weights-{stamp}.safetensors",
        )
        save_file(moments, self.folder / f"moments-{stamp}.safetensors")
        state = {**self.key, "phase": phase, "step": step}
        draft = self.folder / "state.json.part"
        draft.write_text(json.dumps(state))
        draft.replace(self.folder / "state.json")
        for path in old:
            path.unlink()

    def _load(self) -> None:
        state = json.loads((self.folder / "state.json").read_text())
        self.phase, self.step = state.pop("phase"), state.pop("step")
        if state != self.key:
            raise AlvtsError(
                f"the checkpoint in {self.folder} is of another recipe or seed; "
                "remove it or choose another folder"
            )
        stamp = f"{self.phase}-{self.step}"
        weights = load_file(self.folder / f"weights-{stamp}.safetensors")
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "probe": {}}
        for name, value in weights.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.model.load_state_dict(parts["model"], strict=False)
        self.model.tie_weights()
        self.probe.load_state_dict(parts["probe"])
        if self.step:
            self.moments = load_file(self.folder / f"moments-{stamp}.safetensors")


def _visible(labels: Tensor, count: int) -> Tensor:
    """Ascending places [B, count] of the visual tokens shown: objects first, ground at random."""
    if count >= VISUAL_TOKENS:
        return torch.arange(VISUAL_TOKENS).expand(len(labels), -1)
    ground = labels[:, PATCH_GROUPS.index(COLOR_WORDS)] == COLOR_WORDS.index("background")
    order = torch.rand(ground.shape) - ground.float()
    return order.topk(count, 1).indices.sort(1).values
