"""keep=1.0 changes nothing, and leaving restores everything."""

import pytest
import torch
from tiny import CACHE, FAMILIES, LAYERS, Prompt, make_inputs, make_model, make_selectors, one_image
from transformers import DynamicCache

from alvts_cli import AlvtsError, attach
from alvts_cli.engine import SelectiveLayer, attach_scorer, cache_of, resolve_keep
from alvts_cli.families import family_of


def batch(model, family):
    return make_inputs(model, one_image(family), Prompt([1, 8, 9, 10], one_image(family, 3).images))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_everything_is_dense_bit_for_bit(family, attn):
    model = make_model(family, attn)
    for inputs in (make_inputs(model, one_image(family)), batch(model, family)):
        with torch.no_grad():
            dense = model(**inputs, use_cache=True)
            generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
            with attach(model, make_selectors(family), keep=1.0):
                same = model(**inputs, use_cache=True)
                again = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(dense.logits, same.logits)
        assert torch.equal(generated, again)
        for a, b in zip(cache_of(dense).layers, cache_of(same).layers, strict=True):
            assert isinstance(b, SelectiveLayer)
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_keep_everything_is_dense_with_beams(family):
    model = make_model(family)
    for inputs in (make_inputs(model, one_image(family)), batch(model, family)):
        options = dict(max_new_tokens=5, num_beams=3, do_sample=False)
        dense = model.generate(**inputs, **options)
        with attach(model, make_selectors(family), keep=1.0):
            assert torch.equal(model.generate(**inputs, **options), dense)


def hooks(model):
    return {
        name: (len(m._forward_hooks), len(m._forward_pre_hooks), list(m.__dict__))
        for name, m in model.named_modules()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_restores_the_model(family):
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    before = hooks(model)
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, make_selectors(family), keep=0.25):
            assert not torch.equal(model(**inputs).logits, dense)
        assert hooks(model) == before
        assert torch.equal(model(**inputs).logits, dense)


def test_leaving_after_an_exception_restores_the_model():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    before = hooks(model)
    with torch.no_grad():
        dense = model(**inputs).logits
        with pytest.raises(ZeroDivisionError), attach(model, make_selectors(), keep=0.25):
            handle = model.model.language_model.layers[2].mlp.register_forward_hook(
                lambda *_: 1 // 0
            )
            try:
                model(**inputs)
            finally:
                handle.remove()
        assert hooks(model) == before
        assert torch.equal(model(**inputs).logits, dense)


def test_a_failed_forward_leaves_nothing_for_the_next():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad(), attach(model, make_selectors(), keep=0.25) as attachment:
        good = model(**inputs).logits
        handle = model.model.language_model.layers[2].mlp.register_forward_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        handle.remove()
        assert attachment._state.forward is None
        assert torch.equal(model(**inputs).logits, good)


def test_nothing_is_compiled_unless_asked():
    model = make_model("llava")
    with attach(model, make_selectors(), 4):
        assert "forward" not in vars(model.model.language_model)
    with attach(model, make_selectors(), 4, compile={"backend": "eager"}):
        assert "forward" in vars(model.model.language_model)
    assert "forward" not in vars(model.model.language_model)


def test_detach_by_hand_twice_and_attach_again():
    model = make_model("llava")
    attachment = attach(model, make_selectors(), keep=0.25)
    with pytest.raises(AlvtsError, match="already"):
        attach(model, make_selectors(), keep=0.25)
    attachment.detach()
    attachment.detach()
    attach(model, make_selectors(), keep=0.25).detach()


def test_a_refused_attach_leaves_no_hooks():
    model = make_model("llava")
    before = hooks(model)
    with pytest.raises(AlvtsError):
        attach(model, make_selectors(), keep=2.5)
    assert hooks(model) == before
    attach(model, make_selectors()).detach()


def test_keep_comes_from_the_selectors_when_not_given():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad():
        with attach(model, make_selectors(default_keep=0.5)) as attachment:
            model(**inputs)
            assert attachment.last.kept == ((8,),) * LAYERS
            assert attachment.last.layer_average == 8
        schedules = ((1.0, 0.5, 0.25, 0.0),)
        selectors = make_selectors(schedules=schedules, default_keep=0.4375)
        with attach(model, selectors) as attachment:
            model(**inputs)
            assert attachment.last.kept == ((16,), (8,), (4,), (0,))
            assert attachment.last.visual_tokens == (16,)
            assert attachment.last.layer_average == 7


