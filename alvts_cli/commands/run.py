"""`alvts run`: ask a question about images, or every question of a data set, or talk about them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    MOST,
    NOT_READ,
    OF_RECORDS,
    SPREAD,
    ColumnsOption,
    DeviceOption,
    DTypeOption,
    ImageFolderOption,
    KeepOption,
    ModelOption,
    OtherWeightsOption,
    SelectorsOption,
    Setup,
    TrustOption,
    check_keep,
    read_columns,
    refuse,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ..answer import Answer
    from ..artifact import Artifact


EPILOG = (
    'Example: `alvts run --image alvts_cli/pocket/example.png --prompt "what digit is on the teal '
    'cross?" --keep 0.11`\n\n'
    "On a terminal, without `--prompt`, it is a conversation about the images; `/help` there.\n\n"
    "`alvts run --data questions.jsonl --image-folder photos/ --out answers.parquet` answers a "
    "whole set, and goes on where it stopped when it is given again. " + SPREAD.format("run --data")
)


def run(
    context: typer.Context,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture, or a folder of some; repeat for several, all in one prompt."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to ask; without one, on a terminal, a conversation. With --data, where a "
            "record does not say."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Answer every question of a .json, .jsonl, .csv or .parquet file, a folder of "
            "images, a data set of the hub (ID, ID:SPLIT or ID:CONFIG:SPLIT), or 'pocket'."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where the answers of --data go: a .jsonl or .parquet file.")
    ] = None,
    image_folder: ImageFolderOption = None,
    columns: ColumnsOption = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="The first of --data; default: all."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Questions of --data at once; default: 8.")
    ] = None,
    model: ModelOption = "pocket",
    selectors: SelectorsOption = None,
    keep: KeepOption = None,
    dense: Annotated[bool, typer.Option("--dense", help="Without any selection.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer dense and selective, side by side.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Longest answer.")] = 128,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    other_weights: OtherWeightsOption = False,
) -> None:
    """Answer a question about one or more images, then say what it took; or talk about them; or
    answer all questions of a data set."""
    if dense:
        selecting = ("--keep", "--selectors", "--other-weights", "--compare")
        refuse(context, selecting, "not with --dense")
    if data is None:
        refuse(context, ("--out", *OF_RECORDS, "--samples", "--batch"), "only with --data")
    else:
        refuse(context, ("--image", "--compare"), "not with --data")
    if data == "pocket":
        # It has questions of its own.
        refuse(context, (*OF_RECORDS, "--prompt"), NOT_READ)
    check_keep(keep)
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("it is empty", param_hint="--prompt")
    setup = Setup(
        model,
        device,
        dtype,
        selectors,
        keep,
        dense,
        max_new_tokens,
        batch or 8,
        trust_remote_code,
        other_weights,
    )
    if data is not None:
        if out is None or out.suffix not in (".jsonl", ".parquet"):
            raise typer.BadParameter("name a .jsonl or .parquet file", param_hint="--out")
        told = read_columns(columns)

        from ..data import Source
        from .run_data import answer_data

        source = Source(data, image_folder, told, split="test", prompt=prompt)
        answer_data(source, out, setup, samples, json_output)
        return
    if prompt is None and _talks() and not (compare or json_output):
        from .run_chat import chat

        chat(setup, image or [])
        return
    if not image or prompt is None:
        missing = "--prompt" if image else "--image"
        raise typer.BadParameter("it is missing (or give --data)", param_hint=missing)

    import json

    from ..answer import answer, prepare, selectors_for
    from ..data import read_pictures
    from ..models import load_model
    from ..terminal import console, say

    pictures = read_pictures(image)
    loaded = load_model(model, device, dtype, trust_remote_code)
    inputs = prepare(loaded, pictures, prompt, max_new_tokens)
    chosen = None if dense else selectors_for(loaded, selectors, other_weights)
    notice(loaded.processor.tokenizer, prompt, pictures)

    stream = not (json_output or compare)
    if not compare:
        result = answer(loaded, inputs, chosen, keep, max_new_tokens, stream)
        say(json.dumps(_plain(model, result, chosen)) if json_output else _line(result))
        return
    # The first generation of a process also pays for what is set up once.
    answer(loaded, inputs, None, None, 1, False)
    both = [answer(loaded, inputs, use, keep, max_new_tokens, False) for use in (None, chosen)]
    if json_output:
        names = ("dense", "selective")
        uses = zip(names, both, (None, chosen), strict=True)
        say(json.dumps({name: _plain(model, result, use) for name, result, use in uses}))
    else:
        console().print(_table(*both))


def _talks() -> bool:
    """Whether a person sits at both ends."""
    return sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()


def notice(tokenizer: Any, prompt: str, pictures: Sequence[Any]) -> None:
    """A line on stderr where pocket is asked about what it was never shown."""
    from ..pocket.notice import foreign_words, is_pocket, looks_rendered

    if not is_pocket(tokenizer):
        return
    from ..prompts import MARKER
    from ..terminal import note

    words = foreign_words(tokenizer, prompt.replace(MARKER, " "))
    if words:
        note(f"note: pocket does not know these words: {', '.join(words)}")
    if not all(looks_rendered(picture) for picture in pictures):
        note("note: pocket knows rendered scenes only; its answer about this image is a guess")


def _line(result: "Answer") -> str:
    from ..bench.report import megabytes

    kept = result.visual_tokens_kept
    share = 100 * kept / result.visual_tokens
    return (
        f"visual tokens {result.visual_tokens}, kept {kept:.1f} ({share:.0f} %, layer average); "
        f"prefill {result.prefill_ms:.1f} ms, {result.new_tokens} new tokens at "
        f"{result.decode_ms_per_token:.1f} ms; KV cache {megabytes(result.kv_bytes)}"
    )


def _plain(model: str, result: "Answer", selectors: "Artifact | None") -> dict[str, Any]:
    from dataclasses import asdict

    told = {"model": model, **asdict(result)}
    if selectors is not None and selectors.other_weights:
        told["other_weights"] = True
    return told


def _table(dense: "Answer", selective: "Answer") -> "Table":
    from rich.table import Table

    from ..bench.report import megabytes

    table = Table("", "dense", "selective")
    rows: dict[str, list[str]] = {
        "answer": [r.answer for r in (dense, selective)],
        "visual tokens, layer average": [
            f"{r.visual_tokens_kept:.1f} of {r.visual_tokens}" for r in (dense, selective)
        ],
        "language-model prefill": [f"{r.prefill_ms:.1f} ms" for r in (dense, selective)],
        "decode, per token": [f"{r.decode_ms_per_token:.1f} ms" for r in (dense, selective)],
        "KV cache after prefill": [megabytes(r.kv_bytes) for r in (dense, selective)],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table
