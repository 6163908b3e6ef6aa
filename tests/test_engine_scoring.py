import pytest
import torch
from reference import naive_importance
from tiny import WIDTH, make_selectors

from alvts_cli.engine import fold, importance, scoring, select
from alvts_cli.engine.merging import gather_hidden, gather_positions, merge


def masks(*layouts: str) -> tuple[torch.Tensor, torch.Tensor]:
    """From strings of v (visual), t (text) and . (padding)."""
    rows = [list(layout) for layout in layouts]
    return tuple(torch.tensor([[c == kind for c in row] for row in rows]) for kind in "vt")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [3, 1024])
def test_importance_is_the_formula(causal, block, monkeypatch):
    monkeypatch.setattr(scoring, "ROW_BLOCK", block)
    torch.manual_seed(0)
    selector = make_selectors().layers[0]
    hidden = torch.randn(2, 10, WIDTH) * 3
    visual, text = masks("ttvvvvvttt", "...tvvvvtt")
    got = importance(hidden, selector, visual, text, causal)
    assert got.dtype == torch.float32
    for b, start in ((0, 0), (1, 3)):
        v, t = visual[b, start:], text[b, start:]
        expected = naive_importance(hidden[b, start:], selector, v, t, causal)
        torch.testing.assert_close(got[b, start:][v], expected[v])
    assert bool((got[~visual] == -torch.inf).all())


def test_importance_without_text_is_the_visual_mean():
    selector = make_selectors().layers[0]
    hidden = torch.randn(1, 5, WIDTH)
    visual, text = masks("vvvvv")
    got = importance(hidden, selector, visual, text, False)
    torch.testing.assert_close(got[0], naive_importance(hidden[0], selector, visual[0], text[0], 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_importance_in_half_precision(dtype):
    torch.manual_seed(0)
    selector = make_selectors().layers[0]
    hidden = (torch.randn(1, 40, WIDTH) * 20).to(dtype)
    visual, text = masks("ttttt" + "v" * 30 + "ttttt")
    half = importance(hidden, selector.to(hidden.device, dtype), visual, text, True)
    full = importance(hidden.float(), selector, visual, text, True)
    assert bool(half[visual].isfinite().all())
    best = full.topk(8).indices[0].tolist()
    assert len(set(best) & set(half.topk(8).indices[0].tolist())) >= 6


def test_importance_under_autocast_is_finite():
    selector = make_selectors().layers[0]
    visual, text = masks("..tvvvvt")
    with torch.autocast("cpu", torch.bfloat16):
        got = importance(torch.randn(1, 8, WIDTH), selector, visual, text, True)
    assert bool(got[visual].isfinite().all())


def test_importance_is_differentiable():
    selector = make_selectors().layers[0]
    selector.query.requires_grad_()
    visual, text = masks("ttvvvvvt")
    got = importance(torch.randn(1, 8, WIDTH), selector, visual, text, True)
    got[visual].sum().backward()
    assert selector.query.grad.abs().sum() > 0


@pytest.mark.parametrize("bias", [False, True])
def test_fold_equals_the_unfolded_projections(bias):
    torch.manual_seed(0)
    heads, groups, head_dim, rank = 4, 2, 6, 5
    u_q, v_q = torch.randn(heads * head_dim, rank), torch.randn(rank, WIDTH)
    # The rows of the two key heads, repeated once per query head.
    u_k = torch.randn(groups, head_dim, rank).repeat_interleave(heads // groups, 0).flatten(0, 1)
    v_k = torch.randn(rank, WIDTH)
    b_q = torch.randn(heads * head_dim) if bias else None
    b_k = torch.randn(heads * head_dim) if bias else 0.0
    norm = torch.rand(WIDTH) + 0.5

    x = torch.randn(7, WIDTH)
    normed = norm * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    y_q = normed @ (u_q @ v_q).T + (b_q if bias else 0.0)
    y_k = normed @ (u_k @ v_k).T + b_k
    expected = (y_q @ y_k.T / head_dim**0.5).softmax(-1)

    query, key, query_bias = fold(u_q, v_q, u_k, v_k, b_q, norm, head_dim)
    raw = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    folded = raw @ query.T + (query_bias if bias else 0.0)
    torch.testing.assert_close((folded @ (raw @ key.T).T).softmax(-1), expected)


def test_select_keeps_the_best_and_all_text_in_order():
    visual, text = masks("tvvvvt", "..tvvt")
    scores = torch.tensor([[9, 1, 4, 2, 3, 9], [9, 9, 9, 1, 2, 9]]).float()
    scores = scores.masked_fill(~visual, -torch.inf)
    index, valid = select(scores, torch.tensor([2, 1]), text, 4)
    assert index[0].tolist() == [0, 2, 4, 5]
    assert index[1][valid[1]].tolist() == [2, 4, 5]
    assert valid.tolist() == [[True] * 4, [False, True, True, True]]
    assert len(set(index[1].tolist())) == 4


def test_select_breaks_ties_by_position_and_can_keep_none_or_all():
    visual, text = masks("tvvvvt")
    scores = torch.zeros(1, 6).masked_fill(~visual, -torch.inf)
    assert select(scores, torch.tensor([2]), text, 4)[0].tolist() == [[0, 1, 2, 5]]
    assert select(scores, torch.tensor([0]), text, 2)[0].tolist() == [[0, 5]]
    assert select(scores, torch.tensor([4]), text, 6)[0].tolist() == [list(range(6))]


def test_what_saves_time_changes_nothing():
    torch.manual_seed(0)
    selector = make_selectors().layers[0]
    visual, text = masks("tt" + "v" * 600 + "ttt", "ttt" + "v" * 600 + "tt")
    hidden = torch.randn(2, 605, WIDTH)
    plain = importance(hidden, selector, visual, text, True)
    fast = importance(hidden, selector.joined(), visual, text, True, padded=False)
    assert torch.equal(plain, fast)


def test_merge_in_place_writes_to_what_it_is_given():
    hidden = torch.randn(2, 6, 3)
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    new = torch.randn(2, 3, 3)
    expected = merge(hidden, index, new, valid)
    assert merge(hidden, index, new, valid, in_place=True) is hidden
    assert torch.equal(hidden, expected)


def test_merge_is_the_inverse_of_gather_and_not_in_place():
    hidden = torch.randn(2, 6, 3)
    before = hidden.clone()
    index = torch.tensor([[0, 2, 5], [1, 3, 4]])
    valid = torch.tensor([[True, True, True], [False, True, True]])
    new = gather_hidden(hidden, index) + 1
    merged = merge(hidden, index, new, valid)
    expected = before.clone()
    expected[0, [0, 2, 5]] += 1
    expected[1, [3, 4]] += 1
    assert torch.equal(merged, expected)
    assert torch.equal(hidden, before)


def test_gather_positions_of_any_leading_shape():
    index = torch.tensor([[0, 2], [1, 3]])
    shared = torch.randn(1, 4, 6)
    cos, _ = gather_positions((shared, shared), index)
    assert torch.equal(cos, torch.stack([shared[0, [0, 2]], shared[0, [1, 3]]]))
    grid = torch.randn(3, 2, 4, 6)
    cos, _ = gather_positions((grid, grid), index)
    assert torch.equal(cos, torch.stack([grid[:, 0, [0, 2]], grid[:, 1, [1, 3]]], dim=1))
