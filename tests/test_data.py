"""Data of every kind, and what is broken in them."""

import json
import math
import os
import random
import socket
import subprocess
import sys
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alvts_cli import AlvtsError
from alvts_cli.data import Reader, Sample, Source, parse_columns, read_data


@cache
def _bomb() -> bytes:
    file = BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with 6 good pictures and 4 broken ones."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.new("RGB" if i else "P", (20 + i, 10), i).save(folder / f"good{i}.png")
    (folder / "text.jpg").write_text("this is no picture")
    whole = (folder / "good1.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(_bomb())
    return folder


BROKEN = ("text.jpg", "cut.png", "empty.png", "bomb.png", "missing.png")


def record(image: Any, question: str = "<image>\nWhat is it?", **more: Any) -> dict[str, Any]:
    turns = [
        {"from": "human", "value": question},
        {"from": "gpt", "value": "A thing."},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    return {"id": f"r-{image}", "image": image, "conversations": turns, **more}


def read(reader: Reader) -> tuple[list[Sample], str]:
    samples = list(reader)
    assert all("\n" not in line for line in reader.skipped)
    return samples, "\n".join(reader.skipped)


def test_shipped_scenes() -> None:
    one, again = (list(read_data(Source("pocket"), 40, 3)) for _ in range(2))
    assert [s.id for s in one] == [s.id for s in again]
    assert [s.images[0].tobytes() for s in one] == [s.images[0].tobytes() for s in again]
    assert len({s.id for s in one}) == 40
    assert {s.id for s in one}.isdisjoint(s.id for s in read_data(Source("pocket"), 40, 4))
    assert len({s.prompt.split()[0] for s in one}) >= 4
    assert all(s.prompt and s.answers and s.kind and len(s.images) == 1 for s in one)
    seeds = [int(s.id.split()[1]) for s in one]
    assert all(100_000_000 <= seed < 200_000_000 for seed in seeds)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_format(suffix: str, pictures: Path, tmp_path: Path) -> None:
    records: list[Any] = [record(f"good{i}.png") for i in range(5)]
    records.append(record(["good1.png", "good2.png"], "<image> or <image>?"))
    records.append(record("good5.png", "no place for it"))
    records += [record(name) for name in BROKEN]
    records += [
        {"id": "text only", "conversations": record("x")["conversations"]},
        record("good3.png", "<image><image> one too many"),
        {"image": "good3.png"},
        {"image": "good3.png", "conversations": [{"from": "gpt", "value": "<image>"}]},
        {"image": "good3.png", "conversations": [3, {"from": "human"}]},
        {"image": 7, "conversations": []},
        {"image": [], "conversations": []},
        "not a record",
        None,
    ]
    path = tmp_path / f"data{suffix}"
    lines = [json.dumps(r) for r in records]
    path.write_text(f"[{','.join(lines)}]" if suffix == ".json" else "\n\n".join([*lines, "{bad"]))
    reader = read_data(Source(str(path), pictures), 100, 0)
    samples, skipped = read(reader)
    assert {s.id for s in samples} == {
        *(f"r-good{i}.png" for i in range(5)),
        "r-['good1.png', 'good2.png']",
        "r-good5.png",
    }
    assert all(s.answers == ("A thing.",) for s in samples)
    assert all(image.mode == "RGB" for s in samples for image in s.images)
    assert sorted(len(s.images) for s in samples) == [1] * 6 + [2]
    assert len(reader.skipped) == len(records) - 7 + (suffix == ".jsonl")
    assert all(name in skipped for name in BROKEN)
    assert "2 places for images" in skipped
    assert "it has no question" in skipped and "it has no image" in skipped
    assert all(line.startswith(path.name) for line in reader.skipped)


def test_the_sample_is_random_but_the_same_for_a_seed(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record("good1.png", id=i) for i in range(50)]))

    def ids(seed: int) -> list[str]:
        return [s.id for s in read_data(Source(str(path), pictures), 10, seed)]

    assert ids(0) == ids(0)
    assert len(ids(0)) == 10
    assert ids(0) != ids(1)


def test_images_beside_the_file_are_found(pictures: Path) -> None:
    (pictures / "data.json").write_text(json.dumps([record("good1.png")]))
    assert len(list(read_data(Source(str(pictures / "data.json")), 5, 0))) == 1


