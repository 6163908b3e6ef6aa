"""A left-padded batch gives every sample what it gets alone."""

import copy

import pytest
import torch
from tiny import CACHE, FAMILIES, IMAGE, Prompt, make_inputs, make_model, make_selectors, one_image
from torch import nn
from transformers import DynamicCache

from alvts_cli import AlvtsError, attach
from alvts_cli.engine import NAMED, Keep, cache_of, parse_policy
from alvts_cli.engine.calls import going_on
from alvts_cli.engine.plan import make_plan

OPTIONS = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)


def prompts(family):
    """Different lengths of text, and one, two and no images (or none but those of equal size)."""
    size = one_image(family).images[0]
    other = {"llava": size, "qwen2_5_vl": (16, 32)}.get(family, (16, 32))
    return [
        Prompt([1, 5, 9, 12], [size], seed=1),
        Prompt([1, 5, 9, 12, 33, 47, 51], [size, other], seed=2),
        Prompt([1, 6, 7, 8, 9, 10], [other], seed=3),
        Prompt([1, 40, 41, 42, 43]),
    ]


def fresh(model):
    """Qwen remembers the position offset of the latest prompt: forget it between prompts."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None
    return model


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", [0.25, 5, [1.0, 0.0, 0.5, 3]], ids=["ratio", "count", "schedule"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_singles(family, keep, attn):
    model = make_model(family, attn)
    samples = prompts(family)
    batch = make_inputs(model, *samples)
    longest = batch["input_ids"].shape[1]
    with torch.no_grad(), attach(model, make_selectors(family), keep) as attachment:
        whole = fresh(model)(**batch).logits
        assert not bool(whole.isnan().any())
        together = fresh(model).generate(**batch, max_new_tokens=5, **OPTIONS)
        kept = attachment.last.kept
        for b, sample in enumerate(samples):
            inputs = make_inputs(model, sample)
            length = inputs["input_ids"].shape[1]
            one = fresh(model)(**inputs).logits[0]
            torch.testing.assert_close(whole[b, longest - length :], one, rtol=1e-4, atol=1e-4)
            alone = fresh(model).generate(**inputs, max_new_tokens=5, **OPTIONS)
            assert torch.equal(together.sequences[b, longest:], alone.sequences[0, length:])
            for a, c in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[b], c[0], rtol=1e-4, atol=1e-4)
            if sample.images:
                assert [k[b] for k in kept] == [k[0] for k in attachment.last.kept]
                for layer, own in zip(
                    cache_of(together).layers, cache_of(alone).layers, strict=True
                ):
                    real = layer.slots if layer.valid is None else int(layer.valid[b].sum())
                    assert real == own.slots


@pytest.mark.parametrize("family", FAMILIES)
def test_right_padding_in_a_prefill(family):
    model = make_model(family)
    sample = one_image(family)
    inputs = make_inputs(model, sample)
    length = inputs["input_ids"].shape[1]
    padded = dict(inputs)
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in padded:
            padded[name] = torch.nn.functional.pad(padded[name], (0, 3))
    with torch.no_grad(), attach(model, make_selectors(family), 0.25):
        one = fresh(model)(**inputs).logits
        other = fresh(model)(**padded).logits[:, :length]
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_batch_equal_beams_alone(family):
    model = make_model(family)
    samples = prompts(family)[:2]
    options = dict(num_beams=3, max_new_tokens=6, do_sample=False)
    batch = make_inputs(model, *samples)
    longest = batch["input_ids"].shape[1]
    with attach(model, make_selectors(family), 0.25):
        together = fresh(model).generate(**batch, **options)
        for b, sample in enumerate(samples):
            inputs = make_inputs(model, sample)
            alone = fresh(model).generate(**inputs, **options)
            length = inputs["input_ids"].shape[1]
            assert torch.equal(together[b, longest:], alone[0, length:])


def test_several_returned_sequences():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with attach(model, make_selectors(), 0.25):
        one = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        beams = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, num_beams=3, num_return_sequences=3
        )
        assert beams.shape == (3, one.shape[1])
        sampled = model.generate(
            **inputs, max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=2
        )
        assert torch.equal(sampled, one.expand(2, -1))


def test_a_padded_cache_filled_before_attaching():
    model = make_model("llava")
    image = make_inputs(model, one_image("llava"))
    texts = torch.tensor([[0, 0, 1, 20], [1, 21, 22, 23]])
    mask = (texts != 0).long()
    ids = image["input_ids"].expand(2, -1)
    pixels = image["pixel_values"].repeat(2, 1, 1, 1)
    full = torch.cat([mask, torch.ones_like(ids)], dim=1)
    places = full.cumsum(1) - 1
    selectors = make_selectors()
    with torch.no_grad():
        cache = cache_of(model(texts, attention_mask=mask, position_ids=places[:, :4]))
        with attach(model, selectors, 0.25):
            got = model(
                ids,
                pixel_values=pixels,
                attention_mask=full,
                position_ids=places[:, 4:],
                **{CACHE: cache},
            )
            for b, skip in ((0, 2), (1, 0)):
                alone = DynamicCache()
                model(texts[b : b + 1, skip:], **{CACHE: alone})
                expected = model(ids[:1], pixel_values=pixels[:1], **{CACHE: alone})
                torch.testing.assert_close(got.logits[b], expected.logits[0], rtol=1e-4, atol=1e-4)


def test_padding_of_a_turn_of_words_stays_unseen_behind_an_image():
    """A layer that ran whole in the first turn, and so by the model's own mask, selects later."""
    model = make_model("llava")
    image = make_inputs(model, one_image("llava"))
    texts = torch.tensor([[0, 0, 1, 20], [1, 21, 22, 23]])
    mask = (texts != 0).long()
    ids = image["input_ids"]
    full = torch.cat([mask, torch.ones_like(ids).expand(2, -1)], dim=1)
    places = full.cumsum(1) - 1
    pixels = image["pixel_values"]
    with torch.no_grad(), attach(model, make_selectors(), 0.25):
        first = model(
            texts, attention_mask=mask, position_ids=places[:, :4].clamp(min=0), use_cache=True
        )
        got = model(
            ids.expand(2, -1),
            pixel_values=pixels.repeat(2, 1, 1, 1),
            attention_mask=full,
            position_ids=places[:, 4:],
            use_cache=True,
            **going_on(first),
        )
        for b, skip in ((0, 2), (1, 0)):
            alone = model(texts[b : b + 1, skip:], use_cache=True)
            expected = model(ids, pixel_values=pixels, use_cache=True, **going_on(alone))
            torch.testing.assert_close(got.logits[b], expected.logits[0], rtol=1e-4, atol=1e-4)


