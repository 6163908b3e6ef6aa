"""Where alvts keeps what it can make or fetch again."""

import os
from pathlib import Path

from .errors import AlvtsError


def cache_folder() -> Path:
    """`alvts` under `$XDG_CACHE_HOME`, or under `~/.cache`. It may not exist yet.

    Raises:
        AlvtsError: the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alvts"
    except RuntimeError:
        raise AlvtsError(
            "there is no home folder to keep files in; set XDG_CACHE_HOME to one"
        ) from None
