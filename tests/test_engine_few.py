"""The operators that a GPU gets, run on a CPU: the same choices, and few of them."""

import pytest
import torch
from test_engine_batch import fresh, prompts
from test_engine_pieces import POLICIES, every_policy
from test_engine_reference import check_generation
from tiny import FAMILIES, LAYERS, Prompt, make_inputs, make_model, make_selectors, one_image

from alvts_cli import attach
from alvts_cli.engine import NAMED, PAPER, normed, placing, scorer


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    for module in (normed, placing, scorer):
        monkeypatch.setattr(module, "fused", lambda device: True)


@every_policy
def test_generation_equals_the_reference(policy):
    model = make_model("llava")
    check_generation(model, make_inputs(model, one_image("llava")), 0.25, policy=policy)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    check_generation(model, inputs, [1.0, 0.25, 0, 5], family)
    check_generation(model, inputs, 0.25, family, policy=POLICIES["all"])


@every_policy
def test_several_images(policy):
    model = make_model("llava")
    inputs = make_inputs(model, Prompt([1, 5, 9, 12, 33, 47], [(16, 16), (16, 16)]))
    check_generation(model, inputs, 0.25, policy=policy)


@every_policy
def test_a_padded_batch_equals_its_samples(policy):
    model = make_model("qwen2_5_vl")
    selectors = make_selectors("qwen2_5_vl", policy=policy)
    samples = prompts("qwen2_5_vl")
    batch = make_inputs(model, *samples)
    longest = batch["input_ids"].shape[1]
    with torch.no_grad(), attach(model, selectors, 0.25):
        whole = fresh(model)(**batch).logits
        for b, sample in enumerate(samples):
            inputs = make_inputs(model, sample)
            length = inputs["input_ids"].shape[1]
            one = fresh(model)(**inputs).logits[0]
            torch.testing.assert_close(whole[b, longest - length :], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [PAPER, POLICIES["all"]])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_importance_is_told_as_without_them(family, policy, monkeypatch):
    model = make_model(family)
    inputs = make_inputs(model, *prompts(family))
    selectors = make_selectors(family, policy=policy)
    told = {}
    for few in (True, False):
        for module in (normed, placing, scorer):
            monkeypatch.setattr(module, "fused", lambda device, few=few: few)
        told[few] = []
        with torch.no_grad(), attach(model, selectors, 0.25) as attachment:
            attachment.watch = told[few].append
            model(**inputs)
    assert len(told[True]) == LAYERS
    for few, plain in zip(told[True], told[False], strict=True):
        found, wanted = few.importance, plain.importance
        if policy.compares:
            # A sum where the other is a mean: comparing tokens does not ask for the scale.
            found = found * (wanted.amax() / found.amax())
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("policy", ["paper", "once", "every-4"])
def test_training_goes_back_more_than_once(policy):
    """What is unfolded of the norms' weights when selectors are placed is no part of the graph."""
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    weight = model.model.language_model.layers[0].self_attn.q_proj.weight
    with attach(model, make_selectors(policy=NAMED[policy]), 0.25, policy=policy):
        grads = []
        for _ in range(2):
            weight.grad = None
            model(**inputs).logits.sum().backward()
            grads.append(weight.grad)
    assert bool(grads[0].any()) and torch.equal(*grads)