def turn(model, said, ids, mask, at, images=None):
    """A turn of every sample, behind all that was said."""
    before = {} if said is None else going_on(said)
    return model(
        ids, pixel_values=images, attention_mask=mask, position_ids=at, use_cache=True, **before
    )


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", ["paper", "once", "every-4"])
@pytest.mark.parametrize("keep", [0.25, [1.0, 0.25, 0, 5]], ids=["ratio", "schedule"])
@pytest.mark.parametrize("image_first", [True, False])
def test_a_turn_of_one_token_may_be_padding_in_a_sample(image_first, keep, policy, attn):
    """Sample 1 has no second turn: nobody sees what stands in its place, and no row is empty."""
    model = make_model("llava", attn)
    pair = make_inputs(model, one_image("llava", 1), one_image("llava", 2))
    image = pair["input_ids"], torch.ones_like(pair["input_ids"])
    word, none = torch.tensor([[20], [0]]), torch.tensor([[1], [0]])
    last = torch.tensor([[21, 22], [30, 31]]), torch.ones(2, 2, dtype=torch.int64)
    one = torch.tensor([[23], [32]]), torch.ones(2, 1, dtype=torch.int64)
    turns = [image, (word, none), one, (word, none), last]
    if not image_first:
        turns = [(word, none), one, image, (word, none), last]
    whole = torch.cat([mask for _, mask in turns], dim=1)
    places = (whole.cumsum(1) - 1).clamp(min=0)
    selectors = make_selectors(policy=parse_policy(policy))
    with torch.no_grad(), attach(model, selectors, keep):
        said, alone = None, [None, None]
        end = 0
        for ids, mask in turns:
            begin, end = end, end + ids.shape[1]
            images = pair["pixel_values"] if ids is image[0] else None
            at = places[:, begin:end]
            said = turn(model, said, ids, whole[:, :end], at, images)
            for b in range(2):
                if not mask[b].all():
                    continue
                own = None if images is None else images[b : b + 1]
                alone[b] = turn(model, alone[b], ids[b : b + 1], None, at[b : b + 1], own)
                expected = alone[b].logits[0]
                torch.testing.assert_close(said.logits[b], expected, rtol=1e-4, atol=1e-4)


