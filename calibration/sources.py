"""Calibration data on this machine."""

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from alvts_cli.errors import AlvtsError
from alvts_cli.pocket.questions import ask
from alvts_cli.pocket.scenes import SPLITS, make_scene, render, seed_of
from alvts_cli.prompts import MARKER, first_turn, read_image

from .data import Candidate, Sample


def pocket_candidates(seed: int) -> Iterator[Candidate]:
    """Endless scenes of the calibration split, one question each, kinds drawn evenly."""
    rng = random.Random(seed)
    while True:
        scene_seed = seed_of("calibration", rng.randrange(len(SPLITS["calibration"])))
        yield f"scene {scene_seed}", partial(_pocket_sample, scene_seed)


def _pocket_sample(seed: int) -> Sample:
    scene = make_scene(seed)
    # The first of several: a kind may not fit a scene.
    question = ask(scene, 3, random.Random(f"questions {seed}"))[0]
    return Sample(f"scene {seed}", [render(scene)], question.text, question.answer)


def llava_candidates(path: Path, folder: Path, seed: int) -> Iterator[Candidate]:
    """The records of a `.json` list or of a `.jsonl` file, in random order.

    Raises:
        AlvtsError: the file cannot be read, or is not a list of records.
    """
    text = _read_text(path)
    if path.suffix == ".jsonl":
        lines = _lines(text)
        return _shuffled(
            [
                (f"{path.name}:{number}", partial(_llava_line, line, folder))
                for number, line in lines
            ],
            seed,
        )
    try:
        records = json.loads(text)
    except ValueError as error:
        raise AlvtsError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise AlvtsError(f"{path} is not a list of records, as LLaVA's format wants it")
    return _shuffled(
        [
            (f"{path.name}[{i}]", partial(llava_sample, record, folder))
            for i, record in enumerate(records)
        ],
        seed,
    )


def _llava_line(line: str, folder: Path) -> Sample:
    return llava_sample(_parse_line(line), folder)


def llava_sample(record: Any, folder: Path) -> Sample:
    """A record of LLaVA's format: its images, its first question, and the answer to it.

    Raises:
        AlvtsError: a part is missing or broken; the question has not as many places as images.
    """
    if not isinstance(record, dict):
        raise AlvtsError("it is not a record")
    names = record.get("image")
    names = [names] if isinstance(names, str) else names
    if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise AlvtsError("it has no image")
    prompt, answer = first_turn(record.get("conversations"))
    if prompt.count(MARKER) != len(names):
        raise AlvtsError(
            f"its question has {prompt.count(MARKER)} places for images ({MARKER}), "
            f"but it has {len(names)}"
        )
    images = [read_image(folder / name) for name in names]
    return Sample(str(record.get("id", names[0])), images, prompt, answer)


def folder_candidates(folder: Path, seed: int) -> Iterator[Candidate]:
    """The images of a folder that its prompts file names, in random order.

    Raises:
        AlvtsError: there is no prompts file, or it cannot be read.
    """
    path = folder / "prompts.jsonl"
    if not path.exists():
        path = folder / "prompts.txt"
    if not path.exists():
        raise AlvtsError(f"{folder} has neither a prompts.jsonl nor a prompts.txt")
    read = _prompts_json_line if path.suffix == ".jsonl" else _prompts_text_line
    return _shuffled(
        [
            (f"{path.name}:{number}", partial(read, line, folder))
            for number, line in _lines(_read_text(path))
        ],
        seed,
    )


def _prompts_json_line(line: str, folder: Path) -> Sample:
    record = _parse_line(line)
    if not isinstance(record, dict):
        raise AlvtsError("it is not a record")
    name, prompt = record.get("image"), record.get("prompt")
    if not isinstance(name, str) or not isinstance(prompt, str):
        raise AlvtsError('it lacks "image" or "prompt"')
    return Sample(name, [read_image(folder / name)], prompt)


def _prompts_text_line(line: str, folder: Path) -> Sample:
    name, tab, prompt = line.partition("\t")
    if not tab:
        raise AlvtsError("there is no tab between file name and prompt")
    return Sample(name, [read_image(folder / name)], prompt)


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise AlvtsError(f"it is not JSON: {error}") from None


def _lines(text: str) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    return [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AlvtsError(f"there is no file {path}") from None
    except UnicodeDecodeError:
        raise AlvtsError(f"{path} is not UTF-8 text") from None
    except OSError as error:
        raise AlvtsError(f"cannot read {path}: {error.strerror or error}") from None


def _shuffled(candidates: list[Candidate], seed: int) -> Iterator[Candidate]:
    random.Random(seed).shuffle(candidates)
    return iter(candidates)
