"""`alvts info`: what is in a selector file."""

from pathlib import Path
from typing import Annotated

import typer

from .options import check_plots


def info(
    file: Annotated[
        str,
        typer.Argument(
            help="Selectors made by `alvts calibrate`: a file, a folder, user/repo[@revision]."
        ),
    ],
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw what each layer keeps, and where it chooses: .svg or .png."),
    ] = None,
) -> None:
    """Print what an artifact was fitted for, on what, and how well."""
    check_plots(plot, None)

    from rich.table import Table

    from calibration.report import POLICY_NOTE, fit_table, policy_table

    from ..artifact import load_artifact
    from ..hub import selectors_file
    from ..terminal import console

    path = selectors_file(file)
    artifact = load_artifact(path)
    record = artifact.calibration
    facts = {
        "model": artifact.model_id + (f" @ {artifact.revision}" if artifact.revision else ""),
        "family": artifact.family,
        "selectors": f"{len(artifact.layers)} layers, rank {artifact.rank}, "
        f"hidden size {artifact.hidden_size}, {artifact.dtype}"
        + (", of the paper's form" if artifact.paper else ""),
        "default keep": f"{artifact.default_keep:.3f}",
        "size": f"{path.stat().st_size:,} bytes",
        "data": record.data,
        "samples": f"{record.fitted} fitted, {record.held_out} held out",
        "sample ids": record.sample_ids,
        "settings": ", ".join(f"{name}={value}" for name, value in record.settings.items()),
        "versions": ", ".join(f"{name} {value}" for name, value in record.versions.items()),
    }
    about = Table(show_header=False, box=None)
    for name, value in facts.items():
        about.add_row(name, value)

    out = console()
    out.print(about)
    out.print(fit_table(record))
    if record.trials:
        out.print(policy_table(artifact))
        out.print(POLICY_NOTE)
    if plot is not None:
        from ..plots.budget import plot_budget

        plot_budget(artifact, path.name, plot)
