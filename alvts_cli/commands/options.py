"""Options that several commands share, and the checks of their values."""

import inspect
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AlvtsError

if TYPE_CHECKING:
    from rich.console import Console


class DType(StrEnum):
    """Precision of the weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def _known_models(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from ..models import KNOWN

    return [name for name in KNOWN if name.startswith(incomplete)]


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="A name (see `alvts models`), a hub id or a folder.",
        autocompletion=_known_models,
    ),
]
SelectorsOption = Annotated[
    str | None,
    typer.Option(
        "--selectors",
        help="Fitted selectors: a file, a folder, user/repo[@revision] or hf://... of the hub; "
        "default: those found for the model.",
    ),
]
KeepOption = Annotated[
    str | None,
    typer.Option(
        "--keep",
        help="Visual tokens that each layer keeps: a count (64), a ratio (0.11), or one value "
        "per layer with commas; default: what the selectors were fitted for.",
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="How the selectors are used: paper, once, in-turn, every-4 or each; default: what "
        "calibration picked for --keep, or paper.",
    ),
]
SPREAD = (
    "Several GPUs share the work when it is started as torchrun --nproc-per-node 4 -m alvts_cli "
    "{} ..., or so by accelerate launch; several machines with --nnodes (pip install "
    "'alvts[scale]')."
)
"""Of the commands that can, under their help."""

ImageFolderOption = Annotated[
    Path | None,
    typer.Option(
        "--image-folder", help="Of the pictures that records name; default: where the file is."
    ),
]
ColumnsOption = Annotated[
    str | None,
    typer.Option(
        "--columns",
        help='Where a record\'s parts are, such as "image=img,question=q,answer=a"; default: '
        "found by their usual names.",
    ),
]
FromOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--from",
        help="With --plot: draw what earlier --json files hold (repeatable), and run nothing.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...; auto prefers a GPU.")
]
DTypeOption = Annotated[
    DType | None,
    typer.Option("--dtype", help="Precision; default: what suits the model and the device."),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the model brings with it."),
]

OtherWeightsOption = Annotated[
    bool,
    typer.Option(
        "--other-weights",
        help="Use selectors of a model of the same shape, such as the base of a fine-tuned one.",
    ),
]

SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, help="Same seed, same result.")
]

MOST = 1_000_000
"""The largest number that an option counts with."""


@dataclass(frozen=True)
class Setup:
    """The model and how it answers, as the options of `alvts run` say it."""

    model: str
    device: str
    dtype: str | None
    selectors: str | None
    keep: str | None
    dense: bool
    max_new_tokens: int
    batch: int
    trust_remote_code: bool
    other_weights: bool


QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print results and errors, and nothing else.")
]
VerboseOption = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Print what the libraries say, and more of the progress."),
]


def with_levels(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command` with --quiet and --verbose, which are in force while it runs."""

    @wraps(command)
    def run(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        from ..terminal import set_level

        if quiet and verbose:
            raise typer.BadParameter("it cannot go with --verbose", param_hint="--quiet")
        # Read when the libraries are imported, by the command that needs them.
        level = "info" if verbose else "error"
        for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
            os.environ.setdefault(name, level)
        # It raises what it logs as an error: that would be told twice.
        os.environ.setdefault("DATASETS_VERBOSITY", "info" if verbose else "critical")
        if not verbose:
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        set_level(quiet, verbose)
        return command(*args, **kwargs)

    own = inspect.signature(command)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=option)
        for name, option in (("quiet", QuietOption), ("verbose", VerboseOption))
    ]
    run.__signature__ = own.replace(parameters=[*own.parameters.values(), *more])  # type: ignore[attr-defined]
    run.__annotations__ = {
        **command.__annotations__,
        "quiet": QuietOption,
        "verbose": VerboseOption,
    }
    return run


def show_help(context: typer.Context) -> None:
    """What a group of commands does when none of them is named."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def read_columns(columns: str | None) -> dict[str, str]:
    """`--columns` as a dict.

    Raises:
        typer.BadParameter: it cannot be read as one.
    """
    from ..data import parse_columns

    try:
        return parse_columns(columns)
    except AlvtsError as error:
        raise typer.BadParameter(str(error), param_hint="--columns") from None


def print_skipped(console: "Console", skipped: Sequence[str]) -> None:
    """Name and count the records that could not be used."""
    if skipped:
        lines = (f"skipped {len(skipped)} samples:", *skipped)
        console.print(*lines, sep="\n  ", highlight=False)


def check_keep(keep: str | None) -> tuple[float | int, ...]:
    """Refuse a `--keep` that fits no model, before one is loaded.

    Returns:
        Its values, however they are written; none of None.

    Raises:
        typer.BadParameter: not a number or a list of numbers, or one out of range.
    """
    if keep is None:
        return ()
    from ..engine.keep import resolve_keep

    try:
        return resolve_keep(keep, keep.count(",") + 1).values
    except AlvtsError as error:
        raise typer.BadParameter(str(error), param_hint="--keep") from None


OF_RECORDS = ("--image-folder", "--columns")
"""Options that say how `--data` is read; what ships inside is made and not read."""
NOT_READ = "only with --data that is read from files or the hub"
"""Why they are refused beside other data."""


def refuse(context: typer.Context, options: Collection[str], why: str) -> None:
    """Refuse options that would do nothing, and say nothing of it, beside what else was given.

    Args:
        context: of the command.
        options: as they are written.
        why: they would do nothing, such as "not with --dense".

    Raises:
        typer.BadParameter: one of them was given.
    """
    for parameter in context.command.params:
        source = context.get_parameter_source(str(parameter.name))
        given = source is not None and source.name == "COMMANDLINE"
        if given and _written(parameter) in options:
            raise typer.BadParameter(why, param_hint=_written(parameter))


def all_but(context: typer.Context, *options: str) -> set[str]:
    """All options of the command but these, and but how much is printed.

    Where a mode goes with few options, they are named and not those that it refuses: an option that
    the command gets later is refused until somebody says otherwise.
    """
    known = {_written(parameter) for parameter in context.command.params}
    return known - {*options, "--quiet", "--verbose"}


def _written(parameter: Any) -> str:
    """An option's long name."""
    return max(parameter.opts, key=len)


def check_plots(
    plot: Path | None, earlier: list[Path] | None, read: Sequence[Path | str | None] = ()
) -> None:
    """Refuse --from without --plot, or twice the same, and a --plot that cannot be drawn.

    Args:
        plot: to write to.
        earlier: files of --from.
        read: other files that the command reads.

    Raises:
        typer.BadParameter: the one without the other, or a file of --from that is there twice.
        AlvtsError: see `check_plot`.
    """
    files = [os.path.realpath(path) for path in earlier or ()]
    if len(set(files)) < len(files):
        raise typer.BadParameter("a file is there twice", param_hint="--from")
    if plot is not None:
        from ..plots.chart import check_plot

        check_plot(plot, (*(earlier or ()), *read))
    elif earlier:
        raise typer.BadParameter("only with --plot", param_hint="--from")
