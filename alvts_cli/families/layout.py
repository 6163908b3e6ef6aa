"""Where in the pictures the visual tokens lie.

What holds for most families. One whose tokens are laid out in another way overrides
`Family.image_views` or `Family.frame_views`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ..errors import AlvtsError
from .seen import WHOLE, Box, seen

PIXELS = ("pixel_values", "pixel_values_images")
"""What the pixels of images are called among the inputs."""


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


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is to be laid out.

    Attributes:
        family: its name.
        model: of the family.
        processor: that made the inputs.
        inputs: of one prompt.
        sizes: width and height of every image, in pixels.
        videos: of the frames of every video, likewise.
    """

    family: str
    model: Any
    processor: Any
    inputs: Mapping[str, Tensor]
    sizes: Sequence[tuple[int, int]]
    videos: Sequence[tuple[int, int]] = ()

    def places(self, kind: str) -> Tensor:
        """int64 `[n]`: which of the visual tokens are those of a kind, "image" or "video"."""
        ids = self.inputs["input_ids"][0].cpu()
        own = ids == getattr(self.model.config, f"{kind}_token_id", -1)
        other = "image" if kind == "video" else "video"
        both = own | (ids == getattr(self.model.config, f"{other}_token_id", -1))
        return own[both].nonzero()[:, 0]

    def unknown(self) -> AlvtsError:
        """That the tokens of this prompt cannot be placed."""
        tokens = len(self.places("image")) + len(self.places("video"))
        return AlvtsError(
            f"alvts does not know where the {tokens} visual tokens of this {self.family} prompt "
            "lie in its pictures; `alvts run` answers without a picture of them"
        )


def numbered(prompt: Prompt, kind: str, views: Sequence[View], spare: int) -> list[View]:
    """Views whose tokens are counted among those of one kind, counted among all visual ones.

    Args:
        views: with `spare` tokens in no place, all tokens of that kind.

    Raises:
        AlvtsError: they are not.
    """
    places = prompt.places(kind)
    if sum(view.tokens.numel() for view in views) + spare != len(places):
        raise prompt.unknown()
    return [replace(view, tokens=places[view.tokens]) for view in views]


