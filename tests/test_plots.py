"""Plots: that what is drawn is what was found, and what is refused."""

import json
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from cli_tools import alvts, model_folder, refused
from PIL import Image
from tiny import make_selectors

from alvts_cli.artifact import load_artifact
from alvts_cli.engine import Picked, Policy
from alvts_cli.plots import answers as answers_module
from alvts_cli.plots import budget as budget_module
from alvts_cli.plots import chart
from alvts_cli.plots import speed as speed_module
from alvts_cli.plots.answers import plot_answers
from alvts_cli.plots.budget import plot_budget
from alvts_cli.plots.chart import COLOURS, spread
from alvts_cli.plots.speed import plot_speed
from alvts_cli.terminal import safe


def row(method, keep, tokens, kept):
    """Of a file of `alvts eval`."""
    ends = dict(retention=kept, retention_low=kept - 4, retention_high=kept + 3)
    return dict(method=method, keep=keep, tokens=tokens, **ends)


def evaluated(*rows, name="scenes", tokens=200):
    head = dict(samples=70, dense=80.0, blind=20.0, chance=10.0)
    data = dict(name=name, visual_tokens=tokens, head=head, rows=list(rows))
    return dict(settings=dict(name="tiny", model="/x/y"), data=[data])


EVAL = evaluated(
    row("alvts", "0.5", 100, 99),
    row("alvts", "0.1", 20, 90),
    row("fastv", "0.1", 22, 60),
    row("fastv", "0.5", 100, 80),
)


def benched(kept, alvts, **peers):
    """Of a file of `alvts bench` at `kept` of 400 tokens."""
    settings = dict(model="tiny", cut=False, visual_tokens=400, text_tokens=9)
    metrics = dict(
        visual_tokens=400,
        visual_tokens_kept=kept,
        prefill_speedup=alvts,
        prefill_speedup_limit=alvts + 1,
    )
    ends = dict(
        prefill_speedup=[alvts - 0.2, alvts + 0.1], prefill_speedup_limit=[alvts, alvts + 2]
    )
    against = {
        name: dict(visual_tokens_kept=kept + 4, prefill_speedup=value, interval=[value, value])
        for name, value in peers.items()
    }
    return dict(
        settings=settings,
        environment=dict(hardware="a machine"),
        metrics=metrics,
        intervals=ends,
        against=against,
    )


BENCHES = [benched(40, 4.0, fastv=5.0, vtw=6.0), benched(200, 1.5, fastv=1.8, vtw=1.9)]


@pytest.fixture
def drawn(monkeypatch):
    """Per axes what was drawn, `{name: (xs, ys, intervals)}`, the names at the ends, and itself."""
    found = []

    def note(axes, names):
        lines = {}
        for container, name in zip(axes.containers, names, strict=False):
            line, _, bars = container.lines
            ends = [np.array(bar.get_segments()) for bar in bars]
            lines[name.text] = (line.get_xdata().tolist(), line.get_ydata().tolist(), ends)
        found.append((lines, [name.text for name in names], axes))
        chart.write_names(axes, names)

    for module in (answers_module, speed_module, budget_module):
        monkeypatch.setattr(module, "write_names", note)
    return found


def test_answers_against_the_layer_average(drawn, tmp_path):
    plot_answers([EVAL, evaluated(row("alvts", "5", 5, 50), name="other")], tmp_path / "x.png")
    (lines, names, axes), (second, _, _) = drawn
    # From many tokens to few, in percent, whatever the order of the rows.
    assert lines["alvts"][:2] == ([50, 10], [99, 90])
    assert lines["fastv"][:2] == ([50, 11], [80, 60])
    (ends,) = lines["alvts"][2]
    assert ends[:, :, 1].tolist() == [[95, 102], [86, 93]]
    assert second["alvts"][:2] == ([2.5], [50])
    assert names == ["alvts", "fastv", "dense", "grey picture"]
    # The axis turns round, and holds the interval's end above 100.
    left, right = axes.get_xlim()
    assert left > 50 and right < 10 and axes.get_ylim()[1] > 102
    heights = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
    assert 100 in heights and 25 in heights
    picture = Image.open(tmp_path / "x.png")
    assert picture.width > 1.6 * picture.height


