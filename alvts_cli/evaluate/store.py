"""Finished batches on disk, so that an interrupted run loses at most the batch it was in.

Batches lie in a folder of the user's cache, `alvts/eval/KEY` under `$XDG_CACHE_HOME` or `~/.cache`,
each in a file that is written whole. The key is a digest of everything that decides the result: the
model's weights (by some of their values), the processor's settings, the selectors, the questions,
the pixels of their pictures, where they were read from, the methods, budgets, batch size and seed,
the device and precision, the versions of the libraries, and alvts' own code. So a run that is
started again with the same command goes on where it stopped, and one that differs in anything
starts anew. A finished run's folder is removed.
"""

import hashlib
import json
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from ..cache import cache_folder
from ..errors import AlvtsError
from ..files import locked, read_text, write_whole
from ..spread import Group


class Store:
    """The finished batches of one run, inside a `with` block.

    Where nothing can be kept, as the cache cannot be written or another process is at the same run,
    a warning says so and the run goes on without.

    Attributes:
        taken: batches of the run, of all processes, that were there before.
    """

    def __init__(self, facts: dict[str, Any], group: Group | None = None) -> None:
        """
        Args:
            facts: plain values, all that decides the result beside alvts' code.
            group: of processes that share the batches; the first one locks the run for all.
        """
        text = json.dumps({**facts, "code": _code()}, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:24]
        self._lock = ExitStack()
        self._group = group or Group()
        self.folder: Path | None = None
        self.taken = 0

    def __enter__(self) -> "Store":
        try:
            folder = cache_folder() / "eval" / self.key
            folder.parent.mkdir(parents=True, exist_ok=True)
            if self._group.first:
                self._lock.enter_context(locked(folder, "the same evaluation"))
            self.folder = folder
        except (AlvtsError, OSError) as error:
            self._do_without(error)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()

    @property
    def kept(self) -> bool:
        """Whether something of this run is on disk."""
        return self.folder is not None and self.folder.exists()

    def load(self, batch: int) -> Any | None:
        """What was saved of a batch, or None. A damaged file counts as none."""
        if self.folder is None:
            return None
        try:
            return json.loads(read_text(self._path(self.folder, batch)))
        except (AlvtsError, ValueError, RecursionError):
            return None

    def save(self, batch: int, results: Any) -> None:
        """Keep a finished batch."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self._path(self.folder, batch), json.dumps(results).encode())
        except (AlvtsError, OSError) as error:
            self._do_without(error)

    def remove(self) -> None:
        """Forget the run."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _do_without(self, error: Exception) -> None:
        self.folder = None
        warnings.warn(f"finished batches are not kept: {error}", stacklevel=3)

    @staticmethod
    def _path(folder: Path, batch: int) -> Path:
        return folder / f"batch-{batch:05}.json"


def _code() -> str:
    """A digest of the files of this package."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
