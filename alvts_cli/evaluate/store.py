"""Finished batches on disk, so that an interrupted run loses at most the batch it was in.

Batches lie in a folder of the user's cache, `alvts/eval/KEY` under `$XDG_CACHE_HOME` or `~/.cache`,
each in a file that is written whole. The key is a digest of everything that decides the result: the
model's weights (by some of their values), the selectors, the questions, the methods, budgets, batch
size and seed, the device and precision, the versions of the libraries, and alvts' own code. So a
run that is started again with the same command goes on where it stopped, and one that differs in
anything starts anew. A finished run's folder is removed.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ..artifact import write_whole
from ..cache import cache_folder
from ..errors import AlvtsError


class Store:
    """The finished batches of one run."""

    def __init__(self, facts: dict[str, Any]) -> None:
        """
        Args:
            facts: plain values, all that decides the result beside alvts' code.
        """
        text = json.dumps({**facts, "code": _code()}, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self.folder = cache_folder() / "eval" / key

    def load(self, batch: int) -> Any | None:
        """What was saved of a batch, or None. A damaged file counts as none."""
        try:
            return json.loads(self._path(batch).read_text())
        except (OSError, ValueError):
            return None

    def save(self, batch: int, results: Any) -> None:
        """Keep a finished batch.

        Raises:
            AlvtsError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlvtsError(f"cannot make {self.folder}: {error.strerror or error}") from error
        write_whole(self._path(batch), json.dumps(results).encode())

    def remove(self) -> None:
        """Forget the run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:05}.json"


def _code() -> str:
    """A digest of the files of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
