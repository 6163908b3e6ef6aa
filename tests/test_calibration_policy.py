"""What skipped tokens are carried on with, what is left of the answers, and what is picked."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from calibration_tools import LAYERS, RANK, fast, make_processor, make_small, scenes
from test_families import a_model, selectors_for
from tiny import FAMILIES, make_inputs, make_model, make_selectors, one_image
from zoo import KINDS, zoo_inputs

from alvts_cli.bench.timing import generate
from alvts_cli.engine import NAMED, PAPER, Policy, policy_for
from alvts_cli.engine.carry import carried
from alvts_cli.engine.normed import Normed
from alvts_cli.families import family_of
from alvts_cli.header import Trial
from alvts_cli.prompts import build_inputs
from alvts_cli.spread import Group
from calibration import answers, calibrate, policy, timing
from calibration.answers import CAP, answered, each_kept, mean_kept, put_together
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
    batches = put_together(model, samples)
    whole = mean_kept(each_kept(model, selectors, 1.0, EACH, batches))
    assert whole.same == 1.0 and whole.loss == pytest.approx(0, abs=1e-6)
    few = mean_kept(each_kept(model, selectors, 0.1, EACH, batches))
    assert few.loss > 1e-3
    assert few.loss != mean_kept(each_kept(model, selectors, 0.1, PAPER, batches)).loss
    # The dense model again.
    again = answered(model, make_inputs(model, one_image(family, 0)), 5)
    assert torch.equal(again.dense, samples[0].dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_together_answers_lose_what_they_lose_alone(family):
    """Prompts and answers of several lengths, and pictures of which not all go into one batch."""
    model, selectors = make_model(family), make_selectors(family, policy=EACH)
    prompts = [one_image(family, seed) for seed in range(5)]
    prompts[1].text = prompts[1].text[:5]
    prompts[3].images *= 2
    samples = [
        answered(model, make_inputs(model, one), length)
        for one, length in zip(prompts, (1, 4, 2, 5, 3), strict=True)
    ]
    alone = [each_kept(model, selectors, 0.1, EACH, put_together(model, [s])) for s in samples]
    batches = put_together(model, samples)
    assert len(batches) < len(samples)
    found = each_kept(model, selectors, 0.1, EACH, batches)
    assert [same for _, same in found] == [same for [(_, same)] in alone]
    losses = [loss for [(loss, _)] in alone]
    assert [loss for loss, _ in found] == pytest.approx(losses, rel=1e-3, abs=1e-5)
    # No answer counts for more than one that is lost.
    kept = mean_kept(each_kept(model, selectors, 0.1, EACH, batches))
    assert max(losses) > CAP and kept.capped < kept.loss
    assert kept.capped == pytest.approx(sum(min(loss, CAP) for loss in losses) / 5, rel=1e-3)


WORDS = (3, 8), (2, 5)


# Granite's layers get their cache in a way that selection does not know.
@pytest.mark.parametrize("kind", sorted({*KINDS} - {"granite4_vision"}))
def test_every_kind_answers_together_as_alone(kind):
    model = a_model(kind)
    selectors = selectors_for(model)
    prompts = [zoo_inputs(model, kind, words=words, seed=i) for i, words in enumerate(WORDS)]
    samples = [answered(model, one, length) for one, length in zip(prompts, (4, 2), strict=True)]
    batches = put_together(model, samples)
    found = [
        loss
        for tried in (batches, *(put_together(model, [one]) for one in samples))
        for loss, _ in each_kept(model, selectors, 0.3, PAPER, tried)
    ]
    assert len(batches) == 1 and found[:2] == pytest.approx(found[2:], rel=1e-3, abs=1e-5)


def test_no_more_are_put_together_than_memory_is_asked_for(monkeypatch):
    model = make_model("llava")
    one = answered(model, make_inputs(model, one_image("llava")), 1)
    tokens = one.inputs["input_ids"].shape[1]
    for most, sizes in ((3 * tokens, [3, 3, 3, 1]), (tokens - 1, [1] * 10), (99 * tokens, [8, 2])):
        monkeypatch.setattr(answers, "MOST_TOKENS", most)
        assert [len(batch.dense) for batch in put_together(model, [one] * 10)] == sizes


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


def trial(keep: float, policy: Policy, loss: float, time: float = 0.5) -> Trial:
    return Trial(keep, policy, 10 * loss, 0.5, time, loss)


def test_the_cheapest_that_is_as_good_is_picked():
    trials = [
        trial(0.1, ONCE, 0.104, 0.3),
        trial(0.1, PAPER, 0.9, 0.3),
        trial(0.1, EACH, 0.1, 0.3),
        trial(0.02, ONCE, 0.3, 0.2),
        trial(0.02, PAPER, 0.9, 0.2),
        trial(0.02, EACH, 0.11, 0.2),
        # Far below what an answer shows.
        trial(0.5, ONCE, 0.0009),
        trial(0.5, EACH, 0.0),
    ]
    assert [(one.keep, one.policy) for one in pick(trials)] == [
        (0.02, EACH),
        (0.1, ONCE),
        (0.5, ONCE),
    ]


EVERY = NAMED["every-4"]


def test_what_keeps_less_in_the_same_time_is_not_picked():
    """On more tokens, the cheaper policy is as slow as the other and keeps more of the answers."""
    cheap = [trial(0.1, ONCE, 0.07, 0.3), trial(0.3, ONCE, 0.001, 0.5)]
    assert picked_at(0.1, [*cheap, trial(0.1, EVERY, 0.01, 0.6)]) == ONCE
    # As good as that, and on fewer tokens.
    assert picked_at(0.1, [*cheap, trial(0.1, EVERY, 0.001, 0.5)]) == EVERY
    # Faster than what would do as well: between the cheap one's two losses lies .016 by then.
    assert picked_at(0.1, [*cheap, trial(0.1, EVERY, 0.009, 0.4)]) == EVERY
    assert picked_at(0.1, [*cheap, trial(0.1, EVERY, 0.03, 0.4)]) == ONCE
    # Behind the last of the cheap ones lies the dense model, which loses nothing.
    last = [trial(0.1, ONCE, 0.07, 0.3), trial(0.1, EVERY, 0.01, 0.9)]
    assert picked_at(0.1, last) == ONCE
    assert picked_at(0.1, [last[0], trial(0.1, EVERY, 0.01, 0.5)]) == EVERY


def test_a_slower_one_of_fewer_tokens_counts_too():
    """Fewer tokens under the other policy take as long and keep more: it is picked where both are
    asked for the same number, unless that takes it longer than it is worth."""
    few = [trial(0.05, ONCE, 0.2, 0.3), trial(0.05, EVERY, 0.02, 0.4)]
    assert picked_at(0.1, [*few, trial(0.1, ONCE, 0.1, 0.4), trial(0.1, EVERY, 0.01, 0.5)]) == EVERY


def test_where_nothing_is_worth_its_time_the_least_lost_is_picked():
    """As on a GPU whose host is what takes the time: the dense model is faster, and loses none."""
    slow = [trial(0.1, ONCE, 0.07, 1.4), trial(0.1, EVERY, 0.01, 1.9), trial(0.1, EACH, 0.05, 2.9)]
    assert picked_at(0.1, slow) == EVERY


def picked_at(keep: float, trials: list[Trial]) -> Policy:
    """Of the ratio alone."""
    return next(one.policy for one in pick(trials) if one.keep == keep)


def test_policies_are_timed_in_turns_on_the_same_prompts(monkeypatch):
    """Each against the dense prefill of its own round, the warm-up left out."""
    model = make_model("llava")
    samples = [answered(model, make_inputs(model, one_image("llava", seed)), 1) for seed in (0, 1)]
    selectors = make_selectors("llava", policy=EACH)
    seen = []

    def timed(its, inputs, new_tokens):
        assert its is model and new_tokens == 1
        generated = generate(its, inputs, 1)
        number = len(seen) // 3
        pictures = inputs["pixel_values"]
        assert torch.equal(pictures, samples[number % 2].inputs["pixel_values"])
        seen.append(generated.kv_bytes)
        # The machine is ten times as slow in every other round, and the warm-up is another matter.
        pace = 1e6 if number == 0 else 10.0 ** (number % 2)
        return replace(generated, prefill_ms=pace * generated.kv_bytes)

    monkeypatch.setattr(timing, "generate", timed)
    choices = [(0.1, ONCE), (0.5, PAPER)]
    done = []
    times = timing.time_policies(model, selectors, choices, samples, lambda: done.append(1))
    assert len(done) == len(seen) == timing.turns(choices) == 3 * (timing.ROUNDS + 1)
    dense, few, half = sorted(set(seen), reverse=True)[0], min(seen), sorted(set(seen))[1]
    assert times == {choices[0]: few / dense, choices[1]: half / dense}
    # Of several processes the first one's count.
    both = SimpleNamespace(gather=lambda found: [{"the first one's": 1.0}, *found])
    assert timing.time_policies(model, selectors, choices, samples, int, both) == {
        "the first one's": 1.0
    }
    # Each comes first in its turn.
    assert {seen[3 * number] for number in range(3)} == {dense, few, half}


def test_a_gpu_times_as_many_prompts_as_fit(monkeypatch):
    model = make_model("llava")
    inputs = answered(model, make_inputs(model, one_image("llava", 0)), 1).inputs
    tried = []

    def crowded(its, batch, new_tokens):
        tried.append(len(batch["input_ids"]))
        if tried[-1] > 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "generate", crowded)
    assert timing._fitting(model, inputs, 8) == 2 and tried == [8, 4, 2]
    tried.clear()
    assert timing._fitting(model, inputs, 1) == 1 and tried == []


def test_the_nearest_ratio_decides():
    picked = pick([trial(0.02, EACH, 0), trial(0.11, ONCE, 0), trial(0.33, PAPER, 0)])
    found = {keep: policy_for(picked, keep) for keep in (0.001, 0.04, 0.05, 0.18, 0.2, 1.0)}
    assert [*found.values()] == [EACH, EACH, ONCE, ONCE, PAPER, PAPER]
    assert policy_for((), 0.1) == PAPER


class Tried:
    """Stands in for the model: tells what is lost of an answer under every policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: dict[Policy, float]) -> None:
        self.asked: dict[tuple[float, Policy], list[int]] = {}
        self.loss = loss
        monkeypatch.setattr(policy, "put_together", lambda _, samples: [*samples])
        monkeypatch.setattr(policy, "each_kept", self.each_kept)
        monkeypatch.setattr(policy, "time_policies", lambda *_: dict.fromkeys(policy._CHOICES, 0.5))

    def each_kept(self, model, selectors, keep, its, samples, group):
        self.asked.setdefault((keep, its), []).extend(samples)
        # Every other answer is lost by half of that more, so that the mean is the same in all.
        found = [(self.loss.get(its, 0.1) * (0.5 + one % 2), one % 2 == 0) for one in samples]
        return group.gather(found)

    def trials(self, samples, group=None):
        steps = []
        found = policy.try_policies(
            make_model("llava"), None, samples, lambda: steps.append(1), group
        )
        # The timing's own are not taken here.
        assert len(steps) == policy.steps() - timing.turns(policy._CHOICES)
        return found


