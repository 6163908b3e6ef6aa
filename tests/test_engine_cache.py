import pytest
import torch
from tiny import CACHE, LAYERS, Prompt, make_inputs, make_model, make_selectors, one_image
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from alvts_cli import AlvtsError, attach
from alvts_cli.engine import (
    Policy,
    Selection,
    SelectiveLayer,
    cache_of,
    kv_bytes,
    kv_bytes_expected,
    prefill_flops,
    prepare_cache,
)
from alvts_cli.engine.cache import (
    remask,
)


@pytest.fixture
def model():
    return make_model("llava")


def refused(call):
    with pytest.raises(AlvtsError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_static_cache_is_refused(model):
    inputs = make_inputs(model, one_image("llava"))
    with attach(model, make_selectors(), 0.25):
        message = refused(
            lambda: model.generate(**inputs, max_new_tokens=3, cache_implementation="static")
        )
        assert "drop cache_implementation" in message
        model.generate(**inputs, max_new_tokens=3)


def test_other_caches_are_refused(model):
    config = model.config.text_config
    for cache in (
        StaticCache(config=config, max_cache_len=8),
        EncoderDecoderCache(DynamicCache(), DynamicCache()),
        ((torch.zeros(1), torch.zeros(1)),),
    ):
        assert "dynamic KV cache" in refused(lambda cache=cache: prepare_cache(cache, LAYERS))


def test_of_a_wrong_cache_and_the_mask_that_comes_with_it_the_cache_is_named(model):
    inputs = make_inputs(model, one_image("llava"))
    tokens = inputs["input_ids"].shape[1]
    given = {
        **inputs,
        "attention_mask": torch.ones(1, 1, tokens, tokens, dtype=torch.bool),
        CACHE: StaticCache(config=model.config.text_config, max_cache_len=tokens),
    }
    with attach(model, make_selectors(), 0.25):
        assert "dynamic KV cache" in refused(lambda: model(**given))


def test_rolling_back_is_refused(model):
    inputs = make_inputs(model, one_image("llava"))
    with attach(model, make_selectors(), 0.25):
        lookup = dict(max_new_tokens=8, prompt_lookup_num_tokens=3, do_sample=False)
        # Before 5.24, which renamed the cache, transformers does not look, so it is ours to refuse,
        # once it is cropped.
        looks = CACHE == "cache"
        with pytest.raises(ValueError if looks else AlvtsError, match=r"roll|can be cropped"):
            model.generate(**inputs, **lookup)
        cache = cache_of(model(**inputs))
        assert "roll" in refused(lambda: cache.crop(-1))


@pytest.mark.parametrize("with_config", [True, False])
def test_prepare_cache_converts_in_place(model, with_config):
    cache = DynamicCache(config=model.config.text_config) if with_config else DynamicCache()
    prepare_cache(cache, LAYERS)
    assert len(cache.layers) == LAYERS
    layers = list(cache.layers)
    assert all(isinstance(layer, SelectiveLayer) for layer in layers)
    prepare_cache(cache, LAYERS)
    assert all(a is b for a, b in zip(cache.layers, layers, strict=True))


def states(new):
    """Keys or values of so many tokens, of another number of heads."""
    return torch.randn(2, 5, new, 4)


@pytest.mark.parametrize("padded", [True, False])
def test_what_a_plain_cache_holds_is_taken_over(padded):
    cache = DynamicCache()
    for i in range(LAYERS - 1):
        cache.update(states(3), states(3), i)
    held = [(layer.keys, layer.values) for layer in cache.layers]
    real = [[not padded, True, True], [True] * 3]
    prepare_cache(cache, LAYERS)
    if padded:
        remask(cache, torch.tensor(real).long())
    assert len(cache.layers) == LAYERS and cache.layers[-1].seen == 0
    for layer, (keys, values) in zip(cache.layers, held, strict=False):
        assert layer.keys is keys and layer.values is values
        assert (layer.slots, layer.seen, layer.plain) == (3, 3, True)
        assert (layer.valid.tolist() if padded else layer.valid) == (real if padded else None)
        more = states(1)
        layer.update(more, more)
        assert torch.equal(layer.keys, torch.cat([keys, more], dim=2))
        assert torch.equal(layer.values, torch.cat([values, more], dim=2))
        assert (layer.slots, layer.seen) == (4, 4)
        if padded:
            assert layer.valid.tolist() == [[*row, True] for row in real]


def filled() -> SelectiveLayer:
    layer = SelectiveLayer()
    layer.expect(9, torch.tensor([[False, True, True], [True, True, True]]), plain=False)
    layer.update(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    return layer


def test_layer_reports_what_was_seen():
    layer = filled()
    assert (layer.slots, layer.seen, layer.get_seq_length()) == (3, 9, 9)
    assert layer.get_mask_sizes(2) == (11, 0)
    valid = torch.tensor([[False, True, True, True], [True] * 4])
    layer.expect(1, valid, plain=True)
    layer.update(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4))
    assert (layer.slots, layer.seen) == (4, 10)
    assert layer.valid is valid


def test_what_nobody_announces_is_plain_tokens():
    layer = SelectiveLayer()
    layer.update(states(3), states(3))
    assert (layer.slots, layer.seen, layer.plain) == (3, 3, True)
    # What was said of one update is not taken for the next one.
    layer.expect(4, None, plain=True, bias=torch.ones(2, 7))
    layer.update(states(4), states(4))
    layer.update(states(1), states(1))
    assert (layer.slots, layer.seen, layer.valid) == (8, 8, None)
    assert layer.bias.tolist() == [[1.0] * 7 + [0.0]] * 2


def test_a_bias_is_of_all_slots():
    layer = SelectiveLayer()
    one = torch.tensor([[1.5], [2.5]])
    assert layer.whole_bias(1, None) is None and layer.whole_bias(1, one) is one
    layer.update(states(2), states(2))
    assert layer.whole_bias(1, None) is None
    assert layer.whole_bias(1, one).tolist() == [[0, 0, 1.5], [0, 0, 2.5]]
    layer.bias = torch.tensor([[3.5, 4.5], [5.5, 6.5]])
    assert layer.whole_bias(2, None).tolist() == [[3.5, 4.5, 0, 0], [5.5, 6.5, 0, 0]]
    assert layer.whole_bias(1, one).tolist() == [[3.5, 4.5, 1.5], [5.5, 6.5, 2.5]]


def test_what_is_real_is_said_of_all_slots():
    layer = SelectiveLayer()
    one = torch.tensor([[False], [True]])
    assert layer.whole_valid(1, None) is None and layer.whole_valid(1, one) is one
    layer.update(states(2), states(2))
    assert layer.whole_valid(1, None) is None
    assert layer.whole_valid(1, one).tolist() == [[True, True, False], [True] * 3]
    layer.valid = torch.tensor([[False, True], [True, True]])
    assert layer.whole_valid(2, None).tolist() == [[False, True, True, True], [True] * 4]
    assert layer.whole_valid(1, one).tolist() == [[False, True, False], [True] * 3]


def test_layer_carries_valid_through_batch_operations():
    layer = filled()
    keys = layer.keys
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.valid[:, 0].tolist() == [True, False]
    assert torch.equal(layer.keys[0], keys[1])
    layer.batch_repeat_interleave(2)
    assert layer.valid[:, 0].tolist() == [True, True, False, False]
    layer.batch_select_indices(torch.tensor([1, 2]))
    assert layer.valid[:, 0].tolist() == [True, False]
    assert layer.keys.shape[0] == 2
    layer.reset()
    assert (layer.slots, layer.seen, layer.valid, layer.plain) == (0, 0, None, True)


def test_layer_carries_its_bias_through_batch_operations():
    layer = SelectiveLayer()
    layer.expect(2, None, plain=False, bias=torch.tensor([[0.5, 1.5], [2.5, 3.5]]))
    layer.update(states(2), states(2))
    layer.reorder_cache(torch.tensor([1, 0]))
    assert layer.bias.tolist() == [[2.5, 3.5], [0.5, 1.5]]
    layer.batch_repeat_interleave(2)
    assert layer.bias[:, 0].tolist() == [2.5, 2.5, 0.5, 0.5]
    layer.batch_select_indices(torch.tensor([1, 2]))
    assert layer.bias[:, 0].tolist() == [2.5, 0.5]
    layer.reset()
    assert layer.bias is None


def test_a_reset_cache_serves_the_next_prompt(model):
    inputs = make_inputs(model, one_image("llava"))
    batch = make_inputs(model, one_image("llava"), Prompt([1, 2, 3], [(16, 16)]))
    with torch.no_grad(), attach(model, make_selectors(), 0.25):
        expected = model(**inputs).logits
        cache = cache_of(model(**batch))
        cache.reset()
        assert torch.equal(model(**inputs, **{CACHE: cache}).logits, expected)


def test_kv_bytes_measured_equal_expected(model):
    inputs = make_inputs(model, one_image("llava"))
    keep = [1.0, 0.5, 0.25, 0.0]
    with torch.no_grad(), attach(model, make_selectors(), keep) as attachment:
        cache = cache_of(model(**inputs))
        tokens = [12 + kept[0] for kept in attachment.last.kept]
    assert tokens == [28, 20, 16, 12]
    assert kv_bytes(cache) == kv_bytes_expected(model.config.text_config, tokens, 4)


def test_flops_equal_those_of_the_matrices(model):
    config = model.config.text_config
    dense = prefill_flops(config, [28] * LAYERS, Selection(8), 28)
    assert dense.scoring == 0
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters() if p.dim() == 2)
    pairs = sum(range(1, 29))
    attention = LAYERS * pairs * 4 * config.hidden_size
    assert dense.total == 2 * 28 * weights + attention

    pruned = prefill_flops(config, [16, 16, 12, 28], Selection(8), 28, text_tokens=12)
    selector = make_selectors(rank=8).layers[0]
    keys = 2 * 28 * (selector.down.numel() + selector.up.numel())
    queries = 2 * 12 * model.model.language_model.layers[0].self_attn.q_proj.weight.numel()
    one_layer = keys + queries + 2 * 12 * 28 * (config.hidden_size + config.num_attention_heads)
    assert pruned.scoring == 2 * one_layer
    assert pruned.layers < dense.layers

    # The first layer ranks for all, and the third, on text alone, is carried past as well.
    policy = Policy(every=0, quality=0.3, mass=True, carry=True)
    selection = Selection(8, policy, carry_rank=2)
    once = prefill_flops(config, [16, 16, 12, 28], selection, 28, text_tokens=12)
    # Of rank 0 where nobody says which: nothing.
    free = Policy(every=0, carry=True)
    alone = Policy(every=0)
    assert prefill_flops(config, [16] * LAYERS, Selection(8, free), 28, 12) == prefill_flops(
        config, [16] * LAYERS, Selection(8, alone), 28, 12
    )
    compared = 2 * 16 * 16 * 8 + 2 * 28 * 16 * 8
    assert once.scoring == one_layer + compared + 3 * 2 * 28 * 2 * config.hidden_size * 2
