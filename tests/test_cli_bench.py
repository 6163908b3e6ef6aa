import json
import math
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from cli_tools import alvts, model_folder, refused, scene_file

from alvts_cli import shapes
from alvts_cli.artifact import load_artifact, save_artifact
from alvts_cli.bench.metrics import METRICS
from alvts_cli.bench.short import shortened
from alvts_cli.bench.statistics import efficiency, ratio
from alvts_cli.engine.flops import head_size
from alvts_cli.models import usual_dtype

pytestmark = pytest.mark.usefixtures("counted_once")

# Of pocket's 16: a run takes its time by the layer.
LAYERS = 4
# Keys and values of the layers, 3 heads of 64 floats, per token.
BYTES_PER_TOKEN = LAYERS * 2 * 192 * 4


def bench(*more, depth=LAYERS):
    return ("bench", "--model", model_folder(depth=depth), "--runs", 1, *more)


def measured(path, *more):
    result = alvts(*bench("--json", path, *more))
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


def test_the_table_and_the_file_have_everything(tmp_path):
    result = alvts(*bench("--runs", 2, "--json", tmp_path / "a.json", "--batch", 2))
    assert result.exit_code == 0, result.output
    words = (
        *("dense", "selective", "vision tower", "LM prefill", "scoring", "first token", "limit"),
        "efficiency",
        *("per new token", "GFLOPs", "KV cache", "batch 2", "256 visual + 64 text", "torch"),
    )
    for word in words:
        assert word in result.stdout
    report = json.loads((tmp_path / "a.json").read_text())
    assert set(report) == {
        *("format", "settings", "environment", "metrics", "intervals", "times", "against"),
        "peak_bytes",
    }
    assert report["against"] == {}
    assert report["times"]["short"]["prefill_ms"]["median"] == report["metrics"]["short_ms"] > 0
    assert set(report["metrics"]) == set(METRICS)
    for name, (low, high) in report["intervals"].items():
        # A machine so busy that the shorter prefill takes longer knows no efficiency.
        assert low is None or low <= report["metrics"][name] <= high
    for side in ("dense", "selective"):
        for times in report["times"][side].values():
            low, high = times["quartiles"]
            assert len(times["runs"]) == 2
            assert 0 <= low <= times["median"] <= high
    assert "score_ms" not in report["times"]["dense"]
    assert report["times"]["selective"]["score_ms"]["median"] > 0
    assert report["settings"] == {
        "model": str(model_folder(depth=LAYERS)),
        "random_weights": False,
        "layers": LAYERS,
        "hidden_size": 192,
        "cut": False,
        "dtype": "float32",
        "device": "cpu",
        "batch": 2,
        "visual_tokens": 256,
        "text_tokens": 64,
        "new_tokens": 16,
        "keep": 0.25,
        "kept_per_layer": [64] * LAYERS,
        "policy": "chosen in each layer",
        "selectors": str(model_folder(depth=LAYERS) / "selectors.safetensors"),
        "rank": 24,
        "compiled": False,
        "frozen_weights": False,
    }
    assert {"alvts", "python", "torch", "transformers", "hardware", "threads"} <= set(
        report["environment"]
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_counted_figures_are_exact_and_the_same_again(tmp_path, counted_once):
    counted = [name for name, metric in METRICS.items() if metric.portable and "speed" not in name]
    counted_once.clear()
    first = measured(tmp_path / "a.json")["metrics"]
    counted_once.clear()
    second = measured(tmp_path / "b.json")["metrics"]
    assert {name: first[name] for name in counted} == {name: second[name] for name in counted}
    assert first["visual_tokens"] == 256 and first["text_tokens"] == 64
    assert first["visual_tokens_kept"] == 64
    assert first["kv_bytes_dense"] == BYTES_PER_TOKEN * 320
    assert first["kv_bytes"] == BYTES_PER_TOKEN * 128
    assert first["kv_ratio"] == 2.5
    # Per token 2 multiply-adds for each weight of q, k, v, o (192 x 192) and the MLP (192 x 384);
    # attention sees t (t + 1) / 2 pairs of 192 numbers, twice.
    dense = LAYERS * (2 * 320 * (4 * 192**2 + 3 * 192 * 384) + 4 * 192 * 320 * 321 // 2)
    assert first["flops_dense"] == dense
    layers = LAYERS * (2 * 128 * (4 * 192**2 + 3 * 192 * 384) + 4 * 192 * 128 * 129 // 2)
    # Keys of rank 24 for all tokens; queries of 32 of the text, their logits, the mean of 3 heads.
    scoring = LAYERS * (4 * 320 * 192 * 24 + 2 * 32 * 192**2 + 2 * 32 * 320 * (192 + 3))
    assert first["flops"] == layers + scoring
    assert first["flops_ratio"] == dense / (layers + scoring)


def test_keeping_everything_costs_what_dense_costs(tmp_path):
    figures = measured(tmp_path / "a.json", "--keep", "1.0")["metrics"]
    assert figures["flops_ratio"] == figures["kv_ratio"] == 1
    assert figures["scoring_share"] == 0


def test_on_an_image_of_the_user(tmp_path):
    more = ("--image", scene_file(), "--prompt", "color?", "--batch", 2)
    figures = measured(tmp_path / "a.json", *more)["metrics"]
    assert figures["visual_tokens"] == 256
    assert figures["kv_bytes"] == 2 * BYTES_PER_TOKEN * (64 + figures["text_tokens"])


def test_several_images_make_up_more_visual_tokens(tmp_path):
    more = ("--visual-tokens", 512, "--text-tokens", 10, "--keep", 64)
    figures = measured(tmp_path / "a.json", *more)["metrics"]
    assert (figures["visual_tokens"], figures["text_tokens"]) == (512, 10)
    assert figures["visual_tokens_kept"] == 64
    assert "multiple" in refused(*bench("--visual-tokens", 300))
    assert "the model reads" in refused(*bench("--visual-tokens", 256 * 16))


def test_the_limit_is_the_prefill_of_text_and_layer_average():
    seen = []

    def spy(model, tokens):
        seen.append(tokens)
        return shortened(model, tokens)

    with patch("alvts_cli.bench.measure.shortened", spy):
        assert alvts(*bench("--keep", "1.0,0.25,0.25,0")).exit_code == 0
    # (256 + 2 * 64 + 0) / 4 of the image; a round of warm-up, and a timed one.
    assert seen == [64 + 96] * 2
    gates = ("prefill_speedup_limit>0.001", "short_ms>1e-9")
    result = alvts(*bench(*(word for gate in gates for word in ("--gate", gate))))
    assert result.exit_code == 0, result.output


def test_where_nothing_is_to_be_gained_there_is_no_efficiency(tmp_path):
    path = tmp_path / "a.json"
    same = patch("alvts_cli.bench.measure.efficiency", lambda *columns: efficiency(*[[1.0]] * 3))
    with same:
        result = alvts(*bench("--keep", "1.0", "--gate", "efficiency>=0.5", "--json", path))
    assert result.exit_code == 1
    assert "gate failed: efficiency>=0.5, measured nan" in result.stdout
    report = json.loads(path.read_text())
    assert report["metrics"]["efficiency"] is None
    assert report["intervals"]["efficiency"] == [None, None]


def test_what_slows_a_whole_round_down_is_not_in_its_ratio():
    assert ratio([10, 1, 100, 3], [5, 0.5, 50, 1.5]) == (2, 2, 2)
    middle, low, high = ratio([10, 1, 100, 3, 8], [5, 0.25, 50, 1.5, 8])
    assert (middle, low, high) == (2, 1, 4)


def test_a_schedule_is_timed_and_given_to_peers_that_take_it(tmp_path):
    selectors = load_artifact(model_folder(depth=LAYERS) / "selectors.safetensors")
    halves = (0.5, 0.0) * (LAYERS // 2)
    save_artifact(replace(selectors, schedules=(halves,)), tmp_path / "s.safetensors")
    path = tmp_path / "a.json"
    more = ("--selectors", tmp_path / "s.safetensors", "--keep", 32, "--json", path)
    result = alvts(*bench("--against", "alvts-plain,random-policy,oracle", *more))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["settings"]["kept_per_layer"] == [64, 0] * (LAYERS // 2)
    assert [peer["visual_tokens_kept"] for peer in report["against"].values()] == [32, 32, 32]
    # The average is the same, the way of spending it is not.
    assert alvts(*bench("--keep", 32, "--json", tmp_path / "b.json")).exit_code == 0
    refusal = alvts(*bench(*more[:4], "--baseline", tmp_path / "b.json"))
    assert refusal.exit_code == 1 and "kept_per_layer" in refusal.stderr


def test_a_policy_by_its_name(tmp_path):
    path = tmp_path / "a.json"
    result = alvts(*bench("--policy", "once", "--keep", 64, "--json", path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["settings"]["policy"].startswith("chosen once, diverse")
    # Scoring one layer for all is cheaper than the policy of the paper.
    assert alvts(*bench("--policy", "paper", "--keep", 64, "--json", path)).exit_code == 0
    assert json.loads(path.read_text())["metrics"]["flops"] > report["metrics"]["flops"]
    refusal = alvts(*bench("--policy", "never"))
    assert refusal.exit_code == 1 and "known: paper, once" in refusal.stderr


def test_peers_run_at_the_same_layer_average(tmp_path):
    path = tmp_path / "a.json"
    more = ("--against", "fastv, vtw", "--keep", 64, "--profile", "--json", path)
    # FastV runs its first layers on all tokens: few layers could not keep so little on average.
    result = alvts(*bench(*more, depth=16))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert list(report["against"]) == ["fastv", "vtw"]
    for name, peer in report["against"].items():
        assert peer["visual_tokens_kept"] == pytest.approx(64, abs=0.5)
        low, high = peer["interval"]
        assert low <= peer["prefill_speedup"] <= high
        assert len(peer["prefill_ms"]["runs"]) == 1
        row = next(line for line in result.stdout.splitlines() if line.strip().startswith(name))
        assert f"{peer['visual_tokens_kept']:.1f}" in row
    # One run: the shares are of that one, and make up the whole.
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "selective prefill" in line)
    shares = [float(line.split()[-1]) for line in lines[start + 2 : start + 7]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares[0] == pytest.approx(100 * report["metrics"]["scoring_share"], abs=0.1)


@pytest.mark.parametrize("methods", ["alvts", "dense", "fastv,fastv", "fast", "", "downsample"])
def test_peers_without_sense_are_refused_before_anything_is_loaded(methods):
    line = refused("bench", "--model", "/nowhere", "--against", methods, code=2)
    assert "--against" in line


def test_gates_that_hold():
    gates = ("visual_tokens_kept==64", "kv_ratio>=2.5", "flops<1e12", "prefill_speedup > 0.001")
    result = alvts(*bench(*(word for gate in gates for word in ("--gate", gate))))
    assert result.exit_code == 0, result.output
    assert result.stdout.count("gate passed") == 4


def test_a_gate_that_fails_says_which_and_by_how_much(tmp_path):
    more = ("--gate", "kv_ratio>=3", "--gate", "kv_bytes>1", "--json", tmp_path / "a.json")
    result = alvts(*bench(*more))
    assert result.exit_code == 1
    assert "gate failed: kv_ratio>=3, measured 2.5, off by 0.5" in result.stdout
    assert "gate passed: kv_bytes>1" in result.stdout
    assert (tmp_path / "a.json").is_file()


@pytest.mark.parametrize(
    "gate",
    [
        *("speed>=2", "prefill_speedup", "prefill_speedup=>2", "kv_ratio>=nan", "kv_ratio>=x", ""),
        *("kv_ratio>0", "prefill_speedup>=-1"),
    ],
)
def test_a_gate_without_sense_is_refused_before_anything_is_loaded(gate):
    line = refused("bench", "--model", "/nowhere", "--gate", gate, code=2)
    if gate == "speed>=2":
        assert all(name in line for name in METRICS)


def test_a_baseline_of_the_same_run_is_no_regression(tmp_path):
    measured(tmp_path / "a.json")
    more = ("--baseline", tmp_path / "a.json", "--max-regression", "99%")
    result = alvts(*bench(*more))
    assert result.exit_code == 0, result.output
    assert "no regression" in result.stdout


@pytest.mark.parametrize("name", ["a.json", "./a.json", "link.json"])
def test_a_baseline_is_not_renewed_by_the_run_it_is_to_judge(name, tmp_path, monkeypatch):
    """A second run would be compared with the worse one."""
    monkeypatch.chdir(tmp_path)
    Path("a.json").write_text(report_text())
    Path("link.json").symlink_to("a.json")
    line = refused("bench", "--model", "/nowhere", "--baseline", "a.json", "--json", name, code=2)
    assert "--json" in line and "beside it" in line
    assert Path("a.json").read_text() == report_text()


def test_a_regression_says_which_and_by_how_much(tmp_path):
    path = tmp_path / "a.json"
    report = measured(path)
    report["metrics"] |= {"kv_ratio": 5.0, "kv_bytes": 1.0, "prefill_ms": 1e-9}
    path.write_text(json.dumps(report))
    result = alvts(*bench("--baseline", path, "--max-regression", 0.2))
    assert result.exit_code == 1
    assert "regression: kv_ratio was 5, is 2.5, 50.0 % worse (20 % allowed)" in result.stdout
    assert "regression: kv_bytes was 1" in result.stdout
    # A time is not compared.
    assert "prefill_ms" not in result.stdout


def test_a_baseline_of_something_else_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    measured(path)
    assert "keep=0.25" in refused(*bench("--baseline", path, "--keep", 0.5))
    assert "batch=1" in refused(*bench("--baseline", path, "--batch", 2))
    for text in ("{}", "[]", "nonsense", ""):
        path.write_text(text)
        refused(*bench("--baseline", path))
    refused(*bench("--baseline", tmp_path / "nothing.json"))
    refused(*bench("--baseline", tmp_path))


@cache
def report_text():
    """The report of one run."""
    with tempfile.TemporaryDirectory() as folder:
        measured(Path(folder) / "a.json")
        return (Path(folder) / "a.json").read_text()


def _without(report, part, name):
    del report[part][name]


def _with(part, name, value):
    return lambda report: report[part].__setitem__(name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.update(settings={}, metrics={}),
        lambda report: report.update(metrics={}),
        lambda report: report.update(settings={}),
        lambda report: report.pop("format"),
        _with("metrics", "kv_ratio", math.nan),
        _with("metrics", "kv_ratio", math.inf),
        _with("metrics", "kv_ratio", "2.5"),
        _with("metrics", "kv_ratio", [2.5]),
        _with("metrics", "kv_ratio", None),
        _with("metrics", "kv_ratio", True),
        _with("metrics", "kv_ratio", 0),
        _with("metrics", "kv_ratio", -1),
        _with("metrics", "kv_bytes", 10**400),
        _with("metrics", "vision_ms", "soon"),
        lambda report: _without(report, "metrics", "prefill_speedup"),
        lambda report: _without(report, "settings", "keep"),
        lambda report: report.update(format=0),
    ],
)
def test_a_baseline_that_no_run_could_fail_is_refused_first(change, tmp_path):
    report = json.loads(report_text())
    change(report)
    path = tmp_path / "b.json"
    path.write_text(json.dumps(report))
    line = refused("bench", "--model", "/nowhere", "--baseline", path)
    assert "b.json is not" in line


@pytest.mark.parametrize(
    "more",
    [
        ("--max-regression", "10%"),
        ("--max-regression", "much", "--baseline", "x"),
        ("--max-regression", "-1", "--baseline", "x"),
        ("--max-regression", "10", "--baseline", "x"),
        ("--image", "x.png"),
        ("--prompt", "x"),
        ("--image", "x.png", "--prompt", "x", "--visual-tokens", 5),
        ("--image", "x.png", "--prompt", "x", "--random-weights"),
        ("--layers", 2),
        ("--hidden-size", 64),
        ("--runs", 0),
        ("--dtype", "int8"),
        ("--keep", "nan"),
    ],
)
def test_options_without_sense_are_one_line(more):
    refused(*bench(*more), code=2)


def test_a_place_that_cannot_be_written_is_one_line_and_found_first(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a.json", tmp_path, tmp_path / "nowhere" / "a.json"):
        assert "cannot write" in refused("bench", "--model", "/nowhere", "--json", path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_selectors_of_another_model_are_one_line(tmp_path):
    other = ("--selectors", model_folder(1, LAYERS) / "selectors.safetensors")
    refused(*bench(*other))
    path = tmp_path / "a.json"
    result = alvts(*bench(*other, "--other-weights", "--json", path))
    assert result.exit_code == 0, result.output
    assert json.loads(path.read_text())["settings"]["other_weights"] is True
    assert "fitted on other weights" in result.stderr


def _small(name, **text):
    """The shape of a known model, small enough for a test."""

    def shrunk():
        config = shapes.SHAPES[name]()
        for part, values in (
            (config.text_config, dict(hidden_size=64, intermediate_size=96, vocab_size=1000)),
            (config.vision_config, dict(hidden_size=32, intermediate_size=48)),
        ):
            for key, value in values.items():
                setattr(part, key, value)
        config.text_config.num_attention_heads = config.text_config.num_key_value_heads = 4
        config.text_config.head_dim = 16
        if config.model_type in ("qwen2_5_vl", "glm4v"):
            # Of 16 numbers of a head, GLM turns half.
            sections = [2, 3, 3] if config.model_type == "qwen2_5_vl" else [1, 1, 2]
            config.text_config.rope_parameters["mrope_section"] = sections
            config.vision_config.out_hidden_size = 64
            config.vision_config.depth = 1
            config.vision_config.num_heads = 2
            config.image_token_id, config.video_token_id = 990, 991
            config.text_config.pad_token_id = 0
        else:
            config.vision_config.num_hidden_layers = 2
            config.vision_config.num_attention_heads = 2
            config.image_token_id = 990
        return config

    return shrunk


@pytest.mark.parametrize(
    ("name", "visual"),
    [
        ("llava-1.5-7b", 576),
        ("llava-next-7b", 2928),
        ("llava-next-mistral-7b", 2928),
        ("qwen2.5-vl-3b", 1980),
        ("glm-4.1v-9b", 1980),
    ],
)
def test_random_weights_of_every_family(name, visual, tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "small", _small(name))
    path = tmp_path / "a.json"
    more = ("--random-weights", "--layers", 2, "--runs", 1, "--json", path, "--keep", 64)
    result = alvts("bench", "--model", "small", *more)
    assert result.exit_code == 0, result.output
    assert "small needs about" in result.stderr and "is free" in result.stderr
    assert "random weights, cut to 2 layers" in " ".join(result.stdout.split())
    report = json.loads(path.read_text())
    assert report["metrics"]["visual_tokens"] == visual
    assert report["metrics"]["visual_tokens_kept"] == 64
    assert report["settings"]["layers"] == 2
    assert f"torch.{report['settings']['dtype']}" == str(usual_dtype(torch.device("cpu")))
    assert report["settings"]["selectors"] == "random"


def test_one_layer_of_the_true_shape(tmp_path, monkeypatch):
    config = shapes.shape_config("smolvlm-256m")
    shapes.cut_tower(config, 1)
    monkeypatch.setitem(shapes.SHAPES, "smolvlm-256m", lambda: config)
    path = tmp_path / "a.json"
    more = ("--layers", 1, "--visual-tokens", 64, "--text-tokens", 8, "--keep", 4, "--json", path)
    result = alvts("bench", "--model", "smolvlm-256m", "--random-weights", "--runs", 1, *more)
    assert result.exit_code == 0, result.output
    figures = json.loads(path.read_text())["metrics"]
    size = usual_dtype(torch.device("cpu")).itemsize
    # 3 heads of 64 numbers, keys and values.
    assert figures["kv_bytes"] == 2 * 3 * 64 * size * (4 + 8)


def test_what_does_not_fit_is_said_before_it_is_built(monkeypatch):
    monkeypatch.setattr("alvts_cli.memory.memory_free", lambda device: 10 * 1024**3)
    line = refused("bench", "--model", "llava-1.5-13b", "--random-weights", "--dtype", "bfloat16")
    assert "GiB of memory" in line and "10.0 GiB is free" in line and "too little" in line


def test_random_weights_of_an_unknown_name_or_depth_are_one_line():
    assert "llava-1.5-7b" in refused("bench", "--model", "owner/model", "--random-weights")
    assert "32" in refused("bench", "--model", "llava-1.5-7b", "--random-weights", "--layers", 33)
    for width in (64, 1000, 8192):
        more = ("--random-weights", "--hidden-size", width)
        assert "multiple of 128 up to 4096" in refused("bench", "--model", "llava-1.5-7b", *more)


@pytest.mark.parametrize("name", sorted(shapes.SHAPES))
def test_a_narrower_decoder_has_the_same_heads(name):
    before = shapes.shape_config(name).text_config
    size = head_size(before)
    text = shapes.shape_config(name, hidden_size=2 * size).text_config
    assert (text.hidden_size, head_size(text), text.num_attention_heads) == (2 * size, size, 2)
    assert 2 % text.num_key_value_heads == 0
    ratio = before.intermediate_size / before.hidden_size
    assert text.intermediate_size == pytest.approx(ratio * text.hidden_size, abs=1)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 7.063),
        ("llava-1.5-13b", 13.351),
        ("llava-next-7b", 7.063),
        ("llava-next-mistral-7b", 7.567),
        ("qwen2.5-vl-3b", 3.755),
        ("qwen2.5-vl-7b", 8.292),
        ("qwen3-vl-2b", 2.128),
        ("qwen3-vl-4b", 4.438),
        ("qwen3-vl-8b", 8.767),
        ("qwen3-vl-30b-a3b", 31.071),
        ("qwen2-vl-2b", 2.209),
        ("qwen2-vl-7b", 8.291),
        ("llava-onevision-7b", 8.03),
        ("internvl3-2b", 2.089),
        ("internvl3-8b", 7.944),
        ("internvl3.5-8b", 8.528),
        ("smolvlm-256m", 0.256),
        ("smolvlm-500m", 0.507),
        ("smolvlm2-2.2b", 2.247),
        ("glm-4.1v-9b", 10.293),
        ("mistral-small-3.1-24b", 24.011),
    ],
)
def test_shapes_have_the_published_number_of_weights(name, billions):
    from alvts_cli.memory import count_parameters

    assert round(count_parameters(shapes.shape_config(name)) / 1e9, 3) == billions
