"""`alvts calibrate`: fit the selectors of a model."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    ModelOption,
    SeedOption,
    TrustOption,
    all_but,
    print_skipped,
    read_columns,
    refuse,
)

if TYPE_CHECKING:
    from ..data import Source

FITTED = 256
CHECKED = 32

_MEASURES = (
    *("--model", "--data", "--image-folder", "--columns", "--samples", "--seed"),
    *("--device", "--dtype", "--trust-remote-code"),
)
"""Options that say what is measured on, whether anything is fitted or not."""

EPILOG = (
    "Example: `alvts calibrate --model llava-1.5-7b --data llava_v1_5_mix665k.json --image-folder "
    "images/ --out llava.alvts.safetensors`\n\n"
    "`alvts calibrate --check base.alvts.safetensors --model my-tuned-model/` measures on "
    f"{CHECKED} samples whether selectors still serve a fine-tuned model or should be fitted "
    "again, and exits with 1 in the second case. `alvts calibrate --repick shared.safetensors "
    "--model llava-1.5-7b --out mine.safetensors` picks the policies of selectors from elsewhere "
    "by the times of this machine. " + SPREAD.format("calibrate")
)


def calibrate(
    context: typer.Context,
    model: ModelOption = "pocket",
    data: Annotated[
        str,
        typer.Option(
            help="'pocket' (shipped scenes); a .json, .jsonl, .csv or .parquet file; a folder of "
            "images with prompts.jsonl, prompts.txt or metadata.csv; a data set of the hub: ID, "
            "ID:SPLIT or ID:CONFIG:SPLIT."
        ),
    ] = "pocket",
    image_folder: ImageFolderOption = None,
    columns: ColumnsOption = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=3,
            max=MOST,
            help="Drawn at random; a quarter measures, the rest fits; with --check and --repick "
            f"all measure. Default: {FITTED}; {CHECKED} with --check.",
        ),
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            help="Of the selectors: 'alvts', or 'paper' for the paper's own, to compare with: no "
            "carried updates, no policies."
        ),
    ] = "alvts",
    rank: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST,
            help="Of the selectors; default: width / 64, at least 24; width / 16, at least 16, in "
            "the paper's form.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Default: MODEL.alvts.safetensors in this folder.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    seed: SeedOption = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run that was interrupted.")
    ] = False,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            help="Fit nothing: measure whether these selectors (a file, a folder, "
            "user/repo[@revision]) keep as much of the answers of --model as the file says they "
            "did on the weights they were fitted on.",
        ),
    ] = None,
    repick: Annotated[
        str | None,
        typer.Option(
            "--repick",
            help="Fit nothing: time and try the policies of these selectors (as --check takes "
            "them) again, on this machine, this data and other samples, pick, and write them to "
            "--out.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="With --check: write all figures here.")
    ] = None,
) -> None:
    """Fit the selectors of every layer to the model's own attention, on about 256 samples, and find
    out which way of using them keeps the model's answers."""
    # Read when torch is imported. The steps are small, and threads that spin while they wait for
    # each other come to a standstill on cores that others use too: 100 times slower was seen.
    # Threads that sleep at once take 1.4 times as long on idle cores; so long a spin, 1.1 times,
    # and twice as long as sleepers on busy ones.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")

    if check is not None:
        refuse(context, all_but(context, "--check", "--json", *_MEASURES), "not with --check")
    elif repick is not None:
        refuse(context, all_but(context, "--repick", "--out", *_MEASURES), "not with --repick")
    else:
        refuse(context, ("--json",), "only with --check")
    if data == "pocket":
        refuse(context, OF_RECORDS, NOT_READ)
    output = out or Path(f"{Path(model).name}.alvts.safetensors")
    named = repick if check is None else check
    if named is not None:
        from calibration.asking import FEWEST

        from .calibrate_fitted import Request

        source = _source(data, image_folder, columns)
        count = samples or (FITTED if check is None else CHECKED)
        if count < FEWEST:
            way = "--check" if repick is None else "--repick"
            why = f"at least {FEWEST} are needed with {way}"
            raise typer.BadParameter(why, param_hint="--samples")
        request = Request(named, model, device, dtype, trust_remote_code, source, count, seed)
        if check is None:
            from .calibrate_repick import repick_policies

            repick_policies(request, output)
        else:
            from .calibrate_check import check_selectors

            if not check_selectors(request, json_file):
                raise typer.Exit(1)
        return
    samples = samples or FITTED

    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    from calibration import Checkpoint, Settings, Watch, read_data
    from calibration import calibrate as fit
    from calibration.policy import prefills

    from ..artifact import save_artifact
    from ..files import check_writable, locked
    from ..header import LayerFit
    from ..models import OURS, load_model
    from ..spread import join
    from ..terminal import bars, console
    from .fit_tables import POLICY_NOTE, fit_table, policy_table

    source = _source(data, image_folder, columns)
    # Everything that can be wrong is found before the model is loaded.
    check_writable(output, regular=True, read=[data])
    group = join(device)
    if group.first:
        context.with_resource(locked(output, "a calibration"))
    checkpoint = Checkpoint(output, resume)
    paper = form == "paper"
    settings = Settings.paper(rank=rank, seed=seed) if paper else Settings(form, rank, seed=seed)
    reader = read_data(source, samples, seed)
    words = console(error=True)
    words.quiet = words.quiet or not group.first
    if resume and not checkpoint.found:
        done = f"; {output} is finished and will be replaced" if output.exists() else ""
        words.print(f"note: nothing to resume: there is no {checkpoint.folder}{done}")
    loaded = load_model(model, device, dtype, trust_remote_code)

    refused: list[str] = []
    tables = console()
    tables.quiet = not group.first
    parts = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
    try:
        with bars(words, *parts, TimeRemainingColumn()) as progress:
            images = progress.add_task("images", total=samples, done="")
            layers = progress.add_task("layers", total=None, done="")
            carries = progress.add_task("carry", total=None, done="")
            trials = progress.add_task("policies", total=None, done="")

            def on_layer(index: int, count: int, fit: LayerFit) -> None:
                if index == 0 and not paper:
                    # Only once it is sure that there are samples enough.
                    tried = min(settings.policy_samples, math.ceil(samples * settings.held_out))
                    cost = f"trying policies will cost at most {prefills(tried):.0f} dense prefills"
                    tables.print(cost)
                done = f"{index + 1} of {count}, recall {fit.recall_after:.3f}"
                progress.update(layers, total=count, completed=index + 1, done=done)

            def on_carried(index: int, count: int) -> None:
                done = f"{index + 1} of {count}"
                progress.update(carries, total=count, completed=index + 1, done=done)

            def on_trial(count: int, of: int) -> None:
                progress.update(trials, total=of, completed=count, done=f"{count} of {of}")

            artifact = fit(
                loaded.model,
                loaded.processor,
                reader,
                settings,
                model_id=loaded.name if model in OURS else loaded.model_id,
                revision=loaded.revision,
                checkpoint=checkpoint,
                group=group,
                watch=Watch(
                    sample=lambda count: progress.update(
                        images, completed=count, done=f"{count} of {samples}"
                    ),
                    skipped=refused.append,
                    layer=on_layer,
                    carried=on_carried,
                    trial=on_trial,
                ),
            )
    except KeyboardInterrupt:
        if checkpoint.folder.exists():
            words.print(f"finished layers are in {checkpoint.folder}; go on with --resume")
        raise
    group.by_first(lambda: save_artifact(artifact, output))
    if not group.first:
        return
    checkpoint.remove()
    if checkpoint.taken:
        words.print(f"{checkpoint.taken} layers from before")
    print_skipped(words, reader.skipped + refused)
    record = artifact.calibration
    tables.print(fit_table(record))
    k = f"{settings.keep:.3f}"
    tables.print(
        f"on {record.held_out} samples that were not fitted; recall of the layer's own choice at "
        f"keep {k}; before: SVD alone"
    )
    if record.trials:
        tables.print(policy_table(record, artifact.picked))
        tables.print(POLICY_NOTE)
    size = output.stat().st_size
    tables.print(f"wrote {output} ({size:,} bytes)", soft_wrap=True)


def _source(data: str, image_folder: Path | None, columns: str | None) -> "Source":
    """Where the samples are."""
    from ..data import Source

    return Source(data, image_folder, read_columns(columns))
