"""The whole table on the untrained pocket: figures, resuming, the command line."""

import json
import math
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
import torch
from cli_tools import DEPTH, alvts, model_folder, refused, scene_file
from PIL import Image

from alvts_cli.artifact import load_artifact, save_artifact
from alvts_cli.batches import collate
from alvts_cli.bench.timing import Generated
from alvts_cli.data import Source
from alvts_cli.engine import Selection, new_cache, prefill_flops
from alvts_cli.errors import AlvtsError
from alvts_cli.evaluate import run as run_module
from alvts_cli.evaluate import times
from alvts_cli.evaluate.data import DataSet, read_data
from alvts_cli.evaluate.figures import summarise
from alvts_cli.evaluate.gates import parse_gate
from alvts_cli.evaluate.run import DENSE, Outcome, Plan, Run, evaluate
from alvts_cli.evaluate.store import Store
from alvts_cli.evaluate.table import blind, by_kind, check_gate, figures_by_name, to_json, to_table
from alvts_cli.methods import make_method
from alvts_cli.methods.random import Random
from alvts_cli.models import load_model
from alvts_cli.prompts import build_inputs
from alvts_cli.terminal import console


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(model_folder()), "cpu")


def make_plan(loaded, batch=3, **budgets):
    runs = {Run(name, str(budget)): (make_method(name), budget) for name, budget in budgets.items()}
    return Plan(loaded, make_method("dense"), runs, batch)


@pytest.fixture
def kept():
    """Makes a store that is open until the test ends."""
    with ExitStack() as stack:
        yield lambda facts: stack.enter_context(Store(facts))


def nothing(steps):
    pass


