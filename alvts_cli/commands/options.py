"""Options that several commands share, and the checks of their values."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import AlvtsError


class DType(StrEnum):
    """Precision of the weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


ModelOption = Annotated[
    str, typer.Option("--model", help="A name (see `alvts models`), a hub id or a folder.")
]
SelectorsOption = Annotated[
    Path | None,
    typer.Option("--selectors", help="Fitted selectors; default: those found for the model."),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="Visual tokens that each layer keeps: a count (64), a ratio (0.11), or one value "
        "per layer with commas; default: what the selectors were fitted for.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...; auto prefers a GPU.")
]
DTypeOption = Annotated[
    DType | None,
    typer.Option("--dtype", help="Precision; default: what suits the model and the device."),
]


def check_keep(keep: str | None) -> None:
    """Refuse a `--keep` that fits no model, before one is loaded.

    Raises:
        typer.BadParameter: not a number or a list of numbers, or one out of range.
    """
    if keep is None:
        return
    from ..engine.keep import resolve_keep

    try:
        resolve_keep(keep, keep.count(",") + 1)
    except AlvtsError as error:
        raise typer.BadParameter(str(error), param_hint="--keep") from None
