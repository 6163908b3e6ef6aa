"""`alvts push`: selectors to the hub."""

from pathlib import Path
from typing import Annotated

import typer

EPILOG = (
    "Example: `alvts push llava-1.5-7b.alvts.safetensors user/llava-1.5-7b-selectors`; then, "
    "anywhere, `--selectors user/llava-1.5-7b-selectors`."
)


def push(
    file: Annotated[Path, typer.Argument(help="A selector file made by `alvts calibrate`.")],
    repo: Annotated[str, typer.Argument(help="user/repo; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made.")] = False,
) -> None:
    """Put selectors on the hub, with a card that says what they are for and how they were made.

    A README.md that is in the repo already is left alone, unless it is such a card.
    """
    from ..hub import push as to_hub

    address, carded = to_hub(file, repo, private)
    print(f"pushed to {address}")
    if not carded:
        print("the repo's own README.md was left as it is")
