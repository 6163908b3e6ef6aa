"""`alvts plan`: what a card will gain, by calculation."""

import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_tools import alvts, model_folder, refused

from alvts_cli.bench.launches import Prompts, count_launches
from alvts_cli.engine import NAMED, PAPER, Selection, kv_bytes_expected, prefill_flops
from alvts_cli.engine.flops import Mlp, mlp_of
from alvts_cli.engine.policy import LAYERS, what_layers_do
from alvts_cli.engine.sizes import default_carry_rank, default_rank
from alvts_cli.errors import AlvtsError
from alvts_cli.memory import count_parameters
from alvts_cli.models import KNOWN
from alvts_cli.plan import cards
from alvts_cli.plan import describe as describing
from alvts_cli.plan.cards import at, card, card_names
from alvts_cli.plan.describe import describe
from alvts_cli.plan.predict import Wanted, longest_batch, make_case, predict
from alvts_cli.plan.roofline import phase
from alvts_cli.plan.shape import known_shape
from alvts_cli.plan.work import Product, Stretch, cache_bytes, decode, prefill
from alvts_cli.shapes import SHAPES, shape_config

CARDS = json.loads((Path(cards.__file__).parent / "cards.json").read_text())
REGENERATE = "run: python -m alvts_cli.plan.describe"


def case(name="llava-1.5-7b", keep="0.111", policy="paper", batch=1):
    shape = known_shape(name)
    assert shape is not None, REGENERATE
    return replace(make_case(shape, Wanted(keep, policy, None, 64)), batch=batch)


def planned(path, *more):
    result = alvts("plan", "--json", path, *more)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", SHAPES)
def test_known_models_are_described_as_they_are(name):
    shape, config = known_shape(name), shape_config(name)
    assert shape is not None, REGENERATE
    text = config.text_config
    assert (shape.width, shape.layers, shape.vocabulary) == (
        text.hidden_size,
        text.num_hidden_layers,
        text.vocab_size,
    ), REGENERATE
    assert mlp_of(text, 0) == Mlp(shape.mlp, shape.experts, shape.chosen), REGENERATE
    assert shape.parameters == count_parameters(config), REGENERATE
    assert set(shape.counts) == set(NAMED), REGENERATE


@pytest.mark.parametrize(
    ("name", "policy"), [("llava-next-mistral-7b", "once"), ("qwen2.5-vl-3b", "paper")]
)
def test_launches_are_those_that_are_counted(name, policy):
    shape, counted = known_shape(name), count_launches(shape_config(name), NAMED[policy])
    kinds = shape.counts[policy]
    for kind in (*LAYERS, "once", "rest"):
        assert getattr(kinds, kind).launches == getattr(counted, kind), REGENERATE
    for kind in ("decode", "decode_dense", "decode_rest"):
        assert getattr(kinds, kind) == getattr(counted, kind), REGENERATE
    # Of 640 tokens, 128 and 64 + 32 of them running.
    running_of = dict(dense=640, chooses=128, goes_on=128, text_only=64, once=0, rest=0)
    for kind, running in running_of.items():
        moved = getattr(kinds, kind).moved.bytes(running, 640)
        assert moved == pytest.approx(counted.moved[kind], rel=1e-3), REGENERATE


def test_the_whole_prefill_launches_what_the_counter_says():
    counted = count_launches(shape_config("llava-1.5-7b"), NAMED["once"])
    for keep in ("0.111", ",".join(["1.0", "64", "32", "0", *["0.1"] * 28])):
        one = case(keep=keep, policy="once")
        launches = sum(part.launches * part.times for part in prefill(one))
        over = counted.over_dense(what_layers_do(NAMED["once"], one.kept, 576, 0))
        assert launches == 32 * counted.dense + counted.rest + over


@pytest.mark.parametrize("policy", NAMED)
@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-30b-a3b", "pocket"])
def test_arithmetic_and_cache_are_the_engines(name, policy):
    config = shape_config(name).text_config
    depth = config.num_hidden_layers
    for keep in ("0.111", "1.0", ",".join(["1.0", "0", *["64"] * (depth - 2)])):
        one = case(name, keep, policy, batch=3)
        selection = Selection(
            default_rank(config.hidden_size), one.policy, default_carry_rank(config.hidden_size)
        )
        flops = prefill_flops(config, one.running, selection, one.tokens, 64)
        assert sum(part.flops for part in prefill(one)) == 3 * flops.total
        assert cache_bytes(one) == kv_bytes_expected(config, one.running, 2, 3)


