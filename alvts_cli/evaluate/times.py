"""Every method's prefill, timed in turns: what its answers cost."""

from collections.abc import Callable
from dataclasses import replace

from ..bench.statistics import ratio
from ..bench.timing import generate, in_turns
from ..methods.base import Method
from .data import DataSet, Item
from .figures import Summary
from .preparing import Preparing
from .run import DENSE, Plan

ROUNDS = 10
"""Of turns, after one to warm up."""


def steps(plan: Plan) -> int:
    """How often `time_prefills` calls `advance`."""
    return (ROUNDS + 1) * (len(plan.runs) + 1)


def time_prefills(
    plan: Plan, data: DataSet, advance: Callable[[], None]
) -> dict[str, tuple[float, float, float]]:
    """How many times faster than dense the language model's prefill is, batch of one.

    In every round dense and all runs take their turn on the same question, another one each round.
    What a method does to choose is in its time: on a small model, on this machine, it may be most
    of it.

    Args:
        plan: of the runs.
        data: the questions; the first ones are used.
        advance: called after every turn.

    Returns:
        By the label of the run: `ratio`.
    """
    by_label = {run.label: made for run, made in plan.runs.items()}
    times: dict[str, list[float]] = {label: [] for label in (DENSE, *by_label)}
    for number, label in in_turns(list(times), ROUNDS):
        item = data.items[number % len(data.items)]
        taken = _prefill(plan, data, item, by_label.get(label))
        if number:
            times[label].append(taken)
        advance()
    dense = times.pop(DENSE)
    return {label: ratio(dense, own) for label, own in times.items()}


def _prefill(
    plan: Plan, data: DataSet, item: Item, run: tuple[Method, int | float] | None
) -> float:
    """Milliseconds of one prefill; dense without a run."""
    loaded = plan.loaded
    prepare = Preparing(loaded, [item], data.max_new_tokens)
    pictures = item.images()
    if run is None:
        return generate(loaded.model, prepare([pictures]).inputs, 1).prefill_ms
    method, budget = run
    own = method.images(loaded.model, loaded.processor, pictures, budget)
    with method.attached(loaded.model, budget, [item.id]):
        return generate(loaded.model, prepare([own]).inputs, 1).prefill_ms


def with_times(summary: Summary, times: dict[str, tuple[float, float, float]]) -> Summary:
    """`summary` with `prefill_speedup` and its interval in the figures of every row."""
    rows = []
    for row in summary.rows:
        names = ("prefill_speedup", "prefill_speedup_low", "prefill_speedup_high")
        found = dict(zip(names, times[row.run.label], strict=True))
        rows.append(replace(row, figures={**row.figures, **found}))
    return replace(summary, rows=tuple(rows))
