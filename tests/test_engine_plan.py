"""What a forward is planned to do, from layouts of visual (v), text (t) and padding (.) tokens."""

from dataclasses import replace
from typing import Any

import torch

from alvts_cli.engine.keep import Keep
from alvts_cli.engine.plan import Plan, make_plan
from alvts_cli.engine.policy import due_layers


def planned(*layouts: str, keep: tuple[float | int, ...] = (0.5, 0.0)) -> Plan:
    ids = torch.ones(len(layouts), len(layouts[0]), dtype=torch.int64)
    visual = torch.tensor([[c == "v" for c in layout] for layout in layouts])
    real = torch.tensor([[c != "." for c in layout] for layout in layouts]).long()
    # A mask is of all tokens so far, these being the last.
    mask = torch.cat([real.new_ones(len(layouts), 3), real], dim=1)
    return make_plan(ids, visual, mask, Keep(keep))


def test_a_batch_is_counted_by_sample() -> None:
    plan = planned("tvvtvvvt", "..tvvvvt", ".ttttttt")
    assert (plan.visual_counts, plan.text_counts) == ((5, 4, 0), (3, 2, 7))
    assert plan.keep_counts == ((2, 2, 0), (0, 0, 0))
    assert plan.keep_tensor.tolist() == [[2, 2, 0], [0, 0, 0]]
    assert plan.text_tensor.tolist() == [3, 2, 7]
    assert plan.several
    assert plan.lengths(0) == (5, 4, 7) and plan.lengths(1) == (3, 2, 7)
    assert plan.selects(0) and plan.ranks(0) and plan.selects(1) and not plan.ranks(1)
    assert plan.images.tolist()[:2] == [[0, 1, 1, 1, 2, 2, 2, 2], [0, 0, 0, 1, 1, 1, 1, 1]]
    assert plan.real is not None and torch.equal(plan.real, plan.visual | plan.text)
    # One text token asks in the second sample, two in the first: the last row is filled up.
    assert plan.asking_index.shape[1] == plan.asking_valid.shape[1] == 2


def test_what_needs_no_choice() -> None:
    whole = planned("tvvt", keep=(1.0, 1.0))
    assert not whole.selects(0) and not whole.several
    assert whole.real is None and whole.asking_valid is None
    text = planned("tttt")
    assert text.keep_counts == () and not text.selects(0)
    token = planned("t")
    assert token.visual_counts == () and token.text.tolist() == [[True]]


def test_one_visual_token_may_be_skipped() -> None:
    assert planned("tvt", "tvt", keep=(0,)).keep_counts == ((0, 0),)


def test_what_a_mask_says_of_the_tokens_before() -> None:
    """In a turn of one token and of two: as it was, otherwise, nothing; and padding in the turn."""
    real = torch.tensor([[False, True, True], [True, True, True]])
    keep = Keep((0.5,))
    for new in (1, 2):
        ids = torch.ones(2, new, dtype=torch.int64)
        words, padded = ids.bool(), ids.bool()
        padded[0] = False

        def plan(before: Any, said: Any, now: Any, ids: Any = ids) -> Plan:
            mask = None if said is None else torch.cat([said, now], dim=1).long()
            return make_plan(
                ids, torch.zeros_like(ids, dtype=torch.bool), mask, keep, real_before=before
            )

        for now in (words, padded):
            for before, said, other in (
                (real, real, False),
                (real, ~real, True),
                (real, torch.ones_like(real), True),
                (None, torch.ones_like(real), False),
                (None, real, True),
            ):
                made = plan(before, said, now)
                assert made.remasks is other
                assert torch.equal(made.text, now)
                assert (made.real is None) == (now is words)
        for before in (real, None):
            made = plan(before, None, words)
            assert made.remasks is (before is not None) and made.real is None


def test_a_mask_that_is_written_to_later_changes_no_plan() -> None:
    for new in (1, 2):
        ids = torch.ones(2, new, dtype=torch.int64)
        mask = torch.tensor([[True] * 3, [False] * 3])[:, :new]
        plan = make_plan(ids, torch.zeros_like(mask), mask, Keep((0.5,)))
        mask[:] = True
        assert plan.real is not None and plan.real.tolist() == [[True] * new, [False] * new]


def test_every_sample_is_ranked_where_it_would_be_alone() -> None:
    kept = [(5, 0), (2, 0), (2, 3), (0, 3), (2, 9), (5, 1)]
    counts = (5, 9)

    def due(every: int) -> list[list[bool]]:
        found = due_layers(kept, counts, every)
        for b in range(2):
            alone = due_layers([(row[b],) for row in kept], counts[b : b + 1], every)
            assert [row[b] for row in found] == [row[0] for row in alone]
        return [[row[b] for row in found] for b in range(2)]

    assert due(1) == [
        [False, True, True, False, True, False],
        [False, False, True, True, False, True],
    ]
    assert due(0) == [[False, True, *[False] * 4], [False, False, True, *[False] * 3]]
    assert due(2) == [
        [False, True, *[False] * 2, True, False],
        [False, False, True, *[False] * 2, True],
    ]


def test_a_sample_of_visual_tokens_alone_keeps_one() -> None:
    assert planned("vvvv", ".vvt", "...v", keep=(0,)).keep_counts == ((1, 0, 1),)


def test_a_sample_of_padding_alone_keeps_none() -> None:
    assert planned("tvvt", "....").keep_counts == ((1, 0), (0, 0))


def test_all_tensors_move_to_the_device_of_the_coming_layer() -> None:
    plan = planned("tvvtvvvt", "..tvvvvt")
    tables = (torch.ones(1, 8, 4), torch.ones(1, 8, 4))
    here = plan.scene(tables)
    plan.move(plan.visual.device)
    assert plan.scene(tables) is here
    there = torch.device("meta")
    plan.move(there)
    tensors = {name: held for name, held in vars(plan).items() if isinstance(held, torch.Tensor)}
    assert len(tensors) == 10
    assert {name for name, held in tensors.items() if held.device != there} == set()
    scene = plan.scene(tables)
    made = (scene.present(), scene.alone(), scene.order(), scene.fill(), scene.apart())
    made += (scene.row_weights(), scene.causal(torch.float32), scene.unseen(), scene.weights())
    made += (scene.rows(), scene.joined(), *scene.asked(), *scene.columns(torch.float32))
    assert {table.device for table in made} == {there}
    assert replace(scene, valid=None).weights().device == there
