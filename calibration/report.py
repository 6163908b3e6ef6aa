"""The tables at the end of a calibration."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from alvts_cli.artifact import Artifact, CalibrationRecord


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


def budget_table(artifact: Artifact) -> Table:
    """What every layer loses alone, and what it keeps at each average that was solved for."""
    record = artifact.calibration
    table = Table("layer", box=SIMPLE_HEAD, pad_edge=False)
    for ratio in record.ratios:
        table.add_column(f"loss\n{ratio:.0%}", justify="right", no_wrap=True)
    for schedule in artifact.schedules:
        average = sum(schedule) / len(schedule)
        table.add_column(f"kept\n{average:.0%}", justify="right", no_wrap=True)
    for i in range(len(artifact.layers)):
        # A schedule may come from elsewhere than from losses.
        losses = [f"{loss:.3f}" for loss in record.losses[i]] if record.losses else []
        kept = [f"{schedule[i]:.0%}" for schedule in artifact.schedules]
        table.add_row(str(i), *losses, *kept)
    return table
