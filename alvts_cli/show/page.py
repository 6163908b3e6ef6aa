"""A page in one file, without network or server: sliders over layers and keep ratios."""

import json
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from .. import __version__
from ..bench.report import megabytes
from .png import DIM, DIMMED
from .trace import Shown, Trace

LARGEST = 1200
"""Longer side of an embedded picture, in pixels."""

_TEMPLATE = Path(__file__).with_name("page.html")


def to_page(shown: Shown) -> bytes:
    """The HTML of the page, in UTF-8; its sliders begin at the first layer, and in the middle of
    the keep ratios."""
    places: dict[int, int] = {}
    pictures: list[str] = []
    views = []
    for view in shown.views:
        picture = shown.picture(view)
        if id(picture) not in places:
            places[id(picture)] = len(pictures)
            pictures.append(_data_url(picture))
        rows, columns = view.tokens.shape
        views.append(
            {
                "picture": places[id(picture)],
                "label": shown.label(view),
                "box": view.box,
                "rows": rows,
                "columns": columns,
                "tokens": view.tokens.flatten().tolist(),
            }
        )
    first = shown.traces[0]
    layers, tokens = first.kept.shape
    data = {
        "prompt": shown.prompt,
        "about": f"{shown.model}: what each of its {layers} layers keeps of {tokens} visual tokens."
        f" Clear: runs through the layer; grey: skips it. Made by alvts {__version__}.",
        "visual_tokens": tokens,
        "layers": layers,
        "pictures": pictures,
        "views": views,
        "dim": ImageColor.getrgb(DIM),
        "dimmed": DIMMED,
        "dense": {"answer": shown.dense.answer, "kv": megabytes(shown.dense.kv_bytes)},
        "traces": [_plain(trace) for trace in shown.traces],
        "start": len(shown.traces) // 2,
    }
    # Whatever the words are, they end no script.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return _TEMPLATE.read_text(encoding="utf-8").replace("/*DATA*/", text).encode()


def _plain(trace: Trace) -> dict[str, Any]:
    """A trace as the page reads it."""
    ranking = sorted({layer for layer in trace.ranked_in if layer is not None})
    return {
        "answer": trace.answer.answer,
        "kv": megabytes(trace.answer.kv_bytes),
        "average": trace.answer.visual_tokens_kept,
        "policy": trace.policy,
        "counts": trace.counts,
        "ranked_in": trace.ranked_in,
        "kept": _base64(np.packbits(trace.kept).tobytes()),
        "importance": {
            str(layer): _base64(steps(trace.importance[layer]).tobytes()) for layer in ranking
        },
    }


def steps(importance: np.ndarray) -> np.ndarray:
    """Numbers of at least 0 as uint16, little-endian: `1024 log2(x) + 32768`, and 0 for 0."""
    with np.errstate(divide="ignore"):
        exact = 1024 * np.log2(importance) + 32768
    return np.clip(exact, 0, 65535).round().astype("<u2")


def _data_url(picture: Image.Image) -> str:
    """A picture as a data URL: small ones as they are, photographs as JPEG."""
    file = BytesIO()
    kept = picture.copy()
    kept.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    form = "PNG" if max(picture.size) <= 256 else "JPEG"
    kept.save(file, form, quality=88, optimize=True)
    return f"data:image/{form.lower()};base64,{_base64(file.getvalue())}"


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
