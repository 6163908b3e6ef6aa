"""What `--help` ends with: an example, and tables, as Markdown."""

from collections.abc import Mapping
from shutil import get_terminal_size
from typing import Any

from typer.core import TyperCommand


class Command(TyperCommand):
    """A command whose epilog is Markdown of several paragraphs and tables: typer's own is one."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print it."""
        epilog, self.epilog = self.epilog, None
        super().format_help(ctx, formatter)
        self.epilog = epilog
        if epilog is not None:
            from rich.markdown import Markdown
            from rich.padding import Padding

            from ..terminal import console

            out = console()
            # Prose is broken into lines wherever it goes.
            out.width = get_terminal_size().columns
            out.print(Padding(Markdown(epilog), (0, 1, 1, 1)))


def table(name: str, about: str, rows: Mapping[str, str]) -> str:
    """A table of Markdown with two columns, and its head."""
    lines = [(name, about), ("---", "---"), *rows.items()]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)
