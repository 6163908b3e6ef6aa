"""`S*` against a naive computation from the attention maps the model itself gives out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import FAMILIES, LAYERS, Prompt, make_inputs, make_model, one_image

from alvts_cli.engine.probe import attention_importance, attention_mean, project
from alvts_cli.families import family_of
from calibration.capture import Captured, advance, alike, capture
from calibration.sweep import _targets


def naive(attention: torch.Tensor, visual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The mean over `rows` of `[1, H, T, T]`, with the heads averaged first; 0 where not visual."""
    mean = attention[0].float().mean(dim=0)
    return torch.where(visual, mean[rows[0]].mean(dim=0), 0.0)


def reference_importance(layer: Any, sample: Captured) -> torch.Tensor:
    projected = project(layer, sample.hidden, sample.positions)
    return attention_importance(projected, sample.visual, ~sample.visual)


def prompts(family: str) -> list[Prompt]:
    several = Prompt([1, 5, 9, 12, 33, 3], one_image(family).images * 2, at=3)
    return [one_image(family), several]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_equals_the_models_own_attention(family: str, attn: str) -> None:
    eager, model = make_model(family, "eager"), make_model(family, attn)
    layers: Any = family_of(model).layers(model)
    for prompt in prompts(family):
        inputs = make_inputs(model, prompt)
        with torch.no_grad():
            told = eager(**inputs, output_attentions=True)
        sample = capture(model, inputs)
        for i in range(LAYERS):
            found = reference_importance(layers[i], sample)
            visual, real = sample.visual, torch.ones_like(sample.visual)
            projected = project(layers[i], sample.hidden, sample.positions)
            of_visual = attention_mean(projected, visual, real) * visual
            wanted = naive(told.attentions[i], visual, visual)
            torch.testing.assert_close(of_visual, wanted, rtol=1e-4, atol=1e-10)
            expected = naive(told.attentions[i], visual, ~visual)
            assert (expected > 0).sum() == sample.visual.sum()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-10)
            advance(layers[i], i, attn, [sample])
        assert layers[0].self_attn.config._attn_implementation == attn


@pytest.mark.parametrize("family", FAMILIES)
def test_sweep_through_layers_is_the_dense_forward(family: str) -> None:
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    layers: Any = family_of(model).layers(model)
    states: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        for layer in layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    sample = capture(model, inputs)
    assert bool(sample.added) == (family == "qwen3_vl")
    for i, layer in enumerate(layers[:-1]):
        torch.testing.assert_close(sample.hidden, states[i], rtol=0, atol=0)
        advance(layer, i, "sdpa", [sample])
    torch.testing.assert_close(sample.hidden, states[-1], rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_samples_of_one_length_go_through_a_layer_together(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(family)
    layer = family_of(model).layers(model)[0]
    texts = [[1, 5, 9, 12, 33], [1, 5, 9], [7, 5, 2, 9, 4], [3, 1, 2], [8, 8, 9, 1, 4]]
    images = one_image(family).images
    samples = [capture(model, make_inputs(model, Prompt(text, images))) for text in texts]
    assert alike(samples) == [[0, 2, 4], [1, 3]]
    alone = [replace(one) for one in samples]
    targets = _targets(layer, samples, 0, "alvts")
    for target, one in zip(targets, alone, strict=True):
        (expected,) = _targets(layer, [one], 0, "alvts")
        assert target.hidden is expected.hidden
        torch.testing.assert_close(target.reference, expected.reference)
        torch.testing.assert_close(target.rows.query, expected.rows.query)
        assert torch.equal(target.index, expected.index)
        advance(layer, 0, "sdpa", [one])
    advance(layer, 0, "sdpa", samples)
    for together, one in zip(samples, alone, strict=True):
        torch.testing.assert_close(together.hidden, one.hidden)
        # Its own memory, not a part of that of all.
        assert together.hidden.untyped_storage().nbytes() == one.hidden.untyped_storage().nbytes()
    for name, most in (("MOST", 2), ("MOST_TOKENS", 2 * alone[0].hidden.shape[1])):
        with monkeypatch.context() as patched:
            patched.setattr(f"calibration.capture.{name}", most)
            assert alike(samples)[0] == [0, 2]


def test_row_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("qwen2_5_vl")
    sample = capture(model, make_inputs(model, one_image("qwen2_5_vl")))
    layer = family_of(model).layers(model)[0]
    whole = reference_importance(layer, sample)
    monkeypatch.setattr("alvts_cli.engine.probe.ROW_BLOCK", 5)
    blocks = reference_importance(layer, sample)
    torch.testing.assert_close(whole, blocks)


def test_capture_leaves_no_hook_and_stops_early() -> None:
    model = make_model("llava")
    layers: Any = family_of(model).layers(model)
    ran = []
    handle = layers[0].mlp.register_forward_hook(lambda *_: ran.append(True))
    capture(model, make_inputs(model, one_image("llava")))
    handle.remove()
    assert not ran
    assert not layers[0]._forward_pre_hooks
    assert "forward" not in vars(layers[0])
    with torch.no_grad():
        assert model(**make_inputs(model, one_image("llava"))).logits.isfinite().all()