def test_an_operator_takes_as_long_as_its_slowest_resource():
    machine = replace(
        card("h100"), matmul=((1, ((1, 1e12),)),), bandwidth=1e9, launch=1e-3, graph_launch=0.0
    )
    busy = Stretch((Product(1000, 1000, 1000, 1000),), launches=1, times=2)
    took = phase([busy], machine)
    # 2e9 operations and 1e3 bytes, twice: 4 ms against 2 us; two launches of 1 ms hide.
    assert took.arithmetic == pytest.approx(4e-3)
    assert took.eager == took.graph == pytest.approx(4e-3)
    assert (took.binds, took.launches) == ("arithmetic", 2)
    reading = phase([Stretch((Product(1, 1000, 1000, 10**7),), launches=1)], machine)
    assert reading.eager == pytest.approx(1e-2) and reading.binds == "memory"
    waiting = phase([replace(busy, launches=5)], machine)
    assert waiting.eager == pytest.approx(10e-3) and waiting.binds == "launches"
    assert waiting.graph == pytest.approx(4e-3)
    # Where the host computes itself, nothing hides.
    host = replace(machine, overlaps=False, graph_launch=None)
    assert phase([busy], host).eager == pytest.approx(6e-3)
    assert phase([busy], host).graph is None


def test_rates_go_along_straight_lines_of_logarithms():
    curve = ((1.0, 1.0), (100.0, 10.0))
    assert [at(curve, size) for size in (0.5, 1, 10, 100, 1000)] == pytest.approx(
        [1, 1, 10**0.5, 10, 10]
    )


def test_a_fast_card_is_bound_by_launches_and_a_graph_helps():
    plain = predict(case(), card("h100"))
    assert plain.selective["prefill"].binds == "launches"
    assert plain.speedup("prefill", graph=True) > plain.speedup("prefill")
    # A slower card has the same launches and more to gain from fewer tokens.
    assert predict(case(), card("rtx-3090")).speedup("prefill") > plain.speedup("prefill")
    # One choice for all layers launches less than one in each.
    once = predict(case(policy="once"), card("h100"))
    assert once.selective["prefill"].launches < plain.selective["prefill"].launches
    # Everything kept is dense.
    whole = predict(case(keep="1.0"), card("h100"))
    assert whole.dense == whole.selective


def test_a_smaller_cache_pays_at_large_batches():
    speedups = [
        predict(case("llava-next-7b", batch=batch), card("h100")).speedup("decode", graph=True)
        for batch in (1, 8, 32)
    ]
    assert speedups == sorted(speedups) and speedups[2] > 2
    one = case("llava-next-7b")
    dense, selective = (longest_batch(side, card("h100")) for side in (one.dense(), one))
    assert selective > 2 * dense > 0
    assert longest_batch(case("llava-1.5-13b"), card("rtx-3090")) == 0


def test_a_decoded_token_reads_all_weights_and_the_cache():
    one = case(batch=8)
    read = sum(part.read for part in decode(one))
    shape = one.shape
    layer = 4 * shape.width**2 + 3 * shape.width * shape.mlp
    weights = 2 * (shape.layers * layer + shape.width * shape.vocabulary)
    held = 8 * sum(tokens + 1 for tokens in one.running) * 2 * shape.width * 2
    # Read, and copied to grow.
    assert read == weights + 3 * held


