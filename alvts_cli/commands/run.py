"""`alvts run`: ask a question about images."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    DeviceOption,
    DTypeOption,
    KeepOption,
    ModelOption,
    SelectorsOption,
    check_keep,
)

if TYPE_CHECKING:
    from rich.table import Table

    from ..answer import Answer


def run(
    image: Annotated[list[Path], typer.Option(help="A picture; repeat for several.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    model: ModelOption = "pocket",
    selectors: SelectorsOption = None,
    keep: KeepOption = None,
    dense: Annotated[bool, typer.Option("--dense", help="Without any selection.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer dense and selective, side by side.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
) -> None:
    """Answer a question about one or more images, then say what it took."""
    _check_together(keep, selectors, dense, compare)
    check_keep(keep)
    if not prompt.strip():
        raise typer.BadParameter("it is empty", param_hint="--prompt")

    import json

    from rich.console import Console

    from ..answer import answer, prepare, selectors_for
    from ..models import load_model
    from ..prompts import read_image

    pictures = [read_image(path) for path in image]
    loaded = load_model(model, device, dtype)
    inputs = prepare(loaded, pictures, prompt, max_new_tokens)
    chosen = None if dense else selectors_for(loaded, selectors)
    _notice(loaded.processor.tokenizer, prompt, pictures)

    stream = not (json_output or compare)
    if not compare:
        result = answer(loaded, inputs, chosen, keep, max_new_tokens, stream)
        print(json.dumps(_plain(model, result)) if json_output else _line(result))
        return
    # The first generation of a process also pays for what is set up once.
    answer(loaded, inputs, None, None, 1, False)
    both = [answer(loaded, inputs, use, keep, max_new_tokens, False) for use in (None, chosen)]
    if json_output:
        names = ("dense", "selective")
        print(json.dumps({name: _plain(model, r) for name, r in zip(names, both, strict=True)}))
    else:
        Console().print(_table(*both))


def _check_together(keep: str | None, selectors: Path | None, dense: bool, compare: bool) -> None:
    """Refuse options that contradict each other."""
    others = {
        "--keep": keep is not None,
        "--selectors": selectors is not None,
        "--compare": compare,
    }
    for name, given in others.items():
        if dense and given:
            raise typer.BadParameter(f"it cannot go with {name}", param_hint="--dense")


def _notice(tokenizer: Any, prompt: str, pictures: list[Any]) -> None:
    """A line on stderr where pocket is asked about what it was never shown."""
    from ..pocket.notice import foreign_words, is_pocket, looks_rendered

    if not is_pocket(tokenizer):
        return
    from ..prompts import MARKER

    words = foreign_words(tokenizer, prompt.replace(MARKER, " "))
    if words:
        print(f"note: pocket does not know these words: {', '.join(words)}", file=sys.stderr)
    if not all(looks_rendered(picture) for picture in pictures):
        print(
            "note: pocket knows rendered scenes only; its answer about this image is a guess",
            file=sys.stderr,
        )


def _line(result: "Answer") -> str:
    from ..bench.report import megabytes

    kept = result.visual_tokens_kept
    share = 100 * kept / result.visual_tokens
    return (
        f"visual tokens {result.visual_tokens}, kept {kept:.1f} ({share:.0f} %, layer average); "
        f"prefill {result.prefill_ms:.1f} ms, {result.new_tokens} new tokens at "
        f"{result.decode_ms_per_token:.1f} ms; KV cache {megabytes(result.kv_bytes)}"
    )


def _plain(model: str, result: "Answer") -> dict[str, Any]:
    from dataclasses import asdict

    return {"model": model, **asdict(result)}


def _table(dense: "Answer", selective: "Answer") -> "Table":
    from rich.table import Table
    from rich.text import Text

    from ..bench.report import megabytes

    table = Table("", "dense", "selective")
    rows: dict[str, list[Text | str]] = {
        "answer": [Text(r.answer) for r in (dense, selective)],
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