def test_outcomes(loaded, kept):
    data = read_data(Source("pocket"), 7, 0)
    plan = make_plan(loaded, random=64, vtw=0.5)
    results = evaluate(plan, data, kept({}), nothing)
    assert len(results) == 7
    config = loaded.model.config.text_config
    for one, item in zip(results, data.items, strict=True):
        inputs = build_inputs(loaded.processor, item.images(), item.question)
        text = inputs["input_ids"].shape[1] - 256
        with torch.inference_mode():
            logits = loaded.model(**inputs).logits[0, -1]
            said = loaded.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = loaded.processor.decode(said[0, text + 256 :], skip_special_tokens=True)
        assert one[DENSE].answer == answer.strip()
        assert one[DENSE].kl == 0
        assert one[DENSE].kept == ((256, DEPTH),)
        assert one[DENSE].slots == DEPTH * (256 + text)
        assert one["vtw@0.5"].kept == ((256, DEPTH // 2), (0, DEPTH // 2))
        assert one["vtw@0.5"].slots == DEPTH * text + DEPTH // 2 * 256
        assert one["random@64"].kept == ((64, DEPTH),)
        assert (
            one["random@64"].flops
            == prefill_flops(config, [64 + text] * DEPTH, Selection(), 256).total
        )
        random = make_method("random")
        with torch.inference_mode(), random.attached(loaded.model, 64, [item.id]):
            other = loaded.model(**inputs).logits[0, -1]
        expected = torch.nn.functional.kl_div(
            other.log_softmax(-1), logits.log_softmax(-1), reduction="sum", log_target=True
        )
        assert one["random@64"].kl == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


def test_a_later_turn_goes_on_with_the_cache_of_the_first(loaded, kept):
    data = read_data(Source("pocket-turns"), 7, 0)
    model, processor = loaded.model, loaded.processor
    results = evaluate(make_plan(loaded, fastv=128), data, kept({}), nothing)
    for one, item in zip(results, data.items, strict=True):
        said = [f"USER: <image>\n{item.earlier[0][0]} ASSISTANT:"]
        said += [f" {item.earlier[0][1]}</s>USER: {item.earlier[1][0]} ASSISTANT:"]
        said += [f" {item.earlier[1][1]}</s>USER: {item.question} ASSISTANT:"]
        first, whole = (
            processor(images=item.images(), text=[text], return_tensors="pt")
            for text in (said[0], "".join(said))
        )
        read, text = first["input_ids"].shape[1], whole["input_ids"].shape[1]
        with torch.inference_mode():
            dense = model.generate(**whole, max_new_tokens=4, do_sample=False)
        assert one[DENSE].answer == processor.decode(dense[0, text:], skip_special_tokens=True)
        assert one["fastv@128"].kept == ((256, 1), (85, DEPTH - 1))
        assert one["fastv@128"].slots == DEPTH * (read - 256) + 256 + 85 * 3
        method, past = make_method("fastv"), new_cache(model.model.language_model)
        with torch.inference_mode(), method.attached(model, 128, [item.id]):
            model(**first, **past)
            ids = whole["input_ids"][:, read:]
            logits = model(input_ids=ids, **past).logits[0, -1]
        with torch.inference_mode():
            expected = torch.nn.functional.kl_div(
                logits.log_softmax(-1),
                model(**whole).logits[0, -1].log_softmax(-1),
                reduction="sum",
                log_target=True,
            )
        assert one["fastv@128"].kl == pytest.approx(float(expected), rel=1e-2, abs=1e-5)
    assert any(one["fastv@128"].kl > 1e-4 for one in results)


def test_conversations_that_cannot_go_on_are_refused(loaded, kept, monkeypatch):
    data = read_data(Source("pocket-turns"), 7, 0)
    plan = make_plan(loaded)
    with monkeypatch.context() as patched:
        patched.setattr(loaded.model.config.text_config, "max_position_embeddings", 280)
        with pytest.raises(AlvtsError, match=r"the conversation of scene 0 makes 2\d+ tokens"):
            evaluate(plan, data, kept({"long": 1}), nothing)
    counted = "{{ messages | length }} <image> x"
    monkeypatch.setattr(loaded.processor, "chat_template", counted, raising=False)
    with pytest.raises(AlvtsError, match="writes the first turn in another way"):
        evaluate(plan, data, kept({"template": 1}), nothing)


def test_an_interrupted_run_goes_on_and_ends_the_same(loaded, kept):
    data = read_data(Source("pocket"), 7, 0)
    plan = make_plan(loaded, random=32)
    whole = evaluate(plan, data, kept({"run": 1}), nothing)
    store, steps = kept({"run": 2}), []

    def interrupt(count):
        steps.append(count)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(plan, data, store, interrupt)
    # One batch of three runs is finished, two runs of the second are lost.
    assert len(list(store.folder.iterdir())) == 1
    steps.clear()
    store.__exit__(None, None, None)
    store = kept({"run": 2})
    assert evaluate(plan, data, store, steps.append) == whole
    assert steps == [3] + [1] * 6
    store.remove()
    assert not store.folder.exists()


def test_damaged_batches_are_run_again(loaded, kept):
    data = read_data(Source("pocket"), 7, 0)
    plan = make_plan(loaded, batch=7, random=32)
    store = kept({})
    whole = evaluate(plan, data, store, nothing)
    (file,) = store.folder.iterdir()
    for text in ("", "[]", "3", '[{"dense": {}}]'):
        file.write_text(text)
        assert evaluate(plan, data, store, nothing) == whole


def test_where_nothing_can_be_kept_the_run_goes_on(loaded, kept, cache, monkeypatch):
    data = read_data(Source("pocket"), 7, 0)
    plan = make_plan(loaded, batch=7, random=32)
    whole = evaluate(plan, data, kept({}), nothing)
    # A file where the cache's folder should be; no home; a run that is going on already.
    cache.with_name("file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.with_name("file") / "cache"))
    with pytest.warns(UserWarning, match="finished batches are not kept"):
        store = kept({})
    assert evaluate(plan, data, store, nothing) == whole and not store.kept
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", no_home)
    with pytest.warns(UserWarning, match="there is no home folder"):
        kept({})
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    with pytest.warns(UserWarning, match="is running already"):
        store = kept({})
    store.remove()
    assert list((cache / "alvts" / "eval").glob("*/batch-*.json"))


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_place_that_fills_up_is_done_without(loaded, kept, cache, monkeypatch):
    data = read_data(Source("pocket"), 7, 0)
    plan = make_plan(loaded, batch=4, random=32)
    store = kept({})

    def full(*_):
        raise AlvtsError("cannot write x: No space left on device")

    monkeypatch.setattr("alvts_cli.evaluate.store.write_whole", full)
    with pytest.warns(UserWarning, match="No space left") as warned:
        assert len(evaluate(plan, data, store, nothing)) == 7
    assert len(warned) == 1


def test_everything_that_decides_is_in_the_key():
    assert Store({"a": 1}).key == Store({"a": 1}).key
    assert Store({"a": 1}).key != Store({"a": 2}).key


def test_collate_pads_on_the_left():
    one = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2).long()}
    other = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3).long()}
    one["pixel_values"] = torch.ones(1, 3, 3, 2, 2)
    other["pixel_values"] = torch.ones(1, 5, 3, 2, 2)
    batch = collate([one, other], 7)
    assert batch["input_ids"].tolist() == [[7, 1, 2], [1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]
    assert batch["pixel_values"].shape == (2, 5, 3, 2, 2)
    assert batch["pixel_values"][0].sum() == 3 * 3 * 4


def outcome(answer, **more):
    return Outcome(answer, **{"kl": 0.0, "kept": ((8, 4),), "flops": 100, "slots": 40, **more})


def test_figures_by_hand(loaded):
    full = read_data(Source("pocket"), 14, 0)
    items = [item for item in full.items if item.kind in ("color", "shape")]
    data = DataSet("hand", tuple(items), "exact", 4)
    right = [item.answers[0] for item in items]
    assert len(items) == 4
    cheap = dict(kl=0.5, kept=((8, 1), (2, 3)), flops=25, slots=20)
    results = [
        {
            "dense": outcome(right[i] if i < 2 else "wrong"),
            "blind": outcome("wrong"),
            "dart@2": outcome(right[i] if i == 0 else "wrong", **cheap),
            "alvts@2": outcome(right[i] if i < 3 else "no", **cheap),
        }
        for i in range(4)
    ]
    runs = [Run("dart", "2"), Run("alvts", "2")]
    config = loaded.model.config.text_config
    summary = summarise(data, results, runs, 0, config, 4)
    assert (summary.head.dense, summary.head.blind, summary.head.samples) == (50, 0, 4)
    assert summary.visual_tokens == 8
    assert summary.kinds["color"].dense == 100 and summary.kinds["shape"].dense == 0
    figures = figures_by_name(summary)
    assert figures["dart@2.accuracy"] == 25
    assert figures["dart@2.retention"] == 50
    assert figures["alvts@2.retention"] == 150
    assert figures["dart@2.difference"] == -25
    assert figures["dart@2.over_alvts"] == -50
    assert figures["alvts@2.over_alvts"] == 0
    assert figures["dart@2.agreement"] == 75
    assert figures["alvts@2.agreement"] == 50
    assert figures["dart@2.kl"] == 0.5
    assert (figures["dart@2.tokens"], figures["dart@2.tokens_after"]) == (3.5, 2)
    assert (figures["dart@2.flops"], figures["dart@2.kv"]) == (25, 50)
    low, high = figures["alvts@2.over_alvts_low"], figures["dart@2.over_alvts_high"]
    assert (low, high <= 0) == (0, True)
    plain = to_json(summary, data, results, kinds=True)
    assert json.loads(json.dumps(plain, allow_nan=False))["rows"][0]["kinds"]["color"] == 50
    assert plain["samples"][0]["said"]["dart@2"]["right"] is True


def gated(loaded, text, samples=8, **answers):
    """A gate on alvts, of as many questions; what is said is right where it is None."""
    items = read_data(Source("pocket"), 8, 0).items[:samples]
    said = {"dense": None, "blind": "wrong", "alvts": None, **answers}
    kept = {"alvts": ((2, 4),)}
    method, budget = text.partition("@")[0], text.partition("@")[2].partition(".")[0]
    results = [
        {
            name if name in ("dense", "blind") else f"{name}@{budget}": outcome(
                item.answers[0] if answer is None else answer,
                kept=kept.get(name, ((8, 4),)) if budget != "9" else ((8, 4),),
            )
            for name, answer in said.items()
        }
        for item in items
    ]
    data, config = DataSet("hand", items, "exact", 4), loaded.model.config.text_config
    summary = summarise(data, results, [Run(method, budget)], 0, config, 4)
    return summary, *check_gate(parse_gate(text, [method], [budget], False), summary)


@pytest.mark.parametrize("figure", ["retention>=97", "difference_low>=-60", "agreement>=90"])
def test_a_gate_against_a_model_that_sees_nothing_fails(figure, loaded):
    """Whatever is left out of what is not seen, the answers stay."""
    summary, holds, line = gated(loaded, f"alvts@2.{figure}")
    assert summary.sees and blind(summary) == ""
    assert holds, line
    summary, holds, line = gated(loaded, f"alvts@2.{figure}", blind=None)
    assert not summary.sees and "dense (100.0 %) is not surely better" in blind(summary)
    assert not holds and line == f"gate failed: alvts@2.{figure}, {blind(summary)}"
    # What it costs does not depend on it.
    assert gated(loaded, "alvts@2.tokens<=2", blind=None)[1]
    # One question says nothing, however it is answered.
    assert not gated(loaded, f"alvts@2.{figure}", samples=1)[1]


def test_a_gate_where_everything_is_kept_fails(loaded):
    summary, holds, line = gated(loaded, "alvts@9.retention>=97")
    assert summary.rows[0].all_kept and not holds
    assert line.startswith("gate failed: alvts@9.retention>=97, everything is kept there")
    assert gated(loaded, "alvts@9.tokens>=8")[1]


def test_chance_is_the_commonest_answer_of_each_kind(loaded):
    data = read_data(Source("pocket"), 70, 0)
    results = [{"dense": outcome("x"), "blind": outcome("x")} for _ in data.items]
    summary = summarise(data, results, [], 0, loaded.model.config.text_config, 4)
    for kind, head in summary.kinds.items():
        answers = [item.answers[0] for item in data.items if item.kind == kind]
        assert head.chance == pytest.approx(100 * max(map(answers.count, answers)) / 10)
    assert summary.head.chance == pytest.approx(
        sum(head.chance for head in summary.kinds.values()) / 7
    )


COMMAND = ("eval", "--model", model_folder(), "--methods", "dense,alvts,random", "--keep", "64,0.1")
SMALL = ("--samples", 7, "--batch", 4)


def test_the_command(tmp_path, cache):
    file = tmp_path / "out.json"
    gate = ("--gate", "alvts@64.tokens==64", "--gate", "random@0.1.kv<=20")
    result = alvts(*COMMAND, *SMALL, "--by-kind", "--json", file, *gate)
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert "pocket: 7 questions, exact scoring, 256 visual tokens" in out
    for word in ("dense", "blind (grey picture)", "chance", "64x4", "25x4", "relation"):
        assert word in out
    assert out.count("gate passed") == 2
    whole = json.loads(file.read_text())
    (data,) = whole["data"]
    assert [(row["method"], row["keep"]) for row in data["rows"]] == [
        ("alvts", "64"),
        ("random", "64"),
        ("alvts", "0.1"),
        ("random", "0.1"),
    ]
    row = data["rows"][0]
    assert row["tokens"] == row["tokens_after"] == 64
    # Layers of about 12 text tokens; the selectors are counted.
    assert 20 < row["kv"] < 30 and row["flops"] > data["rows"][1]["flops"]
    assert set(data["samples"][0]["said"]) == {
        *("dense", "blind", "alvts@64", "random@64", "alvts@0.1", "random@0.1")
    }
    assert not any(math.isnan(v) for v in row.values() if isinstance(v, float))
    assert not list((cache / "alvts" / "eval").iterdir())
    # Same seed, same table.
    assert alvts(*COMMAND, *SMALL, "--by-kind", *gate).stdout == out


def test_on_a_narrow_terminal_it_still_says_whose_row_it_is(loaded):
    data = read_data(Source("pocket"), 7, 0)
    runs = [Run("pyramiddrop", "0.111"), Run("alvts", "0.111")]
    results = [
        {label: outcome("x") for label in ("dense", "blind", *(run.label for run in runs))}
        for _ in data.items
    ]
    summary = summarise(data, results, runs, 0, loaded.model.config.text_config, 4)
    narrow = console()
    narrow.width = 60
    with narrow.capture() as captured:
        narrow.print(to_table(summary), by_kind(summary))
    assert captured.get().count("pyramiddrop   0.111") == 2


def test_fitted_methods_are_given_the_selectors_without_alvts_itself(tmp_path):
    # More parts than are named in a row.
    folder = model_folder(depth=8)
    selectors = load_artifact(folder / "selectors.safetensors")
    halves = (0.5, 0.0) * 4
    save_artifact(replace(selectors, schedules=(halves,)), tmp_path / "s.safetensors")
    methods = "random-policy,oracle,alvts-plain"
    more = ("--methods", methods, "--selectors", tmp_path / "s.safetensors", "--keep", "32")
    result = alvts("eval", "--model", folder, *SMALL, *more, "--json", tmp_path / "j.json")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "j.json").read_text())["data"][0]["rows"]
    budgeted = [[64, 1], [0, 1]] * 4
    assert {row["method"]: row["by_layer"] for row in rows} == {
        "random-policy": budgeted,
        "oracle": budgeted,
        "alvts-plain": [[32, 8]],
    }
    assert "0 to 64" in result.stdout and "32x8" in result.stdout


