"""Kernels that a GPU really ran, by torch's profiler: the check on those counted without one."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..engine import attach
from ..families import family_of
from .subject import Subject
from .timing import generate


def traced_kernels(subject: Subject) -> dict[str, int] | None:
    """Kernels of a dense and of a selecting prefill, beside layers and all; None without a GPU.

    Everything of the language model counts, its norm and positions too; memory copies do not.
    """
    if subject.model.device.type != "cuda":
        return None
    selecting = partial(
        attach, subject.model, subject.selectors, subject.keep, policy=subject.policy
    )
    sides: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "dense": nullcontext,
        "selective": selecting,
    }
    return {name: _kernels(subject, setting) for name, setting in sides.items()}


def _kernels(subject: Subject, setting: Callable[[], AbstractContextManager[object]]) -> int:
    """Of one prefill, after one that does not count."""
    decoder: Any = family_of(subject.model).text_model(subject.model)
    tracer = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
    with setting():
        generate(subject.model, subject.inputs, 1)
        handles = [
            decoder.register_forward_pre_hook(lambda *_: _begin(tracer)),
            decoder.register_forward_hook(lambda *_: _end(tracer)),
        ]
        try:
            generate(subject.model, subject.inputs, 1)
        finally:
            for handle in handles:
                handle.remove()
    return count_kernels(tracer.events() or ())


def count_kernels(events: Iterable[Any]) -> int:
    """Kernels among a profiler's events: what ran on the device and is no copy and no fill."""
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
        for event in events
    )


def _begin(tracer: Any) -> None:
    torch.cuda.synchronize()
    tracer.start()


def _end(tracer: Any) -> None:
    torch.cuda.synchronize()
    tracer.stop()
