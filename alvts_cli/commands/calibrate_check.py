"""`alvts calibrate --check`: whether selectors still serve a model of other weights."""

import json
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from calibration.check import CHANCE, LOSS, Check, check, recorded

from ..files import check_writable, is_stdout, write_whole
from ..terminal import console, say
from .calibrate_fitted import Request, load_fitted
from .options import print_skipped

CHECK_NOTE = (
    "answers that are the dense model's own, token for token, and their loss (KL to the dense "
    "model's, in nats), with 95 % intervals; then: as the file says of the weights it was fitted "
    f"on; worse: fewer the same than chance explains (p < {CHANCE}), or all of the loss's interval "
    f"above {LOSS:g} times the loss then"
)
"""What the figures of `check_table` are."""


def check_selectors(request: Request, json_file: Path | None) -> bool:
    """Measure, print what came of it with the verdict as the last line, and return whether the
    selectors still serve.

    Args:
        request: which selectors, on what.
        json_file: where everything measured goes too, or None.

    Raises:
        AlvtsError: what `check`, loading and reading refuse, or a file that cannot be written.
    """
    if json_file is not None:
        check_writable(json_file, read=(request.selectors, request.source.data))
    aside = json_file is not None and is_stdout(json_file)
    fitted = load_fitted(request, recorded)
    path, artifact, loaded, group = fitted.path, fitted.artifact, fitted.loaded, fitted.group
    artifact.check_model(loaded.model, loaded.name, other_weights=True)
    with fitted.watch(request.samples) as watch:
        found = check(
            loaded.model, loaded.processor, artifact, fitted.reader, watch=watch, group=group
        )
    if not group.first:
        return found.serves
    words = fitted.words
    print_skipped(words, fitted.reader.skipped + fitted.refused)
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
