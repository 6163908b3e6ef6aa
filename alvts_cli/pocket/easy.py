"""The public easy-VQA set (PyPI `easy-vqa`, MIT): one shape on a plain ground, 64 x 64 pixels."""

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from ..errors import AlvtsError


@dataclass(frozen=True)
class EasyImage:
    """One picture's file, its (question, answer) pairs, and what the answers say of it."""

    path: Path
    questions: tuple[tuple[str, str], ...]

    def open(self) -> Image.Image:
        """The picture, RGB, 64 x 64."""
        with Image.open(self.path) as image:
            return image.convert("RGB")


def load_easy(split: str) -> list[EasyImage]:
    """The pictures of `split` (`train` or `test`), in order, with their questions.

    Raises:
        AlvtsError: the package that holds the set is not installed.
    """
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise AlvtsError("the easy-VQA set is not installed; pip install easy-vqa==1.0")
    folder = Path(spec.origin).parent / "data" / split
    asked: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        asked.setdefault(image, []).append((question, answer))
    return [
        EasyImage(folder / "images" / f"{image}.png", tuple(pairs))
        for image, pairs in sorted(asked.items())
    ]
