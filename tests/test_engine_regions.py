"""`attach(..., compile="auto")`: scoring and selecting through `torch.compile`, or as ever."""

import warnings
from unittest.mock import patch

import pytest
import torch
from tiny import make_inputs, make_model, make_selectors, one_image
from torch._dynamo.testing import CompileCounterWithBackend

from alvts_cli import attach
from alvts_cli.engine import NAMED, PAPER
from alvts_cli.engine.regions import Regions


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prompt(model, tokens):
    one = one_image("llava")
    one.text = (one.text * 3)[:tokens]
    return make_inputs(model, one)


def through(backend):
    """Another backend than the one that torch would take."""
    return patch(
        "alvts_cli.engine.attaching.Regions", lambda options: Regions({"backend": backend})
    )


def logits(model, prompts, keep=4, compile=False, policy=PAPER):
    selectors = make_selectors(policy=policy)
    with torch.no_grad(), attach(model, selectors, keep, policy=policy, compile=compile) as a:
        return [(model(**inputs).logits, a.last.kept) for inputs in prompts]


@pytest.mark.parametrize("policy", ["paper", "each"])
def test_the_same_bits_and_two_regions_a_layer(policy):
    model = make_model("llava")
    prompts = [prompt(model, tokens) for tokens in (12, 14, 17)]
    keep = [4, 0, 1.0, 4]
    expected = logits(model, prompts, keep, policy=NAMED[policy])
    counter = CompileCounterWithBackend("eager")
    with through(counter), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = logits(model, prompts, keep, "auto", NAMED[policy])
    for (got, kept), (wanted, their) in zip(found, expected, strict=True):
        assert torch.equal(got, wanted) and kept == their
    # Of two layers that choose and one that runs on text; again for all lengths; no more.
    assert 3 <= counter.frame_count <= 6


def test_with_inductor_on_this_machine():
    model = make_model("llava")
    prompts = [prompt(model, 12)]
    keep = [1.0, 1.0, 1.0, 4]
    ((expected, _),) = logits(model, prompts, keep)
    with warnings.catch_warnings():
        # Ours; torch has its own.
        warnings.simplefilter("error", UserWarning)
        ((found, _),) = logits(model, prompts, keep, "auto")
    torch.testing.assert_close(found, expected)


def test_a_compiler_that_fails_is_said_once():
    model = make_model("llava")
    prompts = [prompt(model, tokens) for tokens in (12, 14)]
    expected = logits(model, prompts)
    asked = []

    def broken(graph, example_inputs):
        asked.append(graph)
        raise RuntimeError("no compiler for this device")

    with through(broken), pytest.warns(UserWarning, match="no compiler for this device") as said:
        found = logits(model, prompts, compile="auto")
    assert len(asked) == 1 and len([one for one in said if "alvts" in str(one.message)]) == 1
    for (got, _), (wanted, _) in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)
