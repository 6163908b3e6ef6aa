"""`alvts calibrate`, from the command line to the file."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from calibration_tools import LAYERS, RANK, make_processor, make_small
from cli_tools import alvts, refused
from PIL import Image

from alvts_cli.artifact import load_artifact

pytestmark = pytest.mark.usefixtures("quick_calibration")

_KEPT: list[Any] = []


@cache
def small_folder() -> Path:
    import tempfile

    kept = tempfile.TemporaryDirectory(prefix="alvts-calibration-")
    _KEPT.append(kept)
    make_small().save_pretrained(kept.name)
    make_processor().save_pretrained(kept.name)
    return Path(kept.name)


def calibrate(*more: object, run: Any = alvts) -> Any:
    return run("calibrate", "--model", small_folder(), "--samples", 8, "--rank", RANK, *more)


def test_a_table_and_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = calibrate("--out", out)
    assert result.exit_code == 0, result.output
    assert "recall before" in result.stdout and "mean" in result.stdout
    assert "chosen once" in result.stdout and "33%" in result.stdout
    assert f"wrote {out}" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]
    artifact = load_artifact(out)
    assert artifact.rank == RANK and len(artifact.layers) == LAYERS
    assert artifact.model_id == str(small_folder())
    assert len(artifact.picked) == 4 and len(artifact.carries) == LAYERS
    told = alvts("info", out)
    assert told.exit_code == 0 and "33%" in told.stdout


def test_the_default_place_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibrate().exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == [
        f"{small_folder().name}.alvts.safetensors"
    ]
    Image.new("RGB", (50, 50), "white").save("scene.png")
    asked = ("--prompt", "what color is the circle?", "--image", "scene.png")
    result = alvts("run", "--model", small_folder(), *asked, "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output


def test_broken_samples_are_counted_and_named(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}]
    lines = [json.dumps({"image": f"{i}.png", "conversations": turns}) for i in range(6)]
    data.write_text("\n".join(lines))
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.new("RGB", (30, 30), (60 * i, 9, 99)).save(images / f"{i}.png")
    (images / "4.png").write_text("words")
    out = tmp_path / "out.safetensors"
    result = calibrate("--data", data, "--image-folder", images, "--out", out)
    assert result.exit_code == 0, result.output
    assert "skipped 2 samples:" in result.stderr
    assert "4.png: it is damaged or not a picture" in result.stderr
    assert "there is no image" in result.stderr
    record = load_artifact(out).calibration
    assert (record.data, record.fitted, record.held_out) == ("data.jsonl", 3, 1)

    for i in range(2):
        (images / f"{i}.png").unlink()
    out.unlink()
    line = refused(*command("--data", data, "--image-folder", images, "--out", out))
    assert "only 2 usable samples, at least 3 are needed; 4 were skipped" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "images"]


def command(*more: object) -> tuple[object, ...]:
    return calibrate(*more, run=lambda *args: args)


def test_a_place_that_cannot_be_written_is_found_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alvts_cli.models.load_model", None)
    (tmp_path / "file").touch()
    assert "cannot write" in refused(*command("--out", tmp_path / "file" / "out.safetensors"))
    assert "cannot write" in refused(*command("--out", tmp_path / "none" / "out.safetensors"))
    assert "it is a folder" in refused(*command("--out", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--data", "none.json"), "there is no file none.json"),
        (("--data", "/nowhere/at/all"), "no data"),
        (("--data", ".", "--image-folder", "."), "an image folder goes with"),
        (("--data", "x.json", "--image-folder", "nowhere"), "there is no image folder nowhere"),
        (("--rank", 4000), "rank 4000 is more than this model allows; at most 16"),
        (("--device", "cuda:77"), "device"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    options: tuple[object, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused(*command(*options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--samples", 2), ("--rank", 0), ("--seed", -1)])
def test_numbers_out_of_range_are_refused(options: tuple[object, ...]) -> None:
    refused(*command(*options), code=2)


def test_an_interrupted_run_goes_on_with_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert calibrate("--out", whole).exit_code == 0
    from calibration.sweep import initialise

    calls = []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return initialise(*args)

    with monkeypatch.context() as patch:
        patch.setattr("calibration.sweep.initialise", interrupted)
        result = calibrate("--out", out)
    assert result.exit_code == 130
    assert "go on with --resume" in result.stderr
    assert not out.exists()
    assert "--resume, or delete the folder" in refused(*command("--out", out))
    result = calibrate("--out", out, "--resume")
    assert result.exit_code == 0
    assert result.stderr == "1 layers from before\n"
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_interrupted_in_the_first_layer_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("calibration.sweep.initialise", interrupted)
    assert calibrate("--out", tmp_path / "out").exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_two_runs_for_one_file_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused at once; the first ends as if it had been alone."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert calibrate("--out", alone).exit_code == 0
    from calibration.sweep import initialise

    lines = []

    def meanwhile(*args: Any) -> Any:
        if not lines:
            code = "from alvts_cli.cli import main; main()"
            line = [sys.executable, "-c", code, *map(str, command("--out", out))]
            lines.append(subprocess.run(line, capture_output=True, text=True, timeout=600))
        return initialise(*args)

    monkeypatch.setattr("calibration.sweep.initialise", meanwhile)
    assert calibrate("--out", out).exit_code == 0
    (other,) = lines
    assert other.returncode == 1 and other.stdout == ""
    assert other.stderr == (
        f"error: a calibration into {out} is running already; wait for it, or name another place\n"
    )
    assert out.read_bytes() == alone.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out"]


def test_resume_without_anything_to_resume_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = calibrate("--out", out, "--resume")
    assert result.exit_code == 0
    assert result.stderr == f"note: nothing to resume: there is no {out}.partial\n"
    result = calibrate("--out", out, "--resume")
    assert result.exit_code == 0
    assert f"nothing to resume: there is no {out}.partial; {out} is finished" in result.stderr


@pytest.mark.parametrize("out", ["-", "/dev/null", "/dev/stdout"])
def test_what_is_not_a_file_takes_no_selectors(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "not a regular file" in refused(*command("--out", out))
    assert list(tmp_path.iterdir()) == []
