"""The `alvts` command: a flat table of sub-commands, and the one place where errors end.

Whatever goes wrong leaves one line on stderr and an exit code: 1 for a failure, 2 for a command
line that makes no sense, 130 for Ctrl-C. torch is imported inside the commands, so that
`alvts --help` answers at once.
"""

import io
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from . import __version__
from .commands import bench, calibrate, info, models, plan, push, run, serve, show
from .commands import eval as evaluation
from .commands.help import Command
from .commands.options import show_help, with_levels
from .commands.pocket import pocket
from .commands.smol import smol
from .errors import AlvtsError
from .terminal import note, one_line, say
from .threads import limit_threads

_interrupted = False
"""Whether Ctrl-C was pressed."""


class _Commands(TyperGroup):
    """A group that ends in one line instead of a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command line, then exit the process with its code."""
        try:
            _prepare_streams()
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
            # Here, where a full disk can still be reported.
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader, such as `head`, has had enough; nothing is left to be flushed at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except Exception as error:
            # Whatever a library has made of it: an import that was broken off, for one.
            if _interrupted:
                _end("interrupted", 130)
            if os.environ.get("ALVTS_DEBUG") == "1":
                raise
            _end(*_explain(error))
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the line names."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _end("interrupted", 130)


def _prepare_streams() -> None:
    """Make what is printed arrive, whatever the terminal, the locale and the shell are.

    Raises:
        AlvtsError: standard output is closed.
    """
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - open for the rest of the process
    if sys.stdout is None:
        raise AlvtsError("standard output is closed; send it to a file or to /dev/null")
    # A character that the locale does not have is written as an escape.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    # Nothing would be seen in no columns.
    if not re.fullmatch(r"0*[1-9][0-9]{0,4}", os.environ.get("COLUMNS", "80")):
        del os.environ["COLUMNS"]


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    note(f"warning: {one_line(str(message))}")


def _explain(error: Exception) -> tuple[str, int]:
    """One line about `error`, and the exit code."""
    if isinstance(error, AlvtsError):
        return str(error), 1
    # Of typer, which has moved the class between its modules.
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return error.format_message(), error.exit_code
    line = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in line or "can't allocate memory" in line)
    ):
        return "out of memory; try a smaller model, batch or image, or --dtype bfloat16", 1
    if isinstance(error, OSError):
        about = f"{error.filename}: " if error.filename else ""
        return f"{about}{error.strerror or line or type(error).__name__}", 1
    return (
        f"unexpected {type(error).__name__}: {line[:200]} (this is a bug; set ALVTS_DEBUG=1 "
        "for the traceback)"
    ), 1


def _end(message: str, code: int) -> NoReturn:
    say(f"error: {one_line(message)}", error=True)
    sys.exit(code)


app = typer.Typer(
    cls=_Commands,
    name="alvts",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Adaptive layer-wise visual token selection for vision-language models.",
    epilog='Example: `alvts run --image x.jpg --prompt "What is in the picture?" --keep 0.11`',
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"alvts {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _common(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    show_help(context)
    # Training and calibration give the same bytes again.
    limit_threads(by_load=context.invoked_subcommand not in ("calibrate", "pocket", "smol"))


for name, command, epilog in (
    ("run", run.run, run.EPILOG),
    ("show", show.show, show.EPILOG),
    ("serve", serve.serve, serve.EPILOG),
    ("bench", bench.bench, bench.EPILOG),
    ("calibrate", calibrate.calibrate, calibrate.EPILOG),
    ("eval", evaluation.evaluate, evaluation.EPILOG),
    ("info", info.info, info.EPILOG),
    ("models", models.models, models.EPILOG),
    ("push", push.push, push.EPILOG),
    ("plan", plan.plan, plan.EPILOG),
):
    app.command(name, cls=Command, epilog=epilog)(with_levels(command))
app.add_typer(pocket, name="pocket")
app.add_typer(smol, name="smol")


def _interrupt(*_: Any) -> NoReturn:
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the `alvts` script."""
    warnings.showwarning = _show_warning
    # Not where it is ignored, as in the background of a script.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    app(prog_name="alvts")
