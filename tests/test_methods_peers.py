"""Each peer against its definition, computed naively from eager attention's own output."""

import pytest
import torch
from methods_tools import (
    LAYERS,
    VISUAL,
    attached_run,
    best,
    deep_model,
    dense_run,
    prompts,
    walk,
)
from tiny import make_inputs

from alvts_cli.engine import resolve_keep
from alvts_cli.engine.plan import make_plan
from alvts_cli.engine.probe import Projected, row_attention
from alvts_cli.methods import make_method
from alvts_cli.methods.dart import _take

BUDGET = 24


def check(held, dense, expected):
    """The layers ran on all text and the `expected` visual tokens, and cached just these."""
    for layer in range(LAYERS):
        tokens = sorted([*dense.text, *expected[layer]])
        assert held.ran[layer] == tokens, layer
        assert held.slots[layer] == len(tokens), layer


@pytest.mark.parametrize("b", [0, 1])
def test_fastv_prunes_at_layer_2_by_the_last_row_of_layer_1(b):
    dense = dense_run(prompts()[b])
    row = dense.attention[1].mean(dim=0)[-1]
    # (24 * 32 - 2 * 64) / 30 = 21.3
    chosen = best(row, dense.visual, 21)
    check(
        attached_run("fastv", BUDGET, prompts())[b],
        dense,
        [dense.visual] * 2 + [chosen] * 30,
    )


def test_fastv_scores_are_eager_attention():
    dense = dense_run(prompts()[0])
    size = len(dense.hidden[0])
    real = torch.ones(1, size, dtype=torch.bool)
    layer = deep_model("eager").model.language_model.layers[1]
    query = layer.self_attn.q_proj(layer.input_layernorm(dense.hidden[1])).view(size, 4, 8)
    rotary = deep_model("eager").model.language_model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(size)[None])
    query = query.transpose(0, 1)
    turned = torch.cat([-query[..., 4:], query[..., :4]], dim=-1)
    query = query * cos[0] + turned * sin[0]
    projected = Projected(query[None], dense.keys[1][None], 8**-0.5)
    row = row_attention(projected, torch.tensor([size - 1]), real)[0]
    torch.testing.assert_close(row, dense.attention[1].mean(dim=0)[-1], rtol=1e-4, atol=1e-6)


