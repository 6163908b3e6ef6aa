"""Questions about pictures with right answers: what `alvts_cli.data` reads, and four test sets.

- `pocket` is rendered scenes of the test split, the same number of each kind of question;
- `pocket-turns` asks the same of the same scenes, each behind two other questions and their right
  answers;
- `pocket-described` asks for all that is in a scene (smol learnt that, pocket did not);
- `easy-vqa` is the public set's test split (the package `easy-vqa`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from ..data import Sample, Source
from ..data import read_data as read_source
from ..errors import AlvtsError
from .scoring import suitable

LONG = 16
"""Tokens of the longest answer of a set that is read."""

OWN = {"pocket": 4, "pocket-turns": 4, "pocket-described": 64, "easy-vqa": 4}
"""The test sets that are not read but made here, and the tokens of their longest answers."""

EARLIER = 2
"""Turns in front of a question of `pocket-turns`."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: unique in its set.
        kind: of question, for a table of its own.
        question: the user's words; `<image>` says where an image stands, first by default.
        answers: right ones.
        images: reads the pictures, RGB; raises AlvtsError if one is broken.
        earlier: questions about the same pictures with their answers, said before in the same
            conversation.
    """

    id: str
    kind: str
    question: str
    answers: tuple[str, ...]
    images: Callable[[], list[Image.Image]]
    earlier: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class DataSet:
    """Questions, how they are scored (a name of `SCORINGS`), how long an answer may get, and a line
    for each record that was left out as broken."""

    name: str
    items: tuple[Item, ...]
    scoring: str
    max_new_tokens: int
    skipped: tuple[str, ...] = ()


def read_data(source: Source, samples: int, seed: int, scoring: str | None = None) -> DataSet:
    """`samples` good questions, or all if there are fewer.

    Those of files and of the hub are drawn at random by `seed`; those of `OWN` are the same for
    every seed. Every picture is decoded once here, so that no broken one is left,
    and again when it is its turn.

    Raises:
        AlvtsError: no such data, or no question with pictures and an answer in them.
    """
    data, skipped = source.data, []
    if data in OWN:
        name, items = data, _made(data, samples)
    else:
        source = replace(source, split="test", stream=False, answered=True)
        reader = read_source(source, samples, seed)
        name, skipped = reader.description, reader.skipped
        kind = Path(name).stem if Path(data).is_file() else name
        items = [
            Item(record, one.kind or kind, one.prompt, one.answers, partial(_images, read))
            for record, one, read in reader.found()
        ]
    check_any(data, items, skipped)
    own = "phrases" if data == "pocket-described" else suitable(item.answers for item in items)
    longest = OWN.get(data, LONG)
    return DataSet(name, tuple(items), scoring or own, longest, tuple(skipped))


def check_any(data: str, items: Sequence[Item], skipped: Sequence[str]) -> None:
    """Refuse data of which no question is left.

    Args:
        data: what to call them.
        items: their questions.
        skipped: a line for each record that was left out.

    Raises:
        AlvtsError: there is no question.
    """
    if not items:
        why = f"; {len(skipped)} were skipped, such as {skipped[0]}" if skipped else ""
        raise AlvtsError(f"there is no question in {data}{why}")


def _images(read: Callable[[], Sample]) -> list[Image.Image]:
    return list(read().images)


def _made(data: str, samples: int) -> list[Item]:
    """The questions of one of `OWN`."""
    from ..pocket.evaluate import described_items, easy_items, scene_items
    from ..pocket.questions import KINDS
    from ..pocket.scenes import COLORS

    def easy(answer: str) -> str:
        if answer in ("yes", "no"):
            return "yes/no"
        return "color" if answer in COLORS else "shape"

    scenes = data != "easy-vqa"
    if data in ("pocket", "pocket-turns"):
        earlier = 0 if data == "pocket" else EARLIER
        found = scene_items("test", max(1, samples // len(KINDS)), earlier)
    else:
        found = described_items("test", samples) if scenes else easy_items(samples)
    return [
        Item(
            f"{'scene' if scenes else 'easy'} {i}",
            one.kind if scenes else easy(one.answer),
            one.question,
            (one.answer,),
            partial(list, [one.image]),
            one.earlier,
        )
        for i, one in enumerate(found)
    ]
