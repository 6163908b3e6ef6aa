"""Diversity, mass, carry, and choices that hold for several layers: each against the formulas, in
prefill, cache and decode, in batches, over several images and turns."""

import pytest
import torch
from reference import reference_logits, watch_selection
from test_engine_batch import fresh, prompts
from test_engine_plan import planned
from test_engine_reference import check_generation, counts
from tiny import CACHE, FAMILIES, LAYERS, Prompt, make_inputs, make_model, make_selectors, one_image
from torch.nn.modules.module import register_module_forward_pre_hook

from alvts_cli import AlvtsError, attach
from alvts_cli.engine import NAMED, Policy, cache_of, make_pieces, parse_policy
from alvts_cli.engine.diversity import directions
from alvts_cli.engine.forward import Forward, Pieces, _Choice
from alvts_cli.engine.mass import find_members, pooled
from alvts_cli.engine.scene import Scene
from alvts_cli.engine.selecting import make_layout

POLICIES = {
    "diverse": Policy(quality=0.3),
    "mass": Policy(mass=True),
    "carry": Policy(carry=True),
    "all": Policy(quality=0.3, mass=True, carry=True),
    "once": Policy(every=0, quality=0.6, mass=True),
    "in turn": Policy(every=0, quality=0.3, turns=3, mass=True, pool=True),
    "pooled": Policy(every=2, quality=0.3, pool=True, carry=True),
    "every2": Policy(every=2, quality=0.3, mass=True, carry=True),
}
KEEPS = {"ratio": 0.25, "schedule": [1.0, 0.5, 0.0, 0.25]}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
@every_policy
def test_generation_equals_the_reference(policy, keep, attn):
    model = make_model("llava", attn)
    check_generation(model, make_inputs(model, one_image("llava")), keep, policy=policy)


