"""The engine against the method written down plainly (`reference.py`)."""

import pytest
import torch
from reference import reference_logits, watch_selection
from tiny import (
    CACHE,
    FAMILIES,
    IMAGE,
    LAYERS,
    QWEN,
    Prompt,
    make_inputs,
    make_model,
    make_selectors,
    one_image,
)
from transformers import DynamicCache

from alvts_cli import attach
from alvts_cli.engine import PAPER, cache_of

KEEPS = {"ratio": 0.25, "schedule": [1.0, 0.5, 0.0, 0.25], "count": 3}


def counts(attachment, chunk_tokens):
    """`[layer][chunk]` from what the attachment says it kept, for chunks of one sample."""
    return [[kept[0]] * len(chunk_tokens) for kept in attachment.last.kept]


def check_generation(model, inputs, keep, family="llava", steps=5, policy=PAPER):
    """Prefill and every decode step equal recomputing the sequence so far from nothing."""
    selectors = make_selectors(family, policy=policy)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), attach(model, selectors, keep) as attachment:
        with watch_selection() as chosen:
            prefill = model(**inputs).logits[0]
        out = model.generate(
            **inputs,
            max_new_tokens=steps,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        kept = counts(attachment, [0])
        slots = [layer.slots for layer in cache_of(out).layers]
        text = length - attachment.last.visual_tokens[0]
    assert slots == [text + k[0] + steps - 1 for k in kept]
    assert cache_of(out).get_seq_length() == length + steps - 1

    whole = dict(inputs, input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences))
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, steps)
        )
    expected = reference_logits(model, whole, selectors, kept, [(0, length)], chosen, policy)
    torch.testing.assert_close(prefill, expected[:length], rtol=1e-4, atol=1e-4)
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits[0], expected[length - 1 + step], rtol=1e-4, atol=1e-4)
    return expected


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_the_reference(family, keep, attn):
    model = make_model(family, attn)
    check_generation(model, make_inputs(model, one_image(family)), keep, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_images_with_text_between(family):
    model = make_model(family)
    size = one_image(family).images[0]
    other = {"llava": (16, 16), "qwen2_5_vl": (16, 32)}.get(family, (16, 32))
    prompt = Prompt([1, 5, 9, 12, 33, 47], [size, other])
    check_generation(model, make_inputs(model, prompt), 0.25, family)


@pytest.mark.parametrize("family", QWEN)
def test_video_and_image(family):
    model = make_model(family)
    prompt = Prompt([1, 5, 9, 12, 33, 47], [(16, 32)], videos=[(4, 16, 32)])
    inputs = make_inputs(model, prompt)
    check_generation(model, inputs, 0.4, family)
    only_video = make_inputs(model, Prompt([1, 5, 9, 12, 33], videos=[(4, 32, 32)]))
    check_generation(model, only_video, 0.25, family)


def test_an_image_without_any_text_before_or_after():
    model = make_model("llava")
    inputs = make_inputs(model, Prompt([7], [(16, 16)], at=0))
    check_generation(model, inputs, 0.25)


def test_an_image_alone_keeps_a_token_in_every_layer():
    model = make_model("llava")
    inputs = make_inputs(model, Prompt([], [(16, 16)], at=0))
    with torch.no_grad(), attach(model, make_selectors(), [1.0, 0.25, 0, 0.0]) as attachment:
        model(**inputs)
        assert attachment.last.kept == ((16,), (4,), (1,), (1,))
    check_generation(model, inputs, [1.0, 0.25, 0, 0.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_the_original_ones(family):
    """Renumbered positions would give the logits of the pruned prompt. They must not."""
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    tables = []

    def look(module, args, kwargs):
        tables.append((kwargs["position_embeddings"][0], kwargs["position_ids"]))

    layer = model.model.language_model.layers[1]
    with torch.no_grad():
        handle = layer.register_forward_pre_hook(look, with_kwargs=True)
        model(**inputs)
        handle.remove()
        with attach(model, make_selectors(family), keep=[1.0, 0, 1.0, 1.0]):
            handle = layer.register_forward_pre_hook(look, with_kwargs=True)
            model(**inputs)
            handle.remove()
    (dense, _), (selected, ids) = tables
    text = inputs["input_ids"][0] != IMAGE
    assert torch.equal(dense[0, text], selected[0])
    assert ids is None


@pytest.mark.parametrize("family", FAMILIES)
def test_what_one_layer_skips_the_next_may_take(family):
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    taken = []
    with torch.no_grad(), attach(model, make_selectors(family), keep=0.25):
        handles = [
            layer.register_forward_pre_hook(
                lambda m, a, k: taken.append(k["position_embeddings"][0][0]), with_kwargs=True
            )
            for layer in model.model.language_model.layers
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
    assert len(taken) == LAYERS
    assert any(not torch.equal(taken[0], later) for later in taken[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_use_cache_or_not_is_the_same(family):
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    with torch.no_grad(), attach(model, make_selectors(family), keep=0.25):
        cached = model(**inputs, use_cache=True)
        uncached = model(**inputs, use_cache=False)
        passed = model(**inputs, **{CACHE: DynamicCache()})
    assert cache_of(uncached) is None
    assert torch.equal(cached.logits, uncached.logits)
    assert torch.equal(cached.logits, passed.logits)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_hidden_states_are_whole(family, attn):
    model = make_model(family, attn)
    inputs = make_inputs(model, one_image(family))
    with torch.no_grad():
        dense = model(**inputs, output_hidden_states=True).hidden_states
        with attach(model, make_selectors(family), keep=0.25):
            out = model(**inputs, output_hidden_states=True)
            plain = model(**inputs)
    assert torch.equal(out.logits, plain.logits)
    assert [s.shape for s in out.hidden_states] == [s.shape for s in dense]
    assert torch.equal(out.hidden_states[0], dense[0])
    skipped = (out.hidden_states[1] == out.hidden_states[0]).all(-1)
    visual = inputs["input_ids"] == IMAGE
    assert skipped.sum() == visual.sum() - int(0.25 * visual.sum())
    assert not bool((skipped & ~visual).any())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_image_in_a_later_turn(family, attn):
    model = make_model(family, attn)
    selectors = make_selectors(family)
    first = make_inputs(model, one_image(family))
    second = make_inputs(model, Prompt([4, 6, 8, 11], one_image(family).images, seed=5))
    start = first["input_ids"].shape[1]
    whole = {
        name: torch.cat([first[name], second[name]], dim=int(name in PER_TOKEN)) for name in first
    }
    positions = {}
    if family in QWEN:
        grid = {k: whole[k] for k in ("image_grid_thw", "mm_token_type_ids")}
        positions["position_ids"] = model.model.get_rope_index(whole["input_ids"], **grid)[0]
    one = {k: v[..., :start] for k, v in positions.items()}
    two = {k: v[..., start:] for k, v in positions.items()}
    with torch.no_grad(), attach(model, selectors, keep=0.25) as attachment:
        with watch_selection() as chosen:
            cache = cache_of(model(**first, **one))
            second["attention_mask"] = whole["attention_mask"]
            logits = model(**second, **two, **{CACHE: cache}).logits[0]
        kept = counts(attachment, [0, 1])
    text = int((whole["input_ids"] != IMAGE).sum())
    assert [layer.slots for layer in cache.layers] == [text + sum(k) for k in kept]
    end = whole["input_ids"].shape[1]
    expected = reference_logits(model, whole, selectors, kept, [(0, start), (start, end)], chosen)
    torch.testing.assert_close(logits, expected[start:], rtol=1e-4, atol=1e-4)


PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_text_turn(family, attn):
    model = make_model(family, attn)
    selectors = make_selectors(family)
    inputs = make_inputs(model, one_image(family))
    start = inputs["input_ids"].shape[1]
    options = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad(), attach(model, selectors, keep=0.25) as attachment:
        with watch_selection() as chosen:
            turn = model.generate(**inputs, max_new_tokens=3, **options)
        ids = torch.cat([turn.sequences, torch.tensor([[14, 15, 16, 17]])], dim=1)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **{CACHE: cache_of(turn)},
            max_new_tokens=3,
            **options,
        )
        kept = counts(attachment, [0])
    whole = dict(inputs, input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences))
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (out.sequences == IMAGE).int()
    expected = reference_logits(model, whole, selectors, kept, [(0, start)], chosen)
    for step, logits in enumerate(out.logits):
        row = expected[ids.shape[1] - 1 + step]
        torch.testing.assert_close(logits[0], row, rtol=1e-4, atol=1e-4)


def test_a_cache_filled_before_attaching():
    model = make_model("llava")
    selectors = make_selectors()
    text = torch.tensor([[1, 20, 21, 22]])
    image = make_inputs(model, one_image("llava"))
    whole = dict(image, input_ids=torch.cat([text, image["input_ids"]], dim=1))
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        cache = cache_of(model(input_ids=text))
        with attach(model, selectors, keep=0.25) as attachment:
            image["attention_mask"] = whole["attention_mask"]
            with watch_selection() as chosen:
                logits = model(**image, **{CACHE: cache}).logits[0]
            kept = counts(attachment, [0])
    end = whole["input_ids"].shape[1]
    expected = reference_logits(model, whole, selectors, kept, [(4, end)], chosen)
    torch.testing.assert_close(logits, expected[4:], rtol=1e-4, atol=1e-4)