@pytest.mark.parametrize("kind", ["prompts.jsonl", "prompts.txt"])
def test_a_folder_with_prompts(kind: str, pictures: Path) -> None:
    names = [f"good{i}.png" for i in range(6)] + list(BROKEN)
    if kind == "prompts.txt":
        lines = [f"{name}\tWhat is it?" for name in names] + ["good1.png without a tab"]
    else:
        lines = [json.dumps({"image": name, "prompt": "What is it?"}) for name in names]
        lines += ["{bad", '{"image": "good1.png"}', "[1]"]
    (pictures / kind).write_text("\n".join(lines))
    reader = read_data(Source(str(pictures)), 100, 0)
    samples, skipped = read(reader)
    assert {s.id for s in samples} == set(names[:6])
    assert {s.prompt for s in samples} == {"What is it?"}
    assert all(name in skipped for name in BROKEN)
    assert len(reader.skipped) == len(lines) - 6


def test_reading_stops_when_there_is_enough_or_no_hope() -> None:
    tried = []

    def candidate(i: int, good: bool) -> Any:
        def load() -> Sample:
            tried.append(i)
            if not good:
                raise AlvtsError("broken")
            return Sample(str(i), [], "?")

        return str(i), load

    assert len(list(Reader("x", (candidate(i, True) for i in range(1000)), 7))) == 7
    assert len(tried) == 7
    tried.clear()
    assert list(Reader("x", (candidate(i, False) for i in range(1000)), 7)) == []
    assert len(tried) == 100


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("none.json", "there is no file"),
        ("broken.json", "is not JSON"),
        ("object.json", "is not a list of records"),
        ("binary.jsonl", "is not UTF-8"),
        ("bare", "none of prompts.jsonl, prompts.txt"),
        ("none.parquet", "there is no file"),
        ("broken.parquet", "cannot read the data set broken.parquet"),
        ("not/there/at/all", "no data 'not/there/at/all'"),
        ("a:b:c:d", "no data"),
        ("", "no data '': give"),
        ("bare.text", "its name must end in one of .json, .jsonl, .csv, .parquet"),
        ("ending", "its name must end in one of"),
        ("pipe.jsonl", "it is a device or a pipe"),
    ],
)
def test_data_that_is_not_there(
    data: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.parquet").write_text("words")
    (tmp_path / "bare").mkdir()
    for name in ("bare.text", "ending"):
        (tmp_path / name).write_text("[]")
    os.mkfifo(tmp_path / "pipe.jsonl")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlvtsError, match=words):
        read_data(Source(data), 5, 0)


