"""One picture of all layers: a panel for each, what it keeps clear and what skips it grey."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from math import ceil, log

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..families import View
from .trace import Shown, Trace

WIDTH = 1200
"""Of the picture, in pixels."""

_SMALLEST = 90
"""Width of a view."""

_SHAPE = 2.2
"""Width by height that the grid of panels is to come near to."""

_MARGIN, _GAP, _CAPTION = 24, 14, 22
_INK, _QUIET, _PAPER, _BORDER = "#1b1f24", "#5b6470", "#ffffff", "#e69f00"
"""The last is Okabe and Ito's orange."""

DIM, DIMMED = "#8a8f96", 0.62
"""What is skipped goes towards this grey, by this share."""


@dataclass(frozen=True)
class _Tile:
    """A view in its panel.

    Attributes:
        view: itself.
        clear, dimmed: what lies under it, as it is and as it is skipped; of the same size.
        left, top: in the panel.
    """

    view: View
    clear: Image.Image
    dimmed: Image.Image
    left: int
    top: int


def to_png(shown: Shown, trace: Trace) -> bytes:
    """The bytes of the PNG, `WIDTH` pixels wide or, where pictures are many, wider.

    Args:
        shown: the prompt.
        trace: what to draw of it.
    """
    layers = len(trace.kept)
    rows_of_views = _arrange(shown)
    across = _across(layers, len(rows_of_views[0]) / len(rows_of_views))
    width = (WIDTH - 2 * _MARGIN - (across - 1) * _GAP) // across
    # Many views in a panel, such as frames, are still to be seen.
    width = max(width, _SMALLEST * len(rows_of_views[0]))
    whole = max(WIDTH, 2 * _MARGIN + across * (width + _GAP) - _GAP)
    tiles, height = _tiles(shown, rows_of_views, width)
    head = _head(shown, trace)
    title, small = ImageFont.load_default(22), ImageFont.load_default(15)
    top = _MARGIN + 34 + 22 * (len(head) - 1) + _GAP
    down = ceil(layers / across)
    step = height + _CAPTION + _GAP
    canvas = Image.new("RGB", (whole, top + down * step + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(head):
        font, ink = (title, _INK) if i == 0 else (small, _QUIET)
        y = _MARGIN + (0 if i == 0 else 34 + 22 * (i - 1))
        draw.text((_MARGIN, y), _fit(line, font, whole - 2 * _MARGIN), ink, font)
    for layer, kept in enumerate(trace.kept):
        x = _MARGIN + layer % across * (width + _GAP)
        y = top + layer // across * step
        for tile in tiles:
            canvas.paste(_draw(tile, kept[tile.view.tokens.numpy()]), (x + tile.left, y + tile.top))
        _caption(draw, (x, y + height + 4), width, layer, trace)
    file = BytesIO()
    canvas.save(file, "PNG", optimize=True)
    return file.getvalue()


def edges(length: int, parts: int) -> list[int]:
    """Where `parts` equal parts of `length` pixels begin, and where the last one ends."""
    return [round(i * length / parts) for i in range(parts + 1)]


def under(picture: Image.Image, view: View, size: tuple[int, int]) -> Image.Image:
    """The part of a picture that a view covers, grey where it reaches beyond the picture."""
    left, top, right, bottom = view.box
    corners = (
        *(left * picture.width, top * picture.height),
        *(right * picture.width, bottom * picture.height),
    )
    # In two steps: the first only cuts, where shrinking would leave pixels out.
    whole = max(1, round(corners[2] - corners[0])), max(1, round(corners[3] - corners[1]))
    cut = picture.transform(
        whole, Image.Transform.EXTENT, corners, Image.Resampling.BILINEAR, fillcolor="#808080"
    )
    return cut.resize(size, Image.Resampling.LANCZOS)


def shape(shown: Shown, view: View) -> float:
    """Width by height of what a view covers."""
    left, top, right, bottom = view.box
    picture = shown.picture(view)
    return (right - left) * picture.width / ((bottom - top) * picture.height)


def _arrange(shown: Shown) -> list[list[View]]:
    """The views of a panel in rows, as near to a square as they go."""
    views = list(shown.views)
    middle = sum(shape(shown, view) for view in views) / len(views)
    across = min(
        range(1, len(views) + 1), key=lambda n: abs(log(n * middle / ceil(len(views) / n) / 1.3))
    )
    return [views[i : i + across] for i in range(0, len(views), across)]


def _across(layers: int, aspect: float) -> int:
    """How many panels stand beside each other: a good shape, and few places left empty."""

    def off(across: int) -> float:
        down = ceil(layers / across)
        empty = 1 - layers / (across * down)
        return abs(log(across * aspect / down / _SHAPE)) + 5 * empty

    return min(range(1, layers + 1), key=off)


def _tiles(shown: Shown, rows: list[list[View]], width: int) -> tuple[list[_Tile], int]:
    """The views of a panel of this width, and its height."""
    gap = 4
    each = (width - gap * (len(rows[0]) - 1)) / len(rows[0])
    tiles, top = [], 0
    for row in rows:
        tallest = 0
        for i, view in enumerate(row):
            # No taller than wide, or one narrow picture would fill the page.
            wide = min(each, each * shape(shown, view))
            size = max(1, round(wide)), max(1, round(wide / shape(shown, view)))
            clear = under(shown.picture(view), view, size)
            left = round(i * (each + gap) + (each - wide) / 2)
            tiles.append(_Tile(view, clear, _dim(clear), left, top))
            tallest = max(tallest, size[1])
        top += tallest + gap
    return tiles, top - gap


def _dim(picture: Image.Image) -> Image.Image:
    """Without colours and with little contrast: neither a light picture nor a dark one hides it."""
    grey = picture.convert("L").convert("RGB")
    return Image.blend(grey, Image.new("RGB", picture.size, DIM), DIMMED)


def _draw(tile: _Tile, kept: np.ndarray) -> Image.Image:
    """A view with the tokens `kept` bool `[rows, columns]` clear, and a line around them."""
    made = tile.dimmed.copy()
    rows, columns = kept.shape
    xs, ys = edges(made.width, columns), edges(made.height, rows)
    for row, column in np.argwhere(kept):
        box = xs[column], ys[row], xs[column + 1], ys[row + 1]
        made.paste(tile.clear.crop(box), box)
    draw = ImageDraw.Draw(made)
    for (x0, y0), (x1, y1) in _outline(kept):
        ends = [
            (min(xs[x], made.width - 1), min(ys[y], made.height - 1))
            for x, y in ((x0, y0), (x1, y1))
        ]
        draw.line(ends, _BORDER, 1)
    return made


def _outline(kept: np.ndarray) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The sides between a kept token and one that is not, as pairs of corners `(column, row)`."""
    framed = np.pad(kept, 1)
    for row, column in np.argwhere(framed[1:-1, 1:] != framed[1:-1, :-1]):
        yield (column, row), (column, row + 1)
    for row, column in np.argwhere(framed[1:, 1:-1] != framed[:-1, 1:-1]):
        yield (column, row), (column + 1, row)


def _head(shown: Shown, trace: Trace) -> list[str]:
    given, dense = trace.answer, shown.dense
    share = given.visual_tokens_kept / given.visual_tokens
    held = next((i for n, i in enumerate(trace.ranked_in) if i not in (None, n)), None)
    return [
        shown.prompt,
        f"answer with all {given.visual_tokens} visual tokens: {dense.answer or '(nothing)'}",
        f"answer with {given.visual_tokens_kept:.1f} in each layer on average ({share:.0%}): "
        f"{given.answer or '(nothing)'}",
        f"{shown.model}; {trace.policy}. Clear: runs through the layer; grey: skips it"
        + ("." if held is None else f"; as {held}: goes on with the choice of layer {held}."),
    ]


def _caption(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], width: int, layer: int, trace: Trace
) -> None:
    """The layer's number, and on the right how many tokens it keeps."""
    font = ImageFont.load_default(14)
    ranked_in = trace.ranked_in[layer]
    name = f"layer {layer}"
    count = str(trace.counts[layer])
    if ranked_in not in (None, layer):
        name = f"{name}, as {ranked_in}"
    ink = _INK if ranked_in == layer else _QUIET
    draw.text(place, name, ink, font)
    draw.text((place[0] + width, place[1]), count, ink, font, anchor="ra")


def _fit(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """`text` on one line, cut at its end where it is too long."""
    line = " ".join(text.split())
    if font.getlength(line) <= width:
        return line

    def wide(length: int) -> int:
        return ceil(font.getlength(f"{line[:length]}..."))

    return f"{line[: bisect_right(range(1, len(line)), width, key=wide)]}..."