def test_experts_are_read_as_they_are_met():
    """One token goes through 8 of 128, a long prompt through all; each is read once."""
    one = case("qwen3-vl-30b-a3b")
    shape = one.shape
    each = 3 * shape.width * shape.mlp * 2
    rest = 2 * sum(
        shape.width * columns for columns in (*[32 * 128] * 2, *[4 * 128] * 2, shape.experts)
    )
    token = decode(replace(one.dense(), batch=1))[0].products
    assert sum(product.weights for product in token) == rest + 8 * each
    whole = prefill(one.dense())[0].products
    assert sum(product.weights for product in whole) == rest + 128 * each
    # As many rows as pairs of a token and an expert, shared evenly.
    assert (whole[-1].rows, whole[-1].shared) == (8 * one.tokens, 128)
    # Filling 128 small products takes longer than one large one.
    slow = replace(card("h100"), matmul=((1, ((1, 1e12), (1e5, 1e15))),))
    alike = [replace(whole[-1], weights=0, shared=shared) for shared in (128, 1)]
    times = [phase([Stretch((product,))], slow).arithmetic for product in alike]
    assert times[0] > times[1]


def test_a_machine_of_wider_numbers_moves_more_bytes():
    """Float32 where work is counted in bfloat16: everything that only reads takes twice as long."""
    one = make_case(known_shape("llava-1.5-7b"), Wanted("0.111", "every-4", None, 64))
    base = replace(
        card("h100"),
        matmul=((1, ((1, 1e30),)),),
        attention=((1, 1e30),),
        biased=((1, 1e30),),
        launch=0.0,
        graph_launch=0.0,
    )
    narrow, wide = (predict(one, replace(base, wide=times)) for times in (1.0, 2.0))
    for name in narrow.dense:
        for side in ("dense", "selective"):
            few, many = getattr(narrow, side)[name], getattr(wide, side)[name]
            assert many.eager == pytest.approx(2 * few.eager, rel=1e-6)
            assert (many.read, many.flops) == (2 * few.read, few.flops)
    assert wide.cache == 2 * narrow.cache
    small = replace(base, memory=60e9)
    assert longest_batch(one, small) > longest_batch(one, replace(small, wide=2.0)) > 0


def test_the_machine_is_measured_in_what_it_computes_in(monkeypatch):
    """A CPU without instructions for bfloat16 takes minutes for what it does in seconds."""
    from alvts_cli import models

    monkeypatch.setattr(models, "cpu_computes_bfloat16", lambda: False)
    assert models.usual_dtype(torch.device("cpu")) == torch.float32
    assert models.usual_dtype(torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(models, "cpu_computes_bfloat16", lambda: True)
    assert models.usual_dtype(torch.device("cpu")) == torch.bfloat16


def test_a_narrow_product_is_as_slow_as_narrow_ones_were_measured():
    """And one between two widths lies between them, on a line of logarithms."""
    machine = replace(
        card("h100"), matmul=((100, ((1, 1e9),)), (1e6, ((1, 1e10), (100, 1e12)))), launch=0.0
    )
    inner = (10, 100, 1000, 10**4)
    times = [phase([Stretch((Product(100, side, side),))], machine).arithmetic for side in inner]
    rates = [2 * 100 * side**2 / taken for side, taken in zip(inner, times, strict=True)]
    assert rates == pytest.approx([1e9, 10**10.5, 1e12, 1e12])


def test_layers_that_differ_are_refused_in_one_line():
    config = shape_config("qwen3-vl-30b-a3b", layers=2)
    config.text_config.mlp_only_layers = [1]
    with pytest.raises(AlvtsError, match="some of mine have experts"):
        describe("mine", config)


def test_the_table_and_the_file_have_everything(tmp_path):
    path = tmp_path / "a.json"
    result = alvts("plan", "--model", "llava-next-7b", "--policy", "once", "--json", path)
    assert result.exit_code == 0, result.output
    for word in (
        *("batch 1", "batch 8", "batch 32", "vision", "prefill", "first token", "decode"),
        *("eager", "graph", "KV cache", "longest batch", "Predicted, not measured", "datasheet"),
        *("assumed", "flash kernel"),
    ):
        assert word in " ".join(result.stdout.split())
    report = json.loads(path.read_text())
    assert [one["batch"] for one in report["batches"]] == [1, 8, 32]
    costs = [one["bias_seconds"] for one in report["batches"]]
    assert costs[0] > 0 and costs[2] == pytest.approx(4 * costs[1])
    assert f"{1000 * costs[1]:.3g} ms at batch 8" in " ".join(result.stdout.split())
    # 32 layers that attend to all of 389 tokens at a quarter of the peak, not to half of them.
    pairs = [389**2 / 0.25, 389 * 390 / 2 / 0.4]
    assert costs[0] == pytest.approx(32 * 4 * 4096 * (pairs[0] - pairs[1]) / 989.4e12)
    prefilled = report["batches"][0]["phases"]["prefill"]
    ratio = prefilled["dense"]["eager"] / prefilled["selective"]["eager"]
    assert prefilled["speedup_eager"] == ratio
    assert f"{ratio:.2f} x" in result.stdout


def test_what_does_not_fit_is_said(tmp_path):
    result = alvts("plan", "--model", "llava-next-7b", "--on", "rtx-4090")
    assert "batch 32, dense does not fit" in result.stdout
    result = alvts("plan", "--model", "llava-1.5-13b", "--on", "rtx-4090")
    assert "the weights do not fit" in result.stdout


@pytest.mark.parametrize("name", card_names())
def test_every_card_has_a_source_and_sense(name, tmp_path):
    report = planned(tmp_path / "a.json", "--on", name)
    assert "NVIDIA" in report["machine"]["about"]
    assert CARDS[name]["read"].startswith("https://")
    assert 1e13 < report["machine"]["matmul"][0][1][0][1] < 1e16


def test_a_model_that_is_not_known_is_described_from_its_folder(tmp_path):
    report = planned(tmp_path / "a.json", "--model", model_folder(depth=16))
    known = planned(tmp_path / "b.json", "--model", "pocket")
    assert report["batches"] == known["batches"]


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "num_key_value_heads", 0),
        ("text_config", "hidden_act", "fly"),
        ("vision_config", "patch_size", 0),
    ],
)
def test_a_config_of_no_model_is_one_line(part, name, value, tmp_path):
    config = json.loads((model_folder() / "config.json").read_text())
    config[part][name] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "makes no model that runs" in refused("plan", "--model", tmp_path)


