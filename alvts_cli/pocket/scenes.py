"""Rendered scenes: a few small coloured shapes, some with a digit, on a cluttered pale ground.

The canvas is 192 x 192 pixels, read by the model as 16 x 16 patches of 12 pixels. An object fills
one cell of an 8 x 8 grid, so it covers 2 x 2 of the 256 visual tokens: fine enough that losing the
wrong tokens loses the answer.
"""

import random
from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin

from PIL import Image, ImageDraw, ImageFont

CANVAS = 192
PATCH = 12
GRID = 8
CELL = CANVAS // GRID

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
SHAPES = ("circle", "rectangle", "triangle", "star", "diamond", "cross")

# Seed ranges of the splits: disjoint by construction, so no scene is in two of them.
SPLITS = {
    "train": range(0, 100_000_000),
    "calibration": range(100_000_000, 200_000_000),
    "test": range(200_000_000, 300_000_000),
}


@dataclass(frozen=True)
class Thing:
    """One object: its looks, its digit (None for none) and its cell, counted from the top left."""

    color: str
    shape: str
    digit: int | None
    row: int
    column: int

    @property
    def place(self) -> str:
        """Two words, such as `top left` or `middle center`."""
        vertical = "top" if self.row < 3 else "middle" if self.row < 5 else "bottom"
        horizontal = "left" if self.column < 3 else "center" if self.column < 5 else "right"
        return f"{vertical} {horizontal}"


@dataclass(frozen=True)
class Scene:
    """What is in a picture, and the seed that made it."""

    seed: int
    things: tuple[Thing, ...]


def seed_of(split: str, index: int) -> int:
    """The seed of the `index`-th scene of `split` (train, calibration or test).

    Raises:
        ValueError: an unknown split, or an index beyond the split's seed range.
    """
    if split not in SPLITS or not 0 <= index < len(SPLITS[split]):
        raise ValueError(f"no scene {index} in split {split!r}; splits are {', '.join(SPLITS)}")
    return SPLITS[split][index]


def make_scene(seed: int, fewest: int = 2, most: int = 6) -> Scene:
    """Draw up a scene of `fewest` to `most` things from `seed`, each in a cell of its own.

    Colours and shapes repeat within a scene on purpose (a thing is often told from another only by
    the pair), a full pair never does.
    """
    rng = random.Random(f"scene {seed}")
    count = rng.randint(fewest, most)
    # Drawing from a few colours and shapes makes look-alikes common.
    colors = rng.sample(list(COLORS), min(len(COLORS), max(3, count - 1)))
    shapes = rng.sample(SHAPES, min(len(SHAPES), max(2, count - 1)))
    pairs = rng.sample([(color, shape) for color in colors for shape in shapes], count)
    cells = rng.sample([(row, column) for row in range(GRID) for column in range(GRID)], count)
    digits = rng.sample(range(10), count)
    return Scene(
        seed,
        tuple(
            Thing(color, shape, digit if rng.random() < 0.75 else None, row, column)
            for (color, shape), digit, (row, column) in zip(pairs, digits, cells, strict=True)
        ),
    )


def render(scene: Scene) -> Image.Image:
    """The picture of `scene`: RGB, 192 x 192 pixels, the same for the same scene."""
    rng = random.Random(f"picture {scene.seed}")
    ground = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (CANVAS, CANVAS), ground)
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(4, 16)):
        x, y = rng.randrange(CANVAS), rng.randrange(CANVAS)
        tone = rng.randint(165, 215)
        line = (x, y, x + rng.randint(-9, 9), y + rng.randint(-9, 9))
        draw.line(line, fill=(tone, tone, tone), width=1)
    for thing in scene.things:
        x = thing.column * CELL + CELL // 2 + rng.randint(-1, 1)
        y = thing.row * CELL + CELL // 2 + rng.randint(-1, 1)
        _draw_shape(draw, thing, x, y, rng.randint(10, 12), rng)
        if thing.digit is not None:
            _draw_digit(draw, thing.digit, x, y)
    return image


def _draw_shape(
    draw: ImageDraw.ImageDraw, thing: Thing, x: int, y: int, size: int, rng: random.Random
) -> None:
    fill = COLORS[thing.color]
    if thing.shape == "circle":
        draw.ellipse((x - size, y - size, x + size, y + size), fill=fill)
    elif thing.shape == "rectangle":
        width, height = (size, size - rng.randint(0, 4))[:: rng.choice((1, -1))]
        draw.rectangle((x - width, y - height, x + width, y + height), fill=fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=fill)
    elif thing.shape == "diamond":
        draw.polygon([(x, y - size), (x + size, y), (x, y + size), (x - size, y)], fill=fill)
    elif thing.shape == "cross":
        arm = size // 3 + 1
        draw.rectangle((x - size, y - arm, x + size, y + arm), fill=fill)
        draw.rectangle((x - arm, y - size, x + arm, y + size), fill=fill)
    else:
        radii = (size, size * 0.45)
        points = [
            (x + radii[i % 2] * sin(i * pi / 5), y - radii[i % 2] * cos(i * pi / 5))
            for i in range(10)
        ]
        draw.polygon(points, fill=fill)


def _draw_digit(draw: ImageDraw.ImageDraw, digit: int, x: int, y: int) -> None:
    # A white plate under the glyph keeps it legible on every colour and shape.
    draw.rectangle((x - 5, y - 6, x + 5, y + 6), fill=(255, 255, 255))
    draw.text((x + 0.5, y + 0.5), str(digit), fill=(0, 0, 0), font=_font(), anchor="mm")


@cache
def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=14)
