"""What reaches the terminal: text with nothing in it that a terminal would obey.

Names in files, prompts and answers come from anywhere. Control characters among them are written as
escapes at the last moment, so that no caller has to think of it, and text is never read as markup.
rich is imported where a table or a bar is printed.
"""

import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

# C0 without tab and newline, C1, marks that turn the direction of what follows, lone surrogates.
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def safe(text: str) -> str:
    """`text` with control characters as escapes, such as `\\x1b`; newlines and tabs stay."""
    return _OBEYED.sub(lambda found: _escape(found[0]), text)


def one_line(text: str) -> str:
    """`safe`, and every run of white space one space."""
    return safe(" ".join(text.split()))


def say(text: object, *, end: str = "\n", error: bool = False) -> None:
    """Print text; on standard error where `error`."""
    print(safe(str(text)), end=end, file=sys.stderr if error else sys.stdout, flush=end != "\n")


def console(error: bool = False) -> "Console":
    """A console for tables and bars, on standard error where `error`."""
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

    return Safe(stderr=error, markup=False, emoji=False, soft_wrap=error)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
