import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from cli_tools import alvts, model_folder, refused, scene_file

import alvts_cli
from alvts_cli import cli, terminal, threads
from alvts_cli.bench.metrics import METRICS
from alvts_cli.evaluate.gates import FIGURES
from alvts_cli.pocket import WEIGHTS

COMMAND = [sys.executable, "-m", "alvts_cli"]


def process(*args, **more):
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=600, **more
    )


@pytest.mark.parametrize(
    "args", [["--help"], ["eval", "--help"], ["info", str(WEIGHTS / "selectors.safetensors")]]
)
def test_what_needs_no_torch_does_not_import_it(args):
    code = (
        f"import sys; sys.argv = ['alvts', *{args!r}]\n"
        "from alvts_cli.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'datasets'} & sys.modules.keys()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "recall" in result.stdout or "Usage" in result.stdout


def test_version_and_help():
    help = alvts("--help").stdout
    for command in ("run", "bench", "calibrate", "info", "models"):
        assert command in help
    assert process("--version").stdout == f"alvts {alvts_cli.__version__}\n"


def test_without_a_command_the_commands_are_listed():
    result = alvts()
    assert result.exit_code == 0
    assert "calibrate" in result.stdout and result.stderr == ""


def test_answers_go_to_stdout_and_noise_nowhere():
    args = ("--prompt", "color?", "--json", "--max-new-tokens", 2)
    result = process("run", "--model", model_folder(), "--image", scene_file(), *args)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    "args",
    [("fly",), ("run",), ("run", "--keep"), ("bench", "--batch", 0), ("info",), ("run", "x")],
)
def test_a_command_line_without_sense_is_one_line(args):
    refused(*args, code=2)


def test_an_unexpected_error_is_one_line_and_can_be_seen_whole(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("what\na surprise")

    monkeypatch.setattr("alvts_cli.header.read_header", fail)
    line = refused("info", "x")
    assert "ZeroDivisionError: what a surprise" in line and "ALVTS_DEBUG=1" in line
    monkeypatch.setenv("ALVTS_DEBUG", "1")
    assert isinstance(alvts("info", "x").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(13, "Permission denied", "a.json"), "a.json: Permission denied"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    ],
)
def test_failures_of_the_machine_are_one_line(error, words, monkeypatch):
    def fail(*args):
        raise error

    monkeypatch.setattr("alvts_cli.header.read_header", fail)
    line = refused("info", "x")
    assert words in line and "bug" not in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line():
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=600
        )
    assert result.returncode == 1
    assert result.stderr == "error: No space left on device\n"


