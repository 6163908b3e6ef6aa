"""`alvts pocket`: train the small model that ships with alvts, and score it."""

from pathlib import Path
from typing import Annotated

import typer

from ..models import KNOWN
from .help import Command
from .options import (
    MOST,
    DeviceOption,
    DTypeOption,
    SeedOption,
    TrustOption,
    show_help,
    with_levels,
)

pocket = typer.Typer(
    callback=show_help,
    invoke_without_command=True,
    help="Train and score pocket, the small model that ships with alvts.",
    epilog="Example: `alvts pocket score --easy 0`",
)


@pocket.command(cls=Command, epilog="Example: `alvts pocket train --out my-pocket`")
@with_levels
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for the trained model.")],
    seed: SeedOption = 0,
) -> None:
    """Train pocket from nothing; run again with the same folder to go on where it stopped.

    Only in the source tree: an installed wheel does not hold the recipe.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    from ..files import locked, make_folder
    from ..pocket import require_training
    from ..pocket.build import save_model
    from ..terminal import bars, console, say

    require_training()
    from ..pocket.training.train import PHASES, Step
    from ..pocket.training.train import train as train_model

    make_folder(out)
    context.with_resource(locked(out, "a training"))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with bars(console(error=True), *columns) as bar:
        tasks = {
            phase.name: bar.add_task(phase.name, total=phase.steps, loss=float("nan"))
            for phase in PHASES
        }

        def show(step: Step) -> None:
            bar.update(tasks[step.phase.name], completed=step.number, loss=step.loss)

        model = train_model(out / "checkpoint", seed, on_step=show)
    save_model(model, out)
    say(f"saved {out}")


@pocket.command(
    cls=Command, epilog="Example: `alvts pocket score --model my-pocket --per-kind 20 --easy 0`"
)
@with_levels
def score(
    model: Annotated[str, typer.Option(help="A pocket: `pocket`, or a folder.")] = "pocket",
    per_kind: Annotated[int, typer.Option(min=1, max=MOST, help="Held-out scenes per kind.")] = 100,
    easy: Annotated[int, typer.Option(min=0, max=MOST, help="Questions of easy-VQA.")] = 500,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Accuracy per kind of held-out question, beside a grey image's and the commonest answer's."""
    if model != "pocket" and (model in KNOWN or not Path(model).is_dir()):
        raise typer.BadParameter("give pocket, or the folder of one", param_hint="--model")

    from rich.table import Table

    from ..models import load_model
    from ..pocket.evaluate import answers, chance, easy_items, scene_items, score_kinds
    from ..terminal import console

    loaded = load_model(model, device, dtype, trust_remote_code)
    items = [*scene_items("test", per_kind), *(easy_items(easy) if easy else ())]
    seen = score_kinds(items, answers(loaded.model, loaded.processor, items))
    blind = score_kinds(items, answers(loaded.model, loaded.processor, items, blind=True))
    guess = chance(items)
    table = Table("question kind", "asked", "accuracy", "grey image", "commonest answer")
    for kind, (right, asked) in seen.items():
        shares = (right / asked, blind[kind][0] / asked, guess[kind])
        table.add_row(kind, str(asked), *(f"{share:.1%}" for share in shares))
    console().print(table)