def interrupt_the_second(monkeypatch):
    """Of the batches that are run, which are returned as they come."""
    real, batches = run_module._batch, []

    def counted(*args):
        batches.append(args)
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(run_module, "_batch", counted)
    return batches


def test_an_interrupted_command_goes_on(monkeypatch, cache):
    command = (*COMMAND, "--samples", 7, "--batch", 3)
    whole = alvts(*command).stdout
    batches = interrupt_the_second(monkeypatch)
    result = alvts(*command)
    assert result.exit_code == 130
    assert "same command" in result.stderr
    assert result.stdout == ""
    result = alvts(*command)
    assert result.stdout == whole
    assert seeing(result.stderr) == ["pocket: 1 batches from before"]
    # One before the interrupt, the one it hit, and the two that were left.
    assert len(batches) == 4
    batches.clear()
    assert alvts(*command, "--fresh").exit_code == 130


def seeing(stderr):
    """The lines, but for those which say that this model sees nothing, for it is not trained."""
    return [line for line in stderr.splitlines() if "not surely better than blind" not in line]


def folder_of(folder, color, records):
    folder.mkdir()
    for i in range(2):
        Image.new("RGB", (40, 40 + i), color).save(folder / f"{i}.png")
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "q.jsonl"


RECORDS = [
    {"image": f"{i % 2}.png", "question": f"is it {word}?", "answer": "yes"}
    for i, word in enumerate(("red", "green", "blue", "small"))
]


