"""Questions about pictures, wherever they lie: what `calibrate`, `eval` and `run` read.

`--data` names

- `pocket`: endless rendered scenes, of seeds that are in neither training nor test;
- a `.json`, `.jsonl` or `.csv` file in LLaVA's format (`image`, `conversations`), in POPE's
  (`image`, `text`, `label`; a record a line under either ending), or with columns of its own;
- a folder with such a file, named `prompts.jsonl`, `metadata.jsonl` or `metadata.csv`, or with a
  `prompts.txt` (`a.jpg`, a tab, the prompt); with a prompt for all, any folder of pictures;
- a `.parquet` file, a folder of them, or a data set of the hub (`ID`, `ID:SPLIT`,
  `ID:CONFIG:SPLIT`), read by the `datasets` package.

Text is read with the standard library: for one broken line, or one field too many, `datasets` 5.2
refuses a whole JSON Lines or CSV file, where here it is one broken record.
"""

import csv
import json
import math
import random
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO, StringIO
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, cast

from PIL import Image
from pydantic import Field, TypeAdapter

from .errors import AlvtsError
from .prompts import MARKER, read_image
from .schema import Record, Text, check
from .terminal import one_line

NAMES = {
    "image": ("image", "images", "file_name", "file_names"),
    "question": ("conversations", "question", "prompt", "text"),
    "answer": ("answer", "answers", "label"),
    "kind": ("kind",),
    "id": ("id", "question_id"),
}
"""The parts of a record, and the columns they are looked for in, in this order."""

_TEXT = (".json", ".jsonl", ".csv")
_FILES = (*_TEXT, ".parquet")
_IN_FOLDER = ("prompts.jsonl", "prompts.txt", "metadata.jsonl", "metadata.csv")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_HUB = r"[\w-][\w.-]*(/[\w.-]+)?"

# A file of the hub, or of an archive there. Whatever else a record names is no part of the set.
_REMOTE = r"((zip|tar)://[^:]*::)?hf://datasets/"

# A stream is shuffled within a window: this many times the samples asked for.
_WINDOW = 4

# So many broken records before the first good one: the columns or the folder must be wrong.
_HOPELESS = 100


@dataclass(frozen=True)
class Sample:
    """A question about images.

    Attributes:
        id: what the data call it, or else a picture's name; it need not be unique.
        images: at least one, RGB.
        prompt: the user's words; `<image>` says where an image stands, first by default.
        answers: right ones, where known.
        kind: of question, where known.
    """

    id: str
    images: Sequence[Image.Image]
    prompt: str
    answers: tuple[str, ...] = ()
    kind: str = ""


Candidate = tuple[str, Callable[[], Sample]]
"""A record's name, which is unique, and how to read it: raises AlvtsError if it is broken."""


@dataclass(frozen=True)
class Source:
    """What is to be read.

    Attributes:
        data: see the module's text.
        image_folder: of the pictures that are named; by default where the file is.
        columns: of the parts that are not where `NAMES` says.
        split: of a data set, where none is named.
        stream: read a data set as it comes, without a copy on this machine, and draw from a window
            of four times the samples, not from all of it.
        answered: a record without an answer is a broken one.
        prompt: for records without a question.
    """

    data: str
    image_folder: Path | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    stream: bool = True
    answered: bool = False
    prompt: str | None = None

    def __post_init__(self) -> None:
        """Raises AlvtsError where there is no such image folder."""
        if self.image_folder is not None and not self.image_folder.is_dir():
            raise AlvtsError(f"there is no image folder {self.image_folder}")


def place(data: str) -> str:
    """What `--data` names, told from all else: a file or a folder by where it lies, however its
    path is written."""
    path = Path(data)
    return str(path.resolve()) if path.exists() else data