@pytest.mark.parametrize(
    ("part", "layers", "word"),
    [
        ("text_config", 100_000, "up to 10,000 layers in the decoder"),
        ("vision_config", 1001, "up to 1,000 layers in the vision tower"),
    ],
)
def test_a_depth_of_no_model_is_one_line(part, layers, word, tmp_path):
    config = json.loads((model_folder() / "config.json").read_text())
    config[part]["num_hidden_layers"] = layers
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = refused("plan", "--model", tmp_path)
    assert word in line and f"has {layers:,}" in line


@pytest.mark.parametrize("name", ["smolvlm-256m", "qwen3-vl-30b-a3b"])
def test_a_deep_model_is_counted_as_fast_as_a_shallow_one(name, monkeypatch):
    """Tied weights, and experts; no more than two layers of a decoder are built."""
    depths = []

    def counted(config):
        depths.append(config.text_config.num_hidden_layers)
        return count_parameters(config)

    monkeypatch.setattr(describing, "count_parameters", counted)
    whole, config = known_shape(name), shape_config(name)
    layer = count_parameters(shape_config(name, 2)) - count_parameters(shape_config(name, 1))
    config.text_config.num_hidden_layers = 5000
    config.text_config.layer_types = ["full_attention"] * 5000
    deep = describing.describe(name, config, {"paper": NAMED["paper"]})
    assert deep.parameters == whole.parameters + (5000 - whole.layers) * layer
    assert (deep.layers, deep.vision) == (5000, whole.vision)
    assert max(depths) == 2


@pytest.mark.parametrize(
    ("more", "code", "word"),
    [
        (("--on", "abacus"), 1, "h100"),
        (("--policy", "never"), 1, "paper"),
        (("--keep", "nan"), 2, "--keep"),
        (("--keep", "1,2,3"), 1, "32 layers"),
        (("--model", "nothing"), 1, "no model"),
        (("--visual-tokens", 10**6), 1, "reads"),
        (("--json", "/nowhere/a.json"), 1, "cannot write"),
    ],
)
def test_nonsense_is_one_line(more, code, word):
    assert word in refused("plan", *more, code=code)


