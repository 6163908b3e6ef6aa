"""`alvts bench`: dense against selective, side by side in one run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench.metrics import METRICS, parse_gate, parse_share
from ..errors import AlvtsError
from ..gates import Gate
from ..methods import METHODS, check_method
from .help import table
from .options import (
    MOST,
    DeviceOption,
    DTypeOption,
    FromOption,
    KeepOption,
    ModelOption,
    OtherWeightsOption,
    PolicyOption,
    SelectorsOption,
    TrustOption,
    all_but,
    check_keep,
    check_plots,
    refuse,
)

if TYPE_CHECKING:
    from rich.console import Console

TEXT_TOKENS = 64

EPILOG = (
    'Example: `alvts bench --keep 64 --gate "prefill_speedup>=2"`; without weights '
    "`alvts bench --model llava-1.5-7b --random-weights --layers 4`\n\n"
    + table("metric", "what it is", {name: metric.about for name, metric in METRICS.items()})
)

_NO_PEERS = {
    "dense": "dense runs anyway",
    "alvts": "alvts runs anyway",
    "downsample": "downsample changes the picture, and the prompt with it",
}
"""Methods that --against does not take, and why."""

_OF_SUITE = (
    *("--suite", "--keep", "--visual-tokens", "--text-tokens", "--runs", "--layers"),
    *("--hidden-size", "--random-weights", "--device", "--dtype", "--json"),
)
"""Options of a suite; it decides the others itself, and its weights are random in any case."""


def bench(
    context: typer.Context,
    model: ModelOption = "pocket",
    selectors: SelectorsOption = None,
    keep: KeepOption = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Equal prompts at once.")] = 1,
    image: Annotated[
        list[Path] | None, typer.Option(help="Bench on this image (repeatable), with --prompt.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Bench on these words.")] = None,
    visual_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Without --image; default: one large image's."),
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=2, max=MOST, help=f"Without --image: default {TEXT_TOKENS}.")
    ] = None,
    policy: PolicyOption = None,
    runs: Annotated[int, typer.Option(min=1, max=MOST, help="Timed rounds, all in turn.")] = 10,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="A known model's true shape, without a download."),
    ] = False,
    layers: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="With --random-weights: only so many decoder layers."),
    ] = None,
    hidden_size: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="With --random-weights: a narrower decoder."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="Time the prefill of these methods too, at the same layer average: "
            + ",".join(name for name in METHODS if name not in _NO_PEERS)
            + "."
        ),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the selective prefill's time goes.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run all decoders through torch.compile.")
    ] = False,
    decode: Annotated[
        bool,
        typer.Option("--decode", help="Tokens per second of decoding too, at batch 1 to 32."),
    ] = False,
    against_plan: Annotated[
        bool,
        typer.Option(
            "--against-plan", help="Also measure the machine, and say what `plan` predicts for it."
        ),
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            help="gpu: a whole table on random weights in under 10 minutes (three models, batch 1 "
            "and 8, eager and compiled, decoding); --layers cuts vision towers too."
        ),
    ] = None,
    table: Annotated[
        Path | None, typer.Option(help="Print the README's table from a --json file of a --suite.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DTypeOption = None,
    trust_remote_code: TrustOption = False,
    other_weights: OtherWeightsOption = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write everything measured here.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw prefill speed-ups against the layer average here: .svg or .png."),
    ] = None,
    answers: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --plot: draw the answers kept, of a file of `alvts eval --json` "
            "(repeatable), against the speed-up."
        ),
    ] = None,
    earlier: FromOption = None,
    gate: Annotated[
        list[str] | None,
        typer.Option(
            help='Fail unless this holds, such as "prefill_speedup>=2" (repeatable); with '
            ">=, <=, ==, > or <."
        ),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="Fail if worse than this --json file of an earlier run.")
    ] = None,
    max_regression: Annotated[
        str | None,
        typer.Option(help="How much worse ratios and counts may be; default 10%."),
    ] = None,
) -> None:
    """Time dense and selective generation in turn, and count tokens, FLOPs and cache.

    The limit is the dense prefill of the text and the layer average alone.

    Without --image the prompt is made up, of the family's usual size. A failed gate and a
    regression exit with 1.
    """
    if table is not None:
        refuse(context, all_but(context, "--table"), "not with --table, which runs nothing")
        from ..bench.markdown import read_table

        print(read_table(table), end="")
        return
    read = (*(image or ()), *(answers or ()), selectors, baseline)
    check_plots(plot, earlier, read)
    if plot is None:
        refuse(context, ("--answers",), "only with --plot")
    else:
        from ..plots.files import read_bench, read_eval
        from ..plots.speed import plot_speed

        scores = [read_eval(path) for path in answers or []]
        if earlier:
            others = all_but(context, "--from", "--plot", "--answers")
            refuse(context, others, "not with --from, which runs nothing")
            plot_speed([read_bench(path) for path in earlier], scores, plot)
            return
    gates, tolerance = _conditions(gate, baseline, max_regression)
    if not against_plan and any(one.metric == "plan_error" for one in gates):
        raise typer.BadParameter("plan_error needs --against-plan", param_hint="--gate")
    check_keep(keep)
    peers = _peers(against)
    _check_together(image, prompt, visual_tokens, text_tokens, random_weights)
    if compile:
        shown = ("--profile", "--against", "--decode", "--against-plan")
        refuse(context, shown, "not with --compile")
    if suite is not None:
        if suite != "gpu":
            raise typer.BadParameter(f"unknown suite {suite!r}; known: gpu", param_hint="--suite")
        refuse(context, all_but(context, *_OF_SUITE), "not with --suite")
    elif not random_weights:
        refuse(context, ("--layers", "--hidden-size"), "only with --random-weights")
    else:
        refuse(context, ("--trust-remote-code",), "not with --random-weights")
        if selectors is None:
            why = "with --random-weights only beside --selectors"
            refuse(context, ("--other-weights",), why)

    import json

    from ..bench import decode as decoding
    from ..bench import planned
    from ..bench.baseline import check_comparable, read_baseline, regressions
    from ..bench.markdown import to_markdown
    from ..bench.measure import entrants, measure
    from ..bench.report import environment, to_json, to_table
    from ..bench.subject import Wanted, loaded_subject, random_subject
    from ..bench.suite import Size, entries, run_suite
    from ..engine import parse_policy
    from ..files import check_writable, is_same, is_stdout, write_whole
    from ..terminal import console, say

    if policy is not None:
        parse_policy(policy)
    if baseline is not None and json_file is not None and is_same(json_file, baseline):
        raise typer.BadParameter(
            "it is the --baseline, which a regressed run would replace by itself; write the new "
            "report beside it, and move it there when it is wanted",
            param_hint="--json",
        )
    before = None if baseline is None else read_baseline(baseline)
    if json_file is not None:
        check_writable(json_file, read=read)
    words = console(error=True)
    # What goes to standard output is JSON alone where that is asked for.
    aside = json_file is not None and is_stdout(json_file)
    wanted = Wanted(
        name=model,
        selectors=selectors,
        keep=keep,
        policy=policy,
        batch=batch,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens or TEXT_TOKENS,
        device=device,
        dtype=dtype,
        compile=compile,
        trust_remote_code=trust_remote_code,
        other_weights=other_weights,
    )
    if suite is not None:
        size = Size(runs, layers, hidden_size)
        with _progress(words, len(entries())) as advance:
            report = run_suite(wanted, size, words.print, on_entry=advance)
        say(to_markdown(report), end="", error=aside)
        if json_file is not None:
            write_whole(json_file, f"{json.dumps(report, indent=1)}\n".encode())
        return
    if random_weights:
        subject = random_subject(wanted, layers, hidden_size, say=words.print)
    else:
        subject = loaded_subject(wanted, image or [], prompt or "")
    if subject.settings.get("other_weights"):
        words.print("note: the selectors were fitted on other weights than this model's")
    if before is not None:
        check_comparable(before, subject.settings)

    prediction = planned.predicted(subject) if against_plan else None
    steps = entrants(peers) * (runs + 1)
    with _progress(words, steps + len(decoding.BATCHES) * decode) as advance:
        result = measure(subject, runs, peers, on_run=advance)
        decoded = decoding.decode(subject, on_batch=advance) if decode else []
    if prediction is not None:
        result.figures["plan_error"] = planned.error(prediction[0], result.figures)
    surroundings = environment(subject.model)
    out = console(aside)
    out.print(to_table(result, subject.settings, surroundings, profile))
    written = to_json(result, subject.settings, surroundings)
    if prediction is not None:
        out.print(planned.to_table(*prediction, result.figures))
        written["plan"] = planned.to_json(*prediction)
    if decode:
        out.print(decoding.to_table(decoded))
        written["decode"] = decoding.to_json(decoded)
    if json_file is not None:
        write_whole(json_file, f"{json.dumps(written, indent=1)}\n".encode())

    checked = [condition.check(result.figures) for condition in gates]
    lines = [line for _, line in checked]
    worse = [] if before is None else regressions(before, result.figures, tolerance)
    if before is not None:
        lines += worse or [f"no regression against {baseline}"]
    for line in lines:
        say(line, error=aside)
    if plot is not None:
        plot_speed([written], scores, plot)
    if worse or not all(passed for passed, _ in checked):
        raise typer.Exit(1)


@contextmanager
def _progress(console: "Console", steps: int) -> Iterator[Callable[[], None]]:
    """A bar; gives what advances it by a step."""
    from ..terminal import bars

    with bars(console) as progress:
        task = progress.add_task("measuring", total=steps)
        yield lambda: progress.advance(task)


def _conditions(
    gates: list[str] | None, baseline: Path | None, max_regression: str | None
) -> tuple[list[Gate], float]:
    """The gates, and the share by which a figure may be worse than the baseline's."""
    if max_regression is not None and baseline is None:
        raise typer.BadParameter("it needs --baseline", param_hint="--max-regression")
    parsed = []
    for text in gates or []:
        try:
            parsed.append(parse_gate(text))
        except AlvtsError as error:
            raise typer.BadParameter(str(error), param_hint="--gate") from None
    try:
        return parsed, parse_share(max_regression or "10%")
    except AlvtsError as error:
        raise typer.BadParameter(str(error), param_hint="--max-regression") from None


def _peers(against: str | None) -> list[str]:
    """The methods of --against."""
    names = [] if against is None else [name.strip() for name in against.split(",")]
    try:
        for name in names:
            check_method(name)
    except AlvtsError as error:
        raise typer.BadParameter(str(error), param_hint="--against") from None
    for name in names:
        if name in _NO_PEERS:
            raise typer.BadParameter(_NO_PEERS[name], param_hint="--against")
    if len(set(names)) < len(names):
        raise typer.BadParameter("every method once", param_hint="--against")
    return names


def _check_together(
    image: list[Path] | None,
    prompt: str | None,
    visual_tokens: int | None,
    text_tokens: int | None,
    random_weights: bool,
) -> None:
    """Refuse options that contradict each other."""
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("it is empty", param_hint="--prompt")
    if bool(image) != (prompt is not None):
        raise typer.BadParameter("give both or neither", param_hint="--image and --prompt")
    if image and (visual_tokens or text_tokens):
        raise typer.BadParameter(
            "the image and the prompt decide that",
            param_hint="--visual-tokens" if visual_tokens else "--text-tokens",
        )
    if image and random_weights:
        raise typer.BadParameter(
            "random weights come without a processor; use --visual-tokens", param_hint="--image"
        )
