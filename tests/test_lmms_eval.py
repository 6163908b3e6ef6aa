"""lmms-eval finds alvts, and a task on local data runs to the score that it must run to."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval", reason="needs lmms-eval: pip install alvts[lmms-eval]")
# Nothing here needs the hub. Its client reads this once, when it is first imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from cli_tools import model_folder
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model, get_model_manifest, list_available_models
from lmms_eval.tasks import TaskManager

from alvts_cli import AlvtsError
from alvts_cli.answer import answer, prepare, selectors_for
from alvts_cli.engine import parse_policy
from alvts_cli.lmms.model import Alvts, cut, generation, read_turn
from alvts_cli.models import load_model
from alvts_cli.pocket import WEIGHTS
from alvts_cli.pocket.evaluate import scene_items

KEEP = 64
NEW_TOKENS = 5

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function pictures.read
doc_to_text: question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {length}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""

PICTURES = """
from PIL import Image

def read(doc):
    return [Image.open(path) for path in doc["images"]]
"""


@pytest.fixture(scope="module")
def make_task(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """Writes a task on local data; gives the folder for `--include_path`."""
    root = tmp_path_factory.mktemp("lmms")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(root / "cache"))

        def make(name: str, questions: list[dict[str, Any]], length: int = NEW_TOKENS) -> Path:
            folder = root / name
            folder.mkdir()
            data = folder / "questions.jsonl"
            data.write_text("".join(json.dumps(question) + "\n" for question in questions))
            (folder / "pictures.py").write_text(PICTURES)
            (folder / f"{name}.yaml").write_text(
                TASK.format(name=name, data=data, length=length).strip()
            )
            return folder

        yield make


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A question of every kind about a scene, and one about two scenes; with true answers."""
    folder = tmp_path_factory.mktemp("scenes")
    made: list[dict[str, Any]] = []
    for i, item in enumerate(scene_items("test", per_kind=1)):
        path = folder / f"{i}.png"
        item.image.save(path)
        made.append({"images": [str(path)], "question": item.question, "answer": item.answer})
    both = [*made[0]["images"], *made[1]["images"]]
    return [*made, {"images": both, "question": made[1]["question"], "answer": "yes"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_folder` with sharper attention: each question gets an answer of its own, which
    depends on the tokens that are kept."""
    sharper = tmp_path_factory.mktemp("models") / "sharper"
    shutil.copytree(model_folder(), sharper)
    model = load_model(str(sharper), "cpu").model
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.input_layernorm.weight.mul_(2)
    model.save_pretrained(sharper)
    return sharper


@pytest.fixture(scope="module")
def scored(folder: Path, make_task: Callable[..., Path], questions: list[dict[str, Any]]) -> Path:
    """A task whose right answers are what the engine says at `KEEP`, one question at a time."""
    loaded = load_model(str(folder), "cpu")
    selectors = selectors_for(loaded, None)
    right = []
    for question in questions:
        pictures = [Image.open(path).convert("RGB") for path in question["images"]]
        inputs = prepare(loaded, pictures, question["question"], NEW_TOKENS)
        said = answer(loaded, inputs, selectors, str(KEEP), NEW_TOKENS, stream=False)
        right.append({**question, "answer": said.answer})
    # Otherwise a score of 1 would say nothing.
    assert len({question["answer"] for question in right}) > len(right) // 2
    return make_task("scored", right)


def run(task: Path, model: object, *, batch_size: int = 1, **more: object) -> Any:
    """lmms-eval's results of the task in the folder `task`."""
    model_args = {"pretrained": model, "device": "cpu", **more}
    return simple_evaluate(
        model="alvts",
        model_args=",".join(f"{key}={value}" for key, value in model_args.items()),
        tasks=[task.name],
        batch_size=batch_size,
        task_manager=TaskManager(
            "ERROR", include_path=str(task), include_defaults=False, model_name="alvts"
        ),
        bootstrap_iters=0,
    )


def score(results: Any) -> float:
    (task,) = results["results"].values()
    return float(task["exact_match,none"])


def test_lmms_eval_discovers_the_model() -> None:
    assert "alvts" in list_available_models()
    assert get_model_manifest("alvts").model_id == "alvts"
    assert get_model("alvts") is Alvts


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_score_is_of_the_engines_answers(scored: Path, folder: Path, batch_size: int) -> None:
    results = run(scored, folder, batch_size=batch_size, keep=KEEP)
    assert score(results) == 1
    count = len(results["samples"]["scored"])
    assert count == 8
    # 256 visual tokens a picture, and one question is about two.
    assert results["throughput"]["avg_visual_tokens"] == 256 * (count + 1) / count
    assert results["throughput"]["avg_visual_tokens_kept"] == KEEP
    assert all(sample["token_counts"][0]["input_tokens"] for sample in results["samples"]["scored"])


def test_dense_and_another_budget_answer_otherwise(scored: Path, folder: Path) -> None:
    dense = run(scored, folder, method="dense")
    assert score(dense) < 1
    throughput = dense["throughput"]
    assert throughput["avg_visual_tokens_kept"] == throughput["avg_visual_tokens"]
    assert score(run(scored, folder, batch_size=3, keep=0.02)) < 1


def test_a_peer_runs_at_the_budget(scored: Path, folder: Path) -> None:
    results = run(scored, folder, batch_size=3, method="random", keep=KEEP)
    assert score(results) < 1
    assert results["throughput"]["avg_visual_tokens_kept"] == KEEP


def test_one_value_per_layer_and_a_selector_file(scored: Path, folder: Path) -> None:
    layers = [KEEP] * 16
    file = folder / "selectors.safetensors"
    listed = "[" + ",".join(map(str, layers)) + "]"
    assert score(run(scored, folder, keep=listed, selectors=file)) == 1


def test_the_command_line_writes_the_score(scored: Path, folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lmms_eval", "--model", "alvts", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={folder},keep={KEEP},device=cpu"]
    command += ["--tasks", "scored", "--include_path", str(scored)]
    command += ["--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=600,
        # Else every thread of every test would fight for the cores.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    (file,) = tmp_path.rglob("*results.json")
    results = json.loads(file.read_text())
    assert results["results"]["scored"]["exact_match,none"] == 1, done.stdout + done.stderr
    assert results["config"]["model_backend"] == "alvts_cli.lmms.model.Alvts (chat)"


@pytest.mark.skipif(not (WEIGHTS / "config.json").is_file(), reason="pocket has no weights here")
def test_pocket_answers_through_lmms_eval(
    make_task: Callable[..., Path], questions: list[dict[str, Any]]
) -> None:
    task = make_task("pocket", questions[:-1], length=4)
    assert score(run(task, "pocket", batch_size=4, method="dense")) > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "best"}, "unknown method 'best'"),
        ({"batch_size": "auto"}, "batch_size must be a whole number of at least 1, not 'auto'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"keep": "some"}, "keep='some' is not a number"),
        ({"method": "fastv"}, "no keep was given"),
        ({"method": "fastv", "keep": "[" + "0.5," * 15 + "0.1]"}, "takes one keep"),
        ({"selectors": "nowhere.safetensors"}, "there is no selector file nowhere.safetensors"),
        ({"policy": "best"}, "unknown policy 'best'"),
        ({"policy": "once", "method": "dense"}, "the method dense has no policies"),
        ({"selectors": str(model_folder(seed=1) / "selectors.safetensors")}, "--other-weights"),
    ],
)
def test_wrong_model_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(AlvtsError) as error:
        Alvts(**{"pretrained": str(model_folder()), "device": "cpu", **arguments})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_policy_and_selectors_of_other_weights() -> None:
    selectors = str(model_folder(seed=1) / "selectors.safetensors")
    model = Alvts(
        str(model_folder()), selectors, 9, device="cpu", policy="once", other_weights=True
    )
    turn = [{"type": "image", "url": Image.new("RGB", (32, 32))}, {"type": "text", "text": "what?"}]
    ask(model, [{"role": "user", "content": turn}])
    last = model._attachment.last
    assert str(last.policy) == str(parse_policy("once")) and last.layer_average == 9


def ask(model: Alvts, messages: list[dict[str, Any]]) -> str:
    """The answer to one question."""
    model.task_dict["made"] = {"test": [messages]}
    arguments = ("", lambda doc: doc, {"max_new_tokens": 3}, 0, "made", "test")
    metadata = {"task": "made", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", arguments, 0, metadata)
    return model.generate_until([request])[0].text


def test_questions_it_cannot_take_are_refused_by_name() -> None:
    model = Alvts(str(model_folder()), device="cpu")
    text = {"type": "text", "text": "how many objects are there?"}
    picture = {"type": "image", "url": Image.new("RGB", (32, 32))}
    video = {"type": "video", "url": "film.mp4"}
    user = {"role": "user", "content": [picture, text]}
    assert ask(model, [user]) == ask(model, [user])
    for messages, message in [
        ([{"role": "user", "content": [text]}], "give at least one image"),
        ([{"role": "user", "content": [video, text]}], "it has video in it"),
        ([{"role": "system", "content": [text]}, user], "a conversation of 2 messages"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "no.png"}, text]}],
            "there is no image no.png",
        ),
    ]:
        with pytest.raises(AlvtsError) as error:
            ask(model, messages)
        assert str(error.value).startswith("question 0 of the task made: ")
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    metadata = {"task": "made", "doc_id": 0, "repeats": 1}
    for kind in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(AlvtsError, match=r"the task made .*generate_until"):
            getattr(model, kind)([Instance(kind, (), 0, metadata)])


def test_a_cleaned_model_holds_no_memory() -> None:
    model = Alvts(str(model_folder()), device="cpu")
    model.clean()
    model.clean()
    assert not {"_loaded", "_attachment"} & vars(model).keys()


def test_pictures_stand_where_the_messages_or_the_words_say() -> None:
    one, two = Image.new("L", (8, 8)), Image.new("RGB", (8, 8))

    def turn(*parts: Any) -> list[dict[str, Any]]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image", "url": part}
            for part in parts
        ]
        return [{"role": "user", "content": content}]

    pictures, prompt = read_turn(turn("first ", one, " then ", two, " same?"))
    assert prompt == "first <image> then <image> same?"
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"]
    assert read_turn(turn(one, two, "same?"))[1] == "<image><image>same?"
    assert read_turn(turn(one, two, "is <image> like <image>?"))[1] == "is <image> like <image>?"


def test_settings_of_tasks() -> None:
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert generation({"until": ["\n"]}) == {"max_new_tokens": 1024, "num_beams": 1, **greedy}
    pope = {"max_new_tokens": 128, "temperature": 0.0, "top_p": 1.0, "do_sample": False}
    assert generation(pope) == {"max_new_tokens": 128, "num_beams": 1, **greedy}
    assert generation({**pope, "temperature": 0.7})["do_sample"] is False
    drawn = generation({"temperature": 0.7, "top_p": 0.9, "num_beams": 2})
    assert drawn == {
        "max_new_tokens": 1024,
        "num_beams": 2,
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": None,
    }


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (None, "red ASSISTANT: blue\n\nx"),
        ([], "red ASSISTANT: blue\n\nx"),
        ([""], "red ASSISTANT: blue\n\nx"),
        ("\n\n", "red ASSISTANT: blue"),
        (["\n\n", "ASSISTANT:"], "red"),
    ],
)
def test_answers_end_at_stop_words(until: Any, expected: str) -> None:
    assert cut(" red ASSISTANT: blue\n\nx", until) == expected
