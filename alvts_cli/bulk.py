"""Answers to all questions of a data set, kept on disk as they come.

Records are taken in windows of some batches; in a window, prompts of similar length go together, so
that little is spent on padding. Windows and batches are the same whenever the same command is given
again, so an interrupted run makes the answers that it would have made.

Beside the output lies `<output>.partial`, a line of JSON an answer, each batch forced to disk at
once. A line that an interruption cut off is dropped, and answered again. Each line has a digest of
what was answered: a run that goes on reads those records too, and only goes on if they are the
same. The output itself is written whole, in the order of the data, when the last answer is there.
"""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter

from .answer import prepare
from .artifact import Artifact
from .batches import collate, end_token, ended
from .data import Candidate, Reader
from .digests import of_question
from .engine import attach
from .errors import AlvtsError
from .families import family_of
from .files import write_whole
from .models import Loaded
from .schema import Count, Finite, Text, check, parse_json
from .spread import Group
from .terminal import one_line

FORMATS = (".jsonl", ".parquet")

# Of journals. The first had no digests in it.
_FORMAT = 2

# Batches in a window.
_WINDOW = 8


@dataclass(frozen=True)
class Job:
    """How to answer.

    Attributes:
        loaded: the model.
        selectors: of this model; None for the dense model.
        keep: as `resolve_keep` reads it; None for what the selectors say.
        max_new_tokens: longest answer.
        batch: questions at once.
        group: of the processes that share the windows.
    """

    loaded: Loaded
    selectors: Artifact | None
    keep: str | None
    max_new_tokens: int
    batch: int
    group: Group


@dataclass(frozen=True)
class Line:
    """A line of the journal and, without its digest, of the output.

    Attributes:
        index: of the record in the data, from 0.
        id: what the data call it.
        prompt: the user's words.
        answer: without special tokens.
        new_tokens: of the answer, its end token included.
        text_tokens: in the prompt.
        visual_tokens: in the prompt.
        visual_tokens_kept: layer average.
        digest: of the record as it was answered.
    """

    # What a journal is checked against when a run goes on with it.
    __pydantic_config__ = ConfigDict(strict=True)

    index: Count
    id: Text
    prompt: Text
    answer: Text
    new_tokens: Count
    text_tokens: Count
    visual_tokens: Annotated[Count, Field(gt=0)]
    visual_tokens_kept: Annotated[Finite, Field(ge=0)]
    digest: Text


