"""Tokens per second of decoding, dense against selective, at growing batches.

A prompt is prefilled once. Its cache, repeated, is that of a batch of equal prompts: so a batch of
32 costs no prefill of 32. Then both sides decode tokens in turns.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from torch import Tensor

from ..engine import attach, cache_of, kv_bytes
from ..engine.calls import going_on
from ..memory import memory_free
from .statistics import ratio, spread
from .subject import Subject
from .timing import synchronize

BATCHES = (1, 2, 4, 8, 16, 32)
STEPS = 8
"""Tokens that each side decodes at a batch; one before them does not count."""


@dataclass(frozen=True)
class Decoding:
    """One batch.

    Attributes:
        batch: prompts at once.
        dense_ms, selective_ms: of every step.
        kv_bytes_dense, kv_bytes: the caches in front of the first step.
    """

    batch: int
    dense_ms: tuple[float, ...]
    selective_ms: tuple[float, ...]
    kv_bytes_dense: int
    kv_bytes: int

    @property
    def tokens_per_second(self) -> tuple[float, float]:
        """Of all prompts together, dense and selective, from the median step."""
        dense, selective = (
            1000 * self.batch / spread(times).median for times in (self.dense_ms, self.selective_ms)
        )
        return dense, selective

    @property
    def speedup(self) -> tuple[float, float, float]:
        """Selective over dense, and its 95 % interval."""
        return ratio(self.dense_ms, self.selective_ms)


def decode(subject: Subject, on_batch: Callable[[], None] = lambda: None) -> list[Decoding]:
    """Time decoding at every batch of `BATCHES` whose caches fit; the others are left out.

    Args:
        subject: of which only the first prompt is taken; nothing runs compiled.
        on_batch: called after each, left out or not.
    """
    selecting = partial(
        attach, subject.model, subject.selectors, subject.keep, policy=subject.policy
    )
    settings: list[Callable[[], AbstractContextManager[object]]] = [nullcontext, selecting]
    inputs = _first(subject)
    # Some families keep the positions behind an image on the model: the same on both sides.
    caches = [_prefilled(subject.model, setting, inputs) for setting in settings]
    held = sum(kv_bytes(cache_of(cache)) for cache in caches)
    found = []
    for batch in BATCHES:
        free = memory_free(subject.model.device)
        # While a layer's cache grows it is there twice.
        if free is None or 1.2 * held * batch < free:
            found.append(_at(subject.model, settings, caches, batch))
        on_batch()
    return found


def _at(
    model: Any,
    settings: Sequence[Callable[[], AbstractContextManager[object]]],
    caches: Sequence[dict[str, Any]],
    batch: int,
) -> Decoding:
    """Both sides at one batch, in turns."""
    sides = [_repeated(cache, batch) for cache in caches]
    sizes = [kv_bytes(cache_of(side)) for side in sides]
    times: list[list[float]] = [[], []]
    tokens = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    for step in range(STEPS + 1):
        # Nobody always comes first.
        for i in (0, 1) if step % 2 else (1, 0):
            with settings[i](), torch.inference_mode():
                synchronize(model.device)
                start = time.perf_counter()
                logits: Tensor = model(input_ids=tokens, use_cache=True, **sides[i]).logits
                logits[:, -1].argmax(dim=-1).tolist()
                if step:
                    times[i].append(1000 * (time.perf_counter() - start))
    return Decoding(batch, tuple(times[0]), tuple(times[1]), *sizes)


def _first(subject: Subject) -> dict[str, Tensor]:
    """The inputs of one prompt: what is for all of a batch stands there as often."""
    batch = subject.settings["batch"]
    return {name: value[: len(value) // batch] for name, value in subject.inputs.items()}


def _prefilled(
    model: Any, setting: Callable[[], AbstractContextManager[object]], inputs: dict[str, Tensor]
) -> dict[str, Any]:
    """The cache of a prompt, by the name that the model takes it by."""
    with setting(), torch.inference_mode():
        return going_on(model(**inputs, use_cache=True, logits_to_keep=1))


def _repeated(cache: dict[str, Any], batch: int) -> dict[str, Any]:
    """A copy of a cache for `batch` equal prompts."""
    copied = copy.deepcopy(cache)
    cache_of(copied).batch_repeat_interleave(batch)
    return copied


def to_table(decodings: Sequence[Decoding]) -> Table:
    """Tokens per second at every batch."""
    table = Table("decoding, batch", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("dense, tokens/s", "selective, tokens/s", "ratio (95 %)", "KV cache ratio"):
        table.add_column(column, justify="right")
    for one in decodings:
        point, low, high = one.speedup
        table.add_row(
            str(one.batch),
            *(f"{speed:,.1f}" for speed in one.tokens_per_second),
            f"{point:.2f} ({low:.2f}-{high:.2f})",
            f"{one.kv_bytes_dense / one.kv_bytes:.2f}",
        )
    return table


def to_json(decodings: Sequence[Decoding]) -> list[dict[str, Any]]:
    """The same as plain values."""
    return [
        {
            "batch": one.batch,
            "tokens_per_second_dense": one.tokens_per_second[0],
            "tokens_per_second": one.tokens_per_second[1],
            "speedup": one.speedup[0],
            "interval": list(one.speedup[1:]),
            "kv_bytes_dense": one.kv_bytes_dense,
            "kv_bytes": one.kv_bytes,
            "step_ms": {"dense": list(one.dense_ms), "selective": list(one.selective_ms)},
        }
        for one in decodings
    ]
