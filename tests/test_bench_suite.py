"""The whole table by one command, decoding, and what `plan` says beside what is measured."""

import json
from types import SimpleNamespace

import pytest
import torch
from cli_tools import DEPTH, alvts, model_folder, refused
from torch.autograd import DeviceType

from alvts_cli.bench import decode, suite
from alvts_cli.bench.tracing import count_kernels
from alvts_cli.plan import machine


@pytest.fixture
def small(monkeypatch):
    """A suite of one small model, eager."""
    monkeypatch.setattr(suite, "SHAPES", ("pocket",))
    monkeypatch.setattr(
        suite,
        "entries",
        lambda: [suite.Entry("pocket", batch, "once", False) for batch in (1, 2)],
    )
    monkeypatch.setattr(decode, "BATCHES", (1, 2))


@pytest.fixture
def quick(monkeypatch):
    """A machine that is measured in no time."""
    monkeypatch.setattr(machine, "_LEAST", 1e-3)
    monkeypatch.setattr(machine, "_HELD", 2**22)
    monkeypatch.setattr(machine, "WIDTHS", (256,))
    monkeypatch.setattr(machine, "ROWS", (1, 64))
    monkeypatch.setattr(machine, "LENGTHS", (64,))
    monkeypatch.setattr(machine, "LAYER_WIDTH", 128)
    monkeypatch.setattr(machine, "TOKENS", (4, 16))
    monkeypatch.setattr(machine, "_ROUNDS", 2)


def run(path, *more):
    return alvts("bench", "--suite", "gpu", "--runs", 1, "--layers", 2, "--json", path, *more)


def test_a_suite_is_a_file_and_a_table(small, tmp_path):
    path = tmp_path / "a.json"
    result = run(path)
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert report["suite"] == "gpu" and report["left_out"] == []
    assert [entry["settings"]["batch"] for entry in report["entries"]] == [1, 2]
    first, second = report["entries"]
    assert first["settings"]["layers"] == 2
    assert second["metrics"]["kv_bytes"] == 2 * first["metrics"]["kv_bytes"]
    # Nothing was traced without a GPU; what it would launch is counted.
    assert first["traced"] is None and first["metrics"]["launches_dense"] > 0
    assert [one["batch"] for one in first["decode"]] == [1, 2] and second["decode"] == []
    again = alvts("bench", "--table", path)
    assert again.exit_code == 0 and again.stdout == result.stdout
    speedup = first["metrics"]["prefill_speedup"]
    assert f"| {speedup:.2f} (" in again.stdout
    assert again.stdout.count("| pocket, 256 visual tokens |") == 2


def test_the_suite_has_all_that_it_promises():
    whole = suite.entries()
    assert {(entry.model, entry.batch, entry.compile) for entry in whole} == {
        (model, batch, compile)
        for model in ("llava-1.5-7b", "llava-next-7b", "qwen2.5-vl-7b")
        for batch in (1, 8)
        for compile in (False, True)
    }


def test_what_fails_or_comes_too_late_does_not_lose_the_others(small, monkeypatch, tmp_path):
    measure = suite.measure

    def failing(subject, *args, **kwargs):
        if subject.settings["batch"] == 2:
            raise RuntimeError("CUDA out of memory.\nmore")
        return measure(subject, *args, **kwargs)

    monkeypatch.setattr(suite, "measure", failing)
    path = tmp_path / "a.json"
    result = run(path)
    assert result.exit_code == 0, result.output
    left = json.loads(path.read_text())["left_out"]
    assert left == [{"entry": "pocket, batch 2, once, eager", "why": "CUDA out of memory."}]
    assert "Left out: pocket, batch 2, once, eager (CUDA out of memory.)" in result.stdout
    monkeypatch.setattr(suite, "LIMIT_S", -1)
    late = run(path)
    assert late.exit_code == 1 and "nothing could be run; -1 s are over" in late.stderr


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--suite", "cpu"), "known: gpu"),
        (("--suite", "gpu", "--model", "smol"), "--model"),
        (("--suite", "gpu", "--compile"), "--compile"),
        (("--suite", "gpu", "--gate", "kv_ratio>=1"), "--gate"),
        (("--compile", "--decode"), "--decode"),
        (("--compile", "--against-plan"), "--against-plan"),
    ],
)
def test_options_without_sense_are_one_line(more, word):
    assert word in refused("bench", *more, code=2)


