"""What `alvts calibrate --check` and `--repick` share: fitted selectors, a model, and samples."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

from calibration import Reader, Source, Watch, read_data
from calibration.asking import FEWEST

from ..artifact import Artifact, load_artifact
from ..errors import AlvtsError
from ..hub import selectors_file
from ..models import Loaded, load_model
from ..spread import Group, join
from ..terminal import bars, console


@dataclass(frozen=True)
class Request:
    """The options of `alvts calibrate` that say what is measured.

    Attributes:
        selectors: as `--selectors` takes them.
        model, device, dtype, trust_remote_code: as `load_model` takes them.
        source: of the samples.
        samples: so many.
        seed: of their choice.
    """

    selectors: str
    model: str
    device: str
    dtype: str | None
    trust_remote_code: bool
    source: Source
    samples: int
    seed: int


@dataclass(frozen=True)
class Fitted:
    """All that was asked for, loaded.

    Attributes:
        path: of the selectors' file.
        reader: of samples other than those that calibration draws with this seed, as far as there
            are others.
        words: for notes; silent in all processes but the first.
        refused: lines about samples that could not be used.
    """

    path: Path
    artifact: Artifact
    reader: Reader
    group: Group
    loaded: Loaded
    words: Console
    refused: list[str] = field(default_factory=list)

    @contextmanager
    def watch(self, samples: int) -> Iterator[Watch]:
        """Bars of the answers and, where policies are tried, of those."""
        parts = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[done]}"))
        with bars(self.words, *parts, TimeRemainingColumn()) as progress:
            answers = progress.add_task("answers", total=samples, done="")
            tried = progress.add_task("policies", total=None, done="", visible=False)

            def on_sample(count: int) -> None:
                progress.update(answers, completed=count, done=f"{count} of {samples}")

            def on_trial(count: int, of: int) -> None:
                done = f"{count} of {of}"
                progress.update(tried, total=of, completed=count, done=done, visible=True)

            yield Watch(sample=on_sample, skipped=self.refused.append, trial=on_trial)


def load_fitted(request: Request, check: Callable[[Artifact], object]) -> Fitted:
    """Everything that is needed, the smallest first.

    Args:
        request: for what.
        check: raises where the selectors will not do, before a model is loaded.

    Raises:
        AlvtsError: whatever of all this cannot be had.
    """
    path = selectors_file(request.selectors)
    artifact = load_artifact(path)
    check(artifact)
    reader = read_data(request.source, request.samples, (request.seed + 1) % 2**32)
    if reader.total is not None and reader.total < FEWEST:
        raise AlvtsError(
            f"{request.source.data} has {reader.total} samples, at least {FEWEST} are needed"
        )
    group = join(request.device)
    loaded = load_model(request.model, request.device, request.dtype, request.trust_remote_code)
    words = console(error=True)
    words.quiet = words.quiet or not group.first
    return Fitted(path, artifact, reader, group, loaded, words)
