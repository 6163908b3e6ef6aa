"""Whether selectors still serve a model of other weights."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_tools import fast, make_processor, make_small, scenes
from cli_tools import alvts, model_folder, refused
from test_calibration_command import small_folder

from alvts_cli import AlvtsError, attach
from alvts_cli.artifact import Artifact, save_artifact
from alvts_cli.commands.calibrate_check import verdict
from alvts_cli.prompts import build_inputs
from calibration import calibrate
from calibration.answers import answered, each_kept, mean_kept, put_together
from calibration.check import chance_of_so_few, check, recorded

COUNT = 16


@cache
def fitted() -> Artifact:
    artifact = calibrate(make_small(), make_processor(), scenes(16), fast(policy_samples=4))
    # Two keep ratios will do.
    return replace(artifact, picked=artifact.picked[1:3])


@cache
def tuned() -> Any:
    """The same shape with somewhat other weights."""
    model = make_small()
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    with torch.no_grad():
        for weight in model.model.language_model.layers.parameters():
            weight.add_(0.2 * weight.std() * torch.randn(weight.shape, generator=generator))
    return model


@cache
def found() -> Any:
    return check(tuned(), make_processor(), fitted(), scenes(COUNT, seed=5))


def record(**changes: Any) -> Artifact:
    """The artifact, as if all of its trials had ended otherwise."""
    artifact = fitted()
    trials = tuple(replace(one, **changes) for one in artifact.calibration.trials)
    return replace(artifact, calibration=replace(artifact.calibration, trials=trials))


def test_it_measures_what_is_left_of_the_models_own_answers() -> None:
    model, artifact = tuned(), fitted()
    samples = [
        answered(model, build_inputs(make_processor(), one.images, one.prompt), 4)
        for one in scenes(COUNT, seed=5)
    ]
    batches = put_together(model, samples)
    result = found()
    assert result.other_weights and result.data == result.data_then == "pocket scenes"
    assert [one.then.keep for one in result.held] == [one.keep for one in artifact.picked]
    for one, picked in zip(result.held, artifact.picked, strict=True):
        assert one.then.policy == picked.policy and one.then in artifact.calibration.trials
        assert (one.samples, one.samples_then) == (COUNT, 4)
        kept = mean_kept(each_kept(model, artifact, picked.keep, picked.policy, batches))
        assert one.loss.value == pytest.approx(kept.loss, rel=1e-6)
        assert one.same.value == pytest.approx(kept.same)
        assert one.loss.low <= one.loss.value <= one.loss.high
    assert result.held[0].loss.value > result.held[-1].loss.value > 0


def test_fewer_answers_and_higher_losses_than_then_are_worse() -> None:
    (first, *_) = found().held
    high = replace(first.then, same=0.0, loss=first.loss.low / 2.9)
    assert not replace(first, then=high).worse
    assert replace(first, then=replace(high, loss=first.loss.low / 3.1)).worse
    few = replace(first, then=replace(high, same=1.0), samples_then=64)
    assert replace(few, same=replace(first.same, value=12 / 16)).worse
    assert not replace(few, same=replace(first.same, value=15 / 16)).worse


def test_the_verdict_names_the_keep_ratios() -> None:
    result = found()
    serves = replace(first := result.held[0], then=replace(first.then, same=0.0, loss=9.0))
    fails = replace(first, then=replace(first.then, keep=0.25, loss=0.0))
    good, bad = replace(result, held=(serves,)), replace(result, held=(serves, fails))
    assert good.serves and not bad.serves
    assert "FILE still serves MODEL" in verdict(good, "FILE", "MODEL")
    line = verdict(bad, "FILE", "MODEL")
    assert "fit again: at keep 25% FILE" in line and "alvts calibrate --model MODEL" in line
    assert "\n" not in line
    assert [one["worse"] for one in bad.to_json()["ratios"]] == [False, True]


def test_the_chance_is_fishers() -> None:
    """His lady tasting tea: 3 or more of 4 cups right by chance in 17 of 70 cases."""
    assert chance_of_so_few(1, 4, 3, 4) == pytest.approx(17 / 70)
    assert chance_of_so_few(0, 4, 4, 4) == pytest.approx(1 / 70)
    assert chance_of_so_few(4, 4, 0, 4) == pytest.approx(1)
    assert chance_of_so_few(32, 32, 64, 64) == 1


def test_without_a_record_there_is_nothing_to_check_against() -> None:
    artifact = fitted()
    none = replace(artifact, calibration=replace(artifact.calibration, trials=()))
    with pytest.raises(AlvtsError, match="no record of the answers"):
        recorded(none)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(AlvtsError, match="only 3 usable samples, at least 16"):
        check(tuned(), make_processor(), fitted(), scenes(3))


def test_an_attached_model_or_a_part_of_one_is_refused() -> None:
    model = make_small()
    with (
        attach(model, fitted(), 0.5),
        pytest.raises(AlvtsError, match="detach it before calibrating"),
    ):
        check(model, make_processor(), fitted(), scenes(COUNT))
    with pytest.raises(AlvtsError, match="gives it, not to a part"):
        check(model.model, make_processor(), fitted(), scenes(COUNT))


def test_what_is_no_sample_is_refused() -> None:
    with pytest.raises(AlvtsError, match=r"samples\[1\] must be a Sample; its type is None"):
        check(make_small(), make_processor(), fitted(), [*scenes(1), None])


@pytest.mark.parametrize("name", [None, "s.safetensors"])
def test_what_are_no_selectors_is_refused(name: Any) -> None:
    with pytest.raises(AlvtsError, match="the selectors must be of type Artifact, not"):
        check(make_small(), make_processor(), name, scenes(COUNT))


def saved(tmp_path: Path, artifact: Artifact) -> Path:
    path = tmp_path / "s.safetensors"
    save_artifact(artifact, path)
    return path


def check_command(path: Path, *more: object) -> tuple[object, ...]:
    return ("calibrate", "--check", path, "--model", small_folder(), "--samples", COUNT, *more)


def test_the_command_says_so_in_its_last_line_and_its_code(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    good = alvts(*check_command(saved(tmp_path, record(same=0.0, loss=9.0)), "--json", out))
    assert good.exit_code == 0, good.output
    assert good.stdout.splitlines()[-1].startswith("verdict: ") and "still serves" in good.stdout
    assert "the very weights" in good.stderr
    told = json.loads(out.read_text())
    assert told["serves"] and not told["other_weights"] and len(told["ratios"]) == 2
    assert told["model"] == str(small_folder())

    bad = alvts(*check_command(saved(tmp_path, record(same=1.0, loss=0.0)), "--json", "-"))
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["serves"] is False
    assert "verdict: fit again" in bad.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "s.safetensors"]


def test_what_cannot_be_checked_is_one_line(tmp_path: Path) -> None:
    unrecorded = model_folder() / "selectors.safetensors"
    assert "no record of the answers" in refused(*check_command(unrecorded))
    path = saved(tmp_path, fitted())
    shape = refused("calibrate", "--check", path, "--model", model_folder())
    assert "(3 layers of width 32), not for" in shape
    assert "there is no" in refused(*check_command(tmp_path / "none.safetensors"))