class Reader:
    """Reads candidates one at a time until `count` good ones were found.

    Nothing read is held on to: a large set costs no more memory than its largest image.

    Attributes:
        description: the data in words, for the artifact.
        candidates: all records, to be gone through once, and closed.
        total: how many they are; None where there is no telling.
        skipped: one line for every broken record met.
    """

    def __init__(
        self,
        description: str,
        candidates: Generator[Candidate],
        count: int | None = None,
        total: int | None = None,
    ) -> None:
        self.description = description
        self.candidates = candidates
        self.total = total
        self.skipped: list[str] = []
        self._count = count

    def __iter__(self) -> Iterator[Sample]:
        return (sample for _, sample, _ in self.found())

    def found(self) -> Iterator[tuple[str, Sample, Callable[[], Sample]]]:
        """Every good record: its name, what was read of it, and how to read it again."""
        found = 0
        with closing(self.candidates) as candidates:
            for name, read in candidates:
                if found == self._count or self.hopeless(found):
                    return
                try:
                    sample = read()
                except AlvtsError as error:
                    self.skip(name, error)
                    continue
                found += 1
                yield name, sample, read

    def skip(self, name: str, error: AlvtsError) -> None:
        """Write down a broken record; names in it may be of several lines."""
        self.skipped.append(one_line(f"{name}: {error}"))

    def hopeless(self, found: int) -> bool:
        """Whether so many are broken, and none of `found` is not, that it is no use going on."""
        return found == 0 and len(self.skipped) >= _HOPELESS


def read_data(source: Source, count: int | None, seed: int | None) -> Reader:
    """`count` samples drawn at random by `seed`, or all there are; in their own order without one.

    Raises:
        AlvtsError: no such data, a file that cannot be read as a whole, or an image folder where
            none is used.
    """
    data, path = source.data, Path(source.data)
    suffix = path.suffix.lower()
    if not data:
        raise _no_data(data)
    if source.image_folder is not None and (data == "pocket" or path.is_dir()):
        raise AlvtsError("an image folder goes with a file of records or a set of the hub only")
    if data == "pocket":
        return Reader("pocket scenes", _scenes(seed or 0), count, count)
    if path.is_dir():
        there = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if there:
            return _listed(source, path, _text_records(there[0]), count, seed)
        if source.prompt is not None and not any(path.rglob("*.parquet")):
            rows = [(p.name, {"image": p.name}) for p in pictures_in(path)]
            return _listed(source, path, rows, count, seed)
    elif path.exists() and not path.is_file():
        raise AlvtsError(f"cannot read {path}: it is a device or a pipe; name a file or a folder")
    elif suffix in _FILES and not path.is_file():
        raise AlvtsError(f"there is no file {path}")
    elif suffix in _TEXT:
        return _listed(source, path, _text_records(path), count, seed)
    elif path.is_file() and suffix not in _FILES:
        known = ", ".join(_FILES)
        raise AlvtsError(f"cannot tell what {path} holds: its name must end in one of {known}")
    return _set(source, count, seed)


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder, by their endings, in the order of their names.

    Raises:
        AlvtsError: there is none.
    """
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PICTURES)
    if not found:
        raise AlvtsError(f"there are no pictures in the folder {folder}")
    return found


def read_pictures(paths: Iterable[Path]) -> list[Image.Image]:
    """The pictures in files, and all those in folders, RGB and upright.

    Raises:
        AlvtsError: one that cannot be read, or a folder without any.
    """
    files = [file for path in paths for file in (pictures_in(path) if path.is_dir() else [path])]
    return [read_image(path) for path in files]


def parse_columns(text: str | None) -> dict[str, str]:
    """`image=img,question=q` as a dict.

    Raises:
        AlvtsError: not that, a part that is not one of `NAMES`, or one named twice.
    """
    columns: dict[str, str] = {}
    for item in text.split(",") if text is not None else ():
        part, _, column = (piece.strip() for piece in item.partition("="))
        if part not in NAMES or not column or part in columns:
            raise AlvtsError(
                f"{item!r} is not PART=COLUMN, each part once; parts: {', '.join(NAMES)}"
            )
        columns[part] = column
    return columns


def _scenes(seed: int) -> Generator[Candidate]:
    """Endless scenes of the calibration split, one question each, kinds drawn evenly."""
    from .pocket.scenes import SPLITS, seed_of

    rng = random.Random(seed)
    while True:
        scene = seed_of("calibration", rng.randrange(len(SPLITS["calibration"])))
        yield f"scene {scene}", partial(_scene, scene)


def _scene(seed: int) -> Sample:
    from .pocket.questions import ask
    from .pocket.scenes import make_scene, render

    scene = make_scene(seed)
    # The first of several: a kind may not fit a scene.
    question = ask(scene, 3, random.Random(f"questions {seed}"))[0]
    answers = (question.answer,)
    return Sample(f"scene {seed}", [render(scene)], question.text, answers, question.kind)


def _text_records(path: Path) -> list[tuple[str, Any]]:
    """The records of a file of text with their names; those of JSON Lines are not parsed yet."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise AlvtsError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise AlvtsError(f"cannot read {path}: {error.strerror or error}") from None
    lines = [(f"{path.name}:{i}", s) for i, s in enumerate(text.split("\n"), 1) if s.strip()]
    suffix = path.suffix.lower()
    if suffix == ".csv":
        # By default, one long field makes a whole file unreadable.
        csv.field_size_limit(max(csv.field_size_limit(), len(text)))
        table = csv.DictReader(StringIO(text, newline=""))
        try:
            return [(f"{path.name}:{table.line_num}", row) for row in table]
        except csv.Error as error:
            raise AlvtsError(f"{path} is not CSV: line {table.line_num}: {error}") from None
    if suffix == ".txt":
        parts = ((name, *line.partition("\t")) for name, line in lines)
        return [(name, {"image": image, "prompt": prompt}) for name, image, _, prompt in parts]
    if suffix == ".json":
        try:
            whole = _json(text)
        except AlvtsError as error:
            # POPE's files end in `.json` and hold lines.
            with suppress(AlvtsError, IndexError):
                if isinstance(_json(lines[0][1]), dict):
                    return lines
            raise AlvtsError(f"{path} {str(error).removeprefix('it ')}") from None
        if isinstance(whole, dict) and "image" in whole:
            whole = [whole]
        if not isinstance(whole, list):
            raise AlvtsError(f"{path} is not a list of records")
        return [(f"{path.name}[{i}]", record) for i, record in enumerate(whole)]
    return lines


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AlvtsError(f"it is not JSON: {error}") from None


