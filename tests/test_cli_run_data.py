"""`alvts run --data`: every answer once, whatever happens."""

import json
import math
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import asdict
from functools import partial

import pytest
from cli_tools import alvts, model_folder, refused, scene_file
from PIL import Image

from alvts_cli.errors import AlvtsError
from alvts_cli.models import load_model
from alvts_cli.spread import Group

PROMPTS = ["is there a circle?", "what color is the circle?", "<image> how many red objects?"]


@pytest.fixture
def questions(tmp_path):
    """Ten questions of three lengths about two pictures, and two broken ones."""
    (tmp_path / "a.png").write_bytes(scene_file().read_bytes())
    Image.new("RGB", (60, 30), "red").save(tmp_path / "b.png")
    records = [
        {"id": f"q{i}", "image": "ab"[i % 2] + ".png", "text": PROMPTS[i % 3]} for i in range(10)
    ]
    records.insert(3, {"id": "gone", "image": "c.png", "text": "is it there?"})
    records.insert(7, {"id": "long", "image": "a.png", "text": "is it " * 5000})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def command(data, out, *more):
    setup = ("--model", model_folder(), "--max-new-tokens", 4, "--batch", 4)
    return ("run", "--data", data, "--out", out, *setup, *more)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_answer_is_that_of_a_single_run(questions, tmp_path):
    out = tmp_path / "answers.jsonl"
    result = alvts(*command(questions, out))
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"10 answers in {out}; 2 skipped; ")
    for words in ("answers and", "new tokens a second", "40 new tokens", "256.0 a question"):
        assert words in result.stdout
    assert "skipped 2 samples:" in result.stderr
    assert "questions.jsonl:4: there is no image" in result.stderr
    assert "questions.jsonl:8: prompt and images make" in result.stderr
    found = rows(out)
    assert [row["index"] for row in found] == [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert [row["id"] for row in found] == [f"q{i}" for i in range(10)]
    assert len({row["text_tokens"] for row in found}) > 1
    for row in found[:4]:
        picture = tmp_path / ("ab"[int(row["id"][1:]) % 2] + ".png")
        asked = ("--image", picture, "--prompt", row["prompt"], "--max-new-tokens", 4, "--json")
        one = json.loads(alvts("run", "--model", model_folder(), *asked).stdout)
        shared = ("answer", "new_tokens", "text_tokens", "visual_tokens", "visual_tokens_kept")
        assert {k: row[k] for k in shared} == {k: one[k] for k in shared}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *("a.png", "answers.jsonl", "b.png", "questions.jsonl")
    ]


def test_parquet_dense_and_totals(questions, tmp_path):
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "answers.parquet"
    result = alvts(*command(questions, out, "--dense", "--samples", 5, "--json"))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["answers"], told["skipped"], told["kept_from_before"]) == (4, 1, 0)
    assert told["visual_tokens_kept"] == 256
    found = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
    assert found["id"] == ["q0", "q1", "q2", "q3"]


KILLED = """
import os, signal
from alvts_cli import bulk
from alvts_cli.cli import main

add = bulk.Journal.add

def add_and_die(journal, lines):
    add(journal, lines)
    if len(journal.lines) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

bulk.Journal.add = add_and_die
main()
"""


def test_killed_and_given_again_no_answer_is_lost_or_doubled(tmp_path):
    def told(out):
        return command("pocket", out, "--samples", 12, "--batch", 2)

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert alvts(*told(whole)).exit_code == 0
    journal = tmp_path / "out.jsonl.partial"
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, told(out))], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    there = journal.read_bytes()
    lines = there.count(b"\n")
    assert lines == 1 + 4
    # Cut within the last line, as a kill in the middle of writing would.
    journal.write_bytes(there[:-7])
    result = alvts(*told(out), "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kept_from_before"] == lines - 2
    assert out.read_bytes() == whole.read_bytes()
    assert [row["index"] for row in rows(out)] == list(range(12))
    assert not journal.exists()


