"""`alvts run --data`: answers to every question of a data set, in a file."""

import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from ..answer import selectors_for
from ..artifact import fingerprint
from ..bulk import Job, Journal, answer_all, write_answers
from ..data import Reader, Source, read_data
from ..digests import of_processor
from ..errors import AlvtsError
from ..files import check_writable
from ..models import find_selectors, load_model
from ..spread import join
from ..terminal import bars, console, say
from .options import Setup, print_skipped

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Share:
    """What one of the processes did: its new answers, what it skipped, and the model's seconds."""

    new: list[dict[str, Any]]
    skipped: list[str]
    seconds: float


def answer_data(source: Source, out: Path, setup: Setup, limit: int | None, as_json: bool) -> None:
    """Answer the records of `source`, the first `limit` of them, and say what it took.

    Raises:
        AlvtsError: no such data, an output that cannot be written, whatever loading refuses, or no
            record that can be answered.
    """
    check_writable(out, regular=True, read=(source.data, setup.selectors))
    reader = read_data(source, limit, None)
    if source.data == "pocket" and limit is None:
        raise AlvtsError("the scenes of pocket have no end; say how many with --samples")
    group = join(setup.device)
    loaded = load_model(setup.model, setup.device, setup.dtype, setup.trust_remote_code)
    file = None if setup.dense else find_selectors(loaded, setup.selectors)
    selectors = None
    if file is not None:
        selectors = selectors_for(loaded, str(file), setup.other_weights)
    job = Job(loaded, selectors, setup.keep, setup.max_new_tokens, setup.batch, group)
    words = console(error=True)
    words.quiet = words.quiet or not group.first
    with closing(Journal(out, _facts(job, source, reader, file), group)) as journal:
        before = len(journal.lines)
        try:
            seconds = _with_progress(words, job, reader, limit, journal)
        except KeyboardInterrupt:
            kept = len(journal.lines)
            words.print(f"{kept} answers are kept; give the same command again to go on")
            raise
        own = Share(list(journal.lines.values())[before:], reader.skipped, seconds)
        shares = group.gather([own])
        found = journal.lines | {one["index"]: one for share in shares for one in share.new}
        lines = [line for i, line in found.items() if limit is None or i < limit]
        if lines:
            # No answer is forgotten before the output is there.
            group.by_first(lambda: write_answers(lines, out))
        journal.remove()
    if not group.first:
        return
    skipped = [line for share in shares for line in share.skipped]
    if not lines:
        such = f"; {len(skipped)} were skipped, such as {skipped[0]}" if skipped else ""
        raise AlvtsError(f"no question in {source.data} could be answered{such}")
    print_skipped(words, skipped)
    new = [line for share in shares for line in share.new]
    told = _told(lines, new, max(share.seconds for share in shares))
    told |= {"out": str(out), "skipped": len(skipped)}
    say(json.dumps(told) if as_json else _sentence(told))


def _with_progress(
    words: "Console", job: Job, reader: Reader, limit: int | None, journal: Journal
) -> float:
    total = reader.total
    if total is not None and limit is not None:
        total = min(total, limit)
    columns = (TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with bars(words, *columns) as progress:
        task = progress.add_task("answers", total=total)
        return answer_all(
            job, reader, limit, journal, lambda n: progress.advance(task, n * job.group.size)
        )


def _facts(job: Job, source: Source, reader: Reader, selectors: Path | None) -> dict[str, Any]:
    """What the answers depend on, but for the records, of which the journal has digests, and for
    the batch size, which may be another after a restart."""
    import hashlib

    import transformers

    def digest(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    path = Path(source.data)
    weights = fingerprint(job.loaded.model)
    return {
        "data": digest(path.read_bytes()) if path.is_file() else reader.description,
        "image folder": source.image_folder and str(source.image_folder.resolve()),
        "columns": source.columns,
        "prompt": source.prompt,
        "model": digest(weights.numpy().tobytes()),
        "processor": of_processor(job.loaded.processor),
        "dtype": str(job.loaded.dtype),
        "selectors": selectors and digest(selectors.read_bytes()),
        "keep": job.keep,
        "answer length": job.max_new_tokens,
        "transformers": transformers.__version__,
    }


def _told(lines: list[dict[str, Any]], new: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """The totals: tokens over all answers, speed over those that were made now."""

    def mean(name: str) -> float:
        return sum(line[name] for line in lines) / len(lines)

    tokens = sum(line["new_tokens"] for line in new)
    return {
        "answers": len(lines),
        "kept_from_before": len(lines) - len(new),
        "seconds": seconds,
        "answers_per_second": len(new) / seconds if new else None,
        "new_tokens_per_second": tokens / seconds if new else None,
        "new_tokens": sum(line["new_tokens"] for line in lines),
        "visual_tokens": mean("visual_tokens"),
        "visual_tokens_kept": mean("visual_tokens_kept"),
    }


def _sentence(told: dict[str, Any]) -> str:
    share = 100 * told["visual_tokens_kept"] / told["visual_tokens"]
    before = told["kept_from_before"]
    speed = "none made now"
    if told["answers_per_second"] is not None:
        speed = (
            f"{told['answers_per_second']:.1f} answers and "
            f"{told['new_tokens_per_second']:.1f} new tokens a second"
        )
    return (
        f"{told['answers']} answers in {told['out']}"
        + (f", {before} of them from before" if before else "")
        + f"; {told['skipped']} skipped; {speed}; {told['new_tokens']} new tokens; visual tokens "
        f"{told['visual_tokens']:.1f} a question, kept {told['visual_tokens_kept']:.1f} "
        f"({share:.0f} %, layer average)"
    )
