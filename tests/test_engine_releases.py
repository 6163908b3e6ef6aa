"""The same tokens on every supported release of transformers: those below come from 5.24.0."""

from dataclasses import replace

import pytest
import torch

from alvts_cli import attach
from alvts_cli.artifact import load_artifact
from alvts_cli.engine import NAMED
from alvts_cli.models import find_selectors, load_model
from alvts_cli.pocket.evaluate import scene_items
from alvts_cli.pocket.words import make_prompt

KEEP = [1.0, 0.05, 0.3, 0.02, 0.11, 0, 0.2, 0, 0.11, 0.05, 0, 0.11, 0, 0.02, 0, 0.11]
"""A layer that is full, layers with text alone, and what is between; 11 % on average."""

POLICY = replace(NAMED["every-4"], pool=False)
"""Whatever is picked for pocket: many pieces at once."""

EXPECTED = [
    [49, 50, 22, 38, 52, 52, 52, 50, 50, 50, 38, 38, 67, 67, 52, 36],
    [8, 22, 8, 67, 36, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67, 67],
    [17, 67, 52, 52, 52, 36, 36, 36, 36, 52, 67, 67, 38, 50, 50, 50],
]
"""Far beyond an answer's end, so that sixteen steps of decoding are compared."""


@pytest.mark.parametrize("batched", [False, True])
def test_tokens_are_those_of_other_releases(batched: bool) -> None:
    loaded = load_model("pocket")
    selectors = load_artifact(find_selectors(loaded))
    items = list(scene_items("test", 1))[: len(EXPECTED)]
    lengths = {len(loaded.processor.tokenizer(item.question).input_ids) for item in items}
    assert len(lengths) > 1, "a batch of these would not be padded"
    found = []
    for group in [items] if batched else [[item] for item in items]:
        inputs = loaded.processor(
            images=[item.image for item in group],
            text=[make_prompt(item.question) for item in group],
            return_tensors="pt",
            padding=True,
        )
        with torch.no_grad(), attach(loaded.model, selectors, KEEP, policy=POLICY):
            output = loaded.model.generate(
                **inputs, min_new_tokens=16, max_new_tokens=16, do_sample=False
            )
        found += output[:, -16:].tolist()
    assert found == EXPECTED
