"""LLaVA-NeXT (1.6) and those after it: an encoder over the picture and over tiles of it."""

from dataclasses import dataclass
from fractions import Fraction
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from .base import Family
from .layout import Prompt, View, grid, numbered
from .seen import WHOLE, Box


@dataclass(frozen=True)
class LlavaNext(Family):
    """The whole picture in one grid, then its tiles as one larger grid, without the cells that only
    show the border around the picture, and with a token at the end of every row of it."""

    def image_views(self, prompt: Prompt) -> list[View]:
        """See `Family.image_views`; the tokens at the ends of rows have no place."""
        config, inputs = prompt.model.config, prompt.inputs
        side = config.vision_config.image_size // config.vision_config.patch_size
        # Granite merges neighbours.
        side = int(side * Fraction(getattr(config, "downsample_rate", None) or 1))
        views: list[View] = []
        at = ends = 0
        for i, size in enumerate(inputs.get("image_sizes", torch.empty(0)).tolist()):
            views.append(View(i, WHOLE, grid(at, side, side), name="whole"))
            at += side * side
            box, rows, columns = _tiles(config, size, side)
            # One more column: the ends of the rows.
            tokens = grid(at, rows, columns + 1)
            views.append(View(i, box, tokens[:, :-1], name="tiles"))
            at += tokens.numel()
            ends += rows
        return numbered(prompt, "image", views, ends)


def _tiles(config: Any, size: list[int], side: int) -> tuple[Box, int, int]:
    """What the grid of an image's tiles covers, and its rows and columns, as transformers' own
    functions cut it.

    Args:
        config: of the model.
        size: height and width of the image, in pixels.
        side: of a tile, in tokens.
    """
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    cell = config.vision_config.image_size / side
    canvas = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    rows, columns = (round(length / cell) for length in canvas)
    whole: Tensor = unpad_image(grid(0, rows, columns)[None], size)[0]
    scale = min(length / own for length, own in zip(canvas, size, strict=True))
    first, last = int(whole[0, 0]), int(whole[-1, -1])

    def share(cells: int, axis: int) -> float:
        """Where a cell begins, along the height (0) or the width (1) of the picture."""
        shown = size[axis] * scale
        return (cells * cell - (canvas[axis] - shown) / 2) / shown

    box = (
        *(share(first % columns, 1), share(first // columns, 0)),
        *(share(last % columns + 1, 1), share(last // columns + 1, 0)),
    )
    rows, columns = whole.shape
    most = getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_")
    # OneVision shrinks a grid of more tiles than that; the formula is its `pack_image_features`.
    if most.isdecimal() and (ratio := sqrt(rows * columns / (int(most) * side**2))) > 1.1:
        rows, columns = int(rows // ratio), int(columns // ratio)
    return box, rows, columns
