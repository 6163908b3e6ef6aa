"""`alvts eval`: what each method keeps of the dense model's answers, at equal cost."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..bench.metrics import Gate
from ..errors import AlvtsError
from ..evaluate.gates import FIGURES, FORMAT, parse_gate, read_budget
from ..evaluate.scoring import SCORINGS
from ..methods import FITTED, METHODS, PAPER, check_method
from .help import table
from .options import (
    MOST,
    NOT_READ,
    OF_RECORDS,
    SPREAD,
    ColumnsOption,
    DeviceOption,
    DTypeOption,
    FromOption,
    ImageFolderOption,
    ModelOption,
    OtherWeightsOption,
    SeedOption,
    SelectorsOption,
    TrustOption,
    all_but,
    check_plots,
    print_skipped,
    read_columns,
    refuse,
)

if TYPE_CHECKING:
    from ..evaluate.data import DataSet
    from ..evaluate.figures import Summary
    from ..evaluate.run import Plan
    from ..evaluate.store import Store
    from ..models import Loaded
    from ..spread import Group

EPILOG = (
    "Example: `alvts eval --methods dense,alvts,fastv --keep 64,32 --samples 140 --gate "
    '"alvts@64.retention>=97"`\n\n'
    f"{SPREAD.format('eval')}\n\n"
    + table("figure", "what it is", {name: figure.about for name, figure in FIGURES.items()})
)


def evaluate(
    context: typer.Context,
    model: ModelOption = "pocket",
    selectors: SelectorsOption = None,
    paper_selectors: Annotated[
        str | None,
        typer.Option(help="For alvts-paper: a file made by `alvts calibrate --form paper`."),
    ] = None,
    data: Annotated[
        list[str],
        typer.Option(
            help="'pocket' (held-out scenes), 'pocket-turns' (the same, each behind two other "
            "questions of one conversation), 'pocket-described' (for models that can describe "
            "them), 'easy-vqa'; a .json, .jsonl, .csv or .parquet file; a folder of images with "
            "prompts.jsonl or metadata.csv; a data set of the hub: ID, ID:SPLIT or "
            "ID:CONFIG:SPLIT; repeatable."
        ),
    ] = ["pocket"],  # noqa: B006 - typer reads the default, nobody writes to it
    image_folder: ImageFolderOption = None,
    columns: ColumnsOption = None,
    methods: Annotated[
        str,
        typer.Option(
            help="With commas; 'all' for: " + ", ".join(METHODS) + f" ({PAPER} where there are "
            "--paper-selectors)."
        ),
    ] = "all",
    keep: Annotated[
        str,
        typer.Option(help="Layer averages to compare at, with commas: ratios or token counts."),
    ] = "0.33,0.22,0.11",
    samples: Annotated[int, typer.Option(min=1, max=MOST, help="Questions of each set.")] = 350,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Questions at once.")] = 32,
    scoring: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(SCORINGS)}; default: what suits the right answers."),
    ] = None,
    time: Annotated[
        bool,
        typer.Option(
            "--time", help="Also time every method's prefill, in turns: on an idle machine."
        ),
    ] = False,
    by_kind: Annotated[
        bool, typer.Option("--by-kind", help="Also accuracy per kind of question.")
    ] = False,
    seed: SeedOption = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Do not go on with an interrupted run of this command.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    other_weights: OtherWeightsOption = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures and answers here.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw answers kept against the layer average here (.svg or .png), and with "
            "--time against the speed-up too."
        ),
    ] = None,
    earlier: FromOption = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help='Fail unless this holds for every data set, such as "alvts@64.retention>=97" '
            "(repeatable); with >=, <=, ==, > or <."
        ),
    ] = None,
) -> None:
    """Compare methods of choosing visual tokens: accuracy, agreement and cost, on the same
    questions at equal layer averages.

    An interrupted run goes on where it stopped when the same command is given again. A failed gate
    exits with 1.
    """
    read = (*data, selectors, paper_selectors)
    check_plots(plot, earlier, read)
    if plot is not None and earlier:
        others = all_but(context, "--from", "--plot")
        refuse(context, others, "not with --from, which runs nothing")
        from ..plots.answers import plot_answers
        from ..plots.files import read_eval

        plot_answers([read_eval(path) for path in earlier], plot)
        return
    names = _methods(methods, paper_selectors is not None)
    _refuse_unused(context, names, data)
    from ..data import place

    if len(set(map(place, data))) < len(data):
        raise typer.BadParameter("a data set is there twice", param_hint="--data")
    budgets = _budgets(keep)
    gates = _gates(gate, names, list(budgets), time)
    told = read_columns(columns)
    if scoring is not None and scoring not in SCORINGS:
        raise typer.BadParameter(
            f"unknown scoring {scoring!r}; known: {', '.join(SCORINGS)}", param_hint="--scoring"
        )

    import json

    from ..bench.report import environment
    from ..data import Source
    from ..digests import of_processor
    from ..evaluate.data import read_data
    from ..evaluate.figures import summarise
    from ..evaluate.table import blind, check_gate, to_json, to_table
    from ..evaluate.table import by_kind as kind_table
    from ..families import family_of
    from ..files import check_writable, is_stdout, write_whole
    from ..models import load_model
    from ..spread import join
    from ..terminal import console, say

    if json_file is not None:
        check_writable(json_file, read=read)
    sources = [Source(one, image_folder, told) for one in data]
    sets = [read_data(source, samples, seed, scoring) for source in sources]
    group = join(device)
    loaded = load_model(model, device, dtype, trust_remote_code)
    files = {FITTED: selectors, (PAPER,): paper_selectors}
    plan, facts = _plan(loaded, files, names, budgets, batch, seed, other_weights)
    words = console(error=True)
    if facts.get("other_weights"):
        words.print("note: the selectors were fitted on other weights than this model's")
    # What goes to standard output is JSON alone where that is asked for.
    aside = json_file is not None and is_stdout(json_file)
    tables = console(aside)
    tables.quiet = not group.first
    words.quiet = words.quiet or tables.quiet
    asked = [_usable(words, loaded, questions) for questions in sets]
    text_model: Any = family_of(loaded.model).text_model(loaded.model)
    written, lines, passed = [], [], True
    for one, (questions, digests) in zip(data, asked, strict=True):
        own = {"processor": of_processor(loaded.processor), "place": place(one), "seen": digests}
        store = context.with_resource(_store({**facts, **own}, questions, group))
        if fresh:
            # Nobody looks for finished batches before.
            group.by_first(store.remove)
        results = _with_progress(words, plan, questions, store, group)
        if store.taken:
            words.print(f"{questions.name}: {store.taken} batches from before", highlight=False)
        summary = summarise(
            questions, results, list(plan.runs), seed, text_model.config, loaded.dtype.itemsize
        )
        if time and group.first:
            summary = _timed(words, plan, questions, summary)
        tables.print(to_table(summary))
        if by_kind:
            tables.print(kind_table(summary))
        written.append((to_json(summary, questions, results, by_kind), store))
        if warning := blind(summary):
            words.print(f"warning: {questions.name}: {warning}", highlight=False)
        for condition in gates:
            holds, line = check_gate(condition, summary)
            lines.append(f"{questions.name}: {line}")
            passed = passed and holds
    print_skipped(words, [line for one, _ in asked for line in one.skipped])
    surroundings = environment(loaded.model)
    tables.print(
        f"{loaded.name}, {surroundings['hardware']}, {facts['dtype']}, torch "
        f"{surroundings['torch']}, transformers {surroundings['transformers']}"
    )
    if not group.first:
        return
    whole = {
        "format": FORMAT,
        "settings": {"name": loaded.name, **facts},
        "environment": surroundings,
        "data": [one for one, _ in written],
    }
    if json_file is not None:
        write_whole(json_file, f"{json.dumps(whole, allow_nan=False)}\n".encode())
    for _, store in written:
        store.remove()
    for line in lines:
        say(line, error=aside)
    if plot is not None:
        from ..plots.answers import plot_answers

        plot_answers([whole], plot)
    if not passed:
        raise typer.Exit(1)


def _methods(text: str, paper: bool) -> list[str]:
    if text == "all":
        return [name for name in METHODS if name != PAPER or paper]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    try:
        for name in names:
            check_method(name)
    except AlvtsError as error:
        raise typer.BadParameter(str(error), param_hint="--methods") from None
    if PAPER in names and not paper:
        raise typer.BadParameter(
            f"{PAPER} needs a file made by `alvts calibrate --form paper`",
            param_hint="--paper-selectors",
        )
    return names


def _refuse_unused(context: typer.Context, names: list[str], data: list[str]) -> None:
    """Refuse options that none of these methods, or none of these data sets, has a use for."""
    from ..evaluate.data import OWN

    if names == ["dense"]:
        why = "--methods has dense alone, which keeps everything"
        refuse(context, ("--keep", "--time", "--plot"), why)
    fitted = not set(names).isdisjoint(FITTED)
    if not fitted:
        why = f"only with one of {', '.join(FITTED)} in --methods"
        refuse(context, ("--selectors",), why)
    if PAPER not in names:
        refuse(context, ("--paper-selectors",), f"only with {PAPER} in --methods")
        if not fitted:
            refuse(context, ("--other-weights",), "no method of --methods uses selectors")
    if set(data) <= OWN.keys():
        refuse(context, OF_RECORDS, NOT_READ)


def _budgets(text: str) -> dict[str, int | float]:
    """The budgets by how they are written: an int of tokens or a float of a ratio."""
    budgets: dict[str, int | float] = {}
    for part in text.split(","):
        try:
            name, value = read_budget(part)
        except AlvtsError as error:
            raise typer.BadParameter(str(error), param_hint="--keep") from None
        if name in budgets:
            raise typer.BadParameter(f"{part.strip()} is there twice", param_hint="--keep")
        budgets[name] = value
    return budgets


def _gates(
    texts: list[str] | None, methods: list[str], budgets: list[str], timed: bool
) -> list[Gate]:
    try:
        return [parse_gate(text, methods, budgets, timed) for text in texts or []]
    except AlvtsError as error:
        raise typer.BadParameter(str(error), param_hint="--gate") from None


def _plan(
    loaded: "Loaded",
    files: dict[tuple[str, ...], str | None],
    names: list[str],
    budgets: dict[str, int | float],
    batch: int,
    seed: int,
    other_weights: bool,
) -> tuple["Plan", dict[str, Any]]:
    """What to run, and what decides its result beside the data, as plain values."""
    import hashlib

    import torch
    import transformers

    from ..artifact import fingerprint, load_artifact
    from ..evaluate.run import Plan, Run
    from ..methods import make_method
    from ..models import find_selectors

    read: dict[str, Any] = {}
    used: list[Path] = []
    others = False
    for users, named in files.items():
        if not set(users) & set(names):
            continue
        used.append(find_selectors(loaded, named) if named else _find_selectors(loaded))
        artifact = load_artifact(used[-1])
        artifact = artifact.check_model(loaded.model, loaded.name, other_weights)
        others = others or artifact.other_weights
        read |= dict.fromkeys(users, artifact)
    made = {
        name: make_method(name, read.get(name), seed) for name in dict.fromkeys(["dense", *names])
    }
    # Budget by budget, as the table is read.
    runs: dict[Run, Any] = {
        Run(name, written): (made[name], value)
        for written, value in budgets.items()
        for name in names
        if name != "dense"
    }
    facts = {
        "model": loaded.model_id,
        "weights": hashlib.sha256(fingerprint(loaded.model).numpy().tobytes()).hexdigest(),
        "selectors": [str(file) for file in used],
        "selectors_sha256": [hashlib.sha256(file.read_bytes()).hexdigest() for file in used],
        **({"other_weights": True} if others else {}),
        "methods": names,
        "keep": list(budgets),
        "batch": batch,
        "seed": seed,
        "device": loaded.device.type,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": loaded.model.config._attn_implementation,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return Plan(loaded, made["dense"], runs, batch), facts


def _find_selectors(loaded: "Loaded") -> Path:
    from ..models import find_selectors

    try:
        return find_selectors(loaded)
    except AlvtsError:
        raise AlvtsError(
            f"no selectors for {loaded.name}; fit some with: alvts calibrate --model "
            f"{loaded.name}, or leave {', '.join(FITTED)} out of --methods"
        ) from None


def _usable(
    words: Any, loaded: "Loaded", questions: "DataSet"
) -> tuple["DataSet", tuple[str, ...]]:
    """The questions that the model takes, and a digest of each, under a bar."""
    from ..evaluate.preparing import usable
    from ..terminal import bars

    with bars(words) as progress:
        task = progress.add_task(f"questions of {questions.name}", total=len(questions.items))
        return usable(loaded, questions, lambda: progress.advance(task))


def _store(facts: dict[str, Any], questions: "DataSet", group: "Group") -> "Store":
    from ..evaluate.store import Store

    asked = [(i.id, i.earlier, i.question, i.answers) for i in questions.items]
    return Store({**facts, "data": questions.name, "asked": asked}, group)


def _with_progress(
    words: Any, plan: "Plan", questions: "DataSet", store: Any, group: "Group"
) -> Any:
    """Run a data set under a bar with the time left; the first process's steps stand for all."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    from ..evaluate.run import evaluate as work
    from ..terminal import bars

    batches = -(-len(questions.items) // plan.batch)
    name = TextColumn("{task.description}", markup=False)
    columns = (name, BarColumn(), MofNCompleteColumn(), Remaining())
    try:
        with bars(words, *columns) as progress:
            task = progress.add_task(questions.name, total=batches * (len(plan.runs) + 2))
            advance = partial(progress.advance, task)
            return work(plan, questions, store, lambda n: advance(n * group.size), group)
    except KeyboardInterrupt:
        if store.kept:
            words.print("finished batches are kept; give the same command again to go on")
        raise


def _timed(words: Any, plan: "Plan", questions: "DataSet", summary: "Summary") -> "Summary":
    """The summary with every method's prefill timed."""
    from ..evaluate.times import steps, time_prefills, with_times
    from ..terminal import bars

    with bars(words) as progress:
        task = progress.add_task("prefills in turns", total=steps(plan))
        return with_times(summary, time_prefills(plan, questions, lambda: progress.advance(task)))