def test_it_answers_at_once_and_without_torch():
    """For all known models together, in less time than torch takes to be imported."""
    program = (
        "import sys; from alvts_cli.cli import app; from alvts_cli.models import KNOWN\n"
        "for name in KNOWN:\n"
        "    try: app(['plan', '--model', name, '--policy', 'each'])\n"
        "    except SystemExit as end: assert not end.code, name\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    began = os.times()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("longest batch") == len(KNOWN)
    ended = os.times()
    assert ended.children_user + ended.children_system - (
        began.children_user + began.children_system
    ) < 2 * len(KNOWN)


def test_what_slows_a_whole_round_down_is_taken_out_of_every_figure():
    from alvts_cli.plan.machine import paces

    assert paces([[1, 2, 1, 1], [10, 20, 10, 10], [5, 11, 5, 4]]) == [1, 2, 1, 1]


def test_the_machine_is_measured(monkeypatch, tmp_path):
    from alvts_cli.plan import machine

    monkeypatch.setattr(machine, "_LEAST", 1e-3)
    monkeypatch.setattr(machine, "_HELD", 2**22)
    monkeypatch.setattr(machine, "WIDTHS", (32, 64))
    monkeypatch.setattr(machine, "ROWS", (1, 8))
    monkeypatch.setattr(machine, "LENGTHS", (8, 16))
    monkeypatch.setattr(machine, "LAYER_WIDTH", 128)
    monkeypatch.setattr(machine, "TOKENS", (4, 16))
    monkeypatch.setattr(machine, "_ROUNDS", 2)
    report = planned(tmp_path / "a.json", "--model", "pocket", "--on", "this")
    found = SimpleNamespace(**report["machine"])
    assert [numbers for numbers, _ in found.matmul] == [32**2, 64**2]
    assert [[rows for rows, _ in curve] for _, curve in found.matmul] == [[1, 8], [1, 8]]
    assert [tokens for tokens, _ in found.biased] == [8, 16]
    assert min(found.bandwidth, found.launch, found.memory, found.attention[0][1]) > 0
    assert len(found.elementwise) == 2 and min(rate for _, rate in found.elementwise) > 0
    assert "apart" in found.about and found.spread > 0
    assert found.graph_launch is None and not found.overlaps
    assert (found.dtype, found.wide) in (("float32", 2.0), ("bfloat16", 1.0))
    assert report["batches"][0]["phases"]["prefill"]["speedup_graph"] is None


def test_the_operators_measured_are_those_of_a_layer():
    """All but seven products and the attention, moving as many bytes as a layer is said to."""
    from alvts_cli.plan import machine

    bench = SimpleNamespace(device=torch.device("cpu"), random=torch.randn)
    layer = machine._Layer(bench, 256, 40)
    launches, moved = layer.counted()
    assert launches == layer.launches() - 8
    config = shape_config("llava-1.5-7b", hidden_size=256)
    config.text_config.intermediate_size = 704
    counted = count_launches(config, NAMED["paper"], Prompts(1, 30, 10), torch.float32, "cpu")
    # In a model the heads are twice as wide, and two more join keys and values with the cache.
    assert counted.dense == layer.launches() + 2
    joined = 4 * 40 * 256 * 4
    assert moved == pytest.approx(counted.moved["dense"] - joined, rel=0.03)


def test_a_cpu_has_operators_of_its_own(tmp_path, monkeypatch):
    config = shape_config("llava-1.5-7b", layers=2)
    card, host = (
        describe("mine", config, {"its": PAPER}, on).counts["its"] for on in ("cuda", "cpu")
    )
    assert host.dense == card.dense
    assert host.chooses.launches > card.chooses.launches


def test_a_captured_graph_holds_what_it_reads(monkeypatch):
    """Seen on an H100: a graph does not keep its tensors, and read memory that was given back."""
    from alvts_cli.plan import machine

    runs = []

    class Graph:
        def replay(self):
            runs.append("replay")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: nullcontext())
    work = partial(lambda tensor: runs.append("work"), torch.ones(3))
    held = weakref.ref(work.args[0])
    replay = machine._captured(work)
    del work
    gc.collect()
    replay()
    assert held() is not None
    assert runs == ["work"] * machine._IN_A_GRAPH + ["replay"]
