"""Policies of fitted selectors, picked again."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_tools import fast, make_processor, make_small, scenes
from cli_tools import alvts, model_folder, refused
from test_calibration_check import tuned
from test_calibration_command import small_folder

from alvts_cli import AlvtsError, attach
from alvts_cli.artifact import Artifact, load_artifact, save_artifact
from alvts_cli.card import make_card
from alvts_cli.engine import PAPER, Picked
from alvts_cli.prompts import build_inputs
from calibration import Watch, calibrate
from calibration import repick as repicking
from calibration.answers import answered, each_kept, mean_kept, put_together
from calibration.check import check
from calibration.policy import pick, steps
from calibration.repick import repick

COUNT = 16


@cache
def fitted() -> Artifact:
    artifact = calibrate(make_small(), make_processor(), scenes(8), fast(policy_samples=2))
    # As if another machine had picked otherwise.
    return replace(artifact, picked=tuple(Picked(p.keep, PAPER) for p in artifact.picked))


@cache
def again() -> Artifact:
    return repick(make_small(), make_processor(), fitted(), scenes(COUNT, seed=1))


def test_the_selectors_stay_and_the_trials_are_of_the_new_samples() -> None:
    before, after = fitted(), again()
    for one, other in zip(before.layers, after.layers, strict=True):
        assert torch.equal(one.down, other.down) and torch.equal(one.up, other.up)
    assert after.carries == before.carries
    record = after.calibration
    assert record.layers == before.calibration.layers and record.fitted == before.calibration.fitted
    assert (record.data_tried, record.samples_tried) == ("pocket scenes", COUNT)
    assert before.calibration.samples_tried == 2
    model = make_small()
    samples = [
        answered(model, build_inputs(make_processor(), one.images, one.prompt), 4)
        for one in scenes(COUNT, seed=1)
    ]
    one = record.trials[0]
    kept = mean_kept(each_kept(model, after, one.keep, one.policy, put_together(model, samples)))
    assert one.same == kept.same and one.loss == pytest.approx(kept.loss, rel=1e-6)


def test_what_is_picked_is_picked_by_the_new_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    assert again().picked == pick(again().calibration.trials)
    # On a machine on which nothing but the paper's way is fast, and every way keeps as much.
    trials = tuple(
        replace(one, time=0.2 if one.policy == PAPER else 0.9, loss=0.1, capped=0.1)
        for one in again().calibration.trials
    )
    monkeypatch.setattr(repicking, "try_policies", lambda *_: trials)
    other = repick(make_small(), make_processor(), again(), scenes(COUNT))
    assert {one.policy for one in other.picked} == {PAPER} != {p.policy for p in again().picked}


def test_it_says_how_far_it_is() -> None:
    told: list[Any] = []
    watch = Watch(sample=lambda count: told.append(count), trial=lambda *done: told.append(done))
    repick(make_small(), make_processor(), fitted(), scenes(COUNT), watch=watch)
    assert told == [*range(1, COUNT + 1), *((i, steps()) for i in range(1, steps() + 1))]


def test_a_check_goes_by_the_newest_trials() -> None:
    (first, *_) = check(tuned(), make_processor(), again(), scenes(COUNT, seed=5)).held
    assert first.samples_then == COUNT and first.then in again().calibration.trials


def test_what_cannot_be_picked_is_refused() -> None:
    with pytest.raises(AlvtsError, match="no carried updates"):
        repick(make_small(), make_processor(), replace(fitted(), carries=()), scenes(COUNT))
    with pytest.raises(AlvtsError, match="the weights of this model are others"):
        model = tuned()
        model.config._name_or_path = ""
        repick(model, make_processor(), fitted(), scenes(COUNT))
    with pytest.raises(AlvtsError, match="only 3 usable samples, at least 16"):
        repick(make_small(), make_processor(), fitted(), scenes(3))


def test_an_attached_model_or_a_part_of_one_is_refused() -> None:
    model = make_small()
    with (
        attach(model, fitted(), 0.5),
        pytest.raises(AlvtsError, match="detach it before calibrating"),
    ):
        repick(model, make_processor(), fitted(), scenes(COUNT))
    with pytest.raises(AlvtsError, match="gives it, not to a part"):
        repick(model.model, make_processor(), fitted(), scenes(COUNT))


def test_what_are_no_selectors_is_refused() -> None:
    none: Any = "s.safetensors"
    with pytest.raises(AlvtsError, match="the selectors must be of type Artifact, not str"):
        repick(make_small(), make_processor(), none, scenes(COUNT))


def saved(path: Path) -> Path:
    save_artifact(fitted(), path)
    return path


def test_the_command_writes_them_and_info_tells(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    path = saved(tmp_path / "s.safetensors")
    line = ("calibrate", "--repick", path, "--model", small_folder(), "--samples", COUNT)
    made = alvts(*line, "--out", out)
    assert made.exit_code == 0, made.output
    artifact = load_artifact(out)
    assert artifact.picked == pick(artifact.calibration.trials)
    for one in artifact.picked:
        assert f"keep {one.keep:.0%}: {one.policy} (was {PAPER})" in " ".join(made.stdout.split())
    told = f"tried on {COUNT} samples of pocket scenes"
    assert told in alvts("info", out).stdout and told not in alvts("info", path).stdout
    assert f"on {COUNT} samples that were not fitted (pocket" in make_card(artifact, "user/repo")
    # Onto itself: the file is read before it is replaced.
    assert alvts(*line, "--out", path).exit_code == 0
    assert load_artifact(path).calibration.samples_tried == COUNT
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.safetensors", "s.safetensors"]


def test_the_command_refuses_in_one_line_before_a_model_is_loaded(tmp_path: Path) -> None:
    none = tmp_path / "none.safetensors"
    assert "there is no" in refused("calibrate", "--repick", none, "--model", "no-such-model")
    path = saved(tmp_path / "s.safetensors")
    line = ("calibrate", "--repick", path, "--model", model_folder(), "--samples", COUNT)
    assert "not for" in refused(*line, "--out", tmp_path / "out.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]
