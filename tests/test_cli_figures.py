import math
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import torch
from cli_tools import model_folder
from tiny import FAMILIES, make_inputs, one_image
from tiny import make_model as make_tiny

from alvts_cli import AlvtsError
from alvts_cli.bench.inputs import synthetic_inputs
from alvts_cli.bench.measure import _order
from alvts_cli.bench.metrics import parse_gate, parse_share
from alvts_cli.bench.selectors import random_selectors
from alvts_cli.bench.short import shortened
from alvts_cli.bench.statistics import efficiency, ratio, spread
from alvts_cli.bench.timing import generate
from alvts_cli.engine import attach, cache_of, kv_bytes
from alvts_cli.models import load_model


def test_median_and_quartiles():
    found = spread([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.low, found.median, found.high) == (2, 3, 4)
    one = spread([7.0])
    assert (one.low, one.median, one.high) == (7, 7, 7)


def test_a_ratio_has_an_interval_that_narrows_with_agreement():
    point, low, high = ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert low == point == high == 2  # every pair says the same, however slow its moment was
    point, low, high = ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0])
    assert low < point == 3 < high
    assert ratio([2.0, 3.0, 4.0], [1.0, 1.0, 1.0]) == (point, low, high)


def test_efficiency_is_the_part_of_the_gain_that_is_reached():
    assert efficiency([9.0, 10.0, 11.0], [3.0, 3.0, 3.0], [2.0, 2.0, 2.0])[0] == 7 / 8
    point, low, high = efficiency([9.0, 10.0, 12.0], [3.0, 4.0, 3.0], [2.0, 2.0, 2.5])
    assert low < point < high < 1
    # Where a prefill of the layer average is no faster, there is nothing to reach.
    assert all(map(math.isnan, efficiency([2.0, 2.0], [3.0, 3.0], [2.0, 2.0])))


def test_the_order_of_the_rounds_is_fair():
    rounds = [tuple(_order(["dense", "selective", "short"], i)) for i in range(6)]
    assert set(rounds) == set(permutations(["dense", "selective", "short"]))
    for i in range(5):
        assert sorted(_order(list("abcde"), i)) == list("abcde")
    assert {_order(list("abcde"), i)[0] for i in range(10)} == set("abcde")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_prefill_is_the_decoder_on_fewer_tokens(family):
    model = make_tiny(family)
    inputs = make_inputs(model, one_image(family), one_image(family))
    text_model = model.model.language_model
    states = []
    handle = text_model.register_forward_hook(lambda m, args, output: states.append(output))
    generate(model, inputs, 1)
    with shortened(model, 9):
        made = generate(model, inputs, 1, ignore_end=True)
    generate(model, inputs, 1)
    handle.remove()
    whole, short, again = states
    # Earlier tokens do not see later ones: what is left out changes nothing for the others.
    torch.testing.assert_close(short.last_hidden_state, whole.last_hidden_state[:, :9])
    assert torch.equal(again.last_hidden_state, whole.last_hidden_state)
    assert cache_of(short).get_seq_length() == 9
    assert made.kv_bytes * cache_of(whole).get_seq_length() == 9 * kv_bytes(cache_of(whole))


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("kv_ratio>=2", 2.0, True),
        ("kv_ratio > 2", 2.0, False),
        ("kv_ratio<=2", 2.1, False),
        (" kv_ratio<2e0 ", 1.9, True),
        ("kv_bytes==1024", 1024, True),
        ("kv_bytes==1024", 1025, False),
    ],
)
def test_a_gate_compares(text, value, holds):
    gate = parse_gate(text)
    assert gate.check({gate.metric: value})[0] is holds


@pytest.mark.parametrize(
    "text",
    [
        *("kv_ratio>0", "kv_ratio>=0", "prefill_speedup>=-1", "host_syncs>=0", "host_syncs>-1"),
        *("scoring_share<=1", "scoring_share<5", "plan_error>=0"),
    ],
)
def test_a_gate_that_cannot_fail_is_refused(text):
    with pytest.raises(AlvtsError, match="can never fail: the figure is"):
        parse_gate(text)


@pytest.mark.parametrize(
    "text", ["kv_ratio<=0", "kv_ratio==0", "host_syncs<0", "host_syncs==-1", "scoring_share>1"]
)
def test_a_gate_that_cannot_hold_is_refused(text):
    with pytest.raises(AlvtsError, match="can never hold: the figure is"):
        parse_gate(text)


@pytest.mark.parametrize(
    "text",
    [
        *("host_syncs==0", "host_syncs<=0", "launches_going_on==0", "launches_going_on>=-3"),
        *("scoring_share==1", "scoring_share<1", "efficiency>=0", "plan_error>0"),
    ],
)
def test_a_gate_at_the_end_of_a_range(text):
    assert str(parse_gate(text)) == text


def test_shares():
    assert parse_share("10%") == parse_share("0.1") == 0.1
    assert parse_share("0") == 0 and parse_share("99.9%") < 1
    # The bare 10 of somebody who means percent would let everything pass.
    for text in ("", "%", "-1%", "nan", "inf", "10", "1", "100%", "500%"):
        with pytest.raises(AlvtsError):
            parse_share(text)


def test_peak_memory_sees_what_is_allocated_and_freed():
    # In a process of its own: one with a history reuses memory that it holds already.
    code = """
import torch
from alvts_cli.bench.memory import peak_memory
with peak_memory(torch.device("cpu")) as peak:
    torch.ones(60_000_000)
print(peak.bytes)
"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    if said.stdout.strip() != "None":
        assert 200e6 < int(said.stdout) < 400e6


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


@pytest.fixture
def subject():
    model = load_model(str(model_folder())).model
    inputs = synthetic_inputs(model, batch=2, visual_tokens=None, text_tokens=8)
    # transformers puts hooks of its own into a model at its first forward.
    generate(model, inputs, 1)
    return model, inputs


def test_a_timed_generation_is_the_plain_one_and_leaves_no_trace(subject):
    model, inputs = subject
    with torch.inference_mode():
        plain = model.generate(**inputs, do_sample=False, min_new_tokens=5, max_new_tokens=5)
    before = hooks(model)
    steps = []
    made = generate(model, inputs, 5, ignore_end=True, on_tokens=steps.append)
    assert torch.equal(made.tokens, plain[:, inputs["input_ids"].shape[1] :])
    assert torch.equal(torch.stack(steps, dim=1), made.tokens)
    assert hooks(model) == before
    assert 0 < made.vision_ms < made.ttft_ms < made.total_ms
    assert 0 < made.prefill_ms < made.ttft_ms
    assert made.total_ms == pytest.approx(made.ttft_ms + 4 * made.decode_ms)
    assert made.phase_ms == {}


def test_the_phases_of_a_selection_are_timed_within_prefill(subject):
    model, inputs = subject
    with attach(model, random_selectors(model), 0.1) as attachment:
        hook = attachment.phase
        made = generate(model, inputs, 2, attachment)
        assert attachment.phase is hook
    assert all(time > 0 for time in made.phase_ms.values())
    assert sum(made.phase_ms.values()) < made.prefill_ms


def test_a_generation_that_fails_leaves_no_trace(subject):
    model, inputs = subject
    before = hooks(model)

    def fail(tokens):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        generate(model, inputs, 5, on_tokens=fail)
    assert hooks(model) == before
