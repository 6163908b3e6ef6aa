"""What layers lose by keeping less, and the schedules that are made of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_tools import LAYERS, fast, make_processor, make_small, scenes
from tiny import CACHE, FAMILIES, make_inputs, make_model, make_selectors, one_image

from alvts_cli import AlvtsError, attach
from alvts_cli.artifact import load_artifact, save_artifact
from alvts_cli.engine import Keep, cache_of, spend
from alvts_cli.families import family_of
from alvts_cli.prompts import build_inputs
from calibration import Watch, calibrate
from calibration.answers import Answered, answered
from calibration.budget import AVERAGES, RATIOS, STEPS, UNITS, measure, solve
from calibration.capture import advance
from calibration.refine import TRIALS, Joint, find_schedules, refine

NOTHING = (0.0,) * len(STEPS)


def by_attaching(model: Any, selectors: Any, ratios: Any, family: str, seeds: Any) -> float:
    """The loss of a schedule as a user would see it: prefill, then the answer on the cache."""
    losses = []
    for seed in seeds:
        inputs = make_inputs(model, one_image(family, seed))
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=4)
        answer = answer[:, inputs["input_ids"].shape[1] :]

        def spoken(inputs: Any = inputs, answer: Any = answer) -> torch.Tensor:
            out = model(**inputs, use_cache=True)
            logits = [out.logits[:, -1:]]
            if answer.shape[1] > 1:
                told = {}
                if "mm_token_type_ids" in inputs:
                    told["mm_token_type_ids"] = torch.zeros_like(answer[:, :-1])
                more = model(answer[:, :-1], **{CACHE: cache_of(out)}, **told)
                logits.append(more.logits)
            return torch.cat(logits, dim=1).log_softmax(dim=-1)

        dense = spoken()
        with attach(model, selectors, Keep(tuple(ratios))):
            found = spoken()
        losses.append(float((dense.exp() * (dense - found)).sum(-1).mean()))
    return sum(losses) / len(losses)


def answers_of(model: Any, family: str, seeds: Any) -> list[Answered]:
    return [answered(model, make_inputs(model, one_image(family, seed)), 4) for seed in seeds]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_joint_loss_is_what_attaching_loses(family: str) -> None:
    model, selectors = make_model(family), make_selectors(family)
    layers = len(selectors.layers)
    joint = Joint(model, selectors.layers, answers_of(model, family, (0, 1, 2)))
    assert joint.loss((1.0,) * layers) == 0
    for ratios in ([0.25] * layers, [1.0, 0.0, *[0.5] * (layers - 2)]):
        expected = by_attaching(model, selectors, ratios, family, (0, 1, 2))
        assert expected > 1e-5
        assert joint.loss(ratios) == pytest.approx(expected, rel=1e-3, abs=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layers_own_loss_is_the_joint_loss_with_the_others_dense(family: str) -> None:
    model, selectors = make_model(family), make_selectors(family)
    layers = len(selectors.layers)
    samples = answers_of(model, family, (0, 1))
    joint = Joint(model, selectors.layers, answers_of(model, family, (0, 1)))
    implementation = family_of(model).text_model(model).config._attn_implementation
    for i, layer in enumerate(family_of(model).layers(model)):
        found = measure(model, i, selectors.layers[i], samples)
        expected = []
        for ratio in RATIOS:
            ratios = [1.0] * layers
            ratios[i] = ratio
            expected.append(joint.loss(ratios))
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert max(found) > 1e-6
        for one in samples:
            advance(layer, implementation, one.sample)


@torch.no_grad()
def test_a_loss_sure_to_be_above_the_bound_is_not_finished() -> None:
    model, selectors = make_model("llava"), make_selectors()
    joint = Joint(model, selectors.layers, answers_of(model, "llava", (0, 1)))
    ratios = (0.25,) * len(selectors.layers)
    loss = joint.loss(ratios)
    assert joint.loss(ratios, loss * 1.01) == loss
    assert joint.loss(ratios, loss * 0.99) == float("inf")


@torch.no_grad()
def test_a_loss_that_is_not_a_number_is_one_line() -> None:
    model, selectors = make_model("llava"), make_selectors()
    samples = answers_of(model, "llava", (0,))
    joint = Joint(model, selectors.layers, samples)
    joint.batches[0].dense[:] = float("nan")
    with pytest.raises(AlvtsError, match=r"overflows in torch.float32; use --dtype"):
        joint.loss((0.25,) * len(selectors.layers))
    model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(AlvtsError, match="overflows"):
        measure(model, 0, selectors.layers[0], samples)


def test_a_budget_goes_where_the_loss_is() -> None:
    # The first layer needs everything, the second a few tokens, the third nothing.
    losses = [(9.0, 8.0, 7.0, 6.0), (4.0, 0.0, 0.0, 0.0), NOTHING]
    assert solve(losses, 22) == (64, 2, 0)
    # Without room for both: what lowers the sum most.
    assert solve(losses, 1) == (1, 2, 0)
    # Losses that rise with more tokens are accidents, and nothing is spent to get there.
    assert solve([(1.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.1)], 8) == (0, 16)
    for average in AVERAGES:
        assert sum(solve(losses, average)) == 3 * average


class Table:
    """A joint loss known in full: the distance from what every layer wants."""

    def __init__(self, wanted: tuple[int, ...]) -> None:
        self.wanted = wanted
        self.asked: list[tuple[float, ...]] = []

    def loss(self, ratios: Any, bound: float = float("inf")) -> float:
        self.asked.append(tuple(ratios))
        return sum(abs(a * UNITS - b) for a, b in zip(ratios, self.wanted, strict=True))


def test_moves_come_nearer_to_what_the_layers_want_together() -> None:
    table: Any = Table((20, 0, 8, 0))
    told: list[int] = []
    found = refine(table, [(7, 7, 7, 7), (28, 0, 0, 0)], 0, told.append)
    assert told == list(range(1, TRIALS + 1))
    assert sum(found) == 28
    assert sum(abs(a - b) for a, b in zip(found, table.wanted, strict=True)) <= 4
    assert all(0 <= ratio <= 1 for asked in table.asked for ratio in asked)
    # A single layer has nobody to trade with.
    assert refine(Table((3,)), [(7,)], 0, told.append) == (7,)  # type: ignore[arg-type]


def test_schedules_are_sorted_and_spend_exactly_their_average() -> None:
    wanted = (64, 10, 0, 0)
    found = find_schedules(Table(wanted), [NOTHING] * 4, 0, lambda *_: None)  # type: ignore[arg-type]
    assert [sum(ratios) * UNITS / 4 for ratios in found] == list(AVERAGES)
    again = find_schedules(Table(wanted), [NOTHING] * 4, 0, lambda *_: None)  # type: ignore[arg-type]
    assert found == again


def test_calibration_stores_losses_and_schedules(tmp_path: Path) -> None:
    model = make_small()
    trials: list[tuple[int, int]] = []
    settings = fast(budget=True, loss_samples=3, budget_samples=6, answer_tokens=3)
    watch = Watch(trial=lambda *told: trials.append(told))
    artifact = calibrate(model, make_processor(), scenes(), settings, watch=watch)
    assert trials[-1] == (len(AVERAGES) * TRIALS,) * 2
    record = artifact.calibration
    assert record.ratios == RATIOS
    assert len(record.losses) == LAYERS and all(len(row) == len(RATIOS) for row in record.losses)
    assert record.losses[0][0] > 0
    assert len(artifact.schedules) == len(AVERAGES)

    save_artifact(artifact, tmp_path / "a.safetensors")
    found = load_artifact(tmp_path / "a.safetensors")
    assert found.schedules == artifact.schedules and found.calibration == record
    sample = next(iter(scenes(1)))
    with attach(model, found, 28) as attachment, torch.no_grad():
        model(**build_inputs(make_processor(), sample.images, sample.prompt))
    assert attachment.last is not None
    kept = tuple(count for (count,) in attachment.last.kept)
    assert kept == spend(found.schedules, 28, 256) and sum(kept) == 28 * LAYERS


def test_without_a_budget_every_layer_keeps_the_same() -> None:
    artifact = calibrate(make_small(), make_processor(), scenes(), fast())
    assert artifact.schedules == () and artifact.calibration.losses == ()
