"""`alvts show`: which visual tokens each layer keeps."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    MOST,
    DeviceOption,
    DTypeOption,
    ModelOption,
    OtherWeightsOption,
    PolicyOption,
    SelectorsOption,
    TrustOption,
    check_keep,
    refuse,
)

KEEPS = ("0.5", "0.33", "0.22", "0.11", "0.05", "0.02")
"""Of a page where no --keep is given."""

EPILOG = (
    'Example: `alvts show --image alvts_cli/pocket/example.png --prompt "what digit is on the '
    'teal cross?" --out kept.html`\n\n'
    "Of a video, for a model that takes some: `alvts show --model qwen2.5-vl-7b --video clip.mp4 "
    '--prompt "what happens?" --out kept.html` (files need `alvts[video]`; a folder of frames does '
    "not)."
)


def show(
    context: typer.Context,
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    out: Annotated[
        Path,
        typer.Option(help="Write here: .png for one picture of all layers, .html for a page."),
    ],
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture, or a folder of some; repeat for several."),
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(help="A video, or a folder of its frames; for models that take videos."),
    ] = None,
    frames: Annotated[
        int, typer.Option(min=1, max=MOST, help="Of --video to look at, evenly spaced.")
    ] = 8,
    model: ModelOption = "pocket",
    selectors: SelectorsOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="As in `alvts run`; repeat for the page's slider. Default: what the selectors "
            f"were fitted for; for a page {', '.join(KEEPS)}."
        ),
    ] = None,
    policy: PolicyOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="Longest answer.")] = 128,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    other_weights: OtherWeightsOption = False,
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
    # As text: 1 is a token and 1.0 is all of them.
    steps = [str(check_keep(value)) for value in keeps]
    if len(set(steps)) < len(steps):
        raise typer.BadParameter("a step is there twice", param_hint="--keep")
    if not image and video is None:
        raise typer.BadParameter("it is missing (or give --video)", param_hint="--image")
    if video is None:
        refuse(context, ("--frames",), "only with --video")
    if not prompt.strip():
        raise typer.BadParameter("it is empty", param_hint="--prompt")

    from ..answer import answer, prepare, selectors_for
    from ..data import read_pictures
    from ..engine import Picked, parse_policy
    from ..families import family_of
    from ..files import check_writable, write_whole
    from ..models import load_model
    from ..show.page import to_page
    from ..show.png import to_png
    from ..show.trace import Shown, trace
    from ..terminal import say
    from ..video import read_video

    picked = None if policy is None else (Picked(1.0, parse_policy(policy)),)
    check_writable(out, read=(*(image or ()), video, selectors))
    images = read_pictures(image or ())
    videos = [] if video is None else [read_video(video, frames)]
    loaded = load_model(model, device, dtype, trust_remote_code)
    inputs = prepare(loaded, images, prompt, max_new_tokens, videos)
    chosen = selectors_for(loaded, selectors, other_weights)
    if picked is not None:
        chosen = replace(chosen, picked=picked)
    sizes = [picture.size for picture in images]
    views = family_of(loaded.model).layout(
        loaded.model, loaded.processor, inputs, sizes, [one.frames[0].size for one in videos]
    )
    dense = answer(loaded, inputs, None, None, max_new_tokens, False)
    traces = [trace(loaded, inputs, chosen, k, max_new_tokens) for k in keeps]
    traces.sort(key=lambda one: one.answer.visual_tokens_kept)
    shown = Shown(loaded.name, prompt, images, [one.frames for one in videos], views, dense, traces)
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
