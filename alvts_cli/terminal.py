"""What reaches the terminal: text with nothing in it that a terminal would obey.

Names in files, prompts and answers come from anywhere. Control characters among them are written as
escapes at the last moment, so that no caller has to think of it, and text is never read as markup.
rich is imported where a table or a bar is printed.
"""

import re
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

NOW_AND_THEN = 30.0
"""Seconds between lines of progress where there is no terminal."""

WHOLE = 1000
"""Columns where there is no terminal: a file has room for whole tables."""

_quiet = False
_every = NOW_AND_THEN

# C0 without tab and newline, C1, marks that turn the direction of what follows, lone surrogates,
# and the two that are no characters, which XML does not take either.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def set_level(quiet: bool, verbose: bool) -> None:
    """Say less than usual (nothing but results and errors), or more, until the next call."""
    global _quiet, _every
    _quiet, _every = quiet, 1.0 if verbose else NOW_AND_THEN


def safe(text: str) -> str:
    """`text` with control characters as escapes, such as `\\x1b`; newlines and tabs stay."""
    return _OBEYED.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """`safe`, and every run of white space one space."""
    return safe(" ".join(text.split()))


def say(text: object, *, end: str = "\n", error: bool = False) -> None:
    """Print text; on standard error where `error`."""
    print(safe(str(text)), end=end, file=sys.stderr if error else sys.stdout, flush=end != "\n")


def note(text: str) -> None:
    """Print on standard error what is worth knowing beside the result; not under --quiet."""
    if not _quiet:
        say(text, error=True)


def console(error: bool = False) -> "Console":
    """For tables and bars; on standard error where `error`, and silent there under --quiet."""
    from rich.console import Console
    from rich.segment import Segment

    class Safe(Console):
        def render_str(self, text: str, **kwargs: Any) -> Any:
            # Here too, so that the width of a table's cell is that of what is printed.
            return super().render_str(safe(text), **kwargs)

        def render(self, *args: Any, **kwargs: Any) -> Any:
            for segment in super().render(*args, **kwargs):
                plain = segment.control or segment.text.isprintable()
                yield segment if plain else Segment(safe(segment.text), segment.style)

    made = Safe(stderr=error, quiet=error and _quiet, markup=False, emoji=False, soft_wrap=error)
    if not made.is_terminal:
        made.width = WHOLE
    return made


def bars(console: "Console", *columns: Any) -> "Progress":
    """Bars that go away at the end; where there is no terminal, a line now and then in their place.

    Args:
        console: to show them on; silent where it is quiet.
        columns: of rich's; its own by default.
    """
    from rich.progress import Progress

    class Bars(Progress):
        told = time.monotonic()

        def update(self, task_id: Any, **kwargs: Any) -> None:
            super().update(task_id, **kwargs)
            self._tell(task_id)

        def advance(self, task_id: Any, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self._tell(task_id)

        def _tell(self, task_id: Any) -> None:
            now = time.monotonic()
            if console.is_terminal or now - self.told < _every:
                return
            self.told = now
            task = next(task for task in self.tasks if task.id == task_id)
            of = "" if task.total is None else f" of {task.total:.0f}"
            left = task.time_remaining
            rest = "" if left is None else f", about {left:.0f} s left"
            console.print(f"{task.description}: {task.completed:.0f}{of}{rest}", highlight=False)

    # Disabled where nobody watches: even a bar that goes away again leaves an empty line.
    return Bars(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        get_time=time.monotonic,
    )


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