def test_what_was_begun_otherwise_is_not_gone_on_with(questions, tmp_path, monkeypatch):
    from alvts_cli import bulk

    out = tmp_path / "answers.jsonl"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "_answer", interrupt)
        result = alvts(*command(questions, out))
    assert result.exit_code == 130
    assert "give the same command again" in result.stderr
    line = refused(*command(questions, out, "--keep", "0.5"))
    assert "made with other keep" in line
    questions.write_text(questions.read_text() + "\n")
    assert "made with other data" in refused(*command(questions, out))
    journal = tmp_path / "answers.jsonl.partial"
    line = dict(index=0, id="0", prompt="p", answer="a", new_tokens=1, text_tokens=1)
    line |= dict(visual_tokens=9, visual_tokens_kept=3.0, digest="d")
    odd = [dict(index="x"), dict(index=-1), dict(new_tokens="many"), dict(answer="\ud800")]
    odd += [dict(answer=None), dict(visual_tokens=0), dict(visual_tokens_kept=math.nan)]
    there = journal.read_bytes()
    lines = [there + json.dumps(line | wrong).encode() + b"\n" for wrong in odd]
    lines.append(there + b'{"index": 0}\n')
    for broken in (b"[]\n", b"{\n", b"\xff\n", there + b"3\n", *lines):
        journal.write_bytes(broken)
        assert "is damaged; delete it" in refused(*command(questions, out))
    questions.write_text(questions.read_text().removesuffix("\n"))
    journal.write_bytes(there + json.dumps(line | dict(index=12)).encode() + b"\n")
    for fewer in ((), ("--samples", 13)):
        told = refused(*command(questions, out, *fewer))
        assert "it answers record 12, which is not of this data (12 records" in told
    assert not out.exists()
    journal.unlink()
    held = bulk.Journal(out, {})
    assert "another run is writing" in refused(*command(questions, out))
    held.close()


def test_answers_to_other_records_are_not_gone_on_with(questions, tmp_path, monkeypatch):
    """Of a folder, what is known of the run as a whole is the name."""
    from alvts_cli import bulk

    folder, out = tmp_path / "C", tmp_path / "answers.jsonl"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    records = [json.loads(line) for line in questions.read_text().splitlines()]
    records = [record for record in records if record["id"].startswith("q")]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, records)))
    asked = command(folder, out, "--batch", 1)
    add = bulk.Journal.add

    def add_and_stop(journal, lines):
        add(journal, lines)
        if len(journal.lines) == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bulk.Journal, "add", add_and_stop)
        assert alvts(*asked).exit_code == 130
    there, picture = prompts.read_bytes(), (folder / "b.png").read_bytes()

    def others(name):
        told = refused(*asked)
        assert f"the words or the picture of {name} are not those that it answers" in told
        assert "give the same data, or delete it to start anew" in told

    # The first window, of eight, is answered; the second is not, but for one record.
    prompts.write_bytes(there.replace(b"is there a circle?", b"is there a square?", 1))
    others("prompts.jsonl:1")
    prompts.write_bytes(there.replace(b"q8", b"q88"))
    others("prompts.jsonl:9")
    prompts.write_bytes(there)
    Image.new("RGB", (60, 30), "blue").save(folder / "b.png")
    others("prompts.jsonl:2")
    (folder / "b.png").unlink()
    others("prompts.jsonl:2")
    (folder / "b.png").write_bytes(picture)
    journal = tmp_path / "answers.jsonl.partial"
    whole = journal.read_text()
    made, *lines = [json.loads(line) for line in whole.splitlines()]
    del made["format"]
    for line in lines:
        del line["digest"]
    journal.write_text("".join(f"{json.dumps(one)}\n" for one in (made, *lines)))
    assert "another version of alvts made it; delete it to start anew" in refused(*asked)
    journal.write_text(whole)
    result = alvts(*asked)
    assert result.exit_code == 0 and "9 of them from before" in result.stdout
    assert len(rows(out)) == 10 and not any("digest" in row for row in rows(out))


