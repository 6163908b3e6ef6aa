"""`alvts show`: which visual tokens each layer keeps."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    MOST,
    DeviceOption,
    DTypeOption,
    ModelOption,
    SelectorsOption,
    TrustOption,
    check_keep,
)

KEEPS = ("0.5", "0.33", "0.22", "0.11", "0.05", "0.02")
"""Of a page where no --keep is given."""

EPILOG = (
    'Example: `alvts show --image alvts_cli/pocket/example.png --prompt "what digit is on the '
    'teal cross?" --out kept.html`'
)


def show(
    image: Annotated[
        list[Path], typer.Option(help="A picture, or a folder of some; repeat for several.")
    ],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    out: Annotated[
        Path,
        typer.Option(help="Write here: .png for one picture of all layers, .html for a page."),
    ],
    model: ModelOption = "pocket",
    selectors: SelectorsOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="As in `alvts run`; repeat for the page's slider. Default: what the selectors "
            f"were fitted for; for a page {', '.join(KEEPS)}."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Longest answer.")] = 128,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Draw which visual tokens each layer keeps, and the answers with all and with them.

    The page is one file that needs neither network nor server.
    """
    page = _is_page(out)
    keeps: list[str | None] = [*(keep or (KEEPS if page else (None,)))]
    if not page and len(keeps) > 1:
        raise typer.BadParameter(
            "a .png shows one; give one, or write a page: --out x.html", param_hint="--keep"
        )
    for value in keeps:
        check_keep(value)
    if not prompt.strip():
        raise typer.BadParameter("it is empty", param_hint="--prompt")

    from ..answer import answer, prepare, selectors_for
    from ..data import read_pictures
    from ..families import family_of
    from ..files import check_writable, write_whole
    from ..models import load_model
    from ..show.page import to_page
    from ..show.png import to_png
    from ..show.trace import Shown, trace
    from ..terminal import say

    check_writable(out)
    images = read_pictures(image)
    loaded = load_model(model, device, dtype, trust_remote_code)
    inputs = prepare(loaded, images, prompt, max_new_tokens)
    chosen = selectors_for(loaded, selectors)
    sizes = [picture.size for picture in images]
    views = family_of(loaded.model).layout(loaded.model, loaded.processor, inputs, sizes)
    dense = answer(loaded, inputs, None, None, max_new_tokens, False)
    traces = [trace(loaded, inputs, chosen, k, max_new_tokens) for k in dict.fromkeys(keeps)]
    traces.sort(key=lambda one: one.answer.visual_tokens_kept)
    shown = Shown(loaded.name, prompt, images, [], views, dense, traces)
    data = to_page(shown) if page else to_png(shown, traces[0])
    write_whole(out, data)
    for one in traces:
        said = one.answer
        say(f"{said.visual_tokens_kept:.1f} of {said.visual_tokens} visual tokens: {said.answer}")
    say(f"all of them: {dense.answer}")
    say(f"wrote {out}, {len(data):,} bytes")


def _is_page(out: Path) -> bool:
    """Whether `out` is to be a page and not a PNG."""
    kinds = {".html": True, ".htm": True, ".png": False}
    if out.suffix.lower() not in kinds:
        raise typer.BadParameter("its name must end in .png or .html", param_hint="--out")
    return kinds[out.suffix.lower()]