def test_a_table_of_something_else_is_one_line(tmp_path):
    path = tmp_path / "a.json"
    refused("bench", "--table", path)
    for text in ("", "[]", "{}", '{"suite": "gpu", "entries": [{}], "left_out": []}'):
        path.write_text(text)
        assert str(path) in refused("bench", "--table", path)


def test_kernels_are_what_ran_on_the_device_and_is_no_copy():
    names = {"gemm": "CUDA", "Memcpy HtoD": "CUDA", "Memset (Device)": "CUDA", "aten::mm": "CPU"}
    events = [
        SimpleNamespace(name=name, device_type=getattr(DeviceType, device))
        for name, device in names.items()
    ]
    assert count_kernels(events) == 1


def test_decoding_at_growing_batches(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "BATCHES", (1, 3))
    path = tmp_path / "a.json"
    result = alvts(
        *("bench", "--model", model_folder(), "--runs", 1, "--keep", 64, "--batch", 2),
        *("--decode", "--json", path),
    )
    assert result.exit_code == 0, result.output
    assert "decoding" in result.stdout and "tokens/s" in result.stdout
    one, three = json.loads(path.read_text())["decode"]
    assert (one["batch"], three["batch"]) == (1, 3)
    per_token = DEPTH * 2 * 192 * 4
    assert (one["kv_bytes_dense"], one["kv_bytes"]) == (320 * per_token, 128 * per_token)
    assert three["kv_bytes"] == 3 * one["kv_bytes"]
    for found in (one, three):
        low, high = found["interval"]
        assert low <= found["speedup"] <= high
        assert len(found["step_ms"]["dense"]) == len(found["step_ms"]["selective"]) == decode.STEPS
        assert found["tokens_per_second"] > 0


def test_a_batch_that_does_not_fit_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "BATCHES", (1, 1000))
    monkeypatch.setattr(decode, "memory_free", lambda device: 100e6)
    path = tmp_path / "a.json"
    options = ("--model", model_folder(), "--runs", 1, "--decode", "--json", path)
    assert alvts("bench", *options).exit_code == 0
    assert [one["batch"] for one in json.loads(path.read_text())["decode"]] == [1]


def test_a_repeated_cache_decodes_as_a_prefilled_batch():
    from functools import partial

    from alvts_cli.bench.subject import Wanted, random_subject
    from alvts_cli.engine import attach

    wanted = Wanted("pocket", None, "28", "once", 2, None, 16, "cpu", "float32", False)
    subject = random_subject(wanted, 3, None, say=lambda _: None)
    model = subject.model
    setting = partial(attach, model, subject.selectors, subject.keep, policy=subject.policy)
    repeated = decode._repeated(decode._prefilled(model, setting, decode._first(subject)), 2)
    whole = decode._prefilled(model, setting, subject.inputs)
    tokens = torch.tensor([[5], [7]])
    with setting(), torch.inference_mode():
        one, two = (model(input_ids=tokens, use_cache=True, **c).logits for c in (repeated, whole))
    torch.testing.assert_close(one, two)


def test_the_plan_stands_beside_what_is_measured(quick, tmp_path):
    path = tmp_path / "a.json"
    result = alvts(
        *("bench", "--model", model_folder(), "--runs", 1, "--against-plan", "--json", path),
        *("--gate", "plan_error<=1e9"),
    )
    assert result.exit_code == 0, result.output
    assert "predicted / measured" in " ".join(result.stdout.split())
    report = json.loads(path.read_text())
    planned, figures = report["plan"]["predicted"], report["metrics"]
    off = planned["prefill_speedup"] / figures["prefill_speedup"] - 1
    assert figures["plan_error"] == pytest.approx(abs(off))
    assert planned["prefill_speedup"] == pytest.approx(
        planned["prefill_ms_dense"] / planned["prefill_ms"]
    )