def test_a_turn_of_one_token_may_be_padding_in_a_batch_of_one():
    """As a server of one fixed shape may have it."""
    model = make_model("llava")
    image = make_inputs(model, one_image("llava"))
    ids, pixels = image["input_ids"], image["pixel_values"]
    length = ids.shape[1]
    mask = torch.cat([torch.ones_like(ids), torch.tensor([[0, 1, 1]])], dim=1)
    places = mask.cumsum(1) - 1
    word, more = torch.tensor([[20]]), torch.tensor([[21, 22]])
    with torch.no_grad(), attach(model, make_selectors(), 0.25):
        expected = turn(model, None, ids, None, places[:, :length], pixels)
        expected = turn(model, expected, more, None, places[:, -2:])
        said = turn(model, None, ids, mask[:, :length], places[:, :length], pixels)
        said = turn(model, said, word, mask[:, :-2], places[:, -3:-2])
        said = turn(model, said, more, mask, places[:, -2:])
    torch.testing.assert_close(said.logits, expected.logits, rtol=1e-4, atol=1e-4)


# Visual tokens, 88 and 52, and a prompt without a word.
BIG = Prompt([1, 5, 9, 12, 33], [(32, 32)], seed=1)
SMALL = Prompt([1, 5, 9, 13, 34], [(16, 32)], seed=2)
WORDLESS = Prompt([], [(32, 32)], at=0, seed=3)

NEIGHBOURS = {
    "one keeps all, in every layer": (BIG, SMALL, 60, ()),
    "one keeps all in the first": (BIG, SMALL, [60, 5, 5, 5], ()),
    "one keeps all in a later one": (BIG, SMALL, [0, 5, 60, 5], ()),
    "schedules give one nothing at first": (BIG, SMALL, 0.05, ((0, 0.02, 0.3, 0.1),)),
    "and then": (BIG, SMALL, 0.2, ((0.01, 0, 0.3, 0.5),)),
    "one has to keep a token": (BIG, WORDLESS, [0, 0.3, 0.3, 0.3], ()),
}


@pytest.mark.parametrize("policy", NAMED)
@pytest.mark.parametrize(
    ("first", "second", "keep", "schedules"), NEIGHBOURS.values(), ids=NEIGHBOURS
)
def test_where_tokens_are_ranked_no_neighbour_decides(first, second, keep, schedules, policy):
    """Nor for whom a token stands that is kept like all others. LLaVA-NeXT has tokens that are all
    alike in the first layer, at the ends of its rows."""
    model = make_model("llava_next")
    selectors = make_selectors("llava_next", policy=NAMED[policy], schedules=schedules)
    with torch.no_grad(), attach(model, selectors, keep) as attachment:
        together = model(**make_inputs(model, first, second)).logits[:, -1]
        kept = attachment.last.kept
        for b, prompt in enumerate((first, second)):
            alone = model(**make_inputs(model, prompt)).logits[0, -1]
            assert [one for (one,) in attachment.last.kept] == [one[b] for one in kept]
            torch.testing.assert_close(together[b], alone, rtol=1e-4, atol=1e-4)


