import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_tools import alvts, model_folder, refused, scene_file

import alvts_cli
from alvts_cli.pocket import WEIGHTS

COMMAND = [sys.executable, "-m", "alvts_cli"]


def process(*args, **more):
    return subprocess.run(
        [*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120, **more
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
            [*COMMAND, "models"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
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
    args = ["bench", "--model", str(model_folder()), "--runs", "10000"]
    with subprocess.Popen(
        [*COMMAND, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A job in the background of a script ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as running:
        time.sleep(6)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "error: interrupted"
