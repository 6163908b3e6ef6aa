"""No method holds on to hidden states that a later layer writes to in place."""

import pytest
import torch
from methods_tools import LAYERS, deep_model
from tiny import Prompt, Selectors, make_inputs, paper_selector

from alvts_cli.bench.selectors import random_selectors
from alvts_cli.engine import Attachment
from alvts_cli.engine.forward import Forward
from alvts_cli.methods import METHODS, make_method

PAPER = [paper_selector(i) for i in range(LAYERS)]
TEXT = [1, 5, 9, 12, 33, 47, 51, 60]


# At these budgets FastV (0.075) and DART (0.2) prune the prompt with one picture in front of layer
# 1 and that with two in front of layer 2, by what they have seen of layer 1.
@pytest.mark.parametrize("budget", [0.075, 0.2])
@pytest.mark.parametrize("name", METHODS)
def test_writing_in_place_and_handing_on_give_the_same_bits(name, budget, monkeypatch):
    model = deep_model()
    one, two = Prompt(TEXT, [(32, 32)], seed=1), Prompt(TEXT[:5], [(32, 32)] * 2, seed=2)
    inputs = make_inputs(model, one, two)
    paper = name == "alvts-paper"
    method = make_method(name, Selectors(PAPER) if paper else random_selectors(model))

    def logits():
        with torch.no_grad(), method.attached(model, budget, ["one", "two"]) as attachment:
            return model(**inputs).logits, attachment.last.kept

    written = []
    before = Forward.before

    def spy(self, *args):
        written.append(args[-1] or self.stays)
        return before(self, *args)

    monkeypatch.setattr(Forward, "before", spy)
    fast, kept = logits()
    assert any(written) == (name != "dense")
    if (name, budget) in {("fastv", 0.075), ("dart", 0.2)}:
        assert [layer == (64, 128) for layer in kept[:3]] == [True, False, False]
        assert kept[1][1] == 128 > kept[2][1]
    monkeypatch.setattr(Attachment, "_unseen", lambda self, i: False)
    assert torch.equal(fast, logits()[0])
