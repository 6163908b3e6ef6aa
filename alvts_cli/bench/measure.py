"""Dense and selective generations in turn, with what they are held against, and their figures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from math import nan
from statistics import mean, median
from typing import Any

from ..engine import Attachment, PaperSelector, Prefill, Selection, attach, prefill_flops
from ..engine.policy import what_layers_do
from ..families import family_of
from ..methods import make_method
from .compiled import compiled, compiler_errors
from .launches import Prompts, count_launches
from .memory import peak_memory
from .short import shortened
from .statistics import efficiency, ratio
from .subject import NEW_TOKENS, Subject, rank_of
from .timing import Generated, generate

_WATCHED = 3
"""Prefills whose phases are timed, at most."""


@dataclass(frozen=True)
class Peer:
    """Another method's prefill.

    Attributes:
        runs: in the same rounds as the others.
        visual_tokens_kept: mean over layers.
        speedup: of prefill against dense, and its 95 % interval.
    """

    runs: tuple[Generated, ...]
    visual_tokens_kept: float
    speedup: tuple[float, float, float]


@dataclass(frozen=True)
class Measurement:
    """The timed runs, in rounds: those of index `i` ran one after the other.

    Attributes:
        dense, selective: the generations.
        short: generations of one token whose prefill is as short as the layers' average.
        watched: selective generations of one token whose phases were timed, which takes time of its
            own, on a GPU much; none where all is compiled.
        peers: by the name of the method.
        peak_dense, peak_selective: bytes beyond the weights; None where not measured.
        figures: every name of `METRICS`; nan where there is none.
        intervals: 95 % intervals of the speed-ups among them, and of the efficiency.
    """

    dense: tuple[Generated, ...]
    selective: tuple[Generated, ...]
    short: tuple[Generated, ...]
    watched: tuple[Generated, ...]
    peers: dict[str, Peer]
    peak_dense: int | None
    peak_selective: int | None
    figures: dict[str, float]
    intervals: dict[str, tuple[float, float]]


@dataclass
class _Entrant:
    """One of those that take turns.

    Attributes:
        model: what runs.
        setting: what it runs in.
        new_tokens: of every generation; 1 where prefill is all that is asked for.
    """

    model: Any
    setting: Callable[[], AbstractContextManager[Attachment | None]]
    new_tokens: int = 1
    runs: list[Generated] = field(default_factory=list)
    peaks: list[int | None] = field(default_factory=list)
    kept: Prefill | None = None

    def run(self, subject: Subject) -> None:
        """Once more."""
        with peak_memory(self.model.device) as peak, self.setting() as attachment:
            made = generate(self.model, subject.inputs, self.new_tokens, ignore_end=True)
            if attachment is not None:
                self.kept = attachment.last
        self.runs.append(made)
        self.peaks.append(peak.bytes)

    @property
    def peak(self) -> int | None:
        """The highest; None where not measured."""
        return max((bytes for bytes in self.peaks if bytes is not None), default=None)

    def watch(self, subject: Subject) -> Generated:
        """The phases of one prefill."""
        with self.setting() as attachment:
            return generate(self.model, subject.inputs, 1, attachment, ignore_end=True)


def measure(
    subject: Subject, runs: int, against: Sequence[str], on_run: Callable[[], None]
) -> Measurement:
    """Time `runs` rounds after one round of warm-up.

    In every round all run once. The order is another one each time, so that nobody always comes
    first, or behind the same one.

    Args:
        subject: what to time.
        runs: at least 1.
        against: names of methods to time at the same layer average; none for what is compiled.
        on_run: called after every timed generation, `entrants(against) * (runs + 1)` times.

    Raises:
        AlvtsError: `torch.compile` failed.
    """
    with _racing(subject, against) as racing, compiler_errors():
        for i in range(runs + 1):
            for name in _order(list(racing), i):
                racing[name].run(subject)
                on_run()
        times = 0 if subject.compile else min(runs, _WATCHED)
        watched = tuple(racing["selective"].watch(subject) for _ in range(times))
    for entrant in racing.values():
        del entrant.runs[0]

    dense, selective = racing["dense"], racing["selective"]
    assert selective.kept is not None  # A prompt to measure has an image.
    timed, intervals = _timed(dense.runs, selective.runs, racing["short"].runs, watched)
    return Measurement(
        tuple(dense.runs),
        tuple(selective.runs),
        tuple(racing["short"].runs),
        watched,
        {name: _peer(racing[name], dense.runs) for name in against},
        dense.peak,
        selective.peak,
        {**timed, **_counted(subject, selective.kept), "plan_error": nan},
        intervals,
    )


@contextmanager
def _racing(subject: Subject, against: Sequence[str]) -> Iterator[dict[str, _Entrant]]:
    """All that take turns, by name."""
    model, prompt, keep = subject.model, subject.prompt, subject.keep
    selective = partial(attach, model, subject.selectors, keep, policy=subject.policy)
    depth = len(keep.values)
    average = round(mean(keep.count(i, prompt.visual_tokens) for i in range(depth)))

    with ExitStack() as stack:
        # What is compiled stays so from round to round.
        dense, short = (
            (stack.enter_context(compiled(model)) if subject.compile else model) for _ in range(2)
        )
        if subject.compile:
            attachment = stack.enter_context(selective(compile=True))

        def selecting() -> AbstractContextManager[Attachment]:
            if subject.compile:
                return nullcontext(attachment)
            return selective()

        racing = {
            "dense": _Entrant(dense, nullcontext, NEW_TOKENS),
            "selective": _Entrant(model, selecting, NEW_TOKENS),
            "short": _Entrant(short, partial(shortened, short, prompt.text_tokens + average)),
        }
        samples = [str(sample) for sample in range(subject.settings["batch"])]
        for name in against:
            method = make_method(name, subject.selectors)
            setting = partial(method.attached, model, max(1, average), samples)
            racing[name] = _Entrant(model, setting)
        yield racing


def entrants(against: Sequence[str]) -> int:
    """How many generations a round has."""
    return 3 + len(against)


def _order(names: list[str], number: int) -> list[str]:
    """All names, turned by one place from round to round, and every second time back to front."""
    turn = number % len(names)
    turned = names[turn:] + names[:turn]
    return turned[::-1] if number % 2 else turned


def _peer(entrant: _Entrant, dense: list[Generated]) -> Peer:
    assert entrant.kept is not None
    return Peer(
        tuple(entrant.runs),
        entrant.kept.layer_average,
        ratio(_values(dense, "prefill_ms"), _values(entrant.runs, "prefill_ms")),
    )


def _values(runs: list[Generated], name: str) -> list[float]:
    return [getattr(run, name) for run in runs]


def _counted(subject: Subject, kept: Prefill) -> dict[str, float]:
    """The figures that are the same at every run."""
    prompt, batch = subject.prompt, subject.settings["batch"]
    selectors = subject.selectors
    paper = any(isinstance(layer, PaperSelector) for layer in selectors.layers)
    selection = Selection(rank_of(selectors), kept.policy, kept.carry_rank, paper)
    text_model: Any = family_of(subject.model).text_model(subject.model)

    def flops(visual_per_layer: list[int]) -> int:
        tokens = [prompt.text_tokens + count for count in visual_per_layer]
        text = prompt.text_tokens
        one = prefill_flops(text_model.config, tokens, selection, prompt.tokens, text)
        return one.total * batch

    dense = flops([prompt.visual_tokens] * len(kept.kept))
    # All samples are alike.
    counts = [layer[0] for layer in kept.kept]
    selective = flops(counts)
    prompts = Prompts(batch, prompt.visual_tokens, prompt.text_tokens)
    model = subject.model
    launches = count_launches(model.config, kept.policy, prompts, model.dtype)
    adds_behind = family_of(model).adds_behind(model.config)
    layers = what_layers_do(kept.policy, counts, prompt.visual_tokens, adds_behind)
    return {
        "flops": selective,
        "flops_dense": dense,
        "flops_ratio": dense / selective,
        "visual_tokens": prompt.visual_tokens,
        "visual_tokens_kept": kept.layer_average,
        "text_tokens": prompt.text_tokens,
        "launches_dense": launches.dense,
        "launches_over_dense": launches.chooses - launches.dense,
        "launches_going_on": launches.goes_on - launches.dense,
        "launches_text_only": launches.text_only - launches.dense,
        "launches_once": launches.once,
        "launches_prefill": launches.over_dense(layers),
        "launches_decode": launches.decode - launches.decode_dense,
        "host_syncs": launches.host_syncs,
        "host_copies": launches.copies,
    }


def _timed(
    dense: list[Generated],
    selective: list[Generated],
    short: list[Generated],
    watched: Sequence[Generated],
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Medians and what is made of them, with intervals; and the measured caches."""

    figures: dict[str, float] = {
        "kv_bytes": selective[-1].kv_bytes,
        "kv_bytes_dense": dense[-1].kv_bytes,
        "kv_ratio": dense[-1].kv_bytes / selective[-1].kv_bytes,
        "vision_ms": median(_values(dense + selective, "vision_ms")),
        "scoring_ms": median([run.phase_ms["score"] for run in watched] or [nan]),
        "scoring_share": median([r.phase_ms["score"] / r.prefill_ms for r in watched] or [nan]),
    }
    prefill = [_values(runs, "prefill_ms") for runs in (dense, selective, short)]
    estimates = {
        "prefill_speedup_limit": ratio(prefill[0], prefill[2]),
        "efficiency": efficiency(*prefill),
    }
    figures["short_ms"] = median(prefill[2])
    for name in ("prefill", "ttft", "decode", "total"):
        slow, fast = _values(dense, f"{name}_ms"), _values(selective, f"{name}_ms")
        estimates[f"{name}_speedup"] = ratio(slow, fast)
        figures[f"{name}_ms"], figures[f"{name}_ms_dense"] = median(fast), median(slow)
    figures |= {name: point for name, (point, _, _) in estimates.items()}
    return figures, {name: (low, high) for name, (_, low, high) in estimates.items()}
