"""Where in the pictures the visual tokens lie.

A family whose tokens are laid out in another way than `layout` knows overrides `Family.layout`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ..errors import AlvtsError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in shares of a picture's width and height; beyond 0 and 1 where the
processor puts a border around the picture."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class View:
    """A grid of visual tokens over a picture, every token over an equal part of `box`.

    Attributes:
        picture: number of the image in the prompt, or of the video, from 0.
        box: the part of the picture that the grid covers.
        tokens: int64 `[rows, columns]`, numbers among the visual tokens of the prompt, from 0.
        frames: first and last frame of the video that the tokens show; None for an image.
        name: which view of the picture it is, where there are several.
    """

    picture: int
    box: Box
    tokens: Tensor
    frames: tuple[int, int] | None = None
    name: str = ""


def layout(
    family: str, model: Any, processor: Any, inputs: Mapping[str, Tensor], sizes: Sequence[Any]
) -> tuple[View, ...]:
    """One grid for every image, or for every step in time of a video.

    That is so where the inputs say how large the grids are (`image_grid_thw`), and where the
    encoder sees each image once and as a whole.

    Args, Raises:
        see `Family.layout`; `family` is its name.
    """
    if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
        return grids(family, model, inputs)
    pixels = inputs.get("pixel_values")
    tokens = visual_tokens(model, inputs)
    if pixels is None or pixels.dim() != 4 or len(pixels) != len(sizes):
        raise unknown(family, tokens)
    # Pictures of different sizes are held in one tensor, each in its upper left corner.
    own = inputs.get("image_sizes")
    shapes = [list(pixels.shape[-2:])] * len(pixels) if own is None else own.tolist()
    # A token is a square of the encoder's input, of this many pixels.
    side = max(1, round(sqrt(sum(map(prod, shapes)) / tokens)))
    views, at = [], 0
    for i, ((height, width), size) in enumerate(zip(shapes, sizes, strict=True)):
        if height % side or width % side:
            raise unknown(family, tokens)
        box = WHOLE if own is not None else seen(processor.image_processor, size)
        views.append(View(i, box, grid(at, height // side, width // side)))
        at += views[-1].tokens.numel()
    return check_all(family, views, 0, tokens)


def grids(family: str, model: Any, inputs: Mapping[str, Tensor]) -> tuple[View, ...]:
    """Qwen's: images and videos of any size, whose `image_grid_thw` and `video_grid_thw` count
    patches, of which `spatial_merge_size` squared make a token.

    Raises:
        AlvtsError: the grids do not make up the visual tokens.
    """
    vision = model.config.vision_config
    merge = vision.spatial_merge_size
    kinds = {
        "image": (model.config.image_token_id, inputs.get("image_grid_thw")),
        "video": (getattr(model.config, "video_token_id", None), inputs.get("video_grid_thw")),
    }
    ids = inputs["input_ids"][0].tolist()
    waiting = {
        token: (kind, enumerate(() if sizes is None else sizes.tolist()))
        for kind, (token, sizes) in kinds.items()
    }
    order = [token for token in ids if token in waiting]
    views, at = [], 0
    while at < len(order):
        kind, pictures = waiting[order[at]]
        picture, (steps, height, width) = next(pictures, (0, (1, 0, 0)))
        rows, columns = height // merge, width // merge
        size = rows * columns
        if size == 0 or order[at : at + steps * size] != [order[at]] * (steps * size):
            raise unknown(family, len(order))
        for step in range(steps):
            frames = None
            if kind == "video":
                together = vision.temporal_patch_size
                frames = (step * together, (step + 1) * together - 1)
            views.append(View(picture, WHOLE, grid(at, rows, columns), frames))
            at += size
    return tuple(views)


def grid(start: int, rows: int, columns: int) -> Tensor:
    """int64 `[rows, columns]`: the numbers from `start` on, row by row."""
    return torch.arange(start, start + rows * columns).view(rows, columns)


def seen(image_processor: Any, size: tuple[int, int]) -> Box:
    """What an image processor that makes one view of an image leaves of it.

    It may put a border around the picture to make it square, resize it (to a size, or its shorter
    side to a length) and cut out the middle.

    Args:
        image_processor: of transformers.
        size: width and height of the picture, in pixels.
    """
    picture = [float(side) for side in size]
    canvas = list(picture)
    if getattr(image_processor, "do_pad", False):
        canvas = [max(canvas)] * 2
    scale = [1.0, 1.0]
    if getattr(image_processor, "do_resize", False):
        shortest = _side(image_processor.size, "shortest_edge")
        if shortest is not None:
            scale = [shortest / min(canvas)] * 2
        else:
            target = [_side(image_processor.size, name) for name in ("width", "height")]
            scale = [(new or old) / old for new, old in zip(target, canvas, strict=True)]
    if getattr(image_processor, "do_center_crop", False):
        crop = [_side(image_processor.crop_size, name) for name in ("width", "height")]
        canvas = [c / s if c else old for c, s, old in zip(crop, scale, canvas, strict=True)]
    # Everything is done about the middle of the picture.
    left, top = ((1 - c / p) / 2 for c, p in zip(canvas, picture, strict=True))
    return left, top, 1 - left, 1 - top


def visual_tokens(model: Any, inputs: Mapping[str, Tensor]) -> int:
    """How many image tokens the one prompt in `inputs` has."""
    return int((inputs["input_ids"][0] == model.config.image_token_id).sum())


def check_all(family: str, views: Sequence[View], spare: int, tokens: int) -> tuple[View, ...]:
    """`views`, if they and `spare` tokens in no place make up all `tokens`.

    Raises:
        AlvtsError: they do not.
    """
    if sum(prod(view.tokens.shape) for view in views) + spare != tokens:
        raise unknown(family, tokens)
    return tuple(views)


def unknown(family: str, tokens: int) -> AlvtsError:
    """That the tokens of this prompt cannot be placed."""
    return AlvtsError(
        f"alvts does not know where the {tokens} visual tokens of this {family} prompt lie in its "
        "pictures; `alvts run` answers without a picture of them"
    )


def _side(size: Any, name: str) -> float | None:
    """Of a dict or one of transformers' size objects."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return None if value is None else float(value)
