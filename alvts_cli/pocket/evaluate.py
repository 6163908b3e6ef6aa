"""Accuracy of a pocket model per kind of question, with the picture and with a grey one."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from .easy import load_easy
from .questions import KINDS, ask, ask_kind, describe
from .scenes import CANVAS, make_scene, render, seed_of
from .words import make_prompt

GREY = Image.new("RGB", (CANVAS, CANVAS), (128, 128, 128))
"""What a blind model is shown: its accuracy is what the questions alone give away."""


@dataclass(frozen=True)
class Item:
    """One picture, one question, its answer; and questions with their answers that are said before
    it."""

    kind: str
    image: Image.Image
    question: str
    answer: str
    earlier: tuple[tuple[str, str], ...] = ()


def scene_items(split: str, per_kind: int, earlier: int = 0) -> Iterator[Item]:
    """`per_kind` questions of each kind, each about a scene of its own, in a fixed order; the same
    ones however many other questions, `earlier`, are said before each."""
    index = 0
    for kind in KINDS:
        found = 0
        while found < per_kind:
            seed = seed_of(split, index)
            index += 1
            scene = make_scene(seed)
            asked = ask_kind(scene, kind, random.Random(f"questions {seed}"))
            if asked is not None:
                found += 1
                others = ask(scene, earlier + 1, random.Random(f"earlier {seed}"))
                before = [(one.text, one.answer) for one in others if one.text != asked.text]
                said = tuple(before[:earlier])
                yield Item(kind, render(scene), asked.text, asked.answer, said)


def described_items(split: str, count: int) -> Iterator[Item]:
    """`count` scenes, each to be described."""
    for index in range(count):
        scene = make_scene(seed_of(split, index))
        asked = describe(scene)
        yield Item(asked.kind, render(scene), asked.text, asked.answer)


def easy_items(count: int | None = None) -> Iterator[Item]:
    """Every question of easy-VQA's test split, or `count` of them drawn evenly."""
    pairs = [(source, pair) for source in load_easy("test") for pair in source.questions]
    if count is not None:
        pairs = random.Random("easy").sample(pairs, min(count, len(pairs)))
    for source, (question, answer) in pairs:
        yield Item("easy", source.open(), question, answer)


@torch.inference_mode()
def answers(
    model: Any, processor: Any, items: Sequence[Item], blind: bool = False, batch: int = 32
) -> list[str]:
    """The model's greedy answers, at most four words each, in the order of `items`."""
    said: list[str] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        inputs = processor(
            images=[GREY if blind else item.image for item in part],
            text=[make_prompt(item.question) for item in part],
            return_tensors="pt",
            padding=True,
        ).to(model.device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        new = output[:, inputs["input_ids"].shape[1] :]
        said += processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in said]


def score_kinds(items: Sequence[Item], said: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Per kind: how many answers are exactly right, of how many. `scenes` sums over all kinds
    but easy-VQA's."""
    right: dict[str, list[bool]] = {}
    for item, answer in zip(items, said, strict=True):
        names = ("easy",) if item.kind == "easy" else (item.kind, "scenes")
        for name in names:
            right.setdefault(name, []).append(item.answer == answer)
    return {kind: (sum(hits), len(hits)) for kind, hits in right.items()}


def chance(items: Sequence[Item]) -> dict[str, float]:
    """Per kind, and over all `scenes`: the score of always giving the kind's commonest answer."""
    counts: dict[str, Counter[str]] = {}
    for item in items:
        counts.setdefault(item.kind, Counter())[item.answer] += 1
    best = {kind: max(found.values()) for kind, found in counts.items()}
    scenes = [kind for kind in counts if kind != "easy"]
    asked = {kind: found.total() for kind, found in counts.items()}
    shares = {kind: best[kind] / asked[kind] for kind in counts}
    if scenes:
        shares["scenes"] = sum(best[k] for k in scenes) / sum(asked[k] for k in scenes)
    return shares
