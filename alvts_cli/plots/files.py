"""What earlier runs of `alvts eval` and `alvts bench` wrote with --json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import AlvtsError
from ..files import read_text


def read_eval(path: Path) -> dict[str, Any]:
    """The object that `alvts eval --json` wrote.

    Raises:
        AlvtsError: no such file, or not one of those.
    """

    def check(found: Any) -> bool:
        names = ("tokens", "retention", "retention_low", "retention_high", "method", "keep")
        return bool(found["data"]) and all(
            data["rows"]
            and data["visual_tokens"] > 0
            and all(name in row for row in data["rows"] for name in names)
            and {"dense", "blind", "samples"} <= data["head"].keys()
            for data in found["data"]
        )

    return _read(path, "alvts eval", check)


def read_bench(path: Path) -> dict[str, Any]:
    """The object that `alvts bench --json` wrote.

    Raises:
        AlvtsError: no such file, or not one of those.
    """

    def check(found: Any) -> bool:
        names = ("prefill_speedup", "prefill_speedup_limit", "visual_tokens", "visual_tokens_kept")
        return (
            all(isinstance(found["metrics"][name], (int, float)) for name in names)
            and all(len(found["intervals"][name]) == 2 for name in names[:2])
            and all(len(peer["interval"]) == 2 for peer in found["against"].values())
        )

    return _read(path, "alvts bench", check)


def _read(path: Path, command: str, check: Callable[[Any], bool]) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except ValueError:
        raise AlvtsError(f"{path} is not JSON; give what {command} --json wrote") from None
    try:
        whole = check(found)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise AlvtsError(f"{path} is not what {command} --json writes")
    return found
