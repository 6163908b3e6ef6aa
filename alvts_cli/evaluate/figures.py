"""From outcomes to figures."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine import kv_bytes_expected
from .bootstrap import Bootstrap, Interval
from .data import DataSet
from .run import BLIND, DENSE, Outcomes, Run
from .scoring import SCORINGS, normalise


@dataclass(frozen=True)
class Head:
    """What the figures below stand against, in percent, over all samples or those of a kind.

    Attributes:
        samples: how many.
        dense: accuracy of the dense model.
        blind: its accuracy when every picture is grey.
        chance: accuracy of always giving the kind's commonest answer.
    """

    samples: int
    dense: float
    blind: float
    chance: float


@dataclass(frozen=True)
class Row:
    """A method at a budget.

    Attributes:
        run: which.
        kept: visual tokens by layer, `(count, layers)`, of the first sample.
        figures: every name of `gates.FIGURES`; nan where not defined.
        kinds: accuracy in percent per kind of question.
        all_kept: whether every layer keeps all visual tokens of every sample.
    """

    run: Run
    kept: tuple[tuple[int, int], ...]
    figures: dict[str, float]
    kinds: dict[str, float]
    all_kept: bool


@dataclass(frozen=True)
class Summary:
    """All figures of a data set; `kinds` are the heads of each kind of question, and `sees` says
    whether the dense model is right more often than blind, beyond chance."""

    name: str
    scoring: str
    skipped: int
    visual_tokens: float
    kv_bytes: float
    head: Head
    sees: bool
    kinds: dict[str, Head]
    rows: tuple[Row, ...]


def summarise(
    data: DataSet,
    results: Sequence[Outcomes],
    runs: Sequence[Run],
    seed: int,
    text_config: Any,
    bytes_per_value: int,
) -> Summary:
    """The figures of a run.

    Args:
        data: the questions.
        results: of every question, in order.
        runs: rows wanted, in order.
        seed: of the bootstrap.
        text_config: of the decoder, for the size of the dense KV cache.
        bytes_per_value: of the KV cache.
    """
    table = _Table(data, results, Bootstrap(len(results), seed))
    alvts = {run.budget: run for run in runs if run.method == "alvts"}
    kinds = list(dict.fromkeys(item.kind for item in data.items))
    rows = []
    for run in runs:
        rows.append(
            Row(
                run,
                results[0][run.label].kept,
                table.figures(run, alvts.get(run.budget)),
                {kind: 100 * table.right(run.label)[table.of(kind)].mean() for kind in kinds},
                bool((table.tokens(run.label) == table.tokens(DENSE)).all()),
            )
        )
    everything = np.ones(len(results), dtype=bool)
    slots = sum(one[DENSE].slots for one in results)
    return Summary(
        name=data.name,
        scoring=data.scoring,
        skipped=len(data.skipped),
        visual_tokens=table.tokens(DENSE).mean(),
        kv_bytes=kv_bytes_expected(text_config, [slots], bytes_per_value) / len(results),
        head=table.head(everything),
        sees=table.sees(),
        kinds={kind: table.head(table.of(kind)) for kind in kinds},
        rows=tuple(rows),
    )


class _Table:
    """The outcomes by column."""

    def __init__(self, data: DataSet, results: Sequence[Outcomes], bootstrap: Bootstrap) -> None:
        self._items = data.items
        self._score = SCORINGS[data.scoring]
        self._results = results
        self._bootstrap = bootstrap

    def right(self, label: str) -> np.ndarray:
        """float `[n]`, 1 where the answer is right."""
        pairs = zip(self._results, self._items, strict=True)
        return np.array([float(self._score(r[label].answer, i.answers)) for r, i in pairs])

    def tokens(self, label: str) -> np.ndarray:
        """`[n]`: visual tokens, mean over layers."""
        kept = [one[label].kept for one in self._results]
        return np.array([sum(count * n for count, n in k) / sum(n for _, n in k) for k in kept])

    def of(self, kind: str) -> np.ndarray:
        """bool `[n]`: the questions of a kind."""
        return np.array([item.kind == kind for item in self._items])

    def head(self, among: np.ndarray) -> Head:
        """The head over some samples."""
        answers: dict[str, Counter[str]] = {}
        for item in (i for i, use in zip(self._items, among, strict=True) if use):
            answers.setdefault(item.kind, Counter()).update(set(map(normalise, item.answers)))
        commonest = sum(max(counts.values()) for counts in answers.values())
        return Head(
            int(among.sum()),
            100 * self.right(DENSE)[among].mean(),
            100 * self.right(BLIND)[among].mean(),
            100 * commonest / among.sum(),
        )

    def sees(self) -> bool:
        """Whether the pictures help the dense model: the 95 % interval of dense minus blind is
        above 0."""
        return self._bootstrap.mean(self.right(DENSE) - self.right(BLIND), least=-1).low > 0

    def figures(self, run: Run, alvts: Run | None) -> dict[str, float]:
        """Every name of `gates.FIGURES`."""
        label, bootstrap = run.label, self._bootstrap
        right, dense = self.right(label), self.right(DENSE)
        if alvts is None:
            over = Interval(math.nan, math.nan, math.nan)
        elif alvts == run:
            over = Interval(0, 0, 0)
        else:
            over = bootstrap.mean(right - self.right(alvts.label), least=-1)
        intervals = {
            "retention": bootstrap.ratio(right, dense),
            "difference": bootstrap.mean(right - dense, least=-1),
            "over_alvts": over,
        }
        column = [(one[label], one[DENSE]) for one in self._results]
        figures = {
            "accuracy": 100 * right.mean(),
            "agreement": 100
            * np.mean([normalise(o.answer) == normalise(d.answer) for o, d in column]),
            "kl": np.mean([o.kl for o, _ in column]),
            "tokens": self.tokens(label).mean(),
            "tokens_after": np.mean([o.kept[-1][0] for o, _ in column]),
            "flops": 100 * sum(o.flops for o, _ in column) / sum(d.flops for _, d in column),
            "kv": 100 * sum(o.slots for o, _ in column) / sum(d.slots for _, d in column),
        }
        for name, interval in intervals.items():
            figures[name] = 100 * interval.value
            figures[f"{name}_low"] = 100 * interval.low
            figures[f"{name}_high"] = 100 * interval.high
        # Timed apart, where that is asked for (see `times`).
        speed = ("prefill_speedup", "prefill_speedup_low", "prefill_speedup_high")
        figures |= dict.fromkeys(speed, math.nan)
        return {name: float(value) for name, value in figures.items()}