def test_answers_about_other_pictures_are_not_taken(tmp_path, monkeypatch):
    """The questions, and the names of all files, are the same."""
    interrupt_the_second(monkeypatch)
    told = ("eval", "--model", model_folder(), "--methods", "random", "--keep", "64", "--batch", 2)
    data = folder_of(tmp_path / "A", "red", RECORDS)
    assert alvts(*told, "--data", data).exit_code == 130
    # The same pictures elsewhere; others in the same place; the first ones again.
    copy = folder_of(tmp_path / "B", "red", RECORDS)
    assert "from before" not in alvts(*told, "--data", copy).stderr
    pictures = [path.read_bytes() for path in sorted(data.parent.glob("*.png"))]
    for path in data.parent.glob("*.png"):
        Image.new("RGB", (40, 40), "grey").save(path)
    assert "from before" not in alvts(*told, "--data", data).stderr
    for i, picture in enumerate(pictures):
        (data.parent / f"{i}.png").write_bytes(picture)
    with monkeypatch.context() as patch:
        other = json.dumps({"image_processor": {"image_mean": [0.1, 0.1, 0.1]}})
        patch.setattr("transformers.ProcessorMixin.to_json_string", lambda _: other)
        assert "from before" not in alvts(*told, "--data", data).stderr
    result = alvts(*told, "--data", data)
    assert result.exit_code == 0
    assert seeing(result.stderr) == ["q.jsonl: 1 batches from before"]


