"""Calibration data of every kind, and what is broken in it."""

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from alvts_cli import AlvtsError
from calibration import Reader, Sample, read_data


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
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
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
    one, again = (list(read_data("pocket", None, 40, 3)) for _ in range(2))
    assert [s.id for s in one] == [s.id for s in again]
    assert [s.images[0].tobytes() for s in one] == [s.images[0].tobytes() for s in again]
    assert len({s.id for s in one}) == 40
    assert {s.id for s in one}.isdisjoint(s.id for s in read_data("pocket", None, 40, 4))
    assert len({s.prompt.split()[0] for s in one}) >= 4
    assert all(s.prompt and s.answer and len(s.images) == 1 for s in one)
    seeds = [int(s.id.split()[1]) for s in one]
    assert all(100_000_000 <= seed < 200_000_000 for seed in seeds)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_format(suffix: str, pictures: Path, tmp_path: Path) -> None:
    records: list[Any] = [record(f"good{i}.png") for i in range(5)]
    records.append(record(["good1.png", "good2.png"], "<image> or <image>?"))
    records += [record(name) for name in BROKEN]
    records += [
        {"id": "text only", "conversations": record("x")["conversations"]},
        record("good3.png", "no place for it"),
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
    reader = read_data(str(path), pictures, 100, 0)
    samples, skipped = read(reader)
    assert {s.id for s in samples} == {
        *(f"r-good{i}.png" for i in range(5)),
        "r-['good1.png', 'good2.png']",
    }
    assert all(s.answer == "A thing." for s in samples)
    assert all(image.mode == "RGB" for s in samples for image in s.images)
    assert sorted(len(s.images) for s in samples) == [1] * 5 + [2]
    assert len(reader.skipped) == len(records) - 6 + (suffix == ".jsonl")
    assert all(name in skipped for name in BROKEN)
    assert "2 places for images" in skipped and "0 places for images" in skipped
    assert "it has no question" in skipped and "it has no image" in skipped
    assert all(line.startswith(path.name) for line in reader.skipped)


def test_the_sample_is_random_but_the_same_for_a_seed(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record("good1.png", id=i) for i in range(50)]))

    def ids(seed: int) -> list[str]:
        return [s.id for s in read_data(str(path), pictures, 10, seed)]

    assert ids(0) == ids(0)
    assert len(ids(0)) == 10
    assert ids(0) != ids(1)


def test_images_beside_the_file_are_found(pictures: Path) -> None:
    (pictures / "data.json").write_text(json.dumps([record("good1.png")]))
    assert len(list(read_data(str(pictures / "data.json"), None, 5, 0))) == 1


@pytest.mark.parametrize("kind", ["prompts.jsonl", "prompts.txt"])
def test_a_folder_with_prompts(kind: str, pictures: Path) -> None:
    names = [f"good{i}.png" for i in range(6)] + list(BROKEN)
    if kind == "prompts.txt":
        lines = [f"{name}\tWhat is it?" for name in names] + ["good1.png without a tab"]
    else:
        lines = [json.dumps({"image": name, "prompt": "What is it?"}) for name in names]
        lines += ["{bad", '{"image": "good1.png"}', "[1]"]
    (pictures / kind).write_text("\n".join(lines))
    reader = read_data(str(pictures), None, 100, 0)
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
        ("bare", "neither a prompts.jsonl nor a prompts.txt"),
        ("words.csv", "no calibration data"),
        ("not/there/at/all", "no calibration data"),
    ],
)
def test_data_that_is_not_there(
    data: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "object.json").write_text("{}")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "words.csv").write_text("a,b")
    (tmp_path / "bare").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlvtsError, match=words):
        read_data(data, None, 5, 0)


def test_image_folders_that_make_no_sense(pictures: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[]")
    with pytest.raises(AlvtsError, match="there is no image folder"):
        read_data(str(path), tmp_path / "none", 5, 0)
    for data in ("pocket", str(pictures)):
        with pytest.raises(AlvtsError, match=r"\.json or \.jsonl"):
            read_data(data, pictures, 5, 0)


class Stream(list[Any]):
    """What `load_dataset` gives out, for as far as it is used."""

    def decode(self, enable: bool) -> "Stream":
        assert enable is False
        return self

    def shuffle(self, seed: int, buffer_size: int) -> "Stream":
        return Stream(reversed(self)) if seed else self


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    def load_dataset(name: str, split: str, streaming: bool) -> Any:
        assert (name, split, streaming) == ("org/set", "train", True)
        if isinstance(rows, Exception):
            raise rows
        return Stream(rows)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_a_set_of_the_hub(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def image(name: str) -> dict[str, Any]:
        return {"bytes": (pictures / name).read_bytes(), "path": None}

    turns = record("x")["conversations"]
    rows = [
        {"image": image("good1.png"), "question": "What?", "answer": "This."},
        {"images": [image("good2.png")], "conversations": turns, "id": 7},
        {"image": Image.new("L", (3, 3)), "text": "What?"},
        {"image": image("cut.png"), "question": "What?"},
        {"image": {"bytes": None, "path": "gone"}, "question": "What?"},
        {"image": image("good1.png")},
        {"question": "What?"},
    ]
    fake_datasets(monkeypatch, rows)
    reader = read_data("org/set", None, 100, 0)
    samples, skipped = read(reader)
    assert [s.prompt for s in samples] == ["What?", "<image>\nWhat is it?", "What?"]
    assert [s.answer for s in samples] == ["This.", "A thing.", None]
    assert samples[1].id == "7"
    assert all(s.images[0].mode == "RGB" for s in samples)
    assert len(reader.skipped) == 4
    assert "org/set[3]" in skipped


def test_a_set_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, ConnectionError("no route\nto host"))
    with pytest.raises(AlvtsError, match=r"org/set from the hub: no route; is there a network"):
        read_data("org/set", None, 5, 0)


def test_without_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AlvtsError, match=r"pip install 'alvts\[hub\]'"):
        read_data("org/set", None, 5, 0)


def test_nothing_but_the_hub_needs_a_network(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", None)
    (pictures / "prompts.txt").write_text("good1.png\tWhat?")
    assert len(list(read_data(str(pictures), None, 5, 0))) == 1
    assert len(list(read_data("pocket", None, 5, 0))) == 5
