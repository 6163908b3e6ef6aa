"""`alvts info`: what is in a selector file."""

from pathlib import Path
from typing import Annotated

import typer

from .options import check_plots

EPILOG = "Example: `alvts info llava-1.5-7b.alvts.safetensors --plot budget.svg`"


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
    """Print what an artifact was fitted for, on what, and how well. Its tensors are not read."""
    check_plots(plot, None)

    import warnings

    from rich.table import Table

    from ..header import read_header, written_keep
    from ..hub import selectors_file
    from ..terminal import console
    from .fit_tables import POLICY_NOTE, fit_table, policy_table

    path = selectors_file(file)
    header = read_header(path)
    if header.unknown:
        warnings.warn(header.unknown_names(path), stacklevel=2)
    told = header.metadata
    record = told.calibration
    facts = {
        "model": told.model + (f" @ {told.revision}" if told.revision else ""),
        "family": told.family,
        "selectors": f"{told.num_layers} layers, rank {told.rank}, "
        f"hidden size {told.hidden_size}, {header.dtype}"
        + (", of the paper's form" if told.form == "paper" else ""),
        "default keep": written_keep(told.default_keep),
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
        if record.tried_on is not None:
            out.print(f"policies: tried on {record.samples_tried} samples of {record.data_tried}")
        out.print(policy_table(record, told.picked))
        out.print(POLICY_NOTE)
    if plot is not None:
        from ..artifact import load_artifact
        from ..plots.budget import plot_budget

        plot_budget(load_artifact(path), path.name, plot)
