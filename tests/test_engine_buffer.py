"""The residual stream is written to in place only where nobody else holds on to it."""

from contextlib import contextmanager
from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
from tiny import FAMILIES, LAYERS, Prompt, make_inputs, make_model, make_selectors, one_image
from torch.utils._python_dispatch import TorchDispatchMode

from alvts_cli import attach
from alvts_cli.engine import Policy
from alvts_cli.engine.merging import merge

KEEP = [0.5, 0.25, 0, 5]


@contextmanager
def merges():
    """Whether each merge was in place."""
    seen = []

    def spy(hidden, index, new, valid, in_place):
        seen.append(in_place)
        return merge(hidden, index, new, valid, in_place)

    with patch("alvts_cli.engine.forward.merge", spy):
        yield seen


def padded_batch(model, family):
    size = one_image(family).images
    return make_inputs(model, one_image(family), Prompt([1, 5, 6], size), Prompt([1, 7, 8, 9]))


@pytest.mark.parametrize("family", FAMILIES)
def test_in_place_gives_the_same_bits(family):
    model = make_model(family)
    for inputs in (make_inputs(model, one_image(family)), padded_batch(model, family)):
        with attach(model, make_selectors(family), KEEP), merges() as seen:
            with torch.no_grad():
                fast = model(**inputs).logits
            # The first writes to a copy: the embeddings are the model's. So is what it adds
            # features to, behind the first two layers of Qwen3-VL.
            added = family == "qwen3_vl"
            assert seen == [False, not added, not added, True]
            seen.clear()
            slow = model(**inputs).logits
            assert seen == [False] * LAYERS
        assert torch.equal(fast, slow.detach())


@pytest.mark.parametrize(
    ("keep", "every", "merged"),
    [
        (0.25, 1, LAYERS),
        (0.25, 2, LAYERS // 2),
        (0.25, 0, 1),
        # Layers on text alone hold, too; those that keep another number do not.
        ([0.5, 0, 0, 5], 0, 3),
        ([5, 5, 0.0, 5], 0, 3),
        ([5, 5, 1.0, 5], 0, 2),
    ],
)
def test_a_choice_is_put_back_once_behind_the_last_layer_that_holds_it(keep, every, merged):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    selectors = make_selectors(policy=Policy(every=every))
    with attach(model, selectors, keep), merges() as seen, torch.no_grad():
        model(**inputs)
    assert len(seen) == merged


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_hidden_states_stay_what_they_were(family):
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))
    with attach(model, make_selectors(family), KEEP):
        with torch.no_grad():
            recorded = model(**inputs, output_hidden_states=True).hidden_states
        kept = [state.clone() for state in recorded]
        slow = model(**inputs, output_hidden_states=True).hidden_states
    assert len(recorded) == LAYERS + 1
    for state, copy, expected in zip(recorded, kept, slow, strict=True):
        assert torch.equal(state, copy)
        assert torch.equal(state, expected)
    # Every layer has left some tokens alone and changed some.
    assert all(not torch.equal(a, b) for a, b in pairwise(recorded))


@pytest.mark.parametrize("before", [True, False])
def test_a_hook_that_keeps_what_it_sees_keeps_it_unchanged(before):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    layers = model.model.language_model.layers
    held, copies = [], []

    def keep(tensor):
        held.append(tensor)
        copies.append(tensor.clone())

    with torch.no_grad():
        if before:
            # In front of ours, so it sees what all layers before made, not the selected tokens.
            handle = layers[2].register_forward_pre_hook(lambda m, args: keep(args[0]))
        with attach(model, make_selectors(), KEEP):
            if not before:
                handle = layers[1].register_forward_hook(lambda m, args, output: keep(output))
            model(**inputs)
        handle.remove()
    assert held[0].shape[1] == inputs["input_ids"].shape[1]
    assert torch.equal(held[0], copies[0])


class Largest(TorchDispatchMode):
    """The most numbers that any tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("visual", [2880, 1472])
def test_nothing_of_the_size_of_an_attention_matrix_is_made(visual):
    """Not even with so much text that all of its rows, in every head, would be more."""
    model = make_model("llava")
    model.config.text_config.max_position_embeddings = 4096
    tokens = 2944
    text = [1, *[5] * (tokens - visual - 1)]
    inputs = make_inputs(model, Prompt(text, [(16, 16)] * (visual // 16), at=1))
    assert inputs["input_ids"].shape[1] == tokens

    with torch.no_grad(), attach(model, make_selectors(), KEEP) as attachment:
        with Largest() as largest:
            model(**inputs, logits_to_keep=1)
        assert attachment.last.visual_tokens == (visual,)
    assert largest.numbers < tokens**2
