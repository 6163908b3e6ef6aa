"""What a built wheel holds, and no more: `python tests/wheel.py x.whl`, a stage of `.ci/run`."""

import sys
import zipfile
from pathlib import Path

MOST = 27_000_000
"""Bytes. Nearly all of them are pocket, smol's adapter, and the selectors of both."""

NEEDED = (
    "alvts_cli/plan/cards.json",
    "alvts_cli/plan/models.json",
    "alvts_cli/pocket/example.png",
    "alvts_cli/pocket/weights/model.safetensors",
    "alvts_cli/pocket/weights/selectors.safetensors",
    "alvts_cli/show/page.html",
    "alvts_cli/smol/adapter.safetensors",
    "alvts_cli/smol/selectors.safetensors",
    "calibration/run.py",
)
"""Some that are easily left out, being no modules of the first package."""

ENDINGS = {".py", ".json", ".png", ".html", ".safetensors", ".md"}


def check(wheel: Path) -> None:
    """Raises AssertionError with what is wrong."""
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
    missing = set(NEEDED) - names
    assert not missing, f"missing: {missing}"
    tops = {name.partition("/")[0] for name in names}
    assert len(tops) == 3 and tops >= {"alvts_cli", "calibration"}, tops
    more = {n for n in names if ".dist-info/" not in n and Path(n).suffix not in ENDINGS}
    more |= {name for name in names if "/training/" in name}
    assert not more, f"not for users: {more}"
    size = wheel.stat().st_size
    assert size <= MOST, f"{size:,} bytes, {MOST:,} at most"
    print(f"{wheel.name}: {len(names)} files, {size:,} bytes")


if __name__ == "__main__":
    check(Path(sys.argv[1]))