class Journal:
    """The answers there are so far, on disk. Every process writes into a file of its own."""

    def __init__(self, output: Path, facts: dict[str, Any], group: Group | None = None) -> None:
        """
        Args:
            output: the file they are for.
            facts: plain values, what the answers depend on.
            group: of the processes that share the work.

        Raises:
            AlvtsError: it cannot be written, is damaged, is in use, or is of a run with other
                facts.
        """
        self._group = group or Group()
        self._first = output.with_name(f"{output.name}.partial")
        self.path = self._named(self._group.rank)
        try:
            self._file = self.path.open("a+b")
        except OSError as error:
            raise AlvtsError(f"cannot write {self.path}: {error.strerror or error}") from error
        try:
            self.lines = self._begin(json.loads(json.dumps({"format": _FORMAT, **facts})))
        except AlvtsError:
            self._file.close()
            raise

    def _named(self, rank: int) -> Path:
        return self._first.with_name(f"{self._first.name}{rank or ''}")

    def _begin(self, facts: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """The lines there are, in all files: there may have been more processes before."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AlvtsError(f"another run is writing {self.path}") from None
        lines: dict[int, dict[str, Any]] = {}
        for rank in count():
            path = self._named(rank)
            if path.is_file():
                lines |= _read(path, facts)
            elif rank >= self._group.size:
                break
        # Nobody writes before all have read.
        self._group.gather([rank])
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        if not whole:
            self._write([facts])
        return lines

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        """Keep the lines of a batch, but for those that are there already.

        Raises:
            AlvtsError: they cannot be written.
        """
        new = [line for line in lines if line["index"] not in self.lines]
        self._write(new)
        self.lines |= {line["index"]: line for line in new}

    def check_same(self, index: int, name: str, digest: str | None) -> None:
        """Refuse the answer to a record that is another one by now.

        Args:
            index: of the record in the data.
            name: of the record.
            digest: of what is read now; None where it cannot be read.

        Raises:
            AlvtsError: there is such an answer.
        """
        if index in self.lines and self.lines[index]["digest"] != digest:
            raise AlvtsError(
                one_line(
                    f"cannot go on with {self._first}: the words or the picture of {name} are not "
                    "those that it answers; give the same data, or delete it to start anew"
                )
            )

    def check_within(self, records: int) -> None:
        """Refuse answers to records that the data do not have: they may have been more when the run
        began, and where data have no file of their own, the facts do not tell.

        Args:
            records: that the data have.

        Raises:
            AlvtsError: there is such an answer.
        """
        beyond = max(self.lines, default=-1)
        if beyond >= records:
            raise AlvtsError(
                f"cannot go on with {self._first}: it answers record {beyond}, which is not of "
                f"this data ({records} records, from 0); give the same data, or delete it"
            )

    def close(self) -> None:
        """Let another run go on with it."""
        self._file.close()

    def remove(self) -> None:
        """The output is written."""
        self.path.unlink(missing_ok=True)
        rank = self._group.size
        while self._group.first and self._named(rank).is_file():
            self._named(rank).unlink()
            rank += 1

    def _write(self, lines: Sequence[Any]) -> None:
        try:
            self._file.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise AlvtsError(f"cannot write {self.path}: {error.strerror or error}") from error


def _read(path: Path, facts: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The whole lines of a journal of a run with these facts."""
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    try:
        before, *rest = map(parse_json, lines) if lines else [facts]
        known = before.get("format") == _FORMAT
        differing = [key for key in facts if before.get(key) != facts[key]]
        kept = check(_LINES, rest, str(path)) if known else []
    except (ValueError, AttributeError, AlvtsError):
        raise AlvtsError(f"{path} is damaged; delete it to start anew") from None
    if not known:
        raise AlvtsError(
            f"cannot go on with {path}: another version of alvts made it; delete it to start anew"
        )
    if differing:
        raise AlvtsError(
            f"cannot go on with {path}: it was made with other {', '.join(differing)}; "
            "give the same options, or delete it"
        )
    return {line.index: asdict(line) for line in kept}


_LINES = TypeAdapter(list[Line])


@torch.inference_mode()
def answer_all(
    job: Job, reader: Reader, limit: int | None, journal: Journal, advance: Callable[[int], None]
) -> float:
    """Answer whatever the journal does not hold yet. The reader's `skipped` names all broken ones.

    Args:
        job: how to answer.
        reader: of the records, in their own order.
        limit: of records; None for all.
        journal: takes the answers.
        advance: called with the number of records that were just finished, or were before.

    Returns:
        The seconds that the model took.

    Raises:
        AlvtsError: the journal cannot be written, or answers records that there are not, or that
            are others by now.
    """
    # What a limit leaves out may well have been answered before.
    if reader.total is not None and (limit is None or reader.total < limit):
        journal.check_within(reader.total)
    seconds, met = 0.0, 0
    selecting: Any = nullcontext()
    if job.selectors is not None:
        selecting = attach(job.loaded.model, job.selectors, job.keep)
    with selecting as attachment, closing(reader.candidates) as candidates:
        windows = _windows(islice(candidates, limit), _WINDOW * job.batch)
        for number, window in enumerate(windows):
            met += len(window)
            if not job.group.mine(number):
                continue
            left = [i for i, _ in window if i not in journal.lines]
            advance(len(window) - len(left))
            prepared = []
            for i, (name, read) in window:
                digest: str | None = None
                try:
                    sample = read()
                    digest = of_question(sample.images, sample.id, sample.prompt)
                    # Where all is answered, it is enough that the records are the same.
                    if left:
                        longest = job.max_new_tokens
                        inputs = prepare(job.loaded, sample.images, sample.prompt, longest)
                        prepared.append((i, sample.id, sample.prompt, digest, inputs))
                except AlvtsError as error:
                    reader.skip(name, error)
                    advance(1)
                journal.check_same(i, name, digest)
            if reader.hopeless(len(prepared) + len(journal.lines)):
                return seconds
            # The longest first: where memory is too short, that is seen at once.
            prepared.sort(key=lambda one: -one[-1]["input_ids"].shape[1])
            for start in range(0, len(prepared), job.batch):
                batch = prepared[start : start + job.batch]
                missing = sum(i in left for i, *_ in batch)
                if missing:
                    began = time.perf_counter()
                    lines = _answer(job, attachment, batch)
                    seconds += time.perf_counter() - began
                    journal.add([asdict(line) for line in lines])
                    advance(missing)
    # Of a stream it is known only now.
    if limit is None or met < limit:
        journal.check_within(met)
    return seconds


def _windows(candidates: Iterable[Candidate], size: int) -> Iterator[list[tuple[int, Candidate]]]:
    numbered = enumerate(candidates)
    while window := list(islice(numbered, size)):
        yield window


def _answer(
    job: Job, attachment: Any, batch: Sequence[tuple[int, str, str, str, Any]]
) -> list[Line]:
    model, tokenizer = job.loaded.model, job.loaded.processor.tokenizer
    pad = end_token(model, tokenizer)
    inputs = collate([one[-1] for one in batch], pad)
    output = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=job.max_new_tokens, pad_token_id=pad
    )
    new = output[:, inputs["input_ids"].shape[1] :].tolist()
    visual = family_of(model).visual_mask(model, inputs["input_ids"]).sum(dim=1).tolist()
    tokens = inputs["attention_mask"].sum(dim=1).tolist()
    kept = visual
    if attachment is not None:
        by_layer = attachment.last.kept
        kept = [sum(layer[b] for layer in by_layer) / len(by_layer) for b in range(len(batch))]
    lines = []
    for b, (i, name, prompt, digest, _) in enumerate(batch):
        said = ended(new[b], model.generation_config.eos_token_id)
        text = tokenizer.decode(said, skip_special_tokens=True).strip()
        counts = (len(said), tokens[b] - visual[b], visual[b], float(kept[b]))
        lines.append(Line(i, name, prompt, text, *counts, digest))
    return lines


def write_answers(lines: Iterable[dict[str, Any]], output: Path) -> None:
    """Write the output, in the order of the data, as one of `FORMATS`.

    Raises:
        AlvtsError: it cannot be written.
    """
    ordered = [
        {name: value for name, value in line.items() if name != "digest"}
        for line in sorted(lines, key=lambda line: line["index"])
    ]
    if output.suffix == ".jsonl":
        data = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in ordered).encode()
    else:
        from datasets import Dataset

        buffer = BytesIO()
        Dataset.from_list(ordered).to_parquet(buffer)
        data = buffer.getvalue()
    write_whole(output, data)