def test_a_row_of_attention_by_hand():
    # Two query heads on one key head; the row's logits are 1, 2 and 0, 0 with the third hidden.
    query = torch.tensor([[[[9.0], [1.0]], [[9.0], [0.0]]]])
    key = torch.tensor([[[[1.0], [2.0]]]])
    e = torch.e
    got = row_attention(Projected(query, key, 1.0), torch.tensor([1]), torch.tensor([[True, True]]))
    expected = [(1 / (1 + e) + 0.5) / 2, (e / (1 + e) + 0.5) / 2]
    torch.testing.assert_close(got, torch.tensor([expected]))
    got = row_attention(
        Projected(query, key, 1.0), torch.tensor([1]), torch.tensor([[False, True]])
    )
    torch.testing.assert_close(got, torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("b", [0, 1])
def test_pyramiddrop_drops_before_2_10_and_20_by_the_coming_layer(b):
    dense = dense_run(prompts()[b])
    kept = make_method("pyramiddrop").schedule(VISUAL, LAYERS, BUDGET)
    first, second, third = kept[2], kept[10], kept[20]
    # (2 * 64 + 8 * 40 + 10 * 20 + 12 * 10) / 32 = 24
    assert (first, second, third) == (40, 20, 10)
    assert kept == (64,) * 2 + (40,) * 8 + (20,) * 10 + (10,) * 12
    visual, expected = dense.visual, [dense.visual] * 2
    hidden, row = dense.hidden[2], dense.attention[2].mean(dim=0)[-1]
    before = sorted(dense.text + visual)
    for start, end, count in ((2, 10, first), (10, 20, second), (20, 31, third)):
        score = torch.full((len(dense.hidden[0]),), -torch.inf)
        score[before] = row
        visual = best(score, visual, count)
        expected += [visual] * (end - start)
        now = sorted(dense.text + visual)
        hidden = hidden[[before.index(i) for i in now]]
        hidden, attention = walk(hidden, now, start, end)
        row, before = attention.mean(dim=0)[-1], now
    expected += [visual]
    check(attached_run("pyramiddrop", BUDGET, prompts())[b], dense, expected)


@pytest.mark.parametrize("b", [0, 1])
def test_dart_takes_what_is_least_like_its_pivots(b):
    dense = dense_run(prompts()[b])
    # 4 + 8 * 2 = 20 tokens: (2 * 64 + 30 * 20) / 32 = 22.75; with 3 for a pivot 30.25.
    norm = dense.keys[1].abs().sum(dim=(0, 2))
    behind = [i for i in dense.text if i > dense.visual[-1]]
    visual_pivots = best(norm, dense.visual, 4)
    text_pivots = best(norm, behind, 4)
    with torch.no_grad():
        states = deep_model().model.language_model.norm(dense.hidden[2])
    pivots = sorted(visual_pivots + text_pivots)
    if b == 0:
        assert len(pivots) == 8
        shares = [2] * 8
    else:
        # Only three text tokens stand behind the image: 16 tokens for 7 pivots.
        assert len(pivots) == 7
        shares = [3, 3, 2, 2, 2, 2, 2]
    left = [i for i in dense.visual if i not in visual_pivots]
    chosen = list(visual_pivots)
    for pivot, share in zip(pivots, shares, strict=True):
        likeness = torch.cosine_similarity(states, states[pivot][None], dim=-1)
        taken = best(-likeness, left, share)
        chosen += taken
        left = [i for i in left if i not in taken]
    check(
        attached_run("dart", BUDGET, prompts())[b],
        dense,
        [dense.visual] * 2 + [sorted(chosen)] * 30,
    )


def test_dart_by_hand():
    # Tokens: text, 8 visual, 4 text. Visual pivots are 1 to 4 by their norms; 0 stands before the
    # image and is none, however large.
    norms = torch.tensor([99.0, 9, 8, 7, 6, 1, 1, 1, 1, 3, 3, 3, 3])
    visual = torch.tensor([False] + [True] * 8 + [False] * 4)
    angle = torch.tensor([0.0, 0, 0, 0, 0, 10, 50, 90, 30, 95, 95, 95, 95]).deg2rad()
    states = torch.stack([angle.cos(), angle.sin()], dim=1)
    # Five more than the pivots, so 0.. of the eight pivots get one: 1 takes 90, 2 takes 50 and so
    # on, from the largest angle down.
    taken = _take(norms, states, visual, ~visual, 6)
    assert taken.nonzero()[:, 0].tolist() == [1, 2, 3, 4, 6, 7]
    # All of them, and never more.
    assert torch.equal(_take(norms, states, visual, ~visual, 8), visual)
    # Fewer than the pivots: the largest norms.
    assert _take(norms, states, visual, ~visual, 2).nonzero()[:, 0].tolist() == [1, 2]


@pytest.mark.parametrize("b", [0, 1])
def test_divprune_takes_what_is_farthest_from_what_it_has(b):
    dense = dense_run(prompts()[b])
    states = dense.hidden[0]

    def far(i, j):
        return 1 - torch.cosine_similarity(states[i], states[j], dim=0).item()

    nearest = {i: min(far(i, j) for j in dense.visual if j != i) for i in dense.visual}
    chosen = [max(nearest, key=nearest.__getitem__)]
    while len(chosen) < BUDGET:
        left = {i: min(far(i, j) for j in chosen) for i in dense.visual if i not in chosen}
        chosen.append(max(left, key=left.__getitem__))
    check(attached_run("divprune", BUDGET, prompts())[b], dense, [sorted(chosen)] * LAYERS)


@pytest.mark.parametrize("b", [0, 1])
def test_vtw_withdraws_everything(b):
    dense = dense_run(prompts()[b])
    check(attached_run("vtw", BUDGET, prompts())[b], dense, [dense.visual] * 12 + [[]] * 20)


@pytest.mark.parametrize("b", [0, 1])
def test_oracle_is_the_mean_over_text_rows(b):
    dense = dense_run(prompts()[b])
    attention = dense.attention[0].mean(dim=0)
    score = attention[dense.text].mean(dim=0)
    held = attached_run("oracle", BUDGET, prompts())[b]
    tokens = best(score, dense.visual, BUDGET)
    assert held.ran[0] == sorted([*dense.text, *tokens])
    assert all(len(ran) == BUDGET + len(dense.text) for ran in held.ran)
    assert held.slots == [BUDGET + len(dense.text)] * LAYERS


def test_oracle_sees_what_the_layers_before_skipped():
    """Layer 1 is scored on hidden states in which the tokens layer 0 skipped are as they were."""
    dense = dense_run(prompts()[0])
    held = attached_run("oracle", BUDGET, prompts()[:1])[0]
    hidden = dense.hidden[0].clone()
    ran = held.ran[0]
    hidden[ran], _ = walk(dense.hidden[0][ran], ran, 0, 1)
    _, attention = walk(hidden, list(range(len(hidden))), 1, 1)
    attention = attention.mean(dim=0)
    score = attention[dense.text].mean(dim=0)
    tokens = best(score, dense.visual, BUDGET)
    assert held.ran[1] == sorted([*dense.text, *tokens])


@pytest.mark.parametrize("name", ["random", "random-static"])
def test_random_is_seeded_by_sample_and_layer(name):
    both = attached_run(name, BUDGET, prompts())
    for held, prompt in zip(both, prompts(), strict=True):
        # Not by the batch it is in.
        alone = attached_run(name, BUDGET, [prompt])[0]
        assert alone.ran == held.ran
    again = attached_run(name, BUDGET, prompts(), seed=1)
    assert again[0].ran != both[0].ran
    first = both[0].ran
    assert all(len(ran) == BUDGET + 8 for ran in first)
    assert len({tuple(ran) for ran in first}) == (LAYERS if name == "random" else 1)
    # The two samples' images stand at the same positions, and are drawn from differently.
    visual = range(2, 2 + VISUAL)
    drawn = [[i for i in held.ran[0] if i in visual] for held in both]
    assert len(drawn[0]) == len(drawn[1]) == BUDGET
    assert drawn[0] != drawn[1]


def test_random_draws_evenly():
    method = make_method("random", seed=3)
    ids = torch.tensor([[1] + [90] * 10 + [2]])
    plan = make_plan(ids, ids == 90, None, resolve_keep(3, 1))
    counts = torch.zeros(12)
    for draw in range(600):
        method.samples = [str(draw)]
        scores = method.importance(0, torch.nn.Identity(), torch.zeros(1, 12, 4), plan, {})[0]
        assert scores[0] == scores[-1] == -torch.inf
        counts[scores.topk(3).indices] += 1
    assert counts[1:11].min() > 130 and counts[1:11].max() < 230


def test_downsample_averages_cells():
    """16 tokens of an 8 x 8 grid: 2 x 2 cells, each at its lower right token."""
    dense = dense_run(prompts()[0])
    held = attached_run("downsample", 16, prompts())[0]
    grid = torch.tensor(dense.visual).view(8, 8)
    middles = grid[1::2, 1::2].flatten().tolist()
    check(held, dense, [middles] * LAYERS)
    seen = []
    model = deep_model()
    method = make_method("downsample")
    with torch.no_grad(), method.attached(model, 16, ["a"]):
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        model(**make_inputs(model, prompts()[0]))
        handle.remove()
    got = seen[0][0][2:18]
    cells = dense.hidden[0][grid.flatten()].view(4, 2, 4, 2, -1).mean(dim=(1, 3)).flatten(0, 1)
    torch.testing.assert_close(got, cells)