@pytest.mark.parametrize("total", [3, None])
def test_an_answer_beyond_the_data_is_not_gone_on_with(total, tmp_path):
    """Also where it is known only at the end of a stream how many records there are."""
    from alvts_cli.bulk import Job, Journal, Line, answer_all
    from alvts_cli.data import Reader, Sample
    from alvts_cli.digests import of_question

    job = Job(load_model(str(model_folder()), "cpu"), None, None, 4, 2, Group())
    samples = [Sample(str(i), [Image.new("RGB", (4, 4))], "what?") for i in range(4)]
    before = [
        asdict(Line(i, s.id, s.prompt, "a", 1, 2, 3, 1.5, of_question(s.images, s.id, s.prompt)))
        for i, s in enumerate(samples)
    ]

    def answered(limit):
        reader = Reader("x", ((s.id, partial(next, iter([s]))) for s in samples[:3]), limit, total)
        return answer_all(job, reader, limit, journal, lambda n: None)

    with closing(Journal(tmp_path / "out.jsonl", {})) as journal:
        journal.add(before[:3])
        answered(None)
        journal.add(before)
        # What a limit leaves out was answered with a larger one.
        for limit in (2, 3):
            answered(limit)
        for limit in (None, 4):
            with pytest.raises(
                AlvtsError, match=r"record 3, which is not of this data \(3 records"
            ):
                answered(limit)


def test_a_folder_of_pictures(questions, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(scene_file().read_bytes())
    out = tmp_path / "answers.jsonl"
    assert "none of prompts.jsonl" in refused(*command(folder, out))
    result = alvts(*command(folder, out, "--prompt", "is there a circle?"))
    assert result.exit_code == 0, result.output
    assert [row["id"] for row in rows(out)] == ["0.png", "1.png", "2.png"]
    asked = ("--image", folder, "--prompt", "is there a circle?", "--max-new-tokens", 1, "--json")
    one = alvts("run", "--model", model_folder(), *asked)
    assert json.loads(one.stdout)["visual_tokens"] == 3 * 256


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (("--data", "x.json"), "--out"),
        (("--data", "x.json", "--out", "a.txt"), "--out"),
        (("--data", "x.json", "--out", "a.jsonl", "--compare"), "--compare"),
        (("--data", "x.json", "--out", "a.jsonl", "--image", "x.png"), "--image"),
        (("--data", "x.json", "--out", "a.jsonl", "--columns", "what"), "--columns"),
        (("--image", "x.png", "--prompt", "what?", "--out", "a.jsonl"), "--out"),
        (("--image", "x.png", "--prompt", "what?", "--samples", "3"), "--samples"),
        (("--image", "x.png"), "--prompt"),
        (("--prompt", "what?"), "--image"),
        ((), "--image"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(more, word):
    assert word in refused("run", *more, code=2)


def test_data_that_give_no_answer_are_one_line(tmp_path, questions):
    out = tmp_path / "answers.jsonl"
    assert "no file" in refused(*command(tmp_path / "none.json", out))
    assert "--samples" in refused(*command("pocket", out))
    assert "cannot write" in refused(*command(questions, "/nowhere/answers.jsonl"))
    questions.write_text('{"image": "gone.png", "text": "what?"}')
    line = refused(*command(questions, out))
    assert "1 were skipped, such as questions.jsonl:1: there is no image" in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "questions.jsonl"]


def test_a_line_that_was_cut_is_dropped_for_good(tmp_path):
    from alvts_cli.bulk import Journal, Line

    def line(index):
        return asdict(Line(index, str(index), "what?", "a", 1, 2, 3, 1.5, "d"))

    out = tmp_path / "answers.jsonl"
    with closing(Journal(out, {"a": 1})) as journal:
        journal.add([line(0), line(1)])
    journal.path.write_bytes(journal.path.read_bytes()[:-3])
    for new in (1, 2):
        with closing(Journal(out, {"a": 1})) as journal:
            assert list(journal.lines) == list(range(new))
            journal.add([line(i) for i in range(new + 1)])
    assert journal.path.read_text().count("\n") == 4