def test_data_sets_are_told_apart_by_where_they_lie(tmp_path, monkeypatch, recwarn):
    told = ("eval", "--model", model_folder(), "--methods", "random", "--keep", "64")
    folder_of(tmp_path / "A", "red", RECORDS)
    folder_of(tmp_path / "B", "red", RECORDS)
    monkeypatch.chdir(tmp_path)
    result = alvts(*told, "--data", "A/q.jsonl", "--data", "B/q.jsonl")
    assert result.exit_code == 0 and not seeing(result.stderr) and not recwarn
    for other in ("./A/q.jsonl", "B/../A/q.jsonl", tmp_path / "A" / "q.jsonl"):
        line = refused(*told, "--data", "A/q.jsonl", "--data", other, code=2)
        assert "a data set is there twice" in line


def test_a_question_that_the_model_does_not_take_is_skipped_named_and_counted(tmp_path):
    told = ("eval", "--model", model_folder(), "--methods", "random", "--keep", "64", "-q")
    long = {"image": "0.png", "question": "is it " * 5000, "answer": "yes"}
    broken = {"image": "gone.png", "question": "what?", "answer": "yes"}
    data = folder_of(tmp_path / "A", "red", [RECORDS[0], long, broken])
    file = tmp_path / "out.json"
    result = alvts(*told, "--data", data, "--json", file)
    assert result.exit_code == 0 and result.stderr == ""
    assert "q.jsonl: 1 questions, 2 skipped, yes-no scoring" in result.stdout
    (whole,) = json.loads(file.read_text())["data"]
    assert whole["skipped"] == 2 and len(whole["samples"]) == 1
    result = alvts(*told[:-1], "--data", data)
    assert "skipped 2 samples:" in result.stderr
    assert "q.jsonl:2: prompt and images make" in result.stderr
    data.write_text(json.dumps(long))
    line = refused(*told, "--data", data)
    assert "no question in q.jsonl; 1 were skipped, such as q.jsonl:1: prompt and" in line