def test_what_eval_timed_has_a_panel_of_its_own(drawn, tmp_path):
    rows = [row("alvts", "0.5", 100, 99), row("fastv", "0.5", 90, 80), row("alvts", "5", 5, 50)]
    for one, speed in zip(rows, (1.5, None, 4.0), strict=True):
        ends = (None, None) if speed is None else (speed - 0.25, speed + 0.5)
        names = ("prefill_speedup", "prefill_speedup_low", "prefill_speedup_high")
        one.update(zip(names, (speed, *ends), strict=True))
    plot_answers([evaluated(*rows)], tmp_path / "x.png")
    (by_tokens, _, _), (by_speed, names, _) = drawn
    assert by_tokens["alvts"][:2] == ([50, 2.5], [99, 50])
    assert by_speed["alvts"][:2] == ([1.5, 4.0], [99, 50])
    across, up = by_speed["alvts"][2]
    assert across[:, :, 0].tolist() == [[1.25, 2.0], [3.75, 4.5]]
    assert up[:, :, 1].tolist() == [[95, 102], [46, 53]]
    assert names == ["alvts", "dense", "grey picture"]


def test_a_method_has_one_colour_in_all_panels(drawn, tmp_path):
    """Though one before it was not timed, and is missing in the second."""
    timed = dict(prefill_speedup=2.0, prefill_speedup_low=1.0, prefill_speedup_high=3.0)
    rows = [row("dart", "0.5", 90, 80), {**row("alvts", "0.5", 100, 99), **timed}]
    plot_answers([evaluated(*rows)], tmp_path / "x.png")
    (by_tokens, _, first), (by_speed, _, second) = drawn
    assert [*by_tokens] == ["dart", "alvts"] and [*by_speed] == ["alvts"]
    colours = [axes.containers[i].lines[0].get_color() for axes, i in ((first, 1), (second, 0))]
    assert colours[0] == colours[1] != first.containers[0].lines[0].get_color()


def test_speed_against_the_layer_average(drawn, tmp_path):
    plot_speed(BENCHES, [], tmp_path / "x.svg")
    ((lines, names, _),) = drawn
    assert lines["alvts"][:2] == ([50, 10], [1.5, 4.0])
    assert lines["fastv"][:2] == ([51, 11], [1.8, 5.0])
    assert lines["selection for free"][:2] == ([50, 10], [2.5, 5.0])
    assert sorted(names) == ["alvts", "fastv", "selection for free", "vtw"]


def test_answers_against_speed(drawn, tmp_path):
    plot_speed(BENCHES, [EVAL], tmp_path / "x.svg")
    ((lines, names, _),) = drawn
    assert lines["alvts"][:2] == ([1.5, 4.0], [99, 90])
    assert lines["fastv"][:2] == ([1.8, 5.0], [80, 60])
    across, up = lines["alvts"][2]
    np.testing.assert_allclose(across[:, :, 0], [[1.3, 1.6], [3.8, 4.1]])
    assert up[:, :, 1].tolist() == [[95, 102], [86, 93]]
    # vtw was timed, and has no score.
    assert names == ["alvts", "fastv"]
    text = (tmp_path / "x.svg").read_text()
    assert text.startswith("<?xml") and COLOURS[0].lower() in text


def test_a_score_of_another_layer_average_is_not_taken(tmp_path):
    with pytest.raises(chart.AlvtsError, match=r"layer average that was timed \(25 %\)"):
        plot_speed([benched(100, 2.0)], [EVAL], tmp_path / "x.svg")
    assert list(tmp_path.iterdir()) == []


