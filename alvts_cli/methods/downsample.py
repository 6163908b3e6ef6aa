"""Downsample: a smaller image for the same visual token count."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil, log, sqrt
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..engine import Attachment, Keep, Plan, attach_scorer
from ..engine.calls import by_name, names_of
from ..engine.plan import read_ids
from ..errors import AlvtsError
from ..families import family_of
from .base import Method


class Downsample(Method):
    """The whole picture, coarser; no choice of tokens at all.

    Where the encoder takes pictures of any size (Qwen2.5-VL), the picture itself is made smaller,
    to a grid of as near to the budget's number of cells as its shape allows.

    LLaVA's encoder takes one size, so a smaller picture would be blown up again and give as many
    tokens as before; and at another size its position embeddings are not those it was trained
    with. There the grid of *projected features* is made coarser: cut into as many cells as the
    budget has tokens, each the average of its tokens, at the position of the cell's middle token.
    Grids that do not divide evenly have one cell more in the upper rows of cells, so that every
    budget is hit. LLaVA-NeXT's view of the whole picture comes first; what the budget has beyond
    that goes to the tiles in the same way. Every layer runs on the same tokens.
    """

    name = "downsample"
    _visual: Tensor
    _chosen: Tensor

    def images(
        self, model: Any, processor: Any, images: list[Image.Image], budget: int | float
    ) -> list[Image.Image]:
        """Smaller pictures, for an encoder that takes any size."""
        if not _any_size(model):
            return images
        vision = model.config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        shapes = [
            processor.image_processor.get_number_of_image_patches(i.height, i.width, {})
            // vision.spatial_merge_size**2
            for i in images
        ]
        total = Keep((budget,)).count(0, sum(shapes))
        smaller = []
        for image, share in zip(images, _shares(total, shapes), strict=True):
            rows, columns = _grid(max(1, share), image.height / image.width)
            size = (columns * unit, rows * unit)
            smaller.append(image.resize(size, Image.Resampling.BICUBIC))
        return smaller

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """1 at the tokens that stand for a cell."""
        chosen = self._chosen.to(hidden.device)
        return chosen.float().masked_fill(~plan.visual, -torch.inf)

    @contextmanager
    def attached(
        self, model: Any, budget: int | float, samples: Sequence[str]
    ) -> Iterator[Attachment]:
        """Also averages the features on their way into the first layer."""
        family = family_of(model)
        layers: Any = family.layers(model)
        if _any_size(model):
            with attach_scorer(model, self, 1.0) as attachment:
                yield attachment
            return

        backbone = family.backbone(model)
        names = names_of(backbone.forward)

        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._visual = family.visual_mask(model, read_ids(by_name(names, args, kwargs)))

        def pool(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] == 1 or not bool(self._visual.any()):
                return None
            pooled = self._pool(model, hidden, Keep((budget,)))
            if args:
                return (pooled, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": pooled}

        # Before the engine's own hooks, which run in the order they are made.
        handles = [
            backbone.register_forward_pre_hook(see, with_kwargs=True),
            layers[0].register_forward_pre_hook(pool, with_kwargs=True),
        ]
        try:
            with super().attached(model, budget, samples) as attachment:
                yield attachment
        finally:
            for handle in handles:
                handle.remove()

    def _pool(self, model: Any, hidden: Tensor, keep: Keep) -> Tensor:
        """`hidden` `[B, T, D]` with cell averages where a token stands for its cell."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        newline = getattr(model.model, "image_newline", None)
        visual = self._visual.to(hidden.device)
        pooled, self._chosen = hidden.clone(), torch.zeros_like(visual)
        for b in range(len(hidden)):
            places = visual[b].nonzero()[:, 0]
            if len(places) == 0:
                continue
            breaks = (False,) * len(places)
            if newline is not None:
                same = hidden[b, places] == newline.to(hidden.device, hidden.dtype)
                breaks = tuple(same.all(dim=-1).tolist())
            average, middles = _pooling(breaks, side, keep.count(0, len(places)))
            middles = places[middles.to(places.device)]
            cells = average.to(hidden.device) @ hidden[b, places].float()
            pooled[b, middles] = cells.to(hidden.dtype)
            self._chosen[b, middles] = True
        return pooled


