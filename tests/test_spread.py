"""Two processes, started by torchrun, do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import alvts
from safetensors.torch import load_file
from test_calibration_command import small_folder

from alvts_cli.artifact import load_artifact
from alvts_cli.spread import Group, join

pytest.importorskip("accelerate")

SCRIPT = """
import json, os, sys
from pathlib import Path
from typer.testing import CliRunner
from alvts_cli.cli import app
from calibration import policy

# As the fixture `same_times` does.
policy.time_policies = lambda model, selectors, choices, *_: {one: one[0] for one in choices}

# To a file of its own: two processes that share a pipe write into each other's lines.
out = Path(sys.argv[2]) / os.environ["RANK"]
told = []
for args in json.load(open(sys.argv[1])):
    done = CliRunner().invoke(app, args)
    told.append([done.exit_code, done.stdout, done.stderr])
    out.write_text(json.dumps(told))
    if done.exit_code:
        sys.exit(1)
"""


def commands(folder: Path) -> list[list[str]]:
    """Of a calibration and its check, an evaluation and answers, all under one folder."""
    model = ("--model", small_folder(), "--device", "cpu")
    selectors = folder / "s.safetensors"
    lines: list[tuple[object, ...]] = [
        ("calibrate", *model, "--samples", 10, "--rank", 8, "--out", selectors),
        (
            *("calibrate", "--check", selectors, *model, "--samples", 16),
            *("--json", folder / "check.json"),
        ),
        (
            *("eval", *model, "--methods", "dense,alvts,random", "--selectors", selectors),
            *("--keep", "32", "--samples", 7, "--batch", 2, "--json", folder / "eval.json"),
        ),
        (
            *("run", *model, "--data", "pocket", "--samples", 20, "--batch", 1, "--json"),
            *("--selectors", selectors, "--max-new-tokens", 3, "--out", folder / "a.jsonl"),
        ),
    ]
    return [list(map(str, line)) for line in lines]


@pytest.mark.usefixtures("same_times")
def test_two_processes_make_what_one_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one, two, said = tmp_path / "one", tmp_path / "two", tmp_path / "said"
    for folder in (one, two, said):
        folder.mkdir()
    script, lines = tmp_path / "script.py", tmp_path / "commands.json"
    script.write_text(SCRIPT)
    lines.write_text(json.dumps(commands(two)))
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(lines), str(said)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    told = [answer for path in said.iterdir() for answer in json.loads(path.read_text())]
    # As text: pytest shortens anything else.
    assert done.returncode == 0, f"{told}\n{done.stdout}\n{done.stderr}"
    assert len(told) == 8
    # One of the two says it all, the other nothing.
    for words in ("recall before", "still serves", "7 questions", '"answers": 20'):
        assert sum(words in out for _, out, _ in told) == 1
    assert sum(out == "" for _, out, _ in told) == 4

    for line in commands(one):
        result = alvts(*line)
        assert result.exit_code == 0, result.output
    name = "s.safetensors"
    expected, found = load_file(one / name), load_file(two / name)
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-5)
    records = [load_artifact(folder / name) for folder in (one, two)]
    assert records[0].picked == records[1].picked
    assert records[0].schedules == records[1].schedules
    assert [t.same for t in records[0].calibration.trials] == [
        t.same for t in records[1].calibration.trials
    ]
    assert (one / "a.jsonl").read_text() == (two / "a.jsonl").read_text()
    checks = [json.loads((folder / "check.json").read_text())["ratios"] for folder in (one, two)]
    assert [c["same"] for c in checks[0]] == [c["same"] for c in checks[1]]
    data = [json.loads((folder / "eval.json").read_text())["data"] for folder in (one, two)]
    assert data[0] == data[1]
    assert sorted(path.name for path in two.iterdir()) == [
        *("a.jsonl", "check.json", "eval.json", "s.safetensors")
    ]


def test_work_is_shared_without_gaps() -> None:
    group = [Group(rank, 3) for rank in range(3)]
    for number in range(9):
        assert [one.mine(number) for one in group].count(True) == 1
    assert Group().gather([1, 2]) == [1, 2] and Group().first and not group[1].first


def test_nobody_goes_on_before_the_first_is_done() -> None:
    done: list[str] = []

    class Meeting(Group):
        def gather(self, items: list[Any]) -> list[Any]:
            done.append(f"{self.rank} waits")
            return items

    for rank in range(2):
        Meeting(rank, 2).by_first(lambda: done.append("written"))
    assert done == ["written", "0 waits", "1 waits"]


def test_a_process_by_itself_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    from alvts_cli import AlvtsError

    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join("auto") == Group()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AlvtsError, match=r"pip install 'alvts\[scale\]'"):
        join("auto")
