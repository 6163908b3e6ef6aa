"""Calibration data streamed from a hub, by the `datasets` package (an extra)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any

import fsspec
from PIL import Image

from alvts_cli.errors import AlvtsError
from alvts_cli.prompts import first_turn, read_image

from .data import Candidate, Sample

# A stream is shuffled within a window: this many times the samples asked for.
_WINDOW = 4


def hub_candidates(name: str, seed: int, count: int) -> Iterator[Candidate]:
    """The records of the data set's `train` split, as they stream in, shuffled within a window.

    Raises:
        AlvtsError: `datasets` is not installed, or the set cannot be read.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise AlvtsError(
            "data from the hub needs the datasets package: pip install 'alvts[hub]'"
        ) from None
    with _named_errors(name):
        # Undecoded, so that a broken picture is one broken record.
        rows = load_dataset(name, split="train", streaming=True).decode(False)
        return _stream(name, rows.shuffle(seed=seed, buffer_size=_WINDOW * count))


def _stream(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[Candidate]:
    with _named_errors(name):
        for i, row in enumerate(rows):
            label = f"{name}[{i}]"
            yield label, partial(_row_sample, row, label)


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Turn whatever the HTTP client, the format's reader or the hub itself raises into one line."""
    try:
        yield
    except Exception as error:
        line = str(error).strip().partition("\n")[0]
        raise AlvtsError(
            f"cannot read the data set {name} from the hub: {line or type(error).__name__}; "
            "is there a network, and is the id right?"
        ) from error


def _row_sample(row: dict[str, Any], label: str) -> Sample:
    found = row.get("images") or row.get("image")
    pictures = found if isinstance(found, list) else [found]
    images = [_picture(picture, label) for picture in pictures if picture is not None]
    if not images:
        raise AlvtsError("it has no column image or images")
    if row.get("conversations") is not None:
        prompt, answer = first_turn(row["conversations"])
    else:
        asked = (row.get(column) for column in ("question", "prompt", "text"))
        prompt = next((text for text in asked if isinstance(text, str)), "")
        answer = row.get("answer") if isinstance(row.get("answer"), str) else None
        if not prompt:
            raise AlvtsError("it has no column conversations, question, prompt or text")
    return Sample(str(row.get("id", label)), images, prompt, answer)


def _picture(picture: Any, label: str) -> Image.Image:
    """A column's value: a picture, or undecoded `{"bytes": ..., "path": ...}`, one of them None."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, dict):
        raise AlvtsError("its image holds no picture")
    data, path = picture.get("bytes"), picture.get("path")
    if data is None:
        try:
            # The path may lie on the hub, and in an archive there.
            with fsspec.open(path, "rb") as file:
                data = file.read()
        except (OSError, ValueError, TypeError):
            raise AlvtsError(f"its image {path} cannot be read") from None
    return read_image(BytesIO(data), f"of {label}")