def test_what_is_clearly_behind_is_not_tried_on_more_samples(monkeypatch):
    tried = Tried(monkeypatch, {ONCE: 0.1, PAPER: 0.26, EVERY: 0.24, EACH: 5.0})
    trials = {(one.keep, one.policy): one for one in tried.trials(range(64))}
    assert trials.keys() == set(policy._CHOICES)
    for keep in RATIOS:
        for name, seen in ((ONCE, 64), (EVERY, 64), (PAPER, 16), (EACH, 16)):
            assert tried.asked[keep, name] == [*range(seen)]
            one = trials[keep, name]
            assert one.dropped_after == (None if seen == 64 else seen)
            assert one.loss == pytest.approx(tried.loss[name]) and one.same == 0.5
    # A dropped one is not picked, whatever is known of it.
    lowest = [replace(one, capped=0.0) if one.policy == EACH else one for one in trials.values()]
    assert EACH not in {one.policy for one in pick(lowest)}


def test_a_second_look_is_at_all_samples_so_far(monkeypatch):
    """What was within reach of the best after the first look may be out after the second; what is
    behind on the second 16 alone is not."""
    tried = Tried(monkeypatch, {})
    loss = tried.each_kept

    def worse(model, selectors, keep, its, samples, group):
        found = loss(model, selectors, keep, its, samples, group)
        worse = {EVERY: 8, PAPER: 3}.get(its, 1) if min(samples) >= 16 else 1
        return [(worse * lost, same) for lost, same in found]

    monkeypatch.setattr(policy, "each_kept", worse)
    trials = tried.trials(range(40))
    assert {one.dropped_after for one in trials if one.policy == EVERY} == {32}
    assert {one.dropped_after for one in trials if one.policy != EVERY} == {None}


