"""Calibration data: which kinds there are, and a random sample of one.

`--data` names

- `pocket`: the shipped rendered scenes, of seeds that are in neither training nor test;
- a `.json` or `.jsonl` file in LLaVA's format (`id`, `image`, `conversations`), with its images in
  `--image-folder`, or in the file's own folder;
- a folder of images with `prompts.jsonl` (`{"image": "a.jpg", "prompt": "..."}` a line) or
  `prompts.txt` (`a.jpg`, a tab, the prompt);
- a data set of the hub, read as a stream (split `train`; columns `image` or `images`, and
  `conversations`, `question`, `prompt` or `text`).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from alvts_cli.errors import AlvtsError

# So many broken records before the first good one: the columns or the folder must be wrong.
_HOPELESS = 100


@dataclass(frozen=True)
class Sample:
    """A question about images: `id` names it in messages, `answer` is None where not known."""

    id: str
    images: list[Image.Image]
    prompt: str
    answer: str | None = None


Candidate = tuple[str, Callable[[], Sample]]
"""A record's name, and how to read it: raises AlvtsError if it is broken."""


class Reader:
    """Reads candidates one at a time until `count` good ones were found.

    Nothing read is held on to: a large set costs no more memory than its largest image.

    Attributes:
        description: the data in words, for the artifact.
        skipped: one line for every broken record met.
    """

    def __init__(self, description: str, candidates: Iterable[Candidate], count: int) -> None:
        self.description = description
        self.skipped: list[str] = []
        self._candidates = candidates
        self._count = count

    def __iter__(self) -> Iterator[Sample]:
        found = 0
        for name, read in self._candidates:
            if found == self._count or (found == 0 and len(self.skipped) == _HOPELESS):
                return
            try:
                sample = read()
            except AlvtsError as error:
                self.skipped.append(f"{name}: {error}")
                continue
            found += 1
            yield sample


def read_data(data: str, image_folder: Path | None, count: int, seed: int) -> Reader:
    """`count` samples of `data` (see the module's text), drawn at random by `seed`.

    Raises:
        AlvtsError: no such data, a file that cannot be read as a whole, or an image folder where
            none is used.
    """
    from .hub import hub_candidates
    from .sources import folder_candidates, llava_candidates, pocket_candidates

    path = Path(data)
    is_file = path.suffix in (".json", ".jsonl")
    if image_folder is not None and not is_file:
        raise AlvtsError("an image folder goes with a .json or .jsonl file only")
    if data == "pocket":
        return Reader("pocket scenes", pocket_candidates(seed), count)
    if is_file:
        folder = image_folder or path.parent
        if not folder.is_dir():
            raise AlvtsError(f"there is no image folder {folder}")
        return Reader(path.name, llava_candidates(path, folder, seed), count)
    if path.is_dir():
        return Reader(path.resolve().name, folder_candidates(path, seed), count)
    if not path.exists() and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", data):
        return Reader(data, hub_candidates(data, seed, count), count)
    raise AlvtsError(
        f"no calibration data {data!r}: give 'pocket', a .json or .jsonl file, a folder of images "
        "with prompts, or the id of a data set on the hub"
    )