def _listed(
    source: Source, path: Path, rows: list[tuple[str, Any]], count: int | None, seed: int | None
) -> Reader:
    """A reader of records in memory."""
    name, folder = (path.resolve().name, path) if path.is_dir() else (path.name, path.parent)
    reading = _Reading(source, source.image_folder or folder)
    candidates = ((rows[i][0], partial(reading.sample, *rows[i])) for i in _order(len(rows), seed))
    return Reader(name, candidates, count, len(rows))


def _order(count: int, seed: int | None) -> list[int]:
    order = list(range(count))
    if seed is not None:
        random.Random(seed).shuffle(order)
    return order


def _no_data(data: str) -> AlvtsError:
    return AlvtsError(
        f"no data {data!r}: give 'pocket', a .json, .jsonl, .csv or .parquet file, a folder "
        "of images with prompts, or a data set of the hub: ID, ID:SPLIT or ID:CONFIG:SPLIT"
    )


def _set(source: Source, count: int | None, seed: int | None) -> Reader:
    """What `datasets` reads: Parquet, or a set of the hub or of a folder."""
    data = source.data
    name, *more = [data] if Path(data).exists() else data.split(":")
    path, (config, split) = Path(name), ("", "", *more)[-2:]
    if not path.exists() and (len(more) > 2 or re.fullmatch(_HUB, name) is None):
        raise _no_data(data)
    if path.is_dir() and not any(path.rglob("*.parquet")):
        raise AlvtsError(f"{path} has none of {', '.join(_IN_FOLDER)}, and no Parquet files")
    what: dict[str, Any] = {"path": name, "name": config or None, "split": split or source.split}
    if path.is_file():
        what = {"path": "parquet", "data_files": name, "split": "train"}
    folder = source.image_folder or (path.parent if path.is_file() else None)
    reading = _Reading(source, folder)
    label = path.resolve().name if path.exists() else data
    with _named_errors(data):
        from datasets import load_dataset

        rows: Any = load_dataset(**what, streaming=source.stream)
        if source.stream:
            known = (rows.info.splits or {}).get(what["split"])
            # Undecoded, so that a broken picture is one broken record.
            rows = rows.decode(False)
            if seed is not None:
                rows = rows.shuffle(seed=seed, buffer_size=_WINDOW * (count or _HOPELESS))
            stream = _streamed(data, label, rows, reading)
            return Reader(label, stream, count, known and known.num_examples)
    raw = rows.with_format("arrow")
    named = ((f"{label}[{i}]", partial(_row, raw, i)) for i in _order(len(rows), seed))
    candidates = ((name, partial(reading.sample, name, row)) for name, row in named)
    return Reader(label, candidates, count, len(rows))


