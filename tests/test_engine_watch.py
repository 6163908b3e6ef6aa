"""Watching what every layer keeps: told as it is, and without a trace in the result."""

from contextlib import contextmanager

import pytest
import torch
from tiny import FAMILIES, Prompt, make_inputs, make_model, make_selectors, one_image

from alvts_cli import attach
from alvts_cli.engine import Policy
from alvts_cli.engine.calls import going_on

KEEP = [1.0, 0.25, 0.0, 5]
POLICIES = {
    "paper": Policy(),
    "each": Policy(quality=0.3, mass=True, carry=True),
    "every3": Policy(every=3, quality=0.3, mass=True),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_told_is_what_the_layers_run_on(family, policy):
    model = make_model(family)
    size = one_image(family).images
    inputs = make_inputs(model, one_image(family), Prompt([1, 5, 6], size))
    selectors = make_selectors(family, policy=policy)
    told, ran = [], []

    def before(i):
        def note(module, args, kwargs):
            ran.append((i, (args[0] if args else kwargs["hidden_states"]).shape[1]))

        return note

    with torch.no_grad():
        with attach(model, selectors, KEEP):
            expected = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with attach(model, selectors, KEEP) as attachment:
            attachment.watch = told.append
            handles = [
                layer.register_forward_pre_hook(before(i), with_kwargs=True)
                for i, layer in enumerate(model.model.language_model.layers)
            ]
            made = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            for handle in handles:
                handle.remove()
            kept = attachment.last.kept
    assert torch.equal(made, expected)
    # Once a selecting layer, and never for the words of the answer.
    assert [one.layer for one in told] == [1, 2, 3]
    assert [one.index.shape[1] for one in told] == [rows for i, rows in ran[:4] if i]
    visual = inputs["input_ids"] >= 90
    visual &= inputs["input_ids"] <= 91
    for one in told:
        for b in range(2):
            index = one.index[b] if one.valid is None else one.index[b][one.valid[b]]
            assert visual[b, index].sum() == kept[one.layer][b]
            assert (~visual[b, index]).sum() == (inputs["attention_mask"][b] & ~visual[b]).sum()
    assert told[1].importance is None
    assert [one.ranked_in for one in told] == [1, 2, 3 if policy.every == 1 else 1]
    for one in (told[0], told[2]):
        assert torch.equal(one.importance.isfinite(), visual)
        assert bool((one.importance[~visual] == -torch.inf).all())
        assert bool((one.importance[visual] >= 0).all())


def test_importance_is_that_of_the_scorer_not_the_rank_among_different_tokens():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    told = {}
    for name, policy in POLICIES.items():
        with torch.no_grad(), attach(model, make_selectors(policy=policy), 0.25) as attachment:
            told[name] = []
            attachment.watch = told[name].append
            model(**inputs)
    # The first layer sees the same input whatever becomes of it.
    first = {name: one[0].importance for name, one in told.items()}
    assert torch.equal(first["paper"], first["each"])
    assert not torch.equal(told["paper"][0].index, told["each"][0].index)
    held = told["every3"]
    assert held[1].ranked_in == 0 and torch.equal(held[1].importance, held[0].importance)
    assert torch.equal(held[1].index, held[0].index)
    assert not torch.equal(held[3].importance, held[0].importance)


def test_phases_are_entered_and_left_in_turn():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    told = []

    @contextmanager
    def phase(name):
        told.append(f"{name} begins")
        yield
        told.append(f"{name} ends")

    with torch.no_grad(), attach(model, make_selectors(), KEEP) as attachment:
        expected = model(**inputs).logits
        attachment.phase = phase
        output = model(**inputs)
        assert torch.equal(output.logits, expected)
        begun = [line.removesuffix(" begins") for line in told[::2]]
        assert told == [f"{name} {what}" for name in begun for what in ("begins", "ends")]
        # The first keeps all, the third has nothing to rank.
        once = [name for i, name in enumerate(begun) if begun[max(0, i - 1) : i] != [name]]
        assert once == [
            "layer",
            *("score", "select", "layer", "merge"),
            *("select", "layer", "merge"),
            *("score", "select", "layer", "merge"),
        ]
        told.clear()
        model(input_ids=torch.tensor([[5, 6]]), **going_on(output))
        assert told == []


def test_nothing_runs_compiled_while_someone_watches():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    compiled = []

    def backend(graph, example):
        compiled.append(graph)
        return graph.forward

    told = []
    with torch.no_grad(), attach(model, make_selectors(), 0.25, compile={"backend": backend}) as a:
        a.watch = told.append
        model(**inputs)
        assert len(told) == 4 and compiled == []
        a.watch = None
        model(**inputs)
        assert len(told) == 4 and compiled != []
