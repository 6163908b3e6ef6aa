"""How many threads torch computes with: no more than there are free cores.

Threads that have to share a core wait for each other at every step: on a busy machine a prefill of
70 ms took 4.6 s. OpenMP knows which cores the process may use, but not a container's share of their
time, nor who else uses them.
"""

import os
from contextlib import suppress
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_LOAD = Path("/proc/loadavg")


def limit_threads(by_load: bool) -> None:
    """Set `OMP_NUM_THREADS`, which is read when torch is imported, where that is fewer threads than
    it would take; whatever the user has set stays.

    Args:
        by_load: leave cores alone that others are using. Not where the same command must give the
            same bytes: sums differ with the number of threads.
    """
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        return
    cores = usable_cores()
    free = min(float(cores), _share())
    if by_load:
        free -= _load()
    threads = max(1, round(free))
    if threads < cores:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _load() -> float:
    """Cores that others use: over the last minute and at this moment, whichever are fewer. A minute
    remembers the command before this one; a moment may be anybody's."""
    try:
        minute = os.getloadavg()[0]
    except OSError:
        return 0.0
    # Linux counts what runs; this process is one.
    with suppress(OSError, ValueError, IndexError):
        running = int(_LOAD.read_text().split()[3].split("/")[0]) - 1
        return min(minute, float(running))
    return minute


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _share() -> float:
    """Cores' worth of time that the container gets; infinite without a limit."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (_GROUPS / "cpu.max").read_text().split()
        return float("inf") if quota == "max" else int(quota) / int(period)
    # The first version of control groups.
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (
            (_GROUPS / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
        )
        return int(quota) / int(period) if int(quota) > 0 else float("inf")
    return float("inf")