def _any_size(model: Any) -> bool:
    """Whether the vision tower takes pictures of any size, in merged patches."""
    return hasattr(model.config.vision_config, "spatial_merge_size")


def _shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` split in proportion to `sizes`; the parts add up."""
    ends = [total * sum(sizes[:i]) // sum(sizes) for i in range(len(sizes) + 1)]
    return [end - start for start, end in pairwise(ends)]


def _grid(count: int, aspect: float) -> tuple[int, int]:
    """Rows and columns: about `count` cells, about `aspect` as high as wide; the count first."""

    def off(rows: int, columns: int) -> float:
        return abs(log(rows * columns / count)) + abs(log(rows / columns / aspect)) / 4

    pairs = [
        (rows, columns)
        for rows in range(1, count + 1)
        for columns in {max(1, count // rows), count // rows + 1}
    ]
    return min(pairs, key=lambda pair: (off(*pair), pair))


@lru_cache
def _pooling(breaks: tuple[bool, ...], side: int, count: int) -> tuple[Tensor, Tensor]:
    """How `count` cells are made of the visual tokens of a sample.

    Args:
        breaks: per visual token, whether it is LLaVA-NeXT's end of a row of tiles.
        side: rows and columns of the view of the whole picture.
        count: of cells.

    Returns:
        `[cells, N]` float32, each row an average; and int64 `[cells]`, each cell's middle token.

    Raises:
        AlvtsError: the tokens do not make whole pictures.
    """
    pictures = _pictures(breaks, side)
    sizes = [sum(view.rows * view.columns for view in views) for views in pictures]
    cells: list[tuple[list[int], int]] = []
    for views, share in zip(pictures, _shares(min(count, sum(sizes)), sizes), strict=True):
        for view in views:
            part = min(share, view.rows * view.columns)
            cells += view.cells(part)
            share -= part
    average = torch.zeros(len(cells), len(breaks))
    for row, (tokens, _) in zip(average, cells, strict=True):
        row[tokens] = 1 / len(tokens)
    return average, torch.tensor([middle for _, middle in cells], dtype=torch.int64)


@dataclass(frozen=True)
class _View:
    """A grid of visual tokens: `start` is its first one, `stride` from a row to the next."""

    start: int
    rows: int
    columns: int
    stride: int

    def cells(self, count: int) -> list[tuple[list[int], int]]:
        """The grid cut into `count` cells: the tokens of each, and the middle one."""
        if count == 0:
            return []
        bands = round(sqrt(count * self.rows / self.columns))
        bands = min(max(bands, ceil(count / self.columns)), self.rows, count)
        found = []
        for i in range(bands):
            rows = range(i * self.rows // bands, (i + 1) * self.rows // bands)
            across = count // bands + (i < count % bands)
            for j in range(across):
                columns = range(j * self.columns // across, (j + 1) * self.columns // across)
                tokens = [self._token(row, column) for row in rows for column in columns]
                middle = self._token(rows[len(rows) // 2], columns[len(columns) // 2])
                found.append((tokens, middle))
        return found

    def _token(self, row: int, column: int) -> int:
        return self.start + row * self.stride + column


def _pictures(breaks: tuple[bool, ...], side: int) -> list[list[_View]]:
    """The views of each picture of a sample: the whole, and its tiles where there are any."""
    pictures, at = [], 0
    while at < len(breaks):
        views = [_View(at, side, side, side)]
        at += side * side
        if True in breaks[at:]:
            columns = breaks.index(True, at) - at
            first = at
            while breaks[at + columns : at + columns + 1] == (True,):
                at += columns + 1
            if columns:
                views.append(_View(first, (at - first) // (columns + 1), columns, columns + 1))
        pictures.append(views)
    if at != len(breaks):
        raise AlvtsError(
            f"downsample does not know how {len(breaks)} visual tokens make pictures of "
            f"{side} x {side}"
        )
    return pictures