@pytest.mark.parametrize("count", [1, 15, 16])
def test_of_few_samples_none_is_saved(monkeypatch, count):
    tried = Tried(monkeypatch, {EACH: 5.0})
    assert {one.dropped_after for one in tried.trials(range(count))} == {None}
    assert {len(asked) for asked in tried.asked.values()} == {count}


def test_processes_look_after_the_same_samples_as_one(monkeypatch):
    """Of three, each tries its own among the first 16 of all."""
    alone = Tried(monkeypatch, {EACH: 5.0}).trials(range(40))
    parts = [[one for one in range(40) if one % 3 == rank] for rank in range(3)]

    class Third(Group):
        def gather(self, items):
            """All know how many there are; what was lost, each of its own."""
            if items == [len(parts[self.rank])]:
                return [len(part) for part in parts]
            return items

    for rank in range(3):
        tried = Tried(monkeypatch, {EACH: 5.0})
        tried.trials(parts[rank], Third(rank, 3))
        assert tried.asked[RATIOS[0], EACH] == [one for one in parts[rank] if one < 16]
        assert tried.asked[RATIOS[0], ONCE] == parts[rank]
    assert {one.dropped_after for one in alone if one.policy == EACH} == {16}


def test_calibration_tries_all_and_picks_for_each_ratio():
    artifact = calibrate(make_small(), make_processor(), scenes(), fast())
    trials = artifact.calibration.trials
    assert [(t.keep, t.policy) for t in trials] == [(k, p) for k in RATIOS for p in CANDIDATES]
    assert artifact.picked == pick(trials)
    assert all(0 < t.time < 100 for t in trials)
    assert PAPER in CANDIDATES, "so that alvts is never worse than the paper's own way"
    assert artifact.visual_tokens == 256 and artifact.rank == RANK
    assert prefills(64) < 1500