@pytest.mark.parametrize("policy", ["all", "once"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, policy):
    """All tokens are put together in every layer, or not before the last one; Qwen3-VL's decoder
    itself adds something to them behind the first two."""
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    check_generation(model, inputs, 0.25, family, policy=POLICIES[policy])


@pytest.mark.parametrize(
    "by", ["hook", "pre-hook", "global pre-hook", "decoder", "hidden states", "gradients", "watch"]
)
def test_whoever_looks_sees_all_tokens(by, request):
    """Without anyone, a choice for all layers is handed from layer to layer."""
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    layers, tokens, seen = model.model.language_model.layers, inputs["input_ids"].shape[1], []
    if by == "decoder":
        # Put in before ours, of what the decoder has recorded.
        model.model.language_model.register_forward_hook(
            lambda _, args, output: seen.extend(output.hidden_states or ())
        )
    with attach(model, make_selectors(), 4, policy=POLICIES["once"]) as attachment:
        with torch.no_grad():
            expected = model(**inputs).logits
        if by == "hook":
            layers[1].register_forward_hook(lambda _, args, output: seen.append(output))
        elif by == "pre-hook":
            # Behind ours it would see what the layer runs on.
            pre_hook = layers[2].register_forward_pre_hook
            pre_hook(lambda _, args: seen.append(args[0]), prepend=True)
        elif by == "global pre-hook":
            hook = register_module_forward_pre_hook(
                lambda module, args: seen.append(args[0]) if module is layers[2] else None
            )
            request.addfinalizer(hook.remove)
        elif by == "watch":
            attachment.watch = lambda chosen: seen.append(chosen.layer)
        with torch.set_grad_enabled(by == "gradients"):
            recorded = by in ("hidden states", "decoder")
            output = model(**inputs, output_hidden_states=recorded)
    assert torch.equal(output.logits, expected)
    if by == "watch":
        assert seen == [0, 1, 2, 3]
    elif by == "gradients":
        output.logits.sum().backward()
        assert all(layer.mlp.up_proj.weight.grad.isfinite().all() for layer in layers)
    else:
        seen = seen or output.hidden_states
        assert seen and all(states.shape[1] == tokens for states in seen)


def test_a_choice_follows_the_layers_to_another_device():
    choice = _Choice(0, scores=torch.ones(1, 4), importance=torch.ones(1, 4), counts=(2,))
    choice.move(torch.device("meta"))
    assert choice.scores.device.type == choice.importance.device.type == "meta"
    # What was made of them is made again.
    assert choice.states is None and choice.counts == ()


def test_a_choice_that_is_gone_on_with_is_where_the_layer_is():
    forward = Forward(planned("tvvt"), None, Pieces(Policy(every=0)), "sdpa")
    forward._choice = _Choice(0, scores=torch.ones(1, 4), importance=torch.ones(1, 4))
    there = torch.empty(1, 4, 2, device="meta")
    choice = forward._choose(1, None, there, {})
    assert choice is forward._choice and choice.scores.device.type == "meta"


def test_text_alone_is_chosen_once_a_device():
    forward = Forward(planned("tvvt"), None, Pieces(), "sdpa")
    choice = forward._text_alone(1)
    choice.rows = torch.tensor([[0, 3]])
    assert forward._text_alone(2) is choice
    choice.rows = choice.rows.to("meta")
    assert forward._text_alone(3) is not choice


def test_a_layout_is_made_once_a_device():
    """Of samples of several lengths; otherwise there is nothing on a device in it."""
    plan = planned("tvvtvvvt", "..tvvvvt", keep=(0.5, 0.5, 0.5))
    forward = Forward(plan, None, Pieces(), "sdpa")
    layout = forward._layout(0)
    assert layout.valid is not None and forward._layout(1) is layout
    plan.move(torch.device("meta"))
    assert forward._layout(2) is not layout


@every_policy
def test_images_are_not_compared_with_each_other(policy):
    model = make_model("llava")
    # A text token between them; the same picture twice, so that a mistake would be large.
    inputs = make_inputs(model, Prompt([1, 5, 9, 12, 33, 47], [(16, 16), (16, 16)]))
    check_generation(model, inputs, 0.25, policy=policy)


@every_policy
def test_batch_equals_singles(policy):
    model = make_model("qwen2_5_vl")
    selectors = make_selectors("qwen2_5_vl", policy=policy)
    samples = prompts("qwen2_5_vl")
    batch = make_inputs(model, *samples)
    longest = batch["input_ids"].shape[1]
    more = dict(max_new_tokens=4, do_sample=False, num_beams=2)
    with torch.no_grad(), attach(model, selectors, 0.25):
        whole = fresh(model)(**batch).logits
        together = fresh(model).generate(**batch, **more)
        for b, sample in enumerate(samples):
            inputs = make_inputs(model, sample)
            length = inputs["input_ids"].shape[1]
            one = fresh(model)(**inputs).logits[0]
            torch.testing.assert_close(whole[b, longest - length :], one, rtol=1e-4, atol=1e-4)
            alone = fresh(model).generate(**inputs, **more)
            assert together[b, longest:].tolist()[:2] == alone[0, length:].tolist()[:2]


def test_where_a_small_image_keeps_nothing_no_text_stands_for_it():
    """As schedules can have it: in one layer, of a batch, a large image still keeps a token."""
    model = make_model("qwen2_5_vl")
    schedules = ((0.5, 0.5, 0.5, 0.0), (1.0, 1.0, 1.0, 0.2))
    selectors = make_selectors("qwen2_5_vl", schedules=schedules)
    samples = [Prompt([1, 5, 9, 12], [(16, 16)], seed=1), Prompt([1, 5, 9, 33], [(32, 48)], seed=2)]
    policy = Policy(every=0, quality=0.3, mass=True)
    with torch.no_grad(), attach(model, selectors, 0.5, policy=policy) as attachment:
        whole = fresh(model)(**make_inputs(model, *samples)).logits[0]
        assert attachment.last.kept[-1] == (0, 1)
        alone = fresh(model)(**make_inputs(model, samples[0])).logits[0]
    torch.testing.assert_close(whole[-len(alone) :], alone, rtol=1e-4, atol=1e-4)


@every_policy
def test_a_second_image_in_a_later_turn(policy):
    model = make_model("llava")
    selectors = make_selectors(policy=policy)
    first = make_inputs(model, one_image("llava"))
    second = make_inputs(model, one_image("llava", seed=3))
    start = first["input_ids"].shape[1]
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    pixels = torch.cat([first["pixel_values"], second["pixel_values"]])
    whole = {"input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), attach(model, selectors, keep=0.25) as attachment:
        with watch_selection() as chosen:
            cache = cache_of(model(**first))
            turn = {**second, "attention_mask": whole["attention_mask"]}
            logits = model(**turn, **{CACHE: cache}).logits[0]
        kept = counts(attachment, [0, 1])
    end = ids.shape[1]
    chunks = [(0, start), (start, end)]
    expected = reference_logits(model, whole, selectors, kept, chunks, chosen, policy)
    torch.testing.assert_close(logits, expected[start:], rtol=1e-4, atol=1e-4)


@every_policy
def test_an_image_between_turns_of_words(policy):
    """What was cached before it has no bias and no gaps; what comes behind it meets both."""
    model = make_model("llava")
    selectors = make_selectors(policy=policy)
    words, image = torch.tensor([[1, 40, 41, 42, 43]]), make_inputs(model, one_image("llava"))
    last = torch.tensor([[11, 12, 13]])
    ids = torch.cat([words, image["input_ids"], last], dim=1)
    start, end = words.shape[1], words.shape[1] + image["input_ids"].shape[1]
    with torch.no_grad(), attach(model, selectors, keep=0.25) as attachment:
        out = model(input_ids=words)
        with watch_selection() as chosen:
            seen = torch.ones_like(ids[:, :end])
            out = model(**{**image, "attention_mask": seen}, **{CACHE: cache_of(out)})
        kept = counts(attachment, [0])
        behind = model(
            input_ids=last, attention_mask=torch.ones_like(ids), **{CACHE: cache_of(out)}
        ).logits[0]
    whole = {"input_ids": ids, "pixel_values": image["pixel_values"]}
    whole["attention_mask"] = torch.ones_like(ids)
    expected = reference_logits(model, whole, selectors, kept, [(start, end)], chosen, policy)
    torch.testing.assert_close(out.logits[0], expected[start:end], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(behind, expected[end:], rtol=1e-4, atol=1e-4)


@every_policy
def test_keeping_everything_is_dense_bit_for_bit(policy):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, make_selectors(policy=policy), 1.0):
            assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize(("every", "rankings"), [(0, 1), (1, LAYERS), (2, LAYERS // 2)])
def test_a_choice_that_holds_is_made_once(every, rankings):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    ranked = []
    with torch.no_grad(), attach(model, make_selectors(policy=Policy(every=every)), 0.25) as made:
        score = made._scorer.importance
        made._scorer.importance = lambda *args: ranked.append(args[0]) or score(*args)
        with watch_selection() as chosen:
            model(**inputs)
    assert len(ranked) == rankings
    assert len({tuple(index) for index in chosen[0].values()}) == rankings


def test_compiled_equals_eager():
    model = make_model("llava", layers=3)
    inputs = make_inputs(model, one_image("llava"))
    selectors = make_selectors(policy=POLICIES["every2"], layers=3)
    found = []
    for compile in (False, {"backend": "aot_eager"}):
        with torch.no_grad(), attach(model, selectors, 0.25, compile=compile):
            out = model(**inputs)
            token = out.logits[:, -1:].argmax(-1)
            again = model(input_ids=token, **{CACHE: cache_of(out)}).logits
        found.append(torch.cat([out.logits, again], dim=1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_mass_is_refused_where_no_number_can_be_added_to_a_logit():
    model = make_model("llava")
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(AlvtsError, match="sdpa or eager"):
        make_pieces(model, make_selectors(policy=POLICIES["mass"]), POLICIES["mass"])


def test_carry_is_refused_where_none_was_fitted():
    model = make_model("llava")
    with pytest.raises(AlvtsError, match="fitted without"):
        attach(model, make_selectors(), 0.25, policy=POLICIES["carry"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"every": -1},
        {"quality": 0.0},
        {"quality": float("nan")},
        {"turns": 3},
        {"quality": 0.3, "turns": -1},
        {"quality": 0.3, "turns": 10**6},
    ],
)
def test_policies_out_of_range(wrong):
    with pytest.raises(AlvtsError):
        Policy(**wrong)


def test_named_policies():
    assert {name: str(policy) for name, policy in NAMED.items()} == {
        "paper": "chosen in each layer",
        "once": "chosen once, diverse (importance^0.3), mass",
        "in-turn": "chosen once, diverse (importance^0.3), 8 in turn, mass, pool",
        "every-4": "chosen in every 4 layers, diverse (importance^0.3), mass, pool, carry",
        "each": "chosen in each layer, diverse (importance^0.3), mass, carry",
    }
    assert [parse_policy(name) for name in NAMED] == list(NAMED.values())
    with pytest.raises(AlvtsError, match="unknown policy 'twice'; known: paper, once"):
        parse_policy("twice")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kept_tokens_that_are_all_alike_stay_what_they_are(dtype):
    """One of them stands for all; the others for none, and are not lost."""
    visual = torch.tensor([[False, True, True, True, False]])
    tables = torch.ones(1, 5, 2), torch.zeros(1, 5, 2)
    scene = Scene(visual, tables, torch.tensor([[4]]))
    states = directions(torch.ones(1, 5, 3), scene.present())
    rows = torch.tensor([[0, 1, 2, 4]])
    members = find_members(states, rows, make_layout(visual, None, 4), scene, targets=True)
    assert sorted(members.count[0].round().tolist()) == [0, 1, 1, 3]
    assert members.log(dtype).dtype == dtype
    torch.testing.assert_close(
        members.log(dtype).exp(), members.count.to(dtype), rtol=0.02, atol=1e-4
    )
    hidden = torch.arange(10, dtype=dtype).view(1, 5, 2)
    found = pooled(hidden[:, rows[0]], hidden, members, scene)[0]
    assert torch.equal(found[[0, 3]], hidden[0, [0, 4]])
    alone = int(members.count[0, 1:3].argmin()) + 1
    assert torch.equal(found[alone], hidden[0, alone])
    torch.testing.assert_close(found[3 - alone], hidden[0, 1:4].mean(dim=0), rtol=0.01, atol=0)