def test_a_failed_gate_says_by_how_much():
    result = alvts(*COMMAND, *SMALL, "--gate", "alvts@64.tokens<=60")
    assert result.exit_code == 1
    assert "gate failed: alvts@64.tokens<=60, measured 64, off by 4" in result.stdout
    # It is not trained.
    assert re.fullmatch("warning: pocket: on these 7 questions dense .*\n", result.stderr)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--methods", "alvts,fast"), "unknown method 'fast'"),
        (("--keep", "0"), "--keep"),
        (("--keep", "64,64.0"), "twice"),
        (("--keep", "many"), "--keep"),
        (("--scoring", "kind"), "unknown scoring"),
        (("--gate", "alvts@64.speed>1"), "unknown figure"),
        (("--gate", "vtw@64.retention>1"), "leaves out"),
        (("--gate", "alvts@64.retention>=0.97"), "in percent: write alvts@64.retention>=97"),
        (("--samples", "0"), "--samples"),
    ],
)
def test_bad_options_are_one_line_before_the_model_is_loaded(more, word):
    command = ("eval", "--model", "/nowhere", "--methods", "alvts", "--keep", "64")
    assert word in refused(*command, *more, code=2)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--data", "nothing here"), "no data"),
        (("--data", "missing.json"), "no file"),
        (("--json", "/nowhere/out.json"), "cannot write"),
        (("--data", "x.json", "--image-folder", "/nowhere"), "no image folder"),
        (("--selectors", "missing.safetensors"), "missing.safetensors"),
    ],
)
def test_bad_inputs_are_one_line(more, word):
    assert word in refused(*COMMAND, *more)


