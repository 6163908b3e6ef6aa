"""Dense and selective generations in turn, and the figures that come of them."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..engine import Prefill, attach, prefill_flops
from ..families import family_of
from .memory import peak_memory
from .statistics import ratio
from .subject import NEW_TOKENS, Subject, rank_of
from .timing import Generated, generate


@dataclass(frozen=True)
class Measurement:
    """The timed runs, in pairs: `dense[i]` and `selective[i]` ran one after the other.

    Attributes:
        dense, selective: the generations.
        peak_dense, peak_selective: bytes beyond the weights; None where not measured.
        figures: every name of `METRICS`.
        intervals: 95 % intervals of the speed-ups among them.
    """

    dense: tuple[Generated, ...]
    selective: tuple[Generated, ...]
    peak_dense: int | None
    peak_selective: int | None
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def measure(subject: Subject, runs: int, on_run: Callable[[], None]) -> Measurement:
    """Time `runs` pairs after one pair of warm-up; the order within a pair alternates.

    Args:
        subject: what to time.
        runs: at least 1.
        on_run: called after every generation, `2 * (runs + 1)` times.
    """
    model, inputs = subject.model, subject.inputs
    dense: list[Generated] = []
    selective: list[Generated] = []
    peaks: dict[bool, list[int]] = {False: [], True: []}
    kept: list[Prefill] = []

    def run(selecting: bool) -> Generated:
        with peak_memory(model.device) as peak:
            if selecting:
                with attach(model, subject.selectors, subject.keep) as attachment:
                    result = generate(model, inputs, NEW_TOKENS, attachment, ignore_end=True)
                    if attachment.last is not None:
                        kept.append(attachment.last)
            else:
                result = generate(model, inputs, NEW_TOKENS, ignore_end=True)
        if peak.bytes is not None:
            peaks[selecting].append(peak.bytes)
        on_run()
        return result

    for i in range(runs + 1):
        order = (False, True) if i % 2 == 0 else (True, False)
        pair = {selecting: run(selecting) for selecting in order}
        if i > 0:
            dense.append(pair[False])
            selective.append(pair[True])

    counted = _counted(subject, kept[-1])
    timed, intervals = _timed(dense, selective)
    return Measurement(
        tuple(dense),
        tuple(selective),
        max(peaks[False], default=None),
        max(peaks[True], default=None),
        {**timed, **counted},
        intervals,
    )


def _counted(subject: Subject, kept: Prefill) -> dict[str, float]:
    """The figures that are the same at every run."""
    prompt, rank, batch = subject.prompt, rank_of(subject.selectors), subject.settings["batch"]
    text_model: Any = family_of(subject.model).text_model(subject.model)

    def flops(visual_per_layer: list[int]) -> int:
        tokens = [prompt.text_tokens + count for count in visual_per_layer]
        one = prefill_flops(text_model.config, tokens, rank, prompt.tokens, prompt.text_tokens)
        return one.total * batch

    dense = flops([prompt.visual_tokens] * len(kept.kept))
    # All samples are alike.
    selective = flops([layer[0] for layer in kept.kept])
    return {
        "flops": selective,
        "flops_dense": dense,
        "flops_ratio": dense / selective,
        "visual_tokens": prompt.visual_tokens,
        "visual_tokens_kept": kept.layer_average,
        "text_tokens": prompt.text_tokens,
    }


def _timed(
    dense: list[Generated], selective: list[Generated]
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Medians and their ratios, with the intervals of the ratios; and the measured caches."""

    def values(runs: list[Generated], name: str) -> list[float]:
        return [getattr(run, name) for run in runs]

    figures: dict[str, float] = {
        "kv_bytes": selective[-1].kv_bytes,
        "kv_bytes_dense": dense[-1].kv_bytes,
        "kv_ratio": dense[-1].kv_bytes / selective[-1].kv_bytes,
        "vision_ms": median(values(dense + selective, "vision_ms")),
        "scoring_ms": median(run.phase_ms["score"] for run in selective),
        "scoring_share": median(run.phase_ms["score"] / run.prefill_ms for run in selective),
    }
    intervals = {}
    for name in ("prefill", "ttft", "decode", "total"):
        slow, fast = values(dense, f"{name}_ms"), values(selective, f"{name}_ms")
        point, low, high = ratio(slow, fast)
        figures[f"{name}_speedup"] = point
        intervals[f"{name}_speedup"] = (low, high)
        figures[f"{name}_ms"], figures[f"{name}_ms_dense"] = median(fast), median(slow)
    return figures, intervals
