"""Counting launches on a GPU that is not there."""

from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from tiny import FAMILIES, make_model

from alvts_cli.bench import launches
from alvts_cli.bench.launches import Launches, Prompts, count_launches
from alvts_cli.bench.selectors import RandomSelectors, random_selectors
from alvts_cli.engine import NAMED, PAPER, PaperSelector, attach
from alvts_cli.engine.policy import LAYERS, what_layers_do
from alvts_cli.engine.scorer import SelectorScorer
from alvts_cli.shapes import shape_config

SCORE = SelectorScorer.importance


def scoring(more):
    """Let every scorer do `more` first, which gets the layer's input."""

    def importance(self, layer_index, layer, hidden, plan, kwargs):
        scores = SCORE(self, layer_index, layer, hidden, plan, kwargs)
        more(hidden)
        return scores

    return patch.object(SelectorScorer, "importance", importance)


def test_a_dense_layer_is_what_it_is_made_of():
    counted = count_launches(shape_config("llava-1.5-7b"), PAPER)
    norm = ["_to_copy", "pow", "mean", "add", "rsqrt", "mul", "_to_copy", "mul"]
    turned = ["mul", "neg", "cat", "mul", "add"]
    attention = [*["mm"] * 3, *turned, *turned, "cat", "cat", "attention", "mm", "add"]
    mlp = ["mm", "silu", "mm", "mul", "mm", "add"]
    assert list(counted.operators["dense"]) == [*norm, *attention, *norm, *mlp]
    assert counted.dense == counted.decode_dense == len(counted.operators["dense"])


# What is counted is the decoder, and LLaVA-NeXT's is LLaVA's.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llava_next"])
@pytest.mark.parametrize("policy", NAMED.values(), ids=NAMED)
def test_nothing_in_a_layer_waits_or_is_copied(family, policy):
    """Of a padded batch; of a prompt alone `test_no_more_than_it_was` says so."""
    prompts = Prompts(3, 40, 12, ragged=True)
    counted = count_launches(make_model(family).config, policy, prompts, torch.float32)
    assert (counted.host_syncs, counted.copies) == (0, 0)
    # The numbers of tokens.
    assert counted.host_syncs_once == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: bool(hidden.amax() > 0),
        lambda hidden: hidden[0, :, 0].nonzero(),
        lambda hidden: hidden[0, 0].tolist(),
        lambda hidden: hidden.cpu(),
    ],
)
def test_a_read_in_a_layer_is_seen(read):
    with scoring(read):
        counted = count_launches(make_model("llava").config, PAPER)
    # Five layers that choose.
    assert (counted.host_syncs, counted.copies) == (5, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda hidden: torch.arange(hidden.shape[1]),
        lambda hidden: torch.tensor([0.5], device=hidden.device),
    ],
)
def test_a_tensor_made_on_the_host_in_a_layer_is_seen(make):
    with scoring(make):
        counted = count_launches(make_model("llava").config, PAPER)
    assert counted.copies >= 5 and counted.host_syncs == 0


def test_a_launch_more_is_seen():
    config = make_model("llava").config
    before = count_launches(config, PAPER)
    with scoring(lambda hidden: hidden + 1):
        after = count_launches(config, PAPER)
    assert after.chooses == before.chooses + 1
    rest = dict(operators={}, moved={})
    assert replace(after, chooses=before.chooses, **rest) == replace(before, **rest)


def test_a_whole_prefill_is_its_layers():
    kinds = {name: 40 + i for i, name in enumerate(LAYERS)}
    rest = dict.fromkeys(
        (
            *("rest", "decode", "decode_dense", "decode_rest", "host_syncs"),
            *("host_syncs_once", "copies", "copies_once"),
        ),
        0,
    )
    counted = Launches(**kinds, **rest, once=50, operators={}, moved={})
    assert counted.over_dense(["chooses", "goes_on", "dense", "text_only"]) == 1 + 2 + 0 + 5 + 50


@pytest.mark.parametrize(
    ("policy", "adds_behind", "expected"),
    [
        (dict(every=1), 0, "C C D C C T t C C"),
        (dict(every=0), 0, "C g D a o T t a g"),
        (dict(every=3), 0, "C g D C o T t C g"),
        # Qwen3-VL: all tokens are put back behind the first layers.
        (dict(every=0), 2, "C a D a o T t a g"),
        (dict(every=0), 9, "C a D a o T T a a"),
        # All tokens are wanted in every layer.
        (dict(every=0, carry=True), 0, "C a D a o T T a a"),
    ],
)
def test_what_layers_do(policy, adds_behind, expected):
    names = dict(zip("DCgaoTt", LAYERS, strict=True))
    kept = [6, 6, 9, 6, 5, 0, 0, 5, 5]
    found = what_layers_do(replace(PAPER, **policy), kept, 9, adds_behind)
    assert found == [names[letter] for letter in expected.split()]