def test_damaged_pictures_are_skipped_named_and_counted(tmp_path):
    picture = scene_file().read_bytes()
    (tmp_path / "a.png").write_bytes(picture)
    (tmp_path / "cut.png").write_bytes(picture[:200])
    records = [
        {"img": name, "asked": "is there a circle?", "label": "yes"}
        for name in ("a.png", "cut.png")
    ]
    (tmp_path / "set.json").write_text(json.dumps(records))
    columns = ("--columns", "image=img,question=asked", "--methods", "random")
    result = alvts(*COMMAND, "--data", tmp_path / "set.json", *columns)
    assert result.exit_code == 0, result.output
    assert "set.json: 1 questions" in result.stdout
    assert "skipped 1 samples:" in result.stderr and "cut.png" in result.stderr
    (tmp_path / "a.png").unlink()
    line = refused(*COMMAND, "--data", tmp_path / "set.json", *columns)
    assert "no question in" in line and "2 were skipped" in line


def test_without_selectors_it_says_what_to_do(tmp_path):
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(model_folder(), bare)
    (bare / "selectors.safetensors").unlink()
    line = refused("eval", "--model", bare, "--methods", "alvts", *SMALL)
    assert "alvts calibrate" in line and "--methods" in line


def test_prefills_are_timed_in_turns(loaded, monkeypatch):
    """In a round all have the same question, and what a method does to choose is timed."""
    seen, attached = [], []

    def generate(model, inputs, new_tokens):
        out = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        kept = attached[0].last.layer_average if attached else 256
        seen.append((kept, inputs["input_ids"].shape[1]))
        # As if a prefill cost what it keeps: and the machine was slow in the warm-up.
        prefill = kept * (1 if len(seen) > 3 else 9)
        return Generated(out, 0.0, prefill, prefill, 0.0, prefill, {}, 0)

    class Watched(Random):
        @contextmanager
        def attached(self, model, budget, samples):
            with super().attached(model, budget, samples) as attachment:
                attached.append(attachment)
                yield attachment
                attached.clear()

    monkeypatch.setattr(times, "generate", generate)
    monkeypatch.setattr(times, "ROUNDS", 2)
    data = read_data(Source("pocket"), 3, 0)
    runs = {Run("random", k): (Watched(), int(k)) for k in ("64", "32")}
    turns = []
    plan = Plan(loaded, make_method("dense"), runs, 4)
    found = times.time_prefills(plan, data, lambda: turns.append(len(seen)))
    assert {label: value[0] for label, value in found.items()} == {"random@64": 4, "random@32": 8}
    assert len(turns) == times.steps(plan) == 9
    # Another one begins each round, and within a round all have the same question.
    assert [kept for kept, _ in seen] == [256, 64, 32, 64, 32, 256, 32, 256, 64]
    lengths = [length for _, length in seen]
    assert all(len(set(lengths[i : i + 3])) == 1 for i in (0, 3, 6))


def test_the_command_times_what_it_compares(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "ROUNDS", 2)
    file = tmp_path / "out.json"
    line = refused(*COMMAND, *SMALL, "--gate", "alvts@64.prefill_speedup>0.001", code=2)
    assert "needs --time" in line
    gate = ("--gate", "alvts@64.prefill_speedup>0.001")
    result = alvts(*COMMAND, *SMALL, "--time", "--json", file, *gate)
    assert result.exit_code == 0, result.output
    assert "prefill (95 %)" in result.stdout and "gate passed" in result.stdout
    for row in json.loads(file.read_text())["data"][0]["rows"]:
        assert row["prefill_speedup_low"] <= row["prefill_speedup"] <= row["prefill_speedup_high"]
