"""`alvts calibrate --check`: whether selectors still serve a model of other weights."""

import json
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.progress import BarColumn, TextColumn
from rich.table import Table

from calibration import Source, Watch, read_data
from calibration.check import CHANCE, LOSS, Check, check, recorded

from ..artifact import load_artifact
from ..files import check_writable, is_stdout, write_whole
from ..hub import selectors_file
from ..models import load_model
from ..spread import join
from ..terminal import bars, console, say
from .options import print_skipped

CHECK_NOTE = (
    "answers that are the dense model's own, token for token, and their loss (KL to the dense "
    "model's, in nats), with 95 % intervals; then: as the file says of the weights it was fitted "
    f"on; worse: fewer the same than chance explains (p < {CHANCE}), or all of the loss's interval "
    f"above {LOSS:g} times the loss then"
)
"""What the figures of `check_table` are."""


@dataclass(frozen=True)
class Subject:
    """The model that is checked, as the options of `alvts calibrate` name it."""

    model: str
    device: str
    dtype: str | None
    trust_remote_code: bool


def check_selectors(
    named: str, subject: Subject, source: Source, samples: int, seed: int, json_file: Path | None
) -> bool:
    """Measure, print what came of it with the verdict as the last line, and return whether the
    selectors still serve.

    Args:
        named: as `--selectors` takes it.
        subject: the model.
        source: of the samples.
        samples: so many.
        seed: of their choice.
        json_file: where everything measured goes too, or None.

    Raises:
        AlvtsError: what `check`, loading and reading refuse, or a file that cannot be written.
    """
    if json_file is not None:
        check_writable(json_file)
    aside = json_file is not None and is_stdout(json_file)
    path = selectors_file(named)
    artifact = load_artifact(path)
    recorded(artifact)
    # Not the samples that calibration draws with this seed, as far as there are others.
    reader = read_data(source, samples, (seed + 1) % 2**32)
    group = join(subject.device)
    loaded = load_model(subject.model, subject.device, subject.dtype, subject.trust_remote_code)
    artifact.check_model(loaded.model, loaded.name, other_weights=True)
    words = console(error=True)
    words.quiet = words.quiet or not group.first
    refused: list[str] = []
    of = TextColumn("{task.fields[done]}")
    with bars(words, TextColumn("answers"), BarColumn(), of) as progress:
        task = progress.add_task("answers", total=samples, done="")
        watch = Watch(
            sample=lambda count: progress.update(
                task, completed=count, done=f"{count} of {samples}"
            ),
            skipped=refused.append,
        )
        found = check(loaded.model, loaded.processor, artifact, reader, watch=watch, group=group)
    if not group.first:
        return found.serves
    print_skipped(words, reader.skipped + refused)
    if not found.other_weights:
        words.print(f"note: these are the very weights that {path} was fitted on")
    if found.data != found.data_then:
        words.print(
            f"note: {path} was measured on {found.data_then}, {loaded.name} on {found.data}: "
            "not quite the same question"
        )
    out = console(aside)
    out.print(check_table(found))
    out.print(CHECK_NOTE)
    say(verdict(found, str(path), loaded.name), error=aside)
    if json_file is not None:
        told = {"model": loaded.model_id, "selectors": str(path), **found.to_json()}
        write_whole(json_file, f"{json.dumps(told, indent=1)}\n".encode())
    return found.serves


def check_table(found: Check) -> Table:
    """What is kept of the answers at every keep ratio, then and now."""
    table = Table("keep", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("same then", "same now", "loss then", "loss now", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found.held:
        same, loss = one.same, one.loss
        table.add_row(
            f"{one.then.keep:.0%}",
            f"{one.then.same:.0%}",
            f"{same.value:.0%} ({same.low * 100:.0f}-{same.high * 100:.0f})",
            f"{one.then.loss:.3f}",
            f"{loss.value:.3f} ({loss.low:.3f}-{loss.high:.3f})",
            "worse" if one.worse else "",
        )
    return table


def verdict(found: Check, file: str, model: str) -> str:
    """One line: whether the selectors in `file` still serve `model`, or are to be fitted again."""
    worse = ", ".join(f"{one.then.keep:.0%}" for one in found.held if one.worse)
    samples = found.held[0].samples
    if not worse:
        return (
            f"verdict: {file} still serves {model}: at no keep ratio does it keep clearly less of "
            f"the answers than on the weights it was fitted on ({samples} samples)"
        )
    return (
        f"verdict: fit again: at keep {worse} {file} keeps less of what {model} answers than on "
        f"the weights it was fitted on ({samples} samples); alvts calibrate --model {model}"
    )
