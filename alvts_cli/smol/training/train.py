"""The training recipe: on from an adapter, resumable, the same examples for the same seed.

Every picture comes with a conversation about it: up to `QUESTIONS` questions, one of which may ask
for a description, in one sequence; the first turn shows the picture. Frozen are the language model
(but for its LoRA) and the vision tower. What was learned on the way to the shipped adapter:

- The projector has to start near the words: by regression of its output for a picture onto pocket's
  own, mapped to SmolLM2's vocabulary by a ridge fit on the words both know (150 steps).
- Then 545 steps of batch 8 at a rate of 1e-3, scenes of 1 to 2, 2 to 4, 2 to 6 objects. Accuracy of
  answer tokens stood at .71 as long as the rate stayed up (steps 300 to 460), and went to .86 as it
  fell by a cosine: the decay is what pays. That adapter is the start of `train`.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ...errors import AlvtsError
from ...models import usual_dtype
from ...pocket.easy import load_easy
from ...pocket.questions import ask, describe
from ...pocket.scenes import make_scene, render, seed_of
from ...pocket.training.examples import to_pixels
from ..build import LORA, LORA_SCALE, load_projector

QUESTIONS = 12
DESCRIBED = 0.5
"""Share of the pictures of which a description is asked for."""
EASY = 0.125
"""Share of the pictures that are easy-VQA's."""
RATE = 6e-4
WARM_UP = 20
END_WEIGHT = 0.1
"""Of the token that ends an answer."""
DESCRIPTION_WEIGHT = 0.3
"""Of each token of a description, of which there are many."""
SAVE_EVERY = 20
FIRST = 10_000_000
"""Number of the first training scene: those before were seen on the way to the start."""


@dataclass(frozen=True)
class Recipe:
    """`steps` of `batch` pictures each; the rate falls to zero by a cosine over all of them."""

    steps: int = 260
    batch: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Step:
    """What the caller is told after each step: its number from 1, its loss, and the share of
    answer tokens predicted right."""

    number: int
    loss: float
    accuracy: float


class Lora(nn.Module):
    """A frozen linear layer and `LORA_SCALE * b @ a` on top, `a` and `b` in float32."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`, in the dtype of `x`."""
        low = nn.functional.linear(x, self.a.to(x.dtype))
        return self.base(x) + LORA_SCALE * nn.functional.linear(low, self.b.to(x.dtype))


def train(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    start: dict[str, Tensor],
    folder: Path,
    recipe: Recipe,
    on_step: Callable[[Step], None] = lambda step: None,
) -> dict[str, Tensor]:
    """Train an adapter, from `start` or from `folder`'s checkpoint where there is one.

    Args:
        model, processor: of `build.make_model`, without an adapter; the model is changed.
        start: the adapter to go on from.
        folder: holds the checkpoint, written whole every `SAVE_EVERY` steps.
        recipe: how long.
        on_step: called after every step.

    Returns:
        The trained adapter, float32.

    Raises:
        AlvtsError: the checkpoint is of another recipe or adapter, or easy-VQA is not installed.
    """
    run = _Run(model, processor, start, folder, recipe)
    for step in range(run.step, recipe.steps):
        on_step(run.advance(step))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == recipe.steps:
            run.save(step + 1)
    return run.adapter()


