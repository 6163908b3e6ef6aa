"""Importance against the formula written down plainly, and against the model's own attention."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from reference import decoder_inputs, naive_importance
from tiny import (
    FAMILIES,
    IMAGE,
    PAD,
    WIDTH,
    Prompt,
    make_inputs,
    make_model,
    make_selectors,
    one_image,
    random_selector,
)
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from alvts_cli.engine import LayerSelector, importance, scoring, select
from alvts_cli.engine.merging import (
    gather_hidden,
    join_positions,
    merge,
    rows_of,
    take_positions,
)
from alvts_cli.engine.normed import Normed
from alvts_cli.engine.probe import attention_importance, project
from alvts_cli.engine.scene import Scene
from alvts_cli.engine.scoring import (
    asking,
    text_mean,
    text_rows,
    text_sum,
)
from alvts_cli.engine.selecting import make_layout, positions_of
from alvts_cli.engine.sizes import ROWS
from alvts_cli.families import family_of
from alvts_cli.families.rotary import Rotary


def masks(*layouts: str) -> tuple[torch.Tensor, torch.Tensor]:
    """From strings of v (visual), t (text) and . (padding)."""
    rows = [list(layout) for layout in layouts]
    return tuple(torch.tensor([[c == kind for c in row] for row in rows]) for kind in "vt")


@dataclass
class Case:
    """What a layer is about to score."""

    layer: Any
    selector: LayerSelector
    hidden: torch.Tensor
    positions: tuple[torch.Tensor, torch.Tensor]
    visual: torch.Tensor
    text: torch.Tensor

    def scene(self, padded=True):
        rows = asking(self.visual, self.text)
        index, valid = positions_of(rows, int(rows.sum(dim=1).max()))
        real = self.visual | self.text if padded else None
        return Scene(self.visual, self.positions, index, valid, real)

    def rows(self):
        return text_rows(self.layer, self.hidden, self.scene(), Rotary())

    def score(self):
        return importance(self.hidden, self.selector, self.rows(), self.scene())

    def to(self, dtype):
        selector = self.selector.to(self.hidden.device, dtype)
        layer, hidden = self.layer.to(dtype), self.hidden.to(dtype)
        return replace(self, layer=layer, selector=selector, hidden=hidden)


def make_case(*layouts, groups=2, bias=False, scale=3):
    """A layer of 4 query heads, with random weights, inputs and selector."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=4, num_key_value_heads=groups, attention_bias=bias)
    config = LlamaConfig(hidden_size=WIDTH, intermediate_size=48, **heads)
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).requires_grad_(False)
    for weight in layer.parameters():
        weight.copy_(torch.randn_like(weight) * 0.3 + (weight.dim() == 1))
    selector = random_selector(
        torch.Generator(torch.get_default_device()).manual_seed(1), 8 * groups, bias
    )
    visual, text = masks(*layouts)
    hidden = torch.randn(*visual.shape, WIDTH) * scale
    positions = LlamaRotaryEmbedding(config)(hidden, torch.arange(visual.shape[1])[None])
    return Case(layer, selector, hidden, positions, visual, text)


def model_case(family, *prompts):
    """The first layer of a model on a left-padded batch."""
    model = make_model(family).requires_grad_(False)
    inputs = make_inputs(model, *prompts)
    visual = inputs["input_ids"] == IMAGE
    text = ~visual & (inputs["input_ids"] != PAD)
    layer = model.model.language_model.layers[0]
    hidden, positions = decoder_inputs(model, inputs)
    return Case(layer, make_selectors(family).layers[0], hidden, positions, visual, text)


def samples(family):
    """One image, two with text between them, none, and one without text behind it."""
    size = one_image(family).images[0]
    return [
        Prompt([1, 5, 9, 12], [size], seed=1),
        Prompt([1, 5, 9, 12, 33, 47, 51], [size, size], seed=2),
        Prompt([1, 40, 41, 42, 43]),
        Prompt([1, 6], [size], seed=3),
    ]


