"""Where alvts keeps what it can make or fetch again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`alvts` under `$XDG_CACHE_HOME`, or under `~/.cache`. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alvts"
