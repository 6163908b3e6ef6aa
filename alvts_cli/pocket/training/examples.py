"""Training examples: a picture as pixels, what each patch shows, and questions about it."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..easy import EasyImage
from ..questions import Question, ask
from ..scenes import (
    CANVAS,
    COLORS,
    GRID,
    PATCH,
    SHAPES,
    Thing,
    make_scene,
    render,
    seed_of,
)
from ..words import COLOR_WORDS, DIGIT_WORDS, PATCH_GROUPS, SHAPE_WORDS

SIDE = CANVAS // PATCH


@dataclass(frozen=True)
class Example:
    """`pixels` float32 [3, 192, 192] in [-1, 1]; `labels` int64 [groups, 256], -1 for none;
    `cells` int64 [2, 256]: row and column of the object on that patch, -1 for none."""

    pixels: Tensor
    labels: Tensor
    cells: Tensor
    questions: Sequence[Question]


def to_pixels(image: Image.Image) -> Tensor:
    """What the processor makes of an RGB picture: float32 [3, 192, 192] in [-1, 1]."""
    if image.size != (CANVAS, CANVAS):
        image = image.resize((CANVAS, CANVAS), Image.Resampling.BICUBIC)
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)


def spoken_words(thing: Thing) -> list[int]:
    """What a patch of `thing` says: of each group, the index of its word."""
    vertical, horizontal = thing.place.split()
    digit = "blank" if thing.digit is None else str(thing.digit)
    words = (thing.color, thing.shape, digit, vertical, horizontal)
    return [group.index(word) for group, word in zip(PATCH_GROUPS, words, strict=True)]


def scene_example(index: int, questions: int, fewest: int, most: int) -> Example:
    """The `index`-th training scene, with up to `questions` questions."""
    seed = seed_of("train", index)
    scene = make_scene(seed, fewest, most)
    labels = torch.full((len(PATCH_GROUPS), SIDE, SIDE), -1)
    labels[0] = COLOR_WORDS.index("background")
    cells = torch.full((2, SIDE, SIDE), -1)
    per = SIDE // GRID
    for thing in scene.things:
        area = (
            slice(thing.row * per, (thing.row + 1) * per),
            slice(thing.column * per, (thing.column + 1) * per),
        )
        for group, word in enumerate(spoken_words(thing)):
            labels[group][area] = word
        cells[0][area], cells[1][area] = thing.row, thing.column
    asked = ask(scene, questions, random.Random(f"questions {seed}"))
    return Example(to_pixels(render(scene)), labels.flatten(1), cells.flatten(1), asked)


def easy_example(source: EasyImage, questions: int, rng: random.Random) -> Example:
    """An easy-VQA picture; its patches' colour and shape are read off its answers."""
    pixels = to_pixels(source.open())
    ground = pixels.flatten(1).median(1).values[:, None, None]
    differs = ((pixels - ground).abs().amax(0) > 0.4).float()
    shown = torch.nn.functional.avg_pool2d(differs[None, None], PATCH)[0, 0] > 0.3
    labels = torch.full((len(PATCH_GROUPS), SIDE, SIDE), -1)
    labels[0] = COLOR_WORDS.index("background")
    color, shape = _facts(source)
    labels[0][shown] = COLOR_WORDS.index(color) if color else -1
    labels[1][shown] = SHAPE_WORDS.index(shape) if shape else -1
    labels[2][shown] = DIGIT_WORDS.index("blank")
    chosen = rng.sample(source.questions, min(questions, len(source.questions)))
    return Example(
        pixels,
        labels.flatten(1),
        torch.full((2, SIDE * SIDE), -1),
        [Question("easy", question, answer) for question, answer in chosen],
    )


def _facts(source: EasyImage) -> tuple[str | None, str | None]:
    """Colour and shape of an easy-VQA picture, as far as its answers give them away."""
    color = shape = None
    for question, answer in source.questions:
        said = {answer}
        if answer == ("no" if re.search(r"\b(not|no)\b", question) else "yes"):
            said = set(question.rstrip("?").split())
        color = next((word for word in COLORS if word in said), color)
        shape = next((word for word in SHAPES if word in said), shape)
    return color, shape
