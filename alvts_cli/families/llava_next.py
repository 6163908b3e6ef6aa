"""LLaVA-NeXT (1.6): CLIP over tiles of the image, Llama, Mistral or Qwen2; up to 2,880 tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Family
from .layout import WHOLE, Box, View, check_all, grid, visual_tokens


@dataclass(frozen=True)
class LlavaNext(Family):
    """The whole picture in one grid, then its tiles as one larger grid, without the cells that only
    show the border around the picture, and with a token at the end of every row of it."""

    def layout(
        self, model: Any, processor: Any, inputs: Mapping[str, Tensor], sizes: Sequence[Any]
    ) -> tuple[View, ...]:
        """See `Family.layout`; the tokens at the ends of rows have no place."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        views: list[View] = []
        at = ends = 0
        for i, size in enumerate(inputs.get("image_sizes", torch.empty(0)).tolist()):
            views.append(View(i, WHOLE, grid(at, side, side), name="whole"))
            at += side * side
            box, rows, columns = _tiles(model.config, size)
            # One more column: the ends of the rows.
            tokens = grid(at, rows, columns + 1)
            views.append(View(i, box, tokens[:, :-1], name="tiles"))
            at += tokens.numel()
            ends += rows
        return check_all(self.name, views, ends, visual_tokens(model, inputs))


def _tiles(config: Any, size: list[int]) -> tuple[Box, int, int]:
    """What the grid of an image's tiles covers, and its rows and columns, as transformers' own
    functions cut it.

    Args:
        config: of the model.
        size: height and width of the image, in pixels.
    """
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    patch = config.vision_config.patch_size
    canvas = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    rows, columns = (length // patch for length in canvas)
    numbered = unpad_image(grid(0, rows, columns)[None], size)[0]
    scale = min(length / own for length, own in zip(canvas, size, strict=True))
    first, last = int(numbered[0, 0]), int(numbered[-1, -1])

    def share(cell: int, axis: int) -> float:
        """Where a cell begins, along the height (0) or the width (1) of the picture."""
        shown = size[axis] * scale
        return (cell * patch - (canvas[axis] - shown) / 2) / shown

    box = (
        *(share(first % columns, 1), share(first // columns, 0)),
        *(share(last % columns + 1, 1), share(last // columns + 1, 0)),
    )
    return box, *numbered.shape
