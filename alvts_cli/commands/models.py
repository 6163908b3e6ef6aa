"""`alvts models`: what can be named."""

from contextlib import suppress

EPILOG = "Example: `alvts models`"


def models() -> None:
    """List the known models: name, family, hub id, and whether the weights are on this machine."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..errors import AlvtsError
    from ..models import KNOWN, cached_folder
    from ..pocket import WEIGHTS
    from ..smol.fetch import smol_folder
    from ..terminal import console

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "family", "hub id", "here"):
        table.add_column(column, no_wrap=True)
    for name, known in KNOWN.items():
        if name == "pocket":
            here = (WEIGHTS / "config.json").is_file()
        elif name == "smol":
            here = False
            # A user without a home has nothing there.
            with suppress(AlvtsError):
                here = smol_folder().is_dir()
        else:
            here = cached_folder(known.hub_id) is not None
        table.add_row(name, known.family, known.hub_id, "yes" if here else "no")
    out = console()
    if not out.is_terminal:
        # Wide enough for the longest names.
        out.width = 120
    out.print(table)
    out.print("Any other model of these families works by its hub id or folder.")
