"""The tables about a calibration: at its end, and in `alvts info`. No torch here."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..engine.policy import Picked
from ..header import CalibrationRecord

POLICY_NOTE = (
    "answers that are the dense model's own, token for token, and their loss (KL to the dense "
    "model's, in nats), on samples that were not fitted; how many times as fast as the dense "
    "model's the prefill was on the machine that calibrated; *: picked; out at 16: clearly behind "
    "after so many samples, and dropped"
)
"""What the figures of `policy_table` are."""


def fit_table(record: CalibrationRecord) -> Table:
    """Loss and recall of every layer, and their means, before the fit and after it."""
    table = Table("layer", box=SIMPLE_HEAD)
    for column in ("loss before", "loss after", "recall before", "recall after"):
        table.add_column(column, justify="right")
    rows = [(str(i), fit) for i, fit in enumerate(record.layers)]
    for name, fit in [*rows, ("mean", record.mean)]:
        table.add_row(
            name,
            f"{fit.loss_before:.4f}",
            f"{fit.loss_after:.4f}",
            f"{fit.recall_before:.3f}",
            f"{fit.recall_after:.3f}",
        )
    return table


def policy_table(record: CalibrationRecord, picked: Sequence[Picked]) -> Table:
    """What every policy that was tried does to the answers and to the prefill's time, and which was
    picked."""
    trials = record.trials
    table = Table("policy", box=SIMPLE_HEAD, pad_edge=False)
    keeps = sorted({trial.keep for trial in trials})
    for keep in keeps:
        table.add_column(f"keep\n{keep:.0%}", justify="right", no_wrap=True)
    chosen = {one.keep: one.policy for one in picked}
    for policy in dict.fromkeys(trial.policy for trial in trials):
        cells = []
        for trial in (t for t in trials if t.policy == policy):
            mark = "*" if chosen.get(trial.keep) == policy else " "
            faster = "" if trial.time is None else f"\n{1 / trial.time:.2f}x "
            figures = f"{trial.same:.0%} ({trial.loss:.3f})"
            # Of other samples than those beside it: not to be compared.
            if trial.dropped_after is not None:
                figures = f"out at {trial.dropped_after}"
            cells.append(f"{figures}{mark}{faster}")
        table.add_row(str(policy), *cells)
    return table