def test_an_image_of_which_some_is_masked_is_one_image():
    """As if those tokens were not there."""
    model = make_model("llava")
    inputs = make_inputs(model, Prompt([1, 5, 9, 12], one_image("llava").images))
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    mask = torch.ones_like(ids)
    mask[0, (ids[0] == IMAGE).nonzero()[6:9, 0]] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    plan = make_plan(ids, ids == IMAGE, mask, Keep((0.5,)))
    assert not plan.several and plan.visual_counts == (13,)
    left, whole = mask[0].bool()[ids[0] == IMAGE], model.model.get_image_features

    def features_left(*args, **more):
        output = whole(*args, **more)
        output.pooler_output = [output.pooler_output[0][left]]
        return output

    for policy in NAMED:
        with torch.no_grad(), attach(model, make_selectors(policy=NAMED[policy]), 0.25):
            got = model(ids, pixels, attention_mask=mask, position_ids=places).logits
            model.model.get_image_features = features_left
            alone = model(ids[:, mask[0].bool()], pixels).logits
            del model.model.get_image_features
        torch.testing.assert_close(got[0, -1], alone[0, -1], rtol=1e-4, atol=1e-4)


HIDDEN = "says something else of a picture's turn in the KV cache"


@pytest.mark.parametrize("keep", [0.25, [1.0, 1.0, 0.5, 0]], ids=["ratio", "schedule"])
@pytest.mark.parametrize("new", [1, 2])
def test_a_mask_says_the_same_of_what_is_cached(new, keep):
    """Layers that select hold different tokens: another mask of them all could not be obeyed."""
    model = make_model("llava")
    pair = make_inputs(model, *prompts("llava")[:2])
    mask, ids = pair["attention_mask"], torch.arange(20, 20 + 2 * new).view(2, new)
    assert not mask.all()
    more = torch.ones_like(ids)
    shown, hidden = torch.ones_like(mask), mask.clone()
    hidden[1, -1] = 0
    with torch.no_grad(), attach(model, make_selectors(), keep):
        for other in (shown, hidden):
            said = going_on(model(**pair, use_cache=True))
            with pytest.raises(AlvtsError, match=HIDDEN):
                model(ids, attention_mask=torch.cat([other, more], 1), **said)
        said = going_on(model(**pair, use_cache=True))
        with pytest.raises(AlvtsError, match=HIDDEN):
            model(ids, **said)
        # Nothing was cached of what was refused.
        whole = torch.cat([mask, more], 1)
        said = going_on(model(ids, attention_mask=whole, **said))
        # Of what came behind it is obeyed, and samples come in another order.
        cache = next(iter(said.values()))
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(AlvtsError, match=HIDDEN):
            model(ids, attention_mask=torch.cat([whole, more], 1), **said)
        model(ids, attention_mask=torch.cat([whole.flip(0), more], 1), **said)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("policy", NAMED)
def test_words_behind_a_picture_may_be_hidden_later_and_shown_again(policy, attn):
    """As `generate` does by itself with a cache of its own, where a sample ended before others:
    its padding was decoded like words."""
    model = make_model("llava", attn)
    pair = make_inputs(model, *prompts("llava")[:2])
    words = torch.tensor([[20, 21, 22], [30, 31, 32]])
    last = torch.tensor([[23], [33]])
    before = pair["attention_mask"]
    length = before.shape[1]
    shown = torch.ones_like(words)
    hidden = torch.tensor([[1, 0, 0], [1, 1, 1]])

    def turns(*masks):
        """The words one at a time, then once more, and the last one, each under its mask."""
        said = going_on(model(**pair, use_cache=True))
        for i, mask in enumerate(masks):
            token = words[:, i : i + 1] if i < 3 else last
            whole = torch.cat([before, mask[:, : i + 1]], 1)
            places = torch.full((2, 1), length + i)
            answer = model(token, attention_mask=whole, position_ids=places, **said)
        return answer.logits

    def padded(mask):
        return torch.cat([mask, torch.ones_like(last)], 1)

    with torch.no_grad(), attach(model, make_selectors(policy=NAMED[policy]), 0.25):
        expected = turns(*[padded(hidden)] * 4)
        for masks in (
            [padded(shown)] * 3 + [padded(hidden)],
            [padded(hidden)] * 2 + [padded(shown), padded(hidden)],
        ):
            got = turns(*masks)
            torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
        other = turns(*[padded(shown)] * 4)
        assert (other[0] - expected[0]).abs().max() > 0.01