@pytest.mark.parametrize(
    ("policy", "every"), [("paper", 1), ("paper", 3), ("once", 0), ("every-4", 3)]
)
def test_the_engine_launches_what_its_layers_do(policy, every):
    """What layers do is said twice: here the engine that does it is counted whole."""
    config, policy = shape_config("qwen3-vl-8b"), replace(NAMED[policy], every=every)
    counted = count_launches(config, policy)
    # The first layer on text alone lays that out, for all.
    kinds = ([64] * 7, 0), ([576, 64, 64, 0, 0, 64, 32], 4)
    for adds_behind, (kept, text) in product((0, 2), kinds):
        with launches._fake_device():
            model = launches._fake_model(config, torch.bfloat16, "cuda")
            model.config.vision_config.deepstack_visual_indexes = [5] * adds_behind
            keep = [1.0 if count == 576 else count for count in kept]
            setting = partial(attach, model, random_selectors(model), keep, policy=policy)
            log = launches._run(model, Prompts(), setting)
        found = sum(len(span.launches) for span in (*log.layers, log.rest))
        layers = what_layers_do(policy, kept, 576, adds_behind)
        assert found == 7 * counted.dense + counted.rest + counted.over_dense(layers) + text


# Over a dense layer: where it chooses, goes on, keeps no visual token; for a decoded token; and
# once a prefill. Where nothing is carried, a selection is handed from layer to layer.
LIMITS = {
    ("llava-1.5-7b", "paper", False): (18, 0, 2, 0, 44),
    ("llava-1.5-7b", "once", False): (33, 0, 2, 1, 52),
    ("llava-1.5-7b", "in-turn", False): (72, 0, 2, 1, 52),
    ("llava-1.5-7b", "every-4", False): (42, 5, 5, 1, 52),
    ("llava-1.5-7b", "each", False): (34, 5, 5, 1, 52),
    # Grouped queries, whose keys transformers repeats for an additive mask.
    ("llava-next-mistral-7b", "paper", False): (18, 0, 2, 0, 44),
    ("llava-next-mistral-7b", "each", False): (36, 7, 5, 2, 52),
    ("qwen2.5-vl-3b", "paper", False): (18, 0, 2, 0, 46),
    ("qwen2.5-vl-3b", "each", False): (36, 7, 5, 2, 54),
    # A norm of queries and one of keys.
    ("qwen3-vl-8b", "paper", False): (20, 0, 2, 0, 46),
    ("qwen3-vl-8b", "each", False): (38, 7, 5, 2, 54),
    ("qwen3-vl-30b-a3b", "paper", False): (20, 0, 2, 0, 46),
    # Neighbouring pairs are turned, in a half of each head.
    ("glm-4.1v-9b", "paper", False): (18, 0, 2, 0, 48),
    ("glm-4.1v-9b", "once", False): (35, 2, 2, 2, 56),
    # Two samples, one of them padded on the left.
    ("llava-1.5-7b", "paper", True): (22, 0, 4, 1, 72),
    ("llava-1.5-7b", "once", True): (38, 0, 4, 4, 77),
    ("llava-next-mistral-7b", "each", True): (39, 7, 7, 4, 77),
}


@pytest.mark.parametrize(("name", "policy", "ragged"), LIMITS)
def test_no_more_than_it_was(name, policy, ragged):
    prompts = Prompts(2, ragged=True) if ragged else Prompts()
    counted = count_launches(shape_config(name), NAMED[policy], prompts)
    layers = (counted.chooses, counted.goes_on, counted.text_only)
    found = (*(layer - counted.dense for layer in layers), counted.decode - counted.decode_dense)
    assert (*found, counted.once) == LIMITS[name, policy, ragged]
    assert (counted.host_syncs, counted.copies, counted.host_syncs_once) == (0, 0, 1)


@pytest.mark.parametrize("biased", [False, True])
def test_the_papers_form_is_leaner_still(biased):
    def selectors(model):
        rank, width = 256, model.config.text_config.hidden_size
        map_ = torch.empty(rank, width, dtype=model.dtype, device=model.device)
        bias = torch.empty(rank, device=model.device) if biased else None
        return RandomSelectors([PaperSelector(map_, map_, bias, 1e-5)] * 7)

    with patch.object(launches, "random_selectors", selectors):
        counted = count_launches(shape_config("llava-1.5-7b"), PAPER)
    assert counted.chooses - counted.dense <= 20
    assert (counted.host_syncs, counted.copies) == (0, 0)
