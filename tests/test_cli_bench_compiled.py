"""`alvts bench --compile`: everything compiled once, for its own sizes, and the same counts."""

import json

import pytest
import torch
from cli_tools import alvts, model_folder, refused
from torch._dynamo.testing import CompileCounterWithBackend

from alvts_cli.bench.compiled import compiled
from alvts_cli.bench.inputs import synthetic_inputs
from alvts_cli.bench.selectors import random_selectors
from alvts_cli.bench.timing import generate
from alvts_cli.engine import attach
from alvts_cli.families import family_of
from alvts_cli.models import load_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def counter(monkeypatch):
    """Counts graphs and their runs in the place of inductor."""
    compile, counter = torch.compile, CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, backend=counter))
    return counter


@pytest.fixture
def untraced(monkeypatch):
    """For what is around compiling: nothing is."""
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)


def bench(*more):
    # Tracing takes its time by the layer.
    return ("bench", "--model", model_folder(depth=2), "--keep", 0.25, "--runs", 2, *more)


def test_every_graph_once_and_the_same_counts(counter, tmp_path):
    reports = []
    for i, more in enumerate(((), ("--compile",))):
        result = alvts(*bench("--json", tmp_path / f"{i}.json", *more))
        assert result.exit_code == 0, result.output
        reports.append(json.loads((tmp_path / f"{i}.json").read_text()))
        # Prefill of dense, selective and short, and the two of decoding of the first and second,
        # however many the rounds.
        assert counter.frame_count == 7 * i
    plain, report = reports
    assert [one["settings"]["compiled"] for one in reports] == [False, True]
    assert not report["settings"]["frozen_weights"]
    for name in ("flops", "flops_dense", "kv_bytes", "kv_bytes_dense", "visual_tokens_kept"):
        assert report["metrics"][name] == plain["metrics"][name]
    assert report["metrics"]["prefill_ms"] > 0
    # While phases are timed nothing runs compiled: so there are none.
    assert report["metrics"]["scoring_ms"] is None and plain["metrics"]["scoring_ms"] > 0
    assert "score_ms" not in report["times"]["selective"]
    assert "compiled" in result.stdout and "of it scoring" not in result.stdout


def test_what_is_compiled_is_no_baseline_of_what_is_not(untraced, tmp_path):
    path = tmp_path / "a.json"
    assert alvts(*bench("--compile", "--json", path)).exit_code == 0
    assert "compiled=True" in refused(*bench("--baseline", path))


def test_frozen_weights_are_told(untraced, tmp_path):
    path = tmp_path / "a.json"
    with torch._inductor.config.patch(freezing=True):
        result = alvts(*bench("--compile", "--json", path))
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["settings"]["frozen_weights"]
    assert "weights frozen" in " ".join(result.stdout.split())


def test_the_twin_has_the_weights_but_nothing_of_the_hooks(counter):
    model = load_model(str(model_folder(depth=2))).model
    inputs = synthetic_inputs(model, batch=1, visual_tokens=None, text_tokens=8)
    expected = generate(model, inputs, 3, ignore_end=True).tokens
    with compiled(model) as twin:
        own, copied = dict(model.named_parameters()), dict(twin.named_parameters())
        assert own.keys() == copied.keys()
        assert all(own[name] is copied[name] for name in own)
        with attach(model, random_selectors(model), 0.1):
            made = generate(twin, inputs, 3, ignore_end=True)
        assert torch.equal(made.tokens, expected)
        assert made.phase_ms == {} and made.prefill_ms > 0
        assert counter.frame_count == 3
        decoder = family_of(twin).text_model(twin)
        assert "forward" in vars(decoder)
    assert "forward" not in vars(decoder)


def test_a_compiler_that_fails_is_one_line():
    # Not monkeypatch, which would take the setting away for good.
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/c++")}):
        line = refused(*bench("--compile"))
    assert line.startswith("error: torch.compile failed: ")
    assert "/nowhere/c++" in line and "--compile" in line


@pytest.mark.parametrize("more", [("--profile",), ("--against", "fastv")])
def test_what_cannot_run_compiled_is_refused_before_anything_is_loaded(more):
    line = refused("bench", "--model", "/nowhere", "--compile", *more, code=2)
    assert more[0] in line and "--compile" in line


def test_a_gate_on_what_is_not_measured_fails(untraced):
    result = alvts(*bench("--compile", "--gate", "scoring_ms<=1e9"))
    assert result.exit_code == 1
    assert "gate failed: scoring_ms" in result.output
