"""Nothing that a terminal would obey, and nothing that rich would read as markup, is printed."""

import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from cli_tools import alvts, model_folder, refused, scene_file

from alvts_cli import cli
from alvts_cli.artifact import load_artifact, save_artifact
from alvts_cli.terminal import console, one_line, safe, say

EVIL = "\x1b]0;owned\x07 \x9b2J\u202e [/red] [bold]x[/bold] :smile: \x7f\r\b"


def test_control_characters_are_escapes() -> None:
    assert safe("a\tb\nc \u00e9 \u4e2d") == "a\tb\nc \u00e9 \u4e2d"
    assert safe("\x1b[31m\x9b\x7f\u202e\ud800") == "\\x1b[31m\\x9b\\x7f\\u202e\\ud800"
    assert safe(safe(EVIL)) == safe(EVIL)
    assert one_line(" a\n\x1b b ") == "a \\x1b b"


def test_tables_lines_and_texts_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(EVIL, title=EVIL)
    table.add_row(EVIL)
    table.add_row(Text(EVIL))
    out = console()
    out.width = 200
    out.print(table, EVIL)
    say(EVIL)
    say(EVIL, error=True)
    said = capsys.readouterr()
    for text in said:
        assert "[/red] [bold]x[/bold] :smile:" in text and "\\x1b]0;owned\\x07" in text
        assert safe(text) == text
    # The frame is as wide as what stands in it.
    frame = [line for line in said.out.splitlines() if line[:1] in "┏┃┡│└"]
    assert len({len(line) for line in frame}) == 1


@pytest.mark.parametrize("error", [False, True])
def test_a_file_gets_whole_tables(
    error: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.table import Table

    monkeypatch.setenv("COLUMNS", "80")
    table = Table(*("x" * 30 for _ in range(10)))
    table.add_row(*("y" * 30 for _ in range(10)))
    console(error).print(table)
    said = capsys.readouterr()
    assert (said.err if error else said.out).count("y" * 30) == 10


def test_a_terminal_still_gets_its_colours() -> None:
    out = console()
    out.file = io.StringIO()
    out._force_terminal, out._color_system = True, out._detect_color_system()
    out.print("x", style="bold")
    assert "x" in out.file.getvalue()


def _evil_artifact(path: Path) -> Path:
    from dataclasses import replace

    made = load_artifact(model_folder() / "selectors.safetensors")
    record = replace(made.calibration, data=EVIL, settings={EVIL: EVIL}, versions={EVIL: EVIL})
    made = replace(made, model_id=EVIL, family=EVIL, revision=EVIL, calibration=record)
    save_artifact(made, path)
    return path


def test_names_in_an_artifact(tmp_path: Path) -> None:
    file = _evil_artifact(tmp_path / "a.safetensors")
    told = alvts("info", file)
    assert told.exit_code == 0, told.output
    assert safe(told.stdout) == told.stdout and "\\x1b]0;owned" in told.stdout
    other = model_folder(seed=1)
    more = ("--image", scene_file(), "--prompt", "x", "--selectors", file)
    line = refused("run", "--model", other, *more)
    assert safe(line) == line and "made for \\x1b]0;owned" in line


def test_a_models_name_with_markup_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("[bold]x[").symlink_to(model_folder())
    asked = ("--methods", "random", "--keep", "0.5", "--samples", "7", "--json", "a.json")
    result = alvts("eval", "--model", "[bold]x[", *asked)
    assert result.exit_code == 0, result.output
    assert "[bold]x[" in result.stdout
    assert json.loads(Path("a.json").read_text())["settings"]["model"] == "[bold]x["


@pytest.mark.parametrize("name", ["\x1b[2J.png", "no\x07ne.png"])
def test_the_name_of_a_picture_and_a_prompt(name: str, tmp_path: Path) -> None:
    line = refused("run", "--image", tmp_path / name, "--prompt", "x")
    assert safe(line) == line
    result = alvts("run", "--image", scene_file(), "--prompt", f"is it {EVIL}?", "--dense")
    assert result.exit_code == 0 and safe(result.output) == result.output


def test_json_on_standard_output_is_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = ("--methods", "random", "--keep", "0.5", "--samples", "7", "--json", "-")
    gate = ("--gate", "random@0.5.tokens>=1")
    result = alvts("eval", "--model", model_folder(), *asked, *gate)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["format"] == 1
    assert "gate passed" in result.stderr
    result = alvts("bench", "--model", model_folder(), "--runs", 1, "--json", "-")
    assert json.loads(result.stdout)["format"] == 1 and "LM prefill" in result.stderr


@pytest.mark.parametrize("columns", ["0", "00", "-5", "x", "", "\u00b2", "9" * 40])
def test_columns_that_are_no_width(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "llava-1.5-7b" in alvts("models").stdout


def test_a_locale_without_the_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    cli._prepare_streams()
    say("caf\u00e9")
    sys.stdout.flush()
    assert raw.getvalue() == b"caf\\xe9\n"


def test_a_warning_is_one_safe_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(**_: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = cli._show_warning
            warnings.warn(f"odd\n{EVIL}", stacklevel=1)

    monkeypatch.setattr(cli, "app", warned)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    cli.main()
    err = capsys.readouterr().err
    assert err.startswith("warning: odd \\x1b]0;owned") and len(err.splitlines()) == 1
