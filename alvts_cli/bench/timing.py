"""One greedy generation, with its phases timed where they happen."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from ..engine import Attachment, cache_of, kv_bytes
from ..families import family_of
from ..prompts import padding_token

Name = TypeVar("Name")

VISION = ("vision_tower", "visual", "vision_model", "image_tower", "video_tower")
"""What the encoders of images are called, in one family or another."""

PHASES = ("score", "select", "layer", "merge")
"""Of an `Attachment`, in their order."""


@dataclass(frozen=True)
class Generated:
    """What a generation gave and took.

    Attributes:
        tokens: new ids `[B, new]`, on the CPU.
        vision_ms: vision tower; 0 without an image.
        prefill_ms: language model on the prompt, selection included.
        ttft_ms: from the call to the first token on the host.
        decode_ms: mean time of a token after the first; 0 if there was none.
        total_ms: from the call to the last token.
        phase_ms: per phase of the `Attachment`, summed over layers; empty without one.
        kv_bytes: cache after prefill.
    """

    tokens: Tensor
    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    total_ms: float
    phase_ms: dict[str, float]
    kv_bytes: int


def generate(
    model: Any,
    inputs: dict[str, Tensor],
    max_new_tokens: int,
    attachment: Attachment | None = None,
    ignore_end: bool = False,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Generated:
    """Generate greedily and time it.

    Args:
        model: of a known family.
        inputs: what its processor makes, on the model's device.
        max_new_tokens: at least 1.
        attachment: of this model, for the times of its phases.
        ignore_end: make exactly `max_new_tokens` tokens.
        on_tokens: called with the ids `[B]` of each step as they come.
    """
    watch = _Watch(model)
    arrivals = _Arrivals(on_tokens)
    limit = {"min_new_tokens": max_new_tokens} if ignore_end else {}
    with watch.watching(attachment), torch.inference_mode():
        synchronize(model.device)
        start = time.perf_counter()
        output = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_token(model),
            streamer=arrivals,
            **limit,
        )
        synchronize(model.device)
    after_first = arrivals.times[1:]
    last = arrivals.times[-1]
    return Generated(
        tokens=output[:, inputs["input_ids"].shape[1] :].cpu(),
        vision_ms=watch.total("vision"),
        prefill_ms=watch.total("prefill"),
        ttft_ms=1000 * (arrivals.times[0] - start),
        decode_ms=1000 * (last - arrivals.times[0]) / len(after_first) if after_first else 0.0,
        total_ms=1000 * (last - start),
        phase_ms={name: watch.total(name) for name in PHASES} if attachment else {},
        kv_bytes=watch.kv_bytes,
    )


def in_turns(names: Sequence[Name], rounds: int) -> Iterator[tuple[int, Name]]:
    """All names in each round, another one first every time, so that nobody always is.

    Args:
        names: of what is timed.
        rounds: that count; round 0 comes before them, to warm up.

    Yields:
        The number of the round, and whose turn it is.
    """
    for number in range(rounds + 1):
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            yield number, name


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Arrivals(BaseStreamer):
    """Notes when each token reaches the host."""

    def __init__(self, on_tokens: Callable[[Tensor], None] | None) -> None:
        self.times: list[float] = []
        self._on_tokens = on_tokens
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Called with the prompt first, then with the ids of every step."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        if self._on_tokens is not None:
            self._on_tokens(value)

    def end(self) -> None:
        """Nothing is held back."""


class _Watch:
    """Times of modules and phases: device events on a GPU, which cost no waiting; else a clock."""

    def __init__(self, model: Any) -> None:
        family = family_of(model)
        backbone: Any = family.backbone(model)
        self._text_model = family.text_model(model)
        self._vision = [getattr(backbone, name) for name in VISION if hasattr(backbone, name)]
        self._cuda = model.device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}
        self.kv_bytes = 0

    @contextmanager
    def watching(self, attachment: Attachment | None) -> Iterator[None]:
        """Hooks in, and out again whatever happens."""
        handles = [
            *(v.register_forward_pre_hook(lambda *_: self._begin("vision")) for v in self._vision),
            *(v.register_forward_hook(lambda *_: self._finish("vision")) for v in self._vision),
            self._text_model.register_forward_pre_hook(lambda *_: self._begin("prefill")),
            self._text_model.register_forward_hook(self._after_text_model),
        ]
        before = None if attachment is None else attachment.phase
        if attachment is not None:
            attachment.phase = self._phase
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if attachment is not None and before is not None:
                attachment.phase = before

    def total(self, name: str) -> float:
        """Milliseconds of all spans of this name; the device must have finished."""
        return sum(
            start.elapsed_time(end) if self._cuda else 1000 * (end - start)
            for span, start, end in self._spans
            if span == name
        )

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _begin(self, name: str) -> None:
        self._open[name] = self._now()

    def _finish(self, name: str) -> None:
        self._spans.append((name, self._open.pop(name), self._now()))

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self._begin(name)
        yield
        self._finish(name)

    def _after_text_model(self, module: Any, args: Any, output: Any) -> None:
        if any(name == "prefill" for name, _, _ in self._spans):
            return
        self._finish("prefill")
        self.kv_bytes = kv_bytes(cache_of(output))
