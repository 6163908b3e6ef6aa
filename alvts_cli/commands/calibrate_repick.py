"""`alvts calibrate --repick`: other policies for fitted selectors."""

from contextlib import ExitStack
from pathlib import Path

from calibration.repick import check_pickable, repick

from ..artifact import save_artifact
from ..files import check_writable, locked
from ..spread import join
from ..terminal import console
from .calibrate_fitted import Request, load_fitted
from .fit_tables import POLICY_NOTE, policy_table
from .options import print_skipped


def repick_policies(request: Request, output: Path) -> None:
    """Try, pick, write, and print what was tried.

    Args:
        request: which selectors, on what.
        output: written whole, by one process at a time.

    Raises:
        AlvtsError: what `repick`, loading and reading refuse, or a file that cannot be written.
    """
    # Its selectors may be picked in place.
    check_writable(output, regular=True, read=[request.source.data])
    with ExitStack() as held:
        if join(request.device).first:
            held.enter_context(locked(output, "a calibration"))
        _repick(request, output)


def _repick(request: Request, output: Path) -> None:
    fitted = load_fitted(request, check_pickable)
    loaded, group = fitted.loaded, fitted.group
    fitted.artifact.check_model(loaded.model, loaded.name)
    with fitted.watch(request.samples) as watch:
        artifact = repick(
            loaded.model,
            loaded.processor,
            fitted.artifact,
            fitted.reader,
            watch=watch,
            group=group,
        )
    group.by_first(lambda: save_artifact(artifact, output))
    if not group.first:
        return
    print_skipped(fitted.words, fitted.reader.skipped + fitted.refused)
    out = console()
    before = {one.keep: one.policy for one in fitted.artifact.picked}
    out.print(policy_table(artifact.calibration, artifact.picked))
    out.print(POLICY_NOTE)
    for one in artifact.picked:
        was = before.get(one.keep)
        now = "as before" if was == one.policy else f"was {was}"
        out.print(f"keep {one.keep:.0%}: {one.policy} ({now})")
    out.print(f"wrote {output} ({output.stat().st_size:,} bytes)", soft_wrap=True)
