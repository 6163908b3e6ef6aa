"""Reading questions with answers."""

import json

import pytest
from cli_tools import scene_file

from alvts_cli import AlvtsError
from alvts_cli.data import Source
from alvts_cli.evaluate.data import read_data


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(scene_file().read_bytes())
    return tmp_path


def llava(image, question, answer, **more):
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "x", "image": image, "conversations": said, **more}


def write(path, records, lines=False):
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path.write_text(text)
    return str(path)


def test_pocket_asks_every_kind_as_often():
    data = read_data(Source("pocket"), 23, 0)
    assert (len(data.items), data.scoring, data.max_new_tokens) == (21, "exact", 4)
    kinds = [item.kind for item in data.items]
    assert {kinds.count(kind) for kind in kinds} == {3}
    assert len({item.id for item in data.items}) == 21
    assert data.items[0].images()[0].size == (192, 192)


def test_turns_ask_what_pocket_asks_behind_two_other_questions():
    data, alone = (read_data(Source(name), 140, 0) for name in ("pocket-turns", "pocket"))
    assert (len(data.items), data.scoring, data.max_new_tokens) == (140, "exact", 4)
    for one, single in zip(data.items, alone.items, strict=True):
        assert (one.question, one.answers) == (single.question, single.answers)
        assert one.images()[0].tobytes() == single.images()[0].tobytes()
        assert len({one.question, *(question for question, _ in one.earlier)}) == 3
        assert not single.earlier


def test_scenes_to_be_described():
    data = read_data(Source("pocket-described"), 5, 0)
    assert (len(data.items), data.scoring, data.max_new_tokens) == (5, "phrases", 64)
    assert {item.question for item in data.items} == {"describe the picture."}
    (answer,) = data.items[0].answers
    assert answer.count(",") >= 1 and all(part.startswith("a ") for part in answer.split(", "))


def test_easy_vqa():
    pytest.importorskip("easy_vqa")
    data = read_data(Source("easy-vqa"), 40, 0)
    assert len(data.items) == 40
    assert {item.kind for item in data.items} <= {"yes/no", "color", "shape"}
    assert data.items[0].images()[0].size == (64, 64)


@pytest.mark.parametrize("lines", [False, True])
def test_llava_format(folder, lines):
    path = write(
        folder / "set.json",
        [
            llava("a.png", "<image>\nwhat color?", "red"),
            llava(["a.png", "b.png"], "is <image> in <image>?", "no", kind="pairs"),
        ],
        lines,
    )
    data = read_data(Source(path), 10, 0)
    assert (data.name, data.scoring, data.max_new_tokens) == ("set.json", "exact", 16)
    assert [item.kind for item in data.items] == ["set", "pairs"]
    assert [item.answers for item in data.items] == [("red",), ("no",)]
    assert [len(item.images()) for item in data.items] == [1, 2]


def test_pope_format_with_an_image_folder(folder, tmp_path):
    records = [
        {"question_id": i, "image": "a.png", "text": f"Is there a {i}?", "label": "yes"}
        for i in range(9)
    ]
    (tmp_path / "questions").mkdir()
    path = write(tmp_path / "questions" / "coco_pope_random.json", records, lines=True)
    data = read_data(Source(path, folder), 4, 0)
    assert data.scoring == "yes-no"
    assert len(data.items) == 4
    assert data.items[0].kind == "coco_pope_random"
    # Drawn by the seed.
    ids = [item.id for item in data.items]
    assert ids == [item.id for item in read_data(Source(path, folder), 4, 0).items]
    assert ids != [item.id for item in read_data(Source(path, folder), 4, 1).items]
    assert read_data(Source(path, folder), 4, 0, "exact").scoring == "exact"


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ([llava("c.png", "<image> x", "y")], "set.json[0]: there is no image"),
        ([llava("a.png", "x", "")], "no answer"),
        ([llava("a.png", "<image> <image>", "y")], "2 places for images (<image>), but it has 1"),
        ([{"image": "a.png", "text": "x"}], "no answer"),
        ([{"text": "x", "label": "y"}], "no image"),
        ([3], "not a record"),
        ([], "no question in"),
    ],
)
def test_a_set_of_bad_records_alone_is_refused(folder, records, word):
    path = write(folder / "set.json", records)
    with pytest.raises(AlvtsError) as caught:
        read_data(Source(path), 10, 0)
    assert word in str(caught.value)


def test_bad_files(folder):
    (folder / "bad.json").write_text("{")
    (folder / "binary.json").write_bytes(b"\xff\xfe")
    for data, image_folder, word in (
        (str(folder / "bad.json"), None, "not JSON"),
        (str(folder / "binary.json"), None, "UTF-8"),
        (str(folder / "none.json"), None, "no file"),
        (str(folder / "bad.json"), folder / "none", "no image folder"),
        (str(folder), None, "none of prompts.jsonl"),
        ("what is this?", None, "no data"),
    ):
        with pytest.raises(AlvtsError, match=word):
            read_data(Source(data, image_folder), 10, 0)


def test_broken_records_are_left_out_and_named(folder):
    (folder / "cut.png").write_bytes(scene_file().read_bytes()[:200])
    records = [
        llava("a.png", "<image> which?", "A"),
        llava("cut.png", "<image> which?", "A"),
        llava("a.png", "<image> which?", ""),
        3,
        llava("b.png", "<image> which?", "B"),
    ]
    data = read_data(Source(write(folder / "set.json", records)), 2, 0)
    assert sorted(item.id for item in data.items) == ["set.json[0]", "set.json[4]"]
    lines = "\n".join(read_data(Source(write(folder / "set.json", records)), 10, 0).skipped)
    for words in ("set.json[1]: cannot read the image", "[2]: it has no answer", "not a record"):
        assert words in lines
