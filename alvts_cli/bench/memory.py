"""Peak memory of a stretch of work, beyond what was held before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Peak:
    """Bytes; None where they cannot be measured."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the block: allocated memory on a GPU, resident memory on Linux, else nothing.

    Resident memory is rough: what an earlier run freed may still count as held.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device) - before
        return
    held = _reset_peak() if device.type == "cpu" else None
    yield peak
    highest = _status("VmHWM")
    if held is not None and highest is not None:
        peak.bytes = max(0, highest - held)


def _reset_peak() -> int | None:
    """Bytes resident now, with the high-water mark set back to them; None where that fails."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