def test_what_any_other_scorer_keeps_is_given_as_it_is_to_attach():
    class Last:
        """The last tokens are the most important ones."""

        def importance(self, layer_index, layer, hidden, plan, layer_kwargs):
            places = torch.arange(1.0, hidden.shape[1] + 1)
            return places.where(plan.visual, torch.tensor(-torch.inf))

    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    logits = []
    with torch.no_grad():
        for keep in (0.25, 4, [0.25] * LAYERS, resolve_keep(0.25, LAYERS)):
            with attach_scorer(model, Last(), keep) as attachment:
                logits.append(model(**inputs).logits)
                assert attachment.last.kept == ((4,),) * LAYERS
    assert all(torch.equal(one, logits[0]) for one in logits)
    with pytest.raises(AlvtsError):
        attach_scorer(model, Last(), 2.5)


def test_selectors_of_another_model_are_refused():
    model = make_model("llava")
    selectors = make_selectors()
    selectors.layers.pop()
    with pytest.raises(AlvtsError, match="3 layers"):
        attach(model, selectors, keep=0.5)
    selectors = make_selectors()
    selectors.layers[1] = None
    with pytest.raises(AlvtsError, match="no selector"):
        attach(model, selectors, keep=0.5)
    attach(model, selectors, keep=[0.5, 1.0, 0.5, 0]).detach()
    with pytest.raises(
        AlvtsError, match="keys of 24 but the model has a width of 32 and keys of 16"
    ):
        attach(model, make_selectors("llava_next_mistral"), keep=0.5)


def test_unknown_architectures_are_named():
    with pytest.raises(AlvtsError, match=r"'gpt2'.*llava, .*qwen3_vl"):
        family_of(type("Config", (), {"model_type": "gpt2"})())


def test_sliding_windows_are_refused():
    model = make_model("llava_next_mistral")
    model.config.text_config.sliding_window = 8
    with pytest.raises(AlvtsError, match="sliding"):
        attach(model, make_selectors("llava_next_mistral"), keep=0.5)
    model = make_model("qwen2_5_vl")
    model.config.text_config.layer_types[1] = "sliding_attention"
    with pytest.raises(AlvtsError, match="sliding"):
        attach(model, make_selectors("qwen2_5_vl"), keep=0.5)


def test_unknown_attention_is_refused():
    model = make_model("llava")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(AlvtsError, match="flex_attention"):
        attach(model, make_selectors(), keep=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_describes_the_projections(family):
    model = make_model(family)
    description = family_of(model)
    layer = description.layers(model)[0]
    qk = description.query_key(layer)
    assert qk.w_q.shape[0] == qk.num_heads * qk.head_dim
    assert qk.w_k.shape[0] == qk.num_kv_heads * qk.head_dim
    assert (qk.b_q is not None) == (family == "qwen2_5_vl")
    assert (qk.q_norm is not None) == (qk.k_norm is not None) == (family == "qwen3_vl")
    x = torch.randn(1, 3, qk.w_q.shape[1])
    normed = qk.norm_weight * x * (x.pow(2).mean(-1, keepdim=True) + qk.norm_eps).rsqrt()
    expected = torch.nn.functional.linear(normed, qk.w_q, qk.b_q)
    torch.testing.assert_close(layer.self_attn.q_proj(layer.input_layernorm(x)), expected)


def test_inputs_that_hide_the_visual_tokens_are_refused():
    model = make_model("llava")
    embeds = torch.randn(1, 4, 32)
    with attach(model, make_selectors(), keep=0.5):
        with pytest.raises(AlvtsError, match="input_ids"):
            model(inputs_embeds=embeds)
        with pytest.raises(AlvtsError, match="input_ids"):
            model.model.language_model(inputs_embeds=embeds)
        with pytest.raises(AlvtsError, match="2-D"):
            model(input_ids=torch.ones(1, 4).long(), attention_mask=torch.ones(1, 1, 4, 4))


def test_text_alone_is_dense():
    model = make_model("llava")
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        dense = model(input_ids=ids, **{CACHE: DynamicCache()})
        with attach(model, make_selectors(), keep=0.25) as attachment:
            same = model(input_ids=ids, **{CACHE: DynamicCache()})
            assert attachment.last is None
    assert torch.equal(dense.logits, same.logits)
