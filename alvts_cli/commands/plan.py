"""`alvts plan`: what a keep ratio will bring, without weights and without the card."""

from pathlib import Path
from typing import Annotated

import typer

from .options import MOST, KeepOption, ModelOption, check_keep

BATCHES = (1, 8, 32)
TEXT_TOKENS = 64
KEEP = "0.111"
WIDTH = 120
"""Columns of the tables where there is no terminal."""


EPILOG = (
    "Examples: `alvts plan --model llava-next-7b --keep 0.11 --on h100`; "
    "`alvts plan --model qwen3-vl-8b --on this`"
)


def plan(
    model: ModelOption = "llava-1.5-7b",
    keep: KeepOption = None,
    on: Annotated[
        str,
        typer.Option(
            "--on", help="A card (h100, rtx-4090, ...), or `this`: measures the machine first."
        ),
    ] = "h100",
    policy: Annotated[
        str, typer.Option(help="How the selectors are used: paper, once, in-turn, every-4 or each.")
    ] = "paper",
    visual_tokens: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Of a prompt; default: one large image's.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Of a prompt.")] = TEXT_TOKENS,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything predicted here.")
    ] = None,
) -> None:
    """Predict dense and selective generation on a card, phase by phase, at batch 1, 8 and 32.

    Nothing is run. The letter behind a time says what binds it: **a**rithmetic, **m**emory or
    **l**aunches. What a card reaches of its peaks is assumed, and the last line says how much.
    """
    check_keep(keep)

    import json
    from dataclasses import replace

    from ..files import check_writable, is_stdout, write_whole
    from ..plan.cards import card
    from ..plan.predict import Wanted, make_case, predict
    from ..plan.report import to_json, to_table
    from ..plan.shape import known_shape
    from ..terminal import console

    if json_file is not None:
        check_writable(json_file, read=[f"{model}/config.json"])
    asked = Wanted(keep or KEEP, policy, visual_tokens, text_tokens)
    if on == "this":
        from ..plan.describe import describe_named
        from ..plan.machine import device_here, measure_machine

        case = make_case(describe_named(model, policy, device_here()), asked)
        machine = measure_machine()
    else:
        machine, shape = card(on), known_shape(model)
        if shape is None:
            from ..plan.describe import describe_named

            shape = describe_named(model, policy)
        case = make_case(shape, asked)
    predictions = [predict(replace(case, batch=batch), machine) for batch in BATCHES]
    # What goes to standard output is JSON alone where that is asked for.
    out = console(error=json_file is not None and is_stdout(json_file))
    if not out.is_terminal:
        out.width = WIDTH
    out.print(to_table(predictions, machine))
    if json_file is not None:
        text = json.dumps(to_json(predictions, machine), indent=1)
        write_whole(json_file, f"{text}\n".encode())
