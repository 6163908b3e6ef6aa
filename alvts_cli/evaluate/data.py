"""Questions about pictures, with right answers.

A data set is named by

- `pocket`: rendered scenes of the test split, the same number of each kind of question;
- `easy-vqa`: the public set's test split (the package `easy-vqa`);
- a `.json` or `.jsonl` file in LLaVA's format (`image`, `conversations`; the first answer is the
  right one; `kind` if there is one) or in POPE's (`image`, `text`, `label`; a record a line under
  either ending), with its images in the image folder, or in the file's own folder;
- a data set of the hub, `ID` or `ID:SPLIT` (split `test` if none is named), with columns `image`,
  `question` and `answer` (a text, or a list of texts that are all right).
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import AlvtsError
from ..prompts import MARKER, first_turn, read_image
from .scoring import normalise, suitable

SHORT, LONG = 4, 16
"""Tokens of the longest answer: of the closed sets of one to three words, and of all others."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its set.
        kind: of question, for a table of its own.
        question: the user's words; `<image>` says where an image stands, first by default.
        answers: right ones.
        images: reads the pictures, RGB; raises AlvtsError if one is broken.
    """

    id: str
    kind: str
    question: str
    answers: tuple[str, ...]
    images: Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class DataSet:
    """Questions, how they are scored (a name of `SCORINGS`), and how long an answer may get."""

    name: str
    items: tuple[Item, ...]
    scoring: str
    max_new_tokens: int


def read_data(
    data: str, image_folder: Path | None, samples: int, seed: int, scoring: str | None = None
) -> DataSet:
    """`samples` questions of `data` (see the module's text), or all if there are fewer.

    Those of files and of the hub are drawn at random by `seed`; those of `pocket` and `easy-vqa`
    are the same for every seed.

    Raises:
        AlvtsError: no such data, a file or an image that is not there, a record without a
            question or an answer.
    """
    path = Path(data)
    longest = LONG
    if data == "pocket":
        items, longest = _scenes(samples), SHORT
    elif data == "easy-vqa":
        items, longest = _easy(samples), SHORT
    elif path.suffix in (".json", ".jsonl"):
        items = _file(path, image_folder or path.parent, samples, seed)
    elif not path.exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+)?", data):
        items = _hub(data, samples, seed)
    else:
        raise AlvtsError(
            f"no evaluation data {data!r}: give 'pocket', 'easy-vqa', a .json or .jsonl file of "
            "LLaVA's or POPE's format, or the id of a data set on the hub"
        )
    if not items:
        raise AlvtsError(f"there is no question in {data}")
    chosen = scoring or suitable(item.answers for item in items)
    return DataSet(path.name if path.suffix else data, tuple(items), chosen, longest)


def _scenes(samples: int) -> list[Item]:
    from ..pocket.evaluate import scene_items
    from ..pocket.questions import KINDS

    found = scene_items("test", max(1, samples // len(KINDS)))
    return [
        Item(f"scene {i}", item.kind, item.question, (item.answer,), partial(_pictures, item.image))
        for i, item in enumerate(found)
    ]


def _easy(samples: int) -> list[Item]:
    from ..pocket.evaluate import easy_items
    from ..pocket.scenes import COLORS

    def kind(answer: str) -> str:
        if answer in ("yes", "no"):
            return "yes/no"
        return "color" if answer in COLORS else "shape"

    return [
        Item(
            f"easy {i}",
            kind(item.answer),
            item.question,
            (item.answer,),
            partial(_pictures, item.image),
        )
        for i, item in enumerate(easy_items(samples))
    ]


def _pictures(image: Image.Image) -> list[Image.Image]:
    return [image]


def _file(path: Path, folder: Path, samples: int, seed: int) -> list[Item]:
    if not folder.is_dir():
        raise AlvtsError(f"there is no image folder {folder}")
    records = _records(path)
    chosen = _draw(len(records), samples, seed)
    items = []
    for i in chosen:
        try:
            items.append(_record(records[i], f"{path.stem}[{i}]", path.stem, folder))
        except AlvtsError as error:
            raise AlvtsError(f"{path.name}, record {i}: {error}") from None
    return items


def _records(path: Path) -> list[Any]:
    """A list of records, or one a line. POPE's files end in `.json` and hold lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AlvtsError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise AlvtsError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise AlvtsError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except ValueError:
        pass
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise AlvtsError(f"{path} is not JSON: {error}") from None


def _draw(count: int, samples: int, seed: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(count), min(count, samples)))


def _record(record: Any, name: str, kind: str, folder: Path) -> Item:
    """A record of LLaVA's or of POPE's format."""
    if not isinstance(record, dict):
        raise AlvtsError("it is not a record")
    question: Any = record.get("text")
    answer: Any = record.get("label")
    if "conversations" in record:
        question, answer = first_turn(record["conversations"])
    names = record.get("image")
    names = [names] if isinstance(names, str) else names
    if not isinstance(question, str) or not isinstance(answer, str) or not normalise(answer):
        raise AlvtsError("it has no question, or no answer")
    if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise AlvtsError("it has no image")
    places = question.count(MARKER)
    if places not in (0, len(names)):
        raise AlvtsError(f"its question has {places} places for {len(names)} images")
    paths = [folder / name for name in names]
    for path in paths:
        if not path.is_file():
            raise AlvtsError(f"there is no image {path}")
    own = record.get("kind")
    kind = own if isinstance(own, str) else kind
    return Item(name, kind, question, (answer,), partial(_read_all, paths))


def _read_all(paths: Sequence[Path]) -> list[Image.Image]:
    return [read_image(path) for path in paths]


def _hub(data: str, samples: int, seed: int) -> list[Item]:
    name, _, split = data.partition(":")
    try:
        from datasets import load_dataset
    except ImportError:
        raise AlvtsError(
            "data from the hub needs the datasets package: pip install 'alvts[hub]'"
        ) from None
    try:
        # Undecoded, so that a picture is decoded when its turn comes.
        rows = load_dataset(name, split=split or "test").decode(False)
        chosen = [(i, rows[i]) for i in _draw(len(rows), samples, seed)]
    except Exception as error:
        # Whatever the HTTP client, the format's reader or the hub itself raises.
        line = str(error).strip().partition("\n")[0]
        raise AlvtsError(
            f"cannot read the data set {data} from the hub: {line or type(error).__name__}; "
            "is there a network, and are the id and the split (ID:SPLIT) right?"
        ) from error
    return [_row(row, f"{data}[{i}]", name) for i, row in chosen]


def _row(row: dict[str, Any], label: str, kind: str) -> Item:
    question, answer, picture = (row.get(key) for key in ("question", "answer", "image"))
    answers = tuple(answer) if isinstance(answer, list) else (answer,)
    if not isinstance(question, str) or not answers or not all(isinstance(a, str) for a in answers):
        raise AlvtsError(f"{label} has no columns question and answer with text")
    data = picture.get("bytes") if isinstance(picture, dict) else None
    file = picture.get("path") if isinstance(picture, dict) else None
    if data is None and file is None:
        raise AlvtsError(f"{label} has no column image with a picture")
    return Item(label, kind, question, answers, partial(_row_picture, data, file, label))


def _row_picture(data: bytes | None, file: str | None, label: str) -> list[Image.Image]:
    return [read_image(Path(str(file)) if data is None else BytesIO(data), f"of {label}")]