def grids(prompt: Prompt) -> list[View]:
    """Qwen's: images and videos of any size, whose `image_grid_thw` and `video_grid_thw` count
    patches, of which `spatial_merge_size` squared make a token.

    Raises:
        AlvtsError: the grids do not make up the visual tokens.
    """
    vision = prompt.model.config.vision_config
    merge, together = vision.spatial_merge_size, getattr(vision, "temporal_patch_size", 1)
    views: list[View] = []
    for kind in ("image", "video"):
        at, own = 0, []
        sizes = prompt.inputs.get(f"{kind}_grid_thw", torch.empty(0))
        for picture, (steps, height, width) in enumerate(sizes.tolist()):
            for step in range(steps):
                frames = None
                if kind == "video":
                    frames = (step * together, (step + 1) * together - 1)
                tokens = grid(at, height // merge, width // merge)
                own.append(View(picture, WHOLE, tokens, frames))
                at += tokens.numel()
        views += numbered(prompt, kind, own, 0)
    return views


def image_views(prompt: Prompt) -> list[View]:
    """Of an encoder that sees every image once, or whole and in tiles, all of one size.

    A video is a row of such images where the model has no other way to see one.

    Raises:
        AlvtsError: the views do not make up the visual tokens.
    """
    pixels = next((prompt.inputs[name] for name in PIXELS if name in prompt.inputs), None)
    tokens = len(prompt.places("image"))
    if pixels is None or pixels.dim() not in (4, 5):
        if tokens:
            raise prompt.unknown()
        return []
    own = prompt.inputs.get("image_sizes")
    if own is not None:
        return _of_sizes(prompt, own.tolist(), tokens)
    count = prod(pixels.shape[:-3])
    # A token is a square of the encoder's input, of this many pixels.
    side = sqrt(count * prod(pixels.shape[-2:]) / max(tokens, 1))
    rows, columns = (round(length / side) for length in pixels.shape[-2:])
    boxes = [seen(prompt.processor, size) for size in prompt.sizes]
    frames = 0
    if prompt.videos and "pixel_values_videos" not in prompt.inputs:
        frames = count - sum(map(len, boxes))
    if sum(map(len, boxes)) + frames != count or count * rows * columns != tokens:
        raise prompt.unknown()
    views: list[View] = []
    at = 0
    for i, tiles in enumerate(boxes):
        numbers = grid(at, len(tiles), rows * columns).view(-1, rows, columns)
        views += _arranged(prompt, i, tiles, numbers)
        at += numbers.numel()
    for frame in range(frames):
        (box,) = seen(prompt.processor, prompt.videos[0], video=True)
        views.append(View(0, box, grid(at, rows, columns), (frame, frame)))
        at += rows * columns
    return numbered(prompt, "image", views, 0)


def frame_views(prompt: Prompt, front: int, behind: int) -> list[View]:
    """Of an encoder that sees every frame of a video as an image.

    Args:
        front: tokens in front of those of each frame that lie nowhere.
        behind: tokens behind those of each video, likewise.

    Raises:
        AlvtsError: the views do not make up the visual tokens.
    """
    pixels, tokens = prompt.inputs.get("pixel_values_videos"), len(prompt.places("video"))
    if pixels is None or pixels.dim() != 5:
        if tokens:
            raise prompt.unknown()
        return []
    videos, frames = pixels.shape[:2]
    each = (tokens // videos - behind) // frames
    side = isqrt(max(each - front, 0))
    views = []
    for picture in range(videos):
        (box,) = seen(prompt.processor, prompt.videos[picture], video=True)
        for frame in range(frames):
            at = picture * (frames * each + behind) + frame * each + front
            views.append(View(picture, box, grid(at, side, side), (frame, frame)))
    return numbered(prompt, "video", views, videos * (frames * front + behind))


def grid(start: int, rows: int, columns: int) -> Tensor:
    """int64 `[rows, columns]`: the numbers from `start` on, row by row."""
    return torch.arange(start, start + rows * columns).view(rows, columns)


def _of_sizes(prompt: Prompt, sizes: list[list[int]], tokens: int) -> list[View]:
    """Pictures of different sizes, held in one tensor, each in its upper left corner."""
    side = max(1, round(sqrt(sum(map(prod, sizes)) / max(tokens, 1))))
    views, at = [], 0
    for i, (height, width) in enumerate(sizes):
        if height % side or width % side:
            raise prompt.unknown()
        views.append(View(i, WHOLE, grid(at, height // side, width // side)))
        at += views[-1].tokens.numel()
    return numbered(prompt, "image", views, 0)


def _arranged(prompt: Prompt, picture: int, boxes: Sequence[Box], numbers: Tensor) -> list[View]:
    """The views of one image: as they are where there is one, else the whole and one of all tiles.

    Args:
        boxes: what each covers.
        numbers: int64 `[n, rows, columns]`, their tokens.

    Raises:
        AlvtsError: they are not one view of the whole and a grid of tiles, row by row.
    """
    if len(boxes) == 1:
        return [View(picture, boxes[0], numbers[0])]
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
    whole = areas.index(max(areas))
    tiles = [box for i, box in enumerate(boxes) if i != whole]
    tall = tiles[0][3] - tiles[0][1]
    across = sum(abs(box[1] - tiles[0][1]) < tall / 2 for box in tiles)
    down, rest = divmod(len(tiles), across)
    box = (*tiles[0][:2], *tiles[-1][2:])
    wide = (box[2] - box[0]) / across
    tall = (box[3] - box[1]) / down
    for i, tile in enumerate(tiles):
        left, top = box[0] + i % across * wide, box[1] + i // across * tall
        if rest or abs(tile[0] - left) > wide / 4 or abs(tile[1] - top) > tall / 4:
            raise prompt.unknown()
    _, rows, columns = numbers.shape
    others = torch.cat([numbers[:whole], numbers[whole + 1 :]]).view(down, across, rows, columns)
    laid = others.transpose(1, 2).reshape(down * rows, across * columns)
    return [
        View(picture, boxes[whole], numbers[whole], name="whole"),
        View(picture, box, laid, name="tiles"),
    ]
