"""What skipped tokens are carried on with, what is left of the answers, and what is picked."""

import pytest
import torch
from calibration_tools import LAYERS, RANK, fast, make_processor, make_small, scenes
from tiny import FAMILIES, make_inputs, make_model, make_selectors, one_image

from alvts_cli.engine import NAMED, PAPER, Policy, policy_for
from alvts_cli.engine.carry import carried
from alvts_cli.engine.normed import Normed
from alvts_cli.families import family_of
from alvts_cli.header import Trial
from alvts_cli.prompts import build_inputs
from calibration import calibrate
from calibration.answers import answered, kept_answers
from calibration.capture import capture, run_layer
from calibration.carry import fit_carries
from calibration.policy import CANDIDATES, RATIOS, pick, prefills

ONCE, EACH = NAMED["once"], NAMED["each"]


def update(hidden, carry):
    """What `carry` adds to `hidden`."""
    latent = Normed(hidden).times(carry.down, carry.eps)
    return carried(hidden, latent, carry, False) - hidden


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_keeps_every_answer(family):
    model = make_model(family)
    samples = [answered(model, make_inputs(model, one_image(family, seed)), 5) for seed in range(3)]
    selectors = make_selectors(family, policy=EACH)
    assert any(one.answer.shape[1] > 1 for one in samples)
    whole = kept_answers(model, selectors, 1.0, EACH, samples)
    assert whole.same == 1.0 and whole.loss == pytest.approx(0, abs=1e-6)
    few = kept_answers(model, selectors, 0.1, EACH, samples)
    assert few.loss > 1e-3
    assert few.loss != kept_answers(model, selectors, 0.1, PAPER, samples).loss
    # The dense model again.
    again = answered(model, make_inputs(model, one_image(family, 0)), 5)
    assert torch.equal(again.dense, samples[0].dense)


def small_samples(model, count):
    processor = make_processor()
    return [
        capture(model, build_inputs(processor, scene.images, scene.prompt))
        for scene in scenes(count)
    ]


def test_a_carry_of_full_rank_is_the_ridge_regression_of_the_update():
    model = make_small()
    samples = small_samples(model, 4)
    selectors = calibrate(model, make_processor(), scenes(), fast()).layers
    layer = family_of(model).layers(model)[0]
    width = layer.input_layernorm.weight.shape[0]
    before = [one.hidden.clone() for one in samples]
    (carry, *others) = fit_carries(model, selectors, samples, width)
    assert len(others) == LAYERS - 1
    # What it was given is as it was.
    assert all(torch.equal(one.hidden, old) for one, old in zip(samples, before, strict=True))

    states, updates, found = [], [], []
    with torch.no_grad():
        for one in samples:
            visual = one.visual
            out = run_layer(layer, "sdpa", one.hidden, one.positions)
            states.append(layer.input_layernorm(one.hidden)[visual])
            updates.append((out - one.hidden)[visual])
            found.append(update(one.hidden, carry)[visual])
    x, y = torch.cat(states).double(), torch.cat(updates).double()
    ridge = 0.01 * (x.T @ x).diagonal().mean() * torch.eye(width)
    expected = x @ torch.linalg.solve(x.T @ x + ridge, x.T @ y)
    torch.testing.assert_close(torch.cat(found).double(), expected, rtol=1e-2, atol=1e-3)
    low = fit_carries(model, selectors, samples, 2)[0]
    with torch.no_grad():
        less = torch.cat([update(s.hidden, low)[s.visual] for s in samples])
    errors = [(guess - y).square().sum() for guess in (expected, less, torch.zeros_like(y))]
    assert errors[0] < errors[1] < errors[2]


def trial(keep: float, policy: Policy, loss: float) -> Trial:
    return Trial(keep, policy, loss, 0.5)


def test_the_cheapest_that_is_as_good_is_picked():
    trials = [
        trial(0.1, ONCE, 0.104),
        trial(0.1, PAPER, 0.9),
        trial(0.1, EACH, 0.1),
        trial(0.02, ONCE, 0.3),
        trial(0.02, PAPER, 0.9),
        trial(0.02, EACH, 0.1),
        # Far below what an answer shows.
        trial(0.5, ONCE, 0.0009),
        trial(0.5, EACH, 0.0),
    ]
    assert [(one.keep, one.policy) for one in pick(trials)] == [
        (0.02, EACH),
        (0.1, ONCE),
        (0.5, ONCE),
    ]


def test_the_nearest_ratio_decides():
    picked = pick([trial(0.02, EACH, 0), trial(0.11, ONCE, 0), trial(0.33, PAPER, 0)])
    found = {keep: policy_for(picked, keep) for keep in (0.001, 0.04, 0.05, 0.18, 0.2, 1.0)}
    assert [*found.values()] == [EACH, EACH, ONCE, ONCE, PAPER, PAPER]
    assert policy_for((), 0.1) == PAPER


def test_calibration_tries_all_and_picks_for_each_ratio():
    artifact = calibrate(make_small(), make_processor(), scenes(), fast())
    trials = artifact.calibration.trials
    assert [(t.keep, t.policy) for t in trials] == [(k, p) for k in RATIOS for p in CANDIDATES]
    assert artifact.picked == pick(trials)
    assert PAPER in CANDIDATES, "so that alvts is never worse than the paper's own way"
    assert artifact.visual_tokens == 256 and artifact.rank == RANK
    assert prefills(64) < 1500