class _Run:
    """Everything that changes in training, with its checkpoint."""

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
        start: dict[str, Tensor],
        folder: Path,
        recipe: Recipe,
    ) -> None:
        self.folder, self.recipe = folder, recipe
        self.easy = load_easy("train")
        self.tokenizer: Any = processor.tokenizer
        self.key: dict[str, Any] = {
            **{"seed": recipe.seed, "steps": recipe.steps, "batch": recipe.batch},
            "start": hashlib.sha256(save(start)).hexdigest(),
        }
        self.step, moments = 0, None
        state = folder / "state.json"
        if state.exists():
            found = json.loads(state.read_text())
            self.step = found.pop("step")
            if found != self.key:
                raise AlvtsError(
                    f"the checkpoint in {folder} is of another recipe or began with another "
                    "adapter; remove it or choose another folder"
                )
            start = load_file(folder / f"adapter-{self.step}.safetensors")
            moments = load_file(folder / f"moments-{self.step}.safetensors")
        self.model = model.requires_grad_(False)
        nn.Module.to(self.model, usual_dtype(torch.device("cpu")))
        # In float32 before it is loaded, or a resumed run would go on from a rounded one.
        self.projector = model.model.multi_modal_projector.float().requires_grad_(True)
        load_projector(model, start)
        self.lora: dict[str, Lora] = {}
        for number, layer in enumerate(model.model.language_model.layers):
            for name in LORA:
                holder: Any = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
                key = f"lora.{number}.{name}"
                self.lora[key] = Lora(getattr(holder, name), start[key + ".a"], start[key + ".b"])
                setattr(holder, name, self.lora[key])
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0
        )
        if moments is not None:
            kept: dict[int, dict[str, Tensor]] = {}
            for name, value in moments.items():
                index, what = name.split(".")
                kept.setdefault(int(index), {})[what] = value
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": kept})

    def advance(self, step: int) -> Step:
        """One optimiser step."""
        fall = 0.5 * (1 + math.cos(math.pi * step / self.recipe.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * fall * min(1.0, (step + 1) / WARM_UP)
        pixels, texts = zip(
            *(self._example(step, i) for i in range(self.recipe.batch)), strict=True
        )
        loss, accuracy = self._loss(torch.stack(pixels), texts)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return Step(step + 1, loss.item(), accuracy)

    def _example(self, step: int, i: int) -> tuple[Tensor, list[tuple[str, str, float]]]:
        """Pixels, and a conversation: question, answer, weight of an answer's token."""
        index = FIRST + step * self.recipe.batch + i
        rng = random.Random(f"smol {self.recipe.seed} {index}")
        if rng.random() < EASY:
            source = rng.choice(self.easy)
            turns = [(q, a, 1.0) for q, a in source.questions]
            rng.shuffle(turns)
            return to_pixels(source.open()), turns[:QUESTIONS]
        scene = make_scene(seed_of("train", index), 2, 6)
        turns = [(q.text, q.answer, 1.0) for q in ask(scene, QUESTIONS, rng)]
        if rng.random() < DESCRIBED:
            asked = describe(scene)
            turns[rng.randrange(len(turns))] = (asked.text, asked.answer, DESCRIPTION_WEIGHT)
        return to_pixels(render(scene)), turns

    def _loss(
        self, pixels: Tensor, texts: Sequence[list[tuple[str, str, float]]]
    ) -> tuple[Tensor, float]:
        """Cross-entropy of the answers' tokens, and how many of them are the likeliest."""
        language = self.model.model.language_model
        with torch.no_grad():
            tower = self.model.model.vision_tower(pixels.to(self.model.dtype))
        visual = self.projector(tower.last_hidden_state[:, 1:].float()).to(self.model.dtype)
        head = self._ids("<|im_start|>user\n")
        ids, weights = zip(*map(self._conversation, texts), strict=True)
        longest = max(map(len, ids))
        text = torch.tensor([[*some, *[0] * (longest - len(some))] for some in ids])
        weight = torch.tensor([[*some, *[0.0] * (longest - len(some))] for some in weights])
        words = language.embed_tokens(torch.cat([torch.tensor([head] * len(ids)), text], dim=1))
        embeds = torch.cat([words[:, : len(head)], visual, words[:, len(head) :]], dim=1)
        hidden = language(inputs_embeds=embeds, use_cache=False).last_hidden_state
        # Text token t is predicted by the position in front of it.
        before = hidden[:, -longest - 1 : -1]
        asked = weight > 0
        logits = self.model.lm_head(before[asked]).float()
        target, weight = text[asked], weight[asked]
        loss = nn.functional.cross_entropy(logits, target, reduction="none")
        right = (logits.argmax(-1) == target)[weight == 1].float().mean()
        return (loss * weight).sum() / weight.sum(), right.item()

    def _conversation(self, turns: list[tuple[str, str, float]]) -> tuple[list[int], list[float]]:
        """Tokens behind the image, and the weight of predicting each."""
        ids: list[int] = []
        weights: list[float] = []
        for number, (question, answer, each) in enumerate(turns):
            start = "\n" if number == 0 else "<|im_start|>user\n"
            asked = self._ids(f"{start}{question}<|im_end|>\n<|im_start|>assistant\n")
            said = self._ids(answer)
            end = self._ids("<|im_end|>\n")
            ids += [*asked, *said, *end]
            weights += [
                *[0.0] * len(asked),
                *[each] * len(said),
                END_WEIGHT,
                *[0.0] * (len(end) - 1),
            ]
        return ids, weights

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return found

    def adapter(self) -> dict[str, Tensor]:
        """The trained tensors by their names in the adapter."""
        tensors = {f"proj.{name}": value for name, value in self.projector.state_dict().items()}
        for key, lora in self.lora.items():
            tensors[key + ".a"], tensors[key + ".b"] = lora.a.detach(), lora.b.detach()
        return {name: value.contiguous() for name, value in tensors.items()}

    def save(self, step: int) -> None:
        """Write the checkpoint: tensors under new names first, then the file that names them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        moments = {
            f"{index}.{what}": value
            for index, state in self.optimizer.state_dict()["state"].items()
            for what, value in state.items()
        }
        save_file(self.adapter(), self.folder / f"adapter-{step}.safetensors")
        save_file(moments, self.folder / f"moments-{step}.safetensors")
        draft = self.folder / "state.json.part"
        draft.write_text(json.dumps({**self.key, "step": step}))
        draft.replace(self.folder / "state.json")
        for path in self.folder.glob("*.safetensors"):
            if not path.stem.endswith(f"-{step}"):
                path.unlink()