LAYOUTS = {
    "one image": ("ttvvvvvttt",),
    "padding": ("ttvvvvvttt", "...tvvvvtt"),
    "text between": ("tvvvttvvtt", ".vvtvtvvvt"),
    "text sees nothing": ("ttttvvvvvv", "...tvvvvtt"),
    "without text": ("vvvvvv", "..vvvv"),
    "without an image": ("tvvvtt", "..tttt"),
    "fill in the padding": ("tvtttttttt", "........vt"),
    "a token each": ("tvt", "..v"),
}


def naive(case, b):
    real = case.visual[b] | case.text[b]
    tables = tuple(table[min(b, len(table) - 1), real] for table in case.positions)
    one = case.visual[b, real], case.text[b, real]
    return naive_importance(case.layer, case.hidden[b, real], case.selector, tables, *one)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("groups", "bias"), [(4, False), (2, True), (1, False)])
def test_importance_is_the_formula(layout, groups, bias):
    case = make_case(*layout, groups=groups, bias=bias)
    got = case.score()
    assert got.dtype == torch.float32
    for b, visual in enumerate(case.visual):
        expected = naive(case, b)[visual[visual | case.text[b]]]
        torch.testing.assert_close(got[b, visual], expected)
    assert bool((got[~case.visual] == -torch.inf).all())


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_is_the_formula_in_every_family(family):
    case = model_case(family, samples(family)[1])
    torch.testing.assert_close(case.score()[case.visual], naive(case, 0)[case.visual[0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_its_samples(family):
    batch = model_case(family, *samples(family)).score()
    for scores, sample in zip(batch, samples(family), strict=True):
        alone = model_case(family, sample)
        torch.testing.assert_close(scores[-alone.hidden.shape[1] :], alone.score()[0])


def test_padding_has_no_part_whatever_it_holds():
    case = make_case("ttvvvvvttt", "...tvvvvtt", "......tvvv")
    before = case.score()
    case.hidden[~(case.visual | case.text)] = 1e4
    assert torch.equal(case.score(), before)


def test_where_no_text_sees_an_image_its_own_tokens_ask():
    case = make_case("ttttvvvvvv", "tttvvvvvvt", "...ttttttt")
    asks = asking(case.visual, case.text)
    assert torch.equal(asks[0], case.visual[0]) and not asks[2].any()
    assert asks[1].nonzero()[:, 0].tolist() == [9]


@pytest.mark.parametrize("family", FAMILIES)
def test_text_rows_are_what_the_layer_hands_to_its_kernel(family):
    case = model_case(family, *samples(family))
    rows, own = case.rows(), project(case.layer, case.hidden, case.positions)
    scene = case.scene()
    for b, (index, valid) in enumerate(zip(scene.index, scene.valid, strict=True)):
        expected = own.query[b][:, index[valid]]
        torch.testing.assert_close(rows.query[b][:, valid], expected)
    assert rows.scaling == own.scaling


@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_layers_own_keys_importance_is_the_real_one(family):
    """Of full rank a selector can hold all of `W_k`."""
    case = model_case(family, *samples(family))
    model = make_model(family)
    own = family_of(model).query_key(case.layer)
    case.selector = replace(
        make_selectors(family, rank=WIDTH).layers[0],
        down=torch.diag(own.norm_weight),
        up=own.w_k,
        key_bias=own.b_k,
        eps=own.norm_eps,
        key_norm=own.k_norm,
    )
    got = case.score()
    projected = project(case.layer, case.hidden, case.positions)
    real = attention_importance(projected, case.visual, case.text)
    # The real mean counts text in front of the image, too.
    asks = asking(case.visual, case.text)
    share = (asks & case.text).sum(dim=1) / case.text.sum(dim=1)
    real = torch.where(share[:, None] > 0, real / share[:, None], real)
    # Of many visual tokens that ask, not all do.
    where = case.visual & (share[:, None] > 0)
    torch.testing.assert_close(got[where], real[where])
    assert bool(share[1] > share[3] == 0) and bool((asks & case.visual)[3].any())


@pytest.mark.parametrize("bias", [False, True])
def test_blocks_of_heads_and_rows_give_the_same(bias, monkeypatch):
    """One key head and two text rows at a time; the last row of a head is alone."""
    case = make_case("ttvvvvvttttt", "...tvvvvvttt", bias=bias)
    whole = case.score()
    blocks = []
    softmax = torch.Tensor.softmax

    def spy(self, dim):
        blocks.append(self.shape)
        return softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "softmax", spy)
    monkeypatch.setattr(scoring, "CPU_HELD", 5 * (2 * 12))
    torch.testing.assert_close(case.score(), whole)
    assert [shape[1:3] for shape in blocks if len(shape) == 4] == [(2, 2), (2, 2), (2, 1)] * 2


def test_without_padding_nobody_looks_for_it():
    case = make_case("tt" + "v" * 60 + "ttt", "ttt" + "v" * 60 + "tt")
    alone = importance(case.hidden, case.selector, case.rows(), case.scene(padded=False))
    assert torch.equal(case.score(), alone)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("groups", "bias"), [(4, False), (2, True), (1, False)])
def test_all_heads_at_once_give_the_same(layout, groups, bias, monkeypatch):
    """The operators of a GPU; also with one key head at a time."""
    case = make_case(*layout, groups=groups, bias=bias)
    latent = Normed(case.hidden).times(case.selector.down, case.selector.eps)
    scene = case.scene()
    alike = len(set(scene.valid.sum(dim=1).tolist())) == 1
    expected = text_mean(latent, case.selector, case.rows(), scene)
    for held in (scoring.HELD, 1):
        monkeypatch.setattr(scoring, "HELD", held)
        scene = replace(case.scene(), valid=None if alike else scene.valid)
        normed = Normed(case.hidden, case.layer.input_layernorm.weight)
        total, count = text_sum(case.layer, normed, latent, case.selector, scene, None, Rotary())
        real = case.visual | case.text
        torch.testing.assert_close((total / count)[real], expected[real])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_importance_in_half_precision(dtype):
    case = make_case("ttttt" + "v" * 30 + "ttttt", scale=20)
    half = case.to(dtype).score()
    full = case.to(torch.float32).score()
    assert bool(half[case.visual].isfinite().all())
    off = (half[case.visual] / full[case.visual]).log().abs()
    assert 0 < off.mean() < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_importance_under_autocast_is_finite():
    case = make_case("..tvvvvt")
    with torch.autocast("cpu", torch.bfloat16):
        got = case.score()
    assert got.dtype == torch.float32
    assert bool(got[case.visual].isfinite().all())


def test_importance_is_differentiable():
    case = make_case("ttvvvvvt", "...tvvvt", bias=True)
    tensors = case.selector.tensors()
    for tensor in tensors.values():
        tensor.requires_grad_()
    case.score()[case.visual].log().sum().backward()
    assert tensors.keys() == {"down", "up", "key_bias"}
    for tensor in tensors.values():
        assert bool(tensor.grad.isfinite().all()) and tensor.grad.abs().sum() > 0


def test_asking_is_the_text_behind_the_first_visual_token():
    visual, text = masks("ttvtv.t", "ttttttt")
    assert asking(visual, text).int().tolist() == [[0, 0, 0, 1, 0, 0, 1], [0] * 7]


def test_without_text_behind_them_visual_tokens_ask():
    visual, text = masks("ttvvv..", "ttttttt")
    assert asking(visual, text).int().tolist() == [[0, 0, 1, 1, 1, 0, 0], [0] * 7]


@pytest.mark.parametrize("count", [1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS - 1, 1000])
def test_of_a_long_text_so_many_ask_evenly_spaced_with_the_last(count):
    visual, text = masks("tv" + count * "t", "." + (count + 1) * "t")
    found = asking(visual, text)
    assert not found[1].any()
    at = found[0].nonzero()[:, 0]
    assert len(at) == min(count, ROWS) and at[-1] == count + 1
    gaps = torch.cat([torch.tensor([1]), at]).diff()
    assert gaps.max() - gaps.min() <= 1


def chosen(scores, visual, text, counts):
    """Positions and validity of every sample's best."""
    fill = torch.zeros(visual.shape).masked_fill(text, torch.inf)
    fill = fill.masked_fill(~(visual | text), -torch.inf)
    lengths = torch.tensor(counts) + text.sum(dim=1)
    ragged = len(set(lengths.tolist())) > 1
    layout = make_layout(visual, lengths if ragged else None, int(lengths.max()))
    rows = select(scores + fill, layout)
    return rows - visual.shape[1] * torch.arange(len(rows))[:, None], layout.valid


def test_select_keeps_the_best_and_all_text_in_order():
    visual, text = masks("tvvvvt", "..tvvt")
    scores = torch.tensor([[9, 1, 4, 2, 3, 9], [9, 9, 9, 1, 2, 9]]).float()
    index, valid = chosen(scores, visual, text, [2, 1])
    assert index[0].tolist() == [0, 2, 4, 5]
    assert index[1][valid[1]].tolist() == [2, 4, 5]
    assert valid.tolist() == [[True] * 4, [False, True, True, True]]
    assert len(set(index[1].tolist())) == 4


def test_select_breaks_ties_by_position_and_can_keep_none_or_all():
    visual, text = masks("tvvvvt")
    scores = torch.zeros(1, 6)
    assert chosen(scores, visual, text, [2])[0].tolist() == [[0, 1, 2, 5]]
    assert chosen(scores, visual, text, [0])[0].tolist() == [[0, 5]]
    assert chosen(scores, visual, text, [4])[0].tolist() == [list(range(6))]


def test_merge_in_place_writes_to_what_it_is_given():
    hidden = torch.randn(2, 6, 3)
    rows = rows_of(torch.tensor([[0, 2, 5], [1, 3, 4]]), 6)
    valid = torch.tensor([[True, True, True], [False, True, True]])
    new = torch.randn(2, 3, 3)
    expected = merge(hidden, rows, new, valid)
    assert merge(hidden, rows, new, valid, in_place=True) is hidden
    assert torch.equal(hidden, expected)


def test_merge_is_the_inverse_of_gather_and_not_in_place():
    hidden = torch.randn(2, 6, 3)
    before = hidden.clone()
    rows = rows_of(torch.tensor([[0, 2, 5], [1, 3, 4]]), 6)
    valid = torch.tensor([[True, True, True], [False, True, True]])
    new = gather_hidden(hidden, rows) + 1
    merged = merge(hidden, rows, new, valid)
    expected = before.clone()
    expected[0, [0, 2, 5]] += 1
    expected[1, [3, 4]] += 1
    assert torch.equal(merged, expected)
    assert torch.equal(hidden, before)


def test_positions_of_any_leading_shape():
    index = torch.tensor([[0, 2], [1, 3]])
    shared, rows = torch.randn(1, 4, 6), rows_of(index, 4)
    cos, sin = take_positions(join_positions((shared, -shared), 2), rows)
    assert torch.equal(cos, torch.stack([shared[0, [0, 2]], shared[0, [1, 3]]]))
    assert torch.equal(sin, -cos)
    grid = torch.randn(3, 2, 4, 6)
    cos, sin = take_positions(join_positions((grid, -grid), 2), rows)
    assert torch.equal(cos, torch.stack([grid[:, 0, [0, 2]], grid[:, 1, [1, 3]]], dim=1))
    assert torch.equal(sin, -cos)
