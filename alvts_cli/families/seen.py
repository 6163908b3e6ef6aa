"""What a processor shows a model of a picture, found out by giving it one whose pixels say where
they are."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in shares of a picture's width and height; beyond 0 and 1 where the
processor puts a border around the picture."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


def seen(processor: Any, size: tuple[int, int], video: bool = False) -> list[Box]:
    """What part of a picture each view of it covers, in the order that the model gets them in.

    Whatever a processor does (resize, put a border around, cut out the middle, cut into tiles), a
    pixel of what it makes is as red as it lies to the right, and as green as it lies below.

    Args:
        processor: of a model whose encoder takes views `[..., 3, H, W]`.
        size: width and height of the picture, in pixels.
        video: a frame of a video, not an image.
    """
    width, height = size
    place = np.zeros((height, width, 3), dtype=np.uint8)
    place[:, :, 0] = np.linspace(0, 255, width).round()
    place[:, :, 1] = np.linspace(0, 255, height).round()[:, None]
    dark, bright = (Image.new("RGB", size, color) for color in ("black", "white"))
    low, high, made = (
        _views(processor, picture, video) for picture in (dark, bright, Image.fromarray(place))
    )
    # Where no picture is, a border has the same color under any.
    shown = (high - low).abs() > 1e-3
    shares = torch.where(shown, (made - low) / torch.where(shown, high - low, 1.0), torch.nan)
    return [_box(share, size) for share in shares]


def _views(processor: Any, picture: Image.Image, video: bool) -> Tensor:
    """`[n, 3, H, W]`, float64."""
    if video:
        made = processor(
            videos=[[picture]],
            text=[processor.video_token],
            return_tensors="pt",
            do_sample_frames=False,
        )
    else:
        made = processor(images=[picture], text=[processor.image_token], return_tensors="pt")
    names = ("pixel_values_videos", "pixel_values", "pixel_values_images")
    pixels: Tensor = next(made[name] for name in names if name in made)
    return pixels.double().flatten(0, -4)


def _box(shares: Tensor, size: tuple[int, int]) -> Box:
    """Of one view: `[3, H, W]`, nan where no picture is."""
    left, right = _ends(shares[0].nanmean(dim=0), size[0])
    top, bottom = _ends(shares[1].nanmean(dim=1), size[1])
    return left, top, right, bottom


def _ends(shares: Tensor, pixels: int) -> tuple[float, float]:
    """Where the first of these places begins and the last one ends, as shares of `pixels`.

    Args:
        shares: `[n]`, from 0 at the middle of the first pixel to 1 at the middle of the last; nan
            where there is none.
    """
    known = (~shares.isnan()).nonzero()[:, 0]
    # At the ends pixels are mixed with what is not there.
    cut = len(known) // 4
    middle = known[cut : len(known) - cut]
    if len(middle) < 2:
        return 0.0, 1.0
    places = (shares[middle] * (pixels - 1) + 0.5) / pixels
    at = middle.double() + 0.5
    slope = ((at - at.mean()) * (places - places.mean())).sum() / (at - at.mean()).square().sum()
    start = float(places.mean() - slope * at.mean())
    ends = start, start + float(slope) * len(shares)
    # Told apart from the picture's own ends only where a pixel could be.
    whole = [float(round(end)) for end in ends]
    first, last = (w if abs(w - e) < slope / 2 else e for w, e in zip(whole, ends, strict=True))
    return first, last
