"""One command for whoever owns a GPU: the whole table, within ten minutes, without a download.

Every entry is a benchmark of its own, on random weights of a true shape. Compiled entries are cut
to a few layers: torch takes minutes to compile a whole decoder, and a layer's time is what counts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from ..errors import AlvtsError
from ..models import first_line
from . import decode
from .markdown import FORMAT
from .measure import measure
from .report import environment, to_json
from .subject import Subject, Wanted, random_subject, variant
from .tracing import traced_kernels

SHAPES = ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b")
BATCHES = (1, 8)
POLICIES = ("paper", "once")
COMPILED_LAYERS = 4
LIMIT_S = 540
"""No entry begins later: the last one has a minute to end."""


@dataclass(frozen=True)
class Entry:
    """One benchmark of the suite."""

    model: str
    batch: int
    policy: str
    compile: bool

    def __str__(self) -> str:
        way = "compiled" if self.compile else "eager"
        return f"{self.model}, batch {self.batch}, {self.policy}, {way}"


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        runs: timed rounds of every entry.
        layers: that models are cut to, vision towers too; None for all.
        hidden_size: width of the decoders; None for their own.
    """

    runs: int
    layers: int | None = None
    hidden_size: int | None = None


def entries() -> list[Entry]:
    """What is run, in order: all that is eager first."""
    eager = [Entry(m, b, p, False) for m in SHAPES for p in POLICIES for b in BATCHES]
    return eager + [Entry(m, b, "once", True) for m in SHAPES for b in BATCHES]


def run_suite(
    wanted: Wanted, size: Size, say: Callable[[str], None], on_entry: Callable[[], None]
) -> dict[str, Any]:
    """Run all entries that there is time and memory for.

    Args:
        wanted: keep, device, dtype and prompt; its model, policy, batch and compile are those of
            the entries.
        size: how much.
        say: told what each entry is, and what is left out.
        on_entry: called after each, left out or not.

    Returns:
        Plain values: the reports of the entries as `report.to_json` has them, with `entry`,
        `decode` (eager ones at batch 1) and `traced` (kernels that a GPU ran).

    Raises:
        AlvtsError: no entry could be run.
    """
    began = time.monotonic()
    reports: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for (model, compile), some in groupby(
        entries(), key=lambda entry: (entry.model, entry.compile)
    ):
        one = replace(wanted, name=model, batch=1, compile=False)
        subject: Subject | None = None
        for entry in some:
            say(str(entry))
            try:
                if time.monotonic() - began > LIMIT_S:
                    raise AlvtsError(f"{LIMIT_S} s are over")
                if subject is None:
                    subject = _built(one, size, compile, say)
                reports.append(_report(subject, entry, size.runs))
            # What one entry lacks, memory or a compiler, is not to lose the others.
            except (AlvtsError, RuntimeError, MemoryError) as error:
                left_out.append({"entry": str(entry), "why": first_line(error)})
                say(f"left out: {first_line(error)}")
            on_entry()
    if not reports:
        raise AlvtsError(f"nothing could be run; {left_out[0]['why']}")
    return {
        "format": FORMAT,
        "suite": "gpu",
        "seconds": time.monotonic() - began,
        "entries": reports,
        "left_out": left_out,
    }


def _built(wanted: Wanted, size: Size, compile: bool, say: Callable[[str], None]) -> Subject:
    """A model, with one prompt."""
    most = COMPILED_LAYERS if compile else None
    layers = min(filter(None, (size.layers, most)), default=None)
    return random_subject(wanted, layers, size.hidden_size, say, tower_layers=size.layers)


def _report(subject: Subject, entry: Entry, runs: int) -> dict[str, Any]:
    """All that there is to know of an entry."""
    its = variant(subject, entry.batch, entry.policy, entry.compile)
    result = measure(its, runs, (), on_run=lambda: None)
    plain = to_json(result, its.settings, environment(its.model))
    plain["entry"] = str(entry)
    plain["traced"] = None if entry.compile else traced_kernels(its)
    plain["decode"] = []
    if entry.batch == 1 and not entry.compile:
        plain["decode"] = decode.to_json(decode.decode(its))
    return plain