def test_an_interrupt_is_one_line(monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("alvts_cli.header.read_header", interrupt)
    assert refused("info", "x", code=130) == "error: interrupted"


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_ends_a_process_in_one_line():
    args = ["bench", "--model", str(model_folder()), "--runs", "100000", "--verbose"]
    with subprocess.Popen(
        [*COMMAND, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a script ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        # It says so when it is at work, however long that takes here.
        told = next(line for line in running.stderr if line.startswith("measuring: "))
        assert " of 3" in told
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
    assert running.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "error: interrupted"


def test_ctrl_c_is_one_whatever_a_library_makes_of_it(monkeypatch):
    def interrupted(*args):
        try:
            cli._interrupt()
        except KeyboardInterrupt:
            raise ImportError("half of it is missing") from None

    monkeypatch.setattr(cli, "_interrupted", False)
    monkeypatch.setattr("alvts_cli.header.read_header", interrupted)
    assert refused("info", "x", code=130) == "error: interrupted"


def commands():
    """Every command and group under its words."""

    def below(words, one):
        yield words, one
        for name, inner in getattr(one, "commands", {}).items():
            yield from below((*words, name), inner)

    return list(below((), typer.main.get_command(cli.app)))


@pytest.mark.parametrize(
    ("words", "command"), commands(), ids=[" ".join(words) for words, _ in commands()]
)
def test_every_help_has_an_example_that_is_a_command_line(words, command):
    told = alvts(*words, "--help")
    assert told.exit_code == 0 and "Example" in told.stdout
    assert alvts(*words, "-h").stdout == told.stdout
    lines = re.findall(r"`(alvts [^`]+)`", command.epilog)
    assert any(shlex.split(line)[1 : 1 + len(words)] == list(words) for line in lines)
    for line in lines:
        one, args = typer.main.get_command(cli.app), shlex.split(line)[1:]
        while hasattr(one, "commands"):
            one = one.commands[args.pop(0)]
        # Refuses what the command does not know.
        one.make_context("alvts", args)


def test_metrics_are_a_table():
    for words in (("bench",), ("eval",)):
        lines = [line.split() for line in alvts(*words, "--help").stdout.splitlines()]
        names = METRICS if words == ("bench",) else FIGURES
        assert [line[0] for line in lines if line and line[0] in names] == list(names)


def test_quiet_leaves_notes_and_warnings_out(monkeypatch):
    asked = ("--image", scene_file(), "--prompt", "is it a zebra?", "--max-new-tokens", 1)
    usual = alvts("run", *asked)
    assert "does not know these words: zebra" in usual.stderr
    quiet = alvts("run", *asked, "--quiet")
    assert quiet.exit_code == 0 and quiet.stderr == ""
    # The times differ.
    assert quiet.stdout.split(";")[0] == usual.stdout.split(";")[0]
    assert "zebra" in alvts("run", *asked).stderr
    assert "--quiet" in refused("models", "-q", "-v", code=2)
    assert "there is no selector file" in refused("info", "x", "--quiet")


def test_a_line_now_and_then_where_there_is_no_terminal(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(terminal, "NOW_AND_THEN", 30.0)
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])

    def steps(verbose):
        terminal.set_level(False, verbose)
        with terminal.bars(terminal.console(error=True)) as progress:
            task = progress.add_task("layers", total=40)
            for _ in range(40):
                now[0] += 2
                progress.advance(task)
        return capsys.readouterr().err.splitlines()

    lines = steps(verbose=False)
    assert [line.split(",")[0] for line in lines] == ["layers: 15 of 40", "layers: 30 of 40"]
    assert lines[1].endswith("about 20 s left")
    assert len(steps(verbose=True)) == 40
    terminal.set_level(True, False)
    assert not terminal.console().quiet
    with terminal.bars(terminal.console(error=True)) as progress:
        now[0] += 1000
        progress.advance(progress.add_task("layers", total=40))
    assert capsys.readouterr().err == ""
    terminal.set_level(False, False)


def test_the_shell_completes_commands_options_and_models():
    def completed(words):
        env = {**os.environ, "_ALVTS_COMPLETE": "complete_bash", "COMP_WORDS": words}
        env["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        done = subprocess.run([*COMMAND], env=env, capture_output=True, text=True, timeout=600)
        return done.stdout.split()

    assert completed("alvts cal") == ["calibrate"]
    assert completed("alvts eval --keep") == ["--keep"]
    assert completed("alvts bench --model qwen2.5") == ["qwen2.5-vl-3b", "qwen2.5-vl-7b"]


@pytest.mark.parametrize(
    ("cores", "files", "load", "expected"),
    [
        (8, {}, 0.2, None),
        (8, {}, 3.4, "5"),
        (8, {}, 40.0, "1"),
        (8, {"cpu.max": "150000 100000"}, 0.0, "2"),
        (8, {"cpu.max": "max 100000"}, 0.0, None),
        (8, {"cpu.max": "what"}, 0.0, None),
        (8, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 0.0, "3"),
        (8, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 1.0, "7"),
        (1, {}, 9.0, None),
    ],
)
def test_threads_are_the_free_cores(cores, files, load, expected, monkeypatch, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_GROUPS", tmp_path)
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(threads, "_LOAD", tmp_path / "of another system")
    threads.limit_threads(by_load=True)
    assert os.environ.get("OMP_NUM_THREADS") == expected
    # What the user says stays, and where bytes must be the same the load does not count.
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    threads.limit_threads(by_load=True)
    assert os.environ["OMP_NUM_THREADS"] == "6"
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads.limit_threads(by_load=False)
    assert os.environ.get("OMP_NUM_THREADS") == (expected if files and load == 0 else None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.parametrize(
    ("minute", "running", "expected"),
    [
        # Whoever was busy a minute ago, such as the command before this one, is so no more.
        (4.0, 1, None),
        (4.0, 3, "2"),
        # Something begins just now: for how long nobody knows.
        (0.0, 4, None),
    ],
)
def test_a_load_that_is_over_does_not_count(minute, running, expected, monkeypatch, tmp_path):
    (tmp_path / "loadavg").write_text(f"{minute} 1.00 1.00 {running}/93 4711\n")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_GROUPS", tmp_path)
    monkeypatch.setattr(threads, "_LOAD", tmp_path / "loadavg")
    monkeypatch.setattr(threads, "usable_cores", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (minute, 1.0, 1.0))
    threads.limit_threads(by_load=True)
    assert os.environ.get("OMP_NUM_THREADS") == expected
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_threads_are_limited_before_torch_is_imported(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "limit_threads", lambda by_load: seen.append(by_load))
    alvts("info", "x")
    alvts("calibrate", "--samples", "0")
    assert seen == [True, False]