def test_a_second_turn_by_generate_alone():
    """Which makes the mask out of the padding that it finds."""
    model = make_model("llava")
    pair = make_inputs(model, *prompts("llava")[:2])
    how = dict(do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    new = torch.tensor([[40, 41], [42, 43]])
    with torch.no_grad(), attach(model, make_selectors(), 0.25):
        said = model.generate(**pair, max_new_tokens=6, **how)
        ended = said.sequences[0, -4].item()
        said = model.generate(**pair, max_new_tokens=6, eos_token_id=ended, **how)
        assert (said.sequences[0, -3:] == 0).all() and said.sequences[1, -1] != 0
        ids = torch.cat([said.sequences, new], 1)
        again = model.generate(ids, max_new_tokens=3, **{CACHE: cache_of(said)}, **how)
    assert again.sequences.shape[1] == ids.shape[1] + 3


def test_a_mask_that_was_refused_leaves_nothing_behind():
    model = make_model("llava")
    ids, right = torch.tensor([[5, 6]]), torch.ones(1, 6)
    with torch.no_grad():
        cache = cache_of(model(torch.tensor([[1, 7, 8, 9]]), use_cache=True))
        expected = model(ids, attention_mask=right, **{CACHE: copy.deepcopy(cache)}).logits
        with attach(model, make_selectors(), 0.25):
            for wrong in (torch.tensor([[0, 1]]), torch.zeros(2, 6)):
                with pytest.raises(AlvtsError, match="but the input_ids are 1 x 2 behind 4"):
                    model(ids, attention_mask=wrong, **{CACHE: cache})
            assert torch.equal(model(ids, attention_mask=right, **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("first", ["attached", "dense"])
def test_a_mask_that_is_written_to_is_another(first):
    model = make_model("llava")
    pair = make_inputs(model, *prompts("llava")[:2])
    pair["attention_mask"] = pair["attention_mask"].bool()
    one = torch.ones(2, 1, dtype=torch.bool)
    image = make_inputs(model, one_image("llava"))
    again = image["input_ids"].expand(2, -1), image["pixel_values"].repeat(2, 1, 1, 1)
    mask = torch.cat([pair["attention_mask"], torch.ones_like(again[0], dtype=torch.bool)], 1)
    with torch.no_grad():
        said = going_on(model(**pair, use_cache=True)) if first == "dense" else None
        with attach(model, make_selectors(), 0.25):
            if said is None:
                said = going_on(model(**pair, use_cache=True))
                mask = pair["attention_mask"]
            else:
                model(again[0], pixel_values=again[1], attention_mask=mask, **said)
            mask[1, 2] = False
            with pytest.raises(AlvtsError, match=HIDDEN):
                model(torch.tensor([[5], [6]]), attention_mask=torch.cat([mask, one], 1), **said)


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_a_mask_may_come_late(keep):
    """Behind a dense prefill with padding, and a turn that had no mask."""
    model = make_model("llava")
    pair = make_inputs(model, *prompts("llava")[:2])
    ids, more = torch.tensor([[20], [21]]), torch.ones(2, 1, dtype=torch.int64)
    mask = torch.cat([pair["attention_mask"], more, more], 1)

    def turns(before):
        model(ids, **before)
        return model(ids, attention_mask=mask, **before).logits

    with torch.no_grad():
        expected = turns(going_on(model(**pair, use_cache=True)))
        before = going_on(model(**pair, use_cache=True))
        with attach(model, make_selectors(), keep):
            assert torch.equal(turns(before), expected)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_later_mask_is_obeyed_where_nothing_was_skipped(attn):
    """At keep 1.0 as by the dense model, and behind words by a picture that is selected from."""
    model = make_model("llava", attn)
    pair = make_inputs(model, *prompts("llava")[:2])
    mask, one = pair["attention_mask"], torch.ones(2, 1, dtype=torch.int64)
    hidden = mask.clone()
    hidden[1, -1] = 0
    word = torch.tensor([[24], [25]])

    def turns(other):
        said = going_on(model(**pair, use_cache=True))
        for _ in range(2):
            other = None if other is None else torch.cat([other, one], 1)
            answer = model(word, attention_mask=other, **said)
        return answer.logits

    with torch.no_grad():
        for other in (hidden, torch.ones_like(mask), None):
            expected = turns(other)
            with attach(model, make_selectors(), 1.0):
                assert torch.equal(turns(other), expected)


@pytest.mark.parametrize("other", [[[0, 1, 1, 1], [0, 0, 1, 1]], None], ids=["less", "all"])
def test_a_later_mask_of_words_holds_where_a_picture_is_selected_from(other):
    model = make_model("llava")
    image = make_inputs(model, one_image("llava"))
    texts = torch.tensor([[0, 0, 1, 20], [1, 21, 22, 23]])
    ids, pixels = image["input_ids"], image["pixel_values"]
    places = torch.arange(4 + ids.shape[1])[None].expand(2, -1)
    hides = torch.ones_like(texts) if other is None else torch.tensor(other)
    mask = None if other is None else torch.cat([hides, torch.ones_like(ids).expand(2, -1)], 1)
    with torch.no_grad(), attach(model, make_selectors(), 0.25):
        said = model(texts, attention_mask=(texts != 0).long(), position_ids=places[:, :4])
        got = turn(model, said, ids.expand(2, -1), mask, places[:, 4:], pixels.repeat(2, 1, 1, 1))
    with torch.no_grad():
        # Cached without alvts, it is taken over with the mask that the picture comes with.
        said = model(texts, attention_mask=(texts != 0).long(), position_ids=places[:, :4])
        with attach(model, make_selectors(), 0.25):
            expected = turn(
                model, said, ids.expand(2, -1), mask, places[:, 4:], pixels.repeat(2, 1, 1, 1)
            )
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)


def test_half_precision_runs_and_is_finite():
    model = make_model("llava", dtype=torch.bfloat16)
    batch = make_inputs(model, *prompts("llava"))
    with torch.no_grad(), attach(model, make_selectors(), 0.25):
        logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16
    assert bool(logits.isfinite().all())


def test_gradients_reach_the_embeddings():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with attach(model, make_selectors(), 0.25):
        model(
            **inputs, labels=inputs["input_ids"].where(inputs["input_ids"] != IMAGE, -100)
        ).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:None of the inputs:UserWarning")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("policy", ["paper", "once", "each"])
def test_checkpointed_gradients_are_the_same(policy, reentrant):
    """Layers run a second time, without us; where we would, one line says so."""
    model = make_model("llava").train()
    inputs = make_inputs(model, one_image("llava"))
    layer, runs = model.model.language_model.layers[1], []
    forward = layer.mlp.forward
    layer.mlp.forward = lambda states: runs.append(states.shape[1]) or forward(states)

    def gradients():
        model.zero_grad()
        model(**inputs, use_cache=False).logits.square().sum().backward()
        return [weights.grad.clone() for weights in model.parameters() if weights.grad is not None]

    with attach(model, make_selectors(policy=NAMED[policy]), 0.25):
        expected = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if type(layer).__call__ is not nn.Module.__call__:
            with pytest.raises(AlvtsError, match=r"use transformers 5.24 or newer, or train"):
                gradients()
            with torch.no_grad():
                model(**inputs, use_cache=False)
            return
        found = gradients()
    assert runs == [runs[0]] * 3
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