def test_the_same_figures_give_the_same_file(tmp_path):
    for name in ("a.svg", "b.svg"):
        plot_answers([EVAL], tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_where_the_budget_goes(drawn, tmp_path):
    artifact = make_selectors(schedules=((0.1, 0.4, 0.2, 0.1), (1.0, 0.5, 0.3, 0.2)))
    artifact.visual_tokens = 1000
    artifact.picked = [Picked(0.2, Policy(every=2)), Picked(0.5, Policy(every=0))]
    plot_budget(artifact, "x", tmp_path / "x.svg")
    ((lines, names, axes),) = drawn
    assert names == ["0.5: chosen once", "0.2: chosen in every 2 layers"]
    np.testing.assert_allclose(lines[names[0]][1], [100, 50, 30, 20])
    np.testing.assert_allclose(lines[names[1]][1], [10, 40, 20, 10])
    marks = [container.lines[0].get_markevery() for container in axes.containers]
    # Layer 0 keeps everything at 0.5: the first choice is made behind it.
    assert marks == [[1], [0, 2]]


def test_the_marks_are_where_the_engine_ranks():
    import torch
    from tiny import make_inputs, make_model, one_image

    from alvts_cli.engine import attach

    model = make_model("llava")
    for every in (0, 1, 2, 3):
        for keep in ([1.0, 0.25, 0.5, 0.25], [0.25, 0.0, 0.5, 1.0], [0.5] * 4):
            told = []
            selectors = make_selectors(policy=Policy(every=every))
            with torch.no_grad(), attach(model, selectors, keep) as attachment:
                attachment.watch = told.append
                model(**make_inputs(model, one_image("llava")))
                counts = [count for (count,) in attachment.last.kept]
            ranked = [
                one.layer
                for one in told
                if one.ranked_in == one.layer and one.importance is not None
            ]
            assert budget_module._anew(counts, 16, every) == ranked


@pytest.mark.parametrize("seed", range(20))
def test_names_keep_their_distance_and_their_order(seed):
    random = np.random.default_rng(seed)
    wanted = sorted(random.random(random.integers(1, 12)))
    placed = spread(wanted, 0.06)
    assert all(b - a >= 0.06 - 1e-9 for a, b in pairwise(placed))
    # None is moved without a reason.
    if all(b - a >= 0.06 for a, b in pairwise(wanted)):
        np.testing.assert_allclose(placed, wanted)
    assert np.mean(placed) == pytest.approx(np.mean(wanted))


@pytest.mark.parametrize("command", [["eval"], ["bench"], ["info", "x"]])
def test_a_plot_that_cannot_be_is_refused_before_anything_runs(command, tmp_path, monkeypatch):
    assert "must end in .svg or .png" in refused(*command, "--plot", tmp_path / "x.pdf")
    assert "cannot write" in refused(*command, "--plot", tmp_path / "no" / "x.svg")
    monkeypatch.setattr(chart, "find_spec", lambda name: None)
    line = refused(*command, "--plot", tmp_path / "x.svg")
    assert line == 'error: plots need matplotlib; install it with: pip install "alvts[plot]"'


def test_files_that_are_not_what_a_plot_is_made_of_are_refused(tmp_path):
    plot, other = tmp_path / "x.svg", tmp_path / "x.json"
    for command in ("eval", "bench"):
        assert "--from" in refused(command, "--from", other, code=2)
        assert "no file" in refused(command, "--plot", plot, "--from", other)
        for text, why in (("{", "is not JSON"), ("[1]", "is not what"), ("{}", "is not what")):
            other.write_text(text)
            line = refused(command, "--plot", plot, "--from", other)
            assert why in line and f"alvts {command} --json" in line
        other.unlink()
    assert "--answers" in refused("bench", "--answers", other, code=2)
    other.write_text(json.dumps(EVAL))
    line = refused("bench", "--plot", plot, "--from", other, "--answers", other)
    assert "is not what alvts bench --json writes" in line
    assert not plot.exists()


def _with(whole, place, value):
    """A copy of `whole`, with something else at a place; nothing for None, null for `...`."""
    changed = json.loads(json.dumps(whole))
    *path, last = place
    part = changed
    for name in path:
        part = part[name]
    if value is None:
        del part[last]
    else:
        part[last] = None if value is ... else value
    return changed


@pytest.mark.parametrize(
    ("command", "place", "value"),
    [
        ("eval", ("data",), []),
        ("eval", ("data", 0, "name"), None),
        ("eval", ("data", 0, "rows"), []),
        ("eval", ("data", 0, "visual_tokens"), 10**400),
        ("eval", ("data", 0, "head", "dense"), "x"),
        ("eval", ("data", 0, "head", "blind"), None),
        ("eval", ("data", 0, "rows", 0, "tokens"), "x"),
        ("eval", ("data", 0, "rows", 0, "tokens"), 0),
        ("eval", ("data", 0, "rows", 0, "method"), ["a"]),
        ("eval", ("data", 0, "rows", 0, "retention"), "x"),
        ("eval", ("data", 0, "rows", 0, "retention"), 1e308),
        ("eval", ("data", 0, "rows", 0, "retention_low"), None),
        ("eval", ("data", 0, "rows", 0, "prefill_speedup"), [1, 2]),
        ("eval", ("data", 0, "rows", 0, "prefill_speedup"), 2.0),
        ("eval", ("settings",), 4),
        ("eval", ("settings",), ...),
        ("bench", ("settings",), 4),
        ("bench", ("settings", "model"), None),
        ("bench", ("settings", "cut"), None),
        ("bench", ("environment",), None),
        ("bench", ("metrics", "visual_tokens"), 0),
        ("bench", ("metrics", "prefill_speedup"), "x"),
        ("bench", ("intervals", "prefill_speedup"), ["a", "b"]),
        ("bench", ("against",), {"x": {"interval": [1, 2]}}),
    ],
    ids=str,
)
def test_damaged_figures_are_named(command, place, value, tmp_path):
    plot, file = tmp_path / "x.svg", tmp_path / "x.json"
    whole = EVAL if command == "eval" else BENCHES[0]
    file.write_text(json.dumps(whole))
    assert alvts(command, "--plot", plot, "--from", file).exit_code == 0
    plot.unlink()
    file.write_text(json.dumps(_with(whole, place, value)))
    assert "is not" in refused(command, "--plot", plot, "--from", file)
    if command == "eval":
        refused("bench", "--plot", plot, "--from", file, "--answers", file)
    assert not plot.exists()


READ = [
    ("eval", "--plot", "x.svg", "--from"),
    ("bench", "--plot", "x.svg", "--from"),
    ("bench", "--plot", "x.svg", "--answers"),
    ("bench", "--baseline"),
    ("bench", "--table"),
]


@pytest.mark.parametrize("line", READ, ids=" ".join)
def test_figures_of_a_newer_format(line, tmp_path, monkeypatch):
    """Their names may mean something else; what else they hold does not matter."""
    monkeypatch.chdir(tmp_path)
    whole = EVAL if line[0] == "eval" or "--answers" in line else BENCHES[0]
    (tmp_path / "x.json").write_text(json.dumps({**whole, "format": 99}))
    line = refused(*line, "x.json")
    assert "x.json has format 99, this alvts reads up to 1; upgrade alvts" in line


@pytest.mark.parametrize("line", READ, ids=" ".join)
def test_figures_that_nest_too_deep(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.json").write_text("[" * 100_000)
    assert "x.json" in refused(*line, "x.json")


def test_a_name_with_a_dollar_is_no_formula(tmp_path):
    file, plot = tmp_path / "x.json", tmp_path / "x.svg"
    whole = _with(EVAL, ("data", 0, "name"), "c$_{$.jsonl")
    file.write_text(json.dumps(_with(whole, ("settings", "name"), "$x_{$")))
    assert alvts("eval", "--plot", plot, "--from", file).exit_code == 0
    assert plot.stat().st_size > 0


@pytest.mark.parametrize("odd", ["\x00", "\x1b[2J", "\x0c", "\uffff", "\u202e"])
def test_a_name_that_xml_does_not_take_is_escaped(odd, tmp_path):
    file, plot = tmp_path / "x.json", tmp_path / "x.svg"
    whole = _with(EVAL, ("data", 0, "name"), f"set{odd}")
    whole = _with(whole, ("data", 0, "rows", 2, "method"), f"way{odd}")
    file.write_text(json.dumps(_with(whole, ("settings", "name"), f"model{odd}")))
    assert alvts("eval", "--plot", plot, "--from", file).exit_code == 0
    text = plot.read_text()
    ElementTree.fromstring(text)
    shown = safe(odd)
    assert shown != odd and odd not in text
    assert all(f"{name}{shown}" in text for name in ("set", "way", "model"))


def test_eval_draws_what_it_ran_and_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first, again, file = (tmp_path / name for name in ("a.svg", "b.svg", "e.json"))
    more = ("--methods", "alvts,random", "--samples", 7, "--json", file, "--plot", first)
    result = alvts("eval", "--keep", "0.11", *more)
    assert result.exit_code == 0, result.output
    assert alvts("eval", "--from", file, "--plot", again).exit_code == 0
    assert first.read_bytes() == again.read_bytes()


def test_nothing_kept_of_nothing_is_no_plot(tmp_path):
    blank = evaluated(dict(row("alvts", "0.5", 100, 0), retention=None))
    blank["data"][0]["head"]["dense"] = 0.0
    file = tmp_path / "x.json"
    file.write_text(json.dumps(blank))
    line = refused("eval", "--from", file, "--plot", tmp_path / "x.svg")
    assert "the dense model answers no question of scenes right" in line


def test_bench_draws_what_it_ran_and_what_was_written(tmp_path):
    first, again, file = (tmp_path / name for name in ("c.svg", "d.svg", "b.json"))
    more = ("--keep", "0.25", "--runs", 1, "--json", file, "--plot", first)
    result = alvts("bench", "--model", model_folder(), *more)
    assert result.exit_code == 0, result.output
    assert alvts("bench", "--from", file, "--plot", again).exit_code == 0
    assert first.read_bytes() == again.read_bytes()


def test_info_draws_the_file(tmp_path):
    file = model_folder() / "selectors.safetensors"
    result = alvts("info", file, "--plot", tmp_path / "x.png")
    assert result.exit_code == 0, result.output
    assert Image.open(tmp_path / "x.png").width > 1000
    assert load_artifact(file).default_keep == 0.25