def _streamed(
    data: str, label: str, rows: Iterable[Any], reading: "_Reading"
) -> Generator[Candidate]:
    # Closed, or the threads that read ahead may bring the process down at its end.
    with _named_errors(data), closing(cast(Generator[Any], iter(rows))) as there:
        for i, row in enumerate(there):
            yield f"{label}[{i}]", partial(reading.sample, f"{label}[{i}]", row)


def _row(rows: Any, i: int) -> Any:
    return rows[i].to_pylist()[0]


@contextmanager
def _named_errors(data: str) -> Iterator[None]:
    """Turn whatever the HTTP client, the format's reader or the hub itself raises into one line."""
    try:
        yield
    except Exception as error:
        reason: BaseException = error
        # Of "An error occurred while generating the dataset", and the like.
        while reason.__cause__ is not None:
            reason = reason.__cause__
        line = str(reason).strip().partition("\n")[0] or type(reason).__name__
        hint = "" if Path(data).exists() else "; is there a network, and are id and split right?"
        raise AlvtsError(f"cannot read the data set {data}: {line}{hint}") from error


@dataclass(frozen=True)
class _Reading:
    """Makes samples of records.

    Attributes:
        source: of the records.
        folder: of the pictures that are named; None where there is none.
    """

    source: Source
    folder: Path | None

    def sample(self, name: str, raw: Any) -> Sample:
        """A record: its images, its first question, and the right answers.

        Args:
            name: of the record.
            raw: a mapping, a line of JSON, or a function that reads one of them.

        Raises:
            AlvtsError: a part is missing or broken; the question has places for images, but not as
                many as there are.
        """
        record = _parsed(raw() if callable(raw) else raw)
        told = {
            "image": _several(self._part(record, "image"), lambda path: {"path": path}),
            "question": _several(self._part(record, "question"), _as_turn),
            "answer": _several(self._part(record, "answer")),
        }
        if self.source.answered:
            told["answer"] = list(map(_number_as_text, told["answer"]))
        else:
            # A column of that name may hold anything, such as the numbers of classes.
            told["answer"] = list(filter(_is_text, told["answer"]))
        parts = check(_PARTS, told, "it", of_json=False)
        asked, said = parts.first_turn()
        prompt = asked if asked.strip() else self.source.prompt
        if prompt is None:
            raise self._without(record, "question")
        answers = tuple(parts.answer or _several(said))
        if self.source.answered and not answers:
            raise self._without(record, "answer")
        if not parts.image:
            raise self._without(record, "image")
        places = prompt.count(MARKER)
        if places not in (0, len(parts.image)):
            raise AlvtsError(
                f"its question has {places} places for images ({MARKER}), "
                f"but it has {len(parts.image)}"
            )
        images = [self._picture(picture, name) for picture in parts.image]
        own, kind = self._part(record, "id"), self._part(record, "kind")
        if own is None:
            own = name if "bytes" in told["image"][0] else parts.image[0].path
        return Sample(
            str(own) if _is_text(str(own)) else name,
            images,
            prompt,
            answers,
            kind if _is_text(kind) else "",
        )

    def _part(self, record: dict[str, Any], part: str) -> Any:
        """What a record has of a part, or None.

        Raises:
            AlvtsError: it lacks the column that was named for it.
        """
        told = self.source.columns.get(part)
        if told is not None and told not in record:
            raise self._without(record, part)
        columns = NAMES[part] if told is None else (told,)
        return next((record[c] for c in columns if record.get(c) is not None), None)

    def _without(self, record: dict[str, Any], part: str) -> AlvtsError:
        told = self.source.columns.get(part)
        wanted = f"no column {told}" if told else f"name its column with --columns {part}=..."
        return AlvtsError(f"it has no {part}; of its columns ({', '.join(record)}), {wanted}")

    def _picture(self, picture: "_Picture", name: str) -> Image.Image:
        if picture.data is not None:
            return read_image(BytesIO(picture.data), f"of {name}")
        if picture.path is None:
            raise AlvtsError("its image holds no picture")
        if self.folder is not None:
            return read_image(inside(self.folder, picture.path))
        return read_image(_of_hub(picture.path), f"of {name}")


