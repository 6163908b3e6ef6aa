"""The model that ships: it sees, it is blind without a picture, and it can tell methods apart."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alvts_cli.engine import Plan, attach_scorer
from alvts_cli.models import Loaded, load_model
from alvts_cli.pocket.evaluate import Item, answers, chance, easy_items, scene_items, score_kinds

PER_KIND = 12


@pytest.fixture(scope="module")
def pocket() -> Loaded:
    return load_model("pocket", "cpu")


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [*scene_items("test", PER_KIND), *easy_items(40)]


def share(right: dict[str, tuple[int, int]], kind: str) -> float:
    return right[kind][0] / right[kind][1]


@pytest.fixture(scope="module")
def dense(pocket: Loaded, items: list[Item]) -> dict[str, tuple[int, int]]:
    return score_kinds(items, answers(pocket.model, pocket.processor, items))


def test_it_answers_held_out_questions(dense: dict[str, tuple[int, int]]) -> None:
    assert share(dense, "scenes") >= 0.9
    assert share(dense, "easy") >= 0.95


def test_without_a_picture_it_guesses(pocket: Loaded, items: list[Item]) -> None:
    scenes = [item for item in items if item.kind != "easy"]
    blind = score_kinds(scenes, answers(pocket.model, pocket.processor, scenes, blind=True))
    assert share(blind, "scenes") <= chance(scenes)["scenes"] + 0.1


class AtRandom:
    """Another draw in every layer."""

    def importance(
        self, index: int, layer: nn.Module, hidden: Tensor, plan: Plan, kwargs: dict[str, Any]
    ) -> Tensor:
        assert plan.visual is not None
        return torch.rand(plan.visual.shape).masked_fill(~plan.visual, -torch.inf)


def test_losing_tokens_at_random_costs_accuracy(
    pocket: Loaded, items: list[Item], dense: dict[str, tuple[int, int]]
) -> None:
    torch.manual_seed(0)
    scenes = [item for item in items if item.kind != "easy"]
    with attach_scorer(pocket.model, AtRandom(), 0.11):
        right = score_kinds(scenes, answers(pocket.model, pocket.processor, scenes))
    assert share(right, "scenes") <= share(dense, "scenes") - 0.15