def test_image_folders_that_make_no_sense(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[]")
    with pytest.raises(AlvtsError, match="there is no image folder"):
        read_data(Source(str(path), tmp_path / "none"), 5, 0)
    for data in ("pocket", str(pictures)):
        with pytest.raises(AlvtsError, match="an image folder goes with"):
            read_data(Source(data, pictures), 5, 0)


def test_nothing_but_the_hub_needs_a_network(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", None)
    (pictures / "prompts.txt").write_text("good1.png\tWhat?")
    assert len(list(read_data(Source(str(pictures)), 5, 0))) == 1
    assert len(list(read_data(Source("pocket"), 5, 0))) == 5


def test_the_draw_is_what_it_always_was(tmp_path: Path, pictures: Path) -> None:
    """Artifacts name their samples by a digest of the ids in this order."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record("good1.png", id=i) for i in range(50)]))
    drawn = [s.id for s in read_data(Source(str(path), pictures), 6, 0)]
    order = list(range(50))
    random.Random(0).shuffle(order)
    assert drawn == [str(i) for i in order[:6]]
    whole = read_data(Source(str(path), pictures), None, None)
    assert [s.id for s in whole] == [str(i) for i in range(50)] and whole.total == 50


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_error(suffix: str, pictures: Path) -> None:
    path = pictures / f"data{suffix}"
    line = json.dumps({"image": "good1.png", "question": "What?"})
    text = {".json": f"[{line}]", ".jsonl": line, ".csv": "image,question\ngood1.png,What?"}
    path.write_text(text[suffix], encoding="utf-8-sig")
    samples, skipped = read(read_data(Source(str(path)), None, None))
    assert [s.prompt for s in samples] == ["What?"] and skipped == ""


def test_csv_is_taken_as_it_is_written(pictures: Path) -> None:
    lines = (
        "id,image,question,answer,kind",
        '007,good1.png,"Which one,\nthe left?",None,side',
        "8,good2.png,What?,1.0,",
        "9,good2.png,What?,1,b,one field too many",
        "10,good2.png",
        "11,missing.png,What?,1,b",
    )
    (pictures / "data.csv").write_text("\n".join(lines))
    samples, skipped = read(read_data(Source(str(pictures / "data.csv")), None, None))
    assert [(s.id, s.answers, s.kind) for s in samples] == [
        ("007", ("None",), "side"),
        ("8", ("1.0",), ""),
    ]
    assert samples[0].prompt == "Which one,\nthe left?"
    for words in ("data.csv:5: it has more fields", "data.csv:6: it has no question", "missing"):
        assert words in skipped


def test_a_long_field_of_csv_is_read(pictures: Path) -> None:
    lines = ["image,question", "good1.png,What?", f"good2.png,{'so ' * 50_000}?", "good3.png,Who?"]
    (pictures / "data.csv").write_text("\n".join(lines))
    samples, skipped = read(read_data(Source(str(pictures / "data.csv")), None, None))
    assert [len(s.prompt) for s in samples] == [5, 150_001, 4] and skipped == ""


@pytest.mark.parametrize("name", ["UP.JSONL", "Up.Json", "UP.CSV", "UP.PARQUET"])
def test_the_case_of_an_ending_is_nothing(name: str, pictures: Path) -> None:
    lower = name.lower()
    line = json.dumps({"image": "good1.png", "question": "What?"})
    if lower.endswith(".parquet"):
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list([json.loads(line)]).to_parquet(str(pictures / name))
    else:
        text = {
            "up.jsonl": line,
            "up.json": f"[{line}]",
            "up.csv": "image,question\ngood1.png,What?",
        }
        (pictures / name).write_text(text[lower])
    samples, _ = read(read_data(Source(str(pictures / name)), None, None))
    assert [s.prompt for s in samples] == ["What?"]


def test_numbers_are_right_answers_too(pictures: Path) -> None:
    answers = [3, 2.5, [3, "three"], -1, 0]
    records = [{"image": "good1.png", "text": "How many?", "answer": one} for one in answers]
    (pictures / "data.json").write_text(json.dumps(records))
    source = Source(str(pictures / "data.json"), answered=True)
    samples, skipped = read(read_data(source, None, None))
    expected = [("3",), ("2.5",), ("3", "three"), ("-1",), ("0",)]
    assert [s.answers for s in samples] == expected and skipped == ""


def test_a_damaged_file_is_told_once(tmp_path: Path) -> None:
    """What reads it would log the same before."""
    pytest.importorskip("datasets")
    (tmp_path / "broken.parquet").write_text("words")
    code = "from alvts_cli.cli import main; main()"
    line = [sys.executable, "-c", code, "run", "--data", "broken.parquet", "--out", "out.jsonl"]
    surroundings = {k: v for k, v in os.environ.items() if k != "DATASETS_VERBOSITY"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=surroundings)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cannot read the data set broken.parquet: ")


def test_columns_are_found_or_told(pictures: Path) -> None:
    record = {"img": "good1.png", "q": "What?", "a": ["A", "B"], "image": "missing.png"}
    path = pictures / "data.jsonl"
    path.write_text(json.dumps(record))
    told = parse_columns("image=img, question=q,answer=a")
    (sample,) = read_data(Source(str(path), columns=told), None, None)
    assert (sample.id, sample.prompt, sample.answers) == ("good1.png", "What?", ("A", "B"))
    _, skipped = read(read_data(Source(str(path)), None, None))
    assert "it has no question; of its columns (img, q, a, image), name" in skipped
    for part in ("question", "answer", "id", "kind"):
        named = {"image": "img", "question": "q", part: "asked"}
        _, skipped = read(read_data(Source(str(path), columns=named), None, None))
        assert f"it has no {part}; of its columns (img, q, a, image), no column asked" in skipped
    assert parse_columns(None) == {}
    for text in ("", "image", "picture=img", "image=", "image=a,image=b"):
        with pytest.raises(AlvtsError, match="PART=COLUMN"):
            parse_columns(text)


def test_no_picture_from_outside_of_the_folder(pictures: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    Image.new("RGB", (9, 9)).save(outside)
    (pictures / "link.png").symlink_to(outside)
    (pictures / "linked").symlink_to(tmp_path)
    (pictures / "within.png").symlink_to("good1.png")
    names = [str(outside), "../secret.png", "link.png", "linked/secret.png", "a\0b.png"]
    inner = str(pictures / "good1.png")
    lines = [json.dumps({"image": n, "text": "?"}) for n in (*names, inner, "within.png")]
    (pictures / "data.jsonl").write_text("\n".join(lines))
    samples, skipped = read(read_data(Source(str(pictures / "data.jsonl")), None, None))
    assert [s.id for s in samples] == ["within.png"]
    assert skipped.count("lies outside of the image folder") == 6


def test_a_half_character_is_one_broken_record(pictures: Path) -> None:
    (pictures / "data.jsonl").write_text(
        '{"image": "good1.png", "text": "\\ud800?"}\n' + "[" * 100_000
    )
    samples, skipped = read(read_data(Source(str(pictures / "data.jsonl")), None, None))
    assert samples == []
    assert "'question.0.value': Input should be Unicode" in skipped and "it is not JSON" in skipped


def _said(*turns: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"from": speaker, "value": value} for speaker, value in turns]


_LATER = (("human", "Sure?"), ("gpt", "Yes."))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        # A broken first turn must not make a later one the first.
        ({"conversations": _said(("human", 7), ("gpt", "A"), *_LATER)}, "question.0.value"),
        ({"conversations": _said(("human", None), ("gpt", "A"), *_LATER)}, "question.0.value"),
        ({"conversations": _said((7, "What?"), ("gpt", "A"), *_LATER)}, "question.0.from"),
        ({"conversations": [{"value": "What?"}, *_said(*_LATER)]}, "question.0.from"),
        ({"conversations": [3, *_said(*_LATER)]}, "question.0.value"),
        ({"conversations": _said(("human", "What?"), ("gpt", ["A"]))}, "question.1.value"),
        ({"conversations": {"from": ["human"], "value": ["What?"]}}, "question.0.from"),
        ({"conversations": _said(("gpt", "A"))}, "it has no question"),
        ({"conversations": _said(("human", " "), ("gpt", "A"))}, "it has no question"),
        ({"text": 10**400}, "question.0.value"),
        ({"text": True}, "question.0.value"),
        ({"image": 10**400}, "image.0.path"),
        ({"image": "good1.png\ud800"}, "image.0.path': Input should be Unicode"),
        ({"image": ["good1.png", ["good1.png"]]}, "image.1.path"),
        ({"image": {"path": 7}}, "image.0.path"),
        ({"image": {"path": "good1.png", "bytes": "words"}}, "image.0.bytes"),
        ({"image": {"path": None}}, "its image holds no picture"),
        ({"image": " "}, "it has no image"),
        ({"image": "a\nb.png"}, "there is no image"),
        ({"text": None, "a\nb": 1}, "of its columns"),
        ({"answer": True}, "answer.0"),
        ({"answer": [3, math.nan]}, "answer.1"),
        ({"answer": [{"answer": "A"}]}, "answer.0"),
        ({"answer": ["A", "\ud800"]}, "answer.1': Input should be Unicode"),
        ({"answer": ["", " "]}, "it has no answer"),
    ],
)
def test_a_part_that_is_not_what_it_should_be_is_named(
    changed: dict[str, Any], words: str, pictures: Path
) -> None:
    record = {"image": "good1.png", "text": "What?", "answer": "A", **changed}
    (pictures / "data.json").write_text(json.dumps([record]))
    source = Source(str(pictures / "data.json"), answered=True)
    samples, skipped = read(read_data(source, None, None))
    assert samples == [] and words in skipped and skipped.startswith("data.json[0]: ")


@pytest.mark.parametrize("deep", [200, 100_000])
@pytest.mark.parametrize("part", ["image", "text", "answer", "id", "kind", "x"])
def test_deep_nesting_is_at_most_a_broken_record(part: str, deep: int, pictures: Path) -> None:
    record = {"image": '"good1.png"', "text": '"What?"', "answer": '"A"'}
    record[part] = "[" * deep + "]" * deep
    line = ", ".join(f'"{name}": {value}' for name, value in record.items())
    (pictures / "data.jsonl").write_text(f"{{{line}}}")
    source = Source(str(pictures / "data.jsonl"), answered=True)
    samples, skipped = read(read_data(source, None, None))
    assert bool(samples) == (deep == 200 and part in ("id", "kind", "x"))
    assert len(skipped) < 300


def test_what_is_not_asked_for_may_be_of_any_type(pictures: Path) -> None:
    records = [
        {"image": "good1.png", "text": "What?", "label": 3, "kind": [1], "id": 10**400},
        {"image": ["good1.png", None], "text": ["What?"], "answers": [{"answer": "A"}, "B"]},
    ]
    (pictures / "data.json").write_text(json.dumps(records))
    samples, skipped = read(read_data(Source(str(pictures / "data.json")), None, None))
    assert skipped == "" and [s.prompt for s in samples] == ["What?"] * 2
    assert [(s.id, s.answers, s.kind) for s in samples] == [
        (str(10**400), (), ""),
        ("good1.png", ("B",), ""),
    ]


def test_a_folder_of_pictures_with_one_prompt_for_all(pictures: Path) -> None:
    reader = read_data(Source(str(pictures), prompt="What is it?"), None, None)
    samples, skipped = read(reader)
    assert [s.id for s in samples] == [f"good{i}.png" for i in range(6)]
    assert {s.prompt for s in samples} == {"What is it?"}
    assert all(name in skipped for name in BROKEN if name != "missing.png")
    # A prompt of its own comes first.
    (pictures / "prompts.txt").write_text("good1.png\tWhich?\ngood2.png\n")
    both = read_data(Source(str(pictures), prompt="What is it?"), None, None)
    assert [s.prompt for s in both] == ["Which?", "What is it?"]


@pytest.fixture
def own_set(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set as it lies on the hub: Parquet, two configurations, two splits."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05)
    folder = tmp_path / "set"
    names = ["good1.png", "cut.png", "good2.png", "missing.png"]
    pictured = [{"bytes": (pictures / n).read_bytes(), "path": n} for n in names[:3]]
    pictured.append({"bytes": None, "path": "/etc/hostname"})
    for config in ("plain", "other"):
        for split in ("train", "test"):
            rows = {
                "image": pictured,
                "question": [f"{config} {split} {i}?" for i in range(4)],
                "answer": [["A", "B"]] * 4,
            }
            features = {
                "image": datasets.Image(),
                "question": datasets.Value("string"),
                "answer": datasets.List(datasets.Value("string")),
            }
            made = datasets.Dataset.from_dict(rows, datasets.Features(features))
            (folder / config).mkdir(parents=True, exist_ok=True)
            made.to_parquet(folder / config / f"{split}.parquet")
    configs = [
        f"- config_name: {c}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {c}/{s}.parquet\n" for s in ("train", "test"))
        + ("  default: true\n" if c == "plain" else "")
        for c in ("plain", "other")
    ]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    return folder


@pytest.mark.parametrize("stream", [True, False])
def test_a_data_set(stream: bool, own_set: Path) -> None:
    def asked(data: str) -> list[str]:
        reader = read_data(Source(data, stream=stream), None, None)
        samples, skipped = read(reader)
        assert all(s.answers == ("A", "B") and s.images[0].mode == "RGB" for s in samples)
        assert len(reader.skipped) == 2
        assert "[1]" in skipped and "/etc/hostname" in skipped
        return [s.prompt for s in samples]

    assert asked(str(own_set)) == ["plain train 0?", "plain train 2?"]
    assert asked(f"{own_set}:test") == ["plain test 0?", "plain test 2?"]
    assert asked(f"{own_set}:other:test") == ["other test 0?", "other test 2?"]
    assert asked(f"{own_set}:other:") == ["other train 0?", "other train 2?"]
    assert asked(str(own_set / "other" / "test.parquet")) == ["other test 0?", "other test 2?"]
    for wrong in (f"{own_set}:valid", f"{own_set}:third:test"):
        with pytest.raises(AlvtsError, match="cannot read the data set") as caught:
            read_data(Source(wrong, stream=stream), None, None)
        assert "\n" not in str(caught.value)


def test_a_stream_is_shuffled_by_the_seed(own_set: Path) -> None:
    def order(seed: int) -> list[str]:
        return [s.prompt for s in read_data(Source(str(own_set)), 2, seed)]

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(8)}) == 2


def test_a_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(AlvtsError, match=r"cannot read the data set org/set.*is there a network"):
        read_data(Source("org/set"), 5, 0)


def test_text_files_do_without_the_datasets_package(pictures: Path) -> None:
    (pictures / "prompts.txt").write_text("good1.png\tWhat?")
    code = (
        "import sys; from alvts_cli.data import *;"
        f"print(len(list(read_data(Source({str(pictures)!r}), 5, 0))));"
        "list(read_data(Source('pocket'), 2, 0));"
        "sys.exit('datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