class _Picture(Record):
    """As `datasets` has it undecoded: either may be None."""

    path: Text | None = None
    data: Annotated[bytes | None, Field(alias="bytes")] = None


class _Turn(Record):
    """As LLaVA's instruction set has it."""

    speaker: Annotated[str, Field(alias="from")]
    value: Text


class _Parts(Record):
    """The parts of a record that are checked."""

    image: list[_Picture]
    question: list[_Turn]
    answer: list[Text]

    def first_turn(self) -> tuple[str, str]:
        """The first question and the answer to it, or "" for what is not there."""
        for turn, then in zip_longest(self.question, self.question[1:]):
            if turn.speaker == "human":
                return turn.value, then.value if then and then.speaker == "gpt" else ""
        return "", ""


_PARTS = TypeAdapter(_Parts)


def _several(value: Any, alone: Callable[[Any], Any] = lambda one: one) -> list[Any]:
    """One or several, as a list without empty ones; `alone` makes a mapping of what is none."""
    several = value if isinstance(value, list) else [value]
    there = [one for one in several if (one.strip() if isinstance(one, str) else one is not None)]
    return [one if isinstance(one, dict) else alone(one) for one in there]


def _number_as_text(value: Any) -> Any:
    """What is right may be a number; true and NaN are none, and stay what they are."""
    number = type(value) is int or (type(value) is float and math.isfinite(value))
    return str(value) if number else value


def _as_turn(text: Any) -> dict[str, Any]:
    return {"from": "human", "value": text}


def _of_hub(path: str) -> Path | BytesIO:
    """What a record of a set of the hub names: a file of the hub's, on this machine or there."""
    import fsspec
    from huggingface_hub.constants import HF_HOME

    if Path(path).resolve().is_relative_to(Path(HF_HOME).resolve()):
        return Path(path)
    if re.match(_REMOTE, path) is None:
        raise AlvtsError(f"its image {path} is not of the data set; is an --image-folder missing?")
    try:
        with fsspec.open(path, "rb") as file:
            return BytesIO(file.read())
    except (OSError, ValueError, TypeError):
        raise AlvtsError(f"its image {path} cannot be read") from None


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` in `folder`.

    Raises:
        AlvtsError: it is absolute, has `..` in it, or is a link to somewhere else.
    """
    path, relative = folder / name, Path(name)
    stays = not (relative.is_absolute() or ".." in relative.parts or "\0" in name)
    if not stays or not path.resolve().is_relative_to(folder.resolve()):
        raise AlvtsError(f"its image {name!r} lies outside of the image folder")
    return path


def _parsed(raw: Any) -> dict[str, Any]:
    raw = _json(raw) if isinstance(raw, str) else raw
    if not isinstance(raw, dict):
        raise AlvtsError("it is not a record")
    if None in raw:
        raise AlvtsError("it has more fields than there are columns")
    return raw


def _is_text(value: Any) -> bool:
    """Whether it is text with anything in it, and no half characters such as JSON's "\\ud800"."""
    return (
        isinstance(value, str) and value.strip() != "" and not re.search("[\ud800-\udfff]", value)
    )
