"""Pictures that are seen once."""

from functools import wraps
from typing import Any

import pytest
import torch
from test_families import a_model, each_kind
from zoo import KINDS, zoo_inputs

from alvts_cli.families import family_of
from alvts_cli.families.vision import seen_once


@each_kind
def test_a_picture_goes_through_the_tower_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(kind)
    backbone: Any = family_of(model).backbone(model)
    inputs, see = zoo_inputs(model, kind), backbone.get_image_features
    calls: list[Any] = []

    @wraps(see)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return see(*args, **kwargs)

    monkeypatch.setattr(backbone, "get_image_features", counted)
    name = KINDS[kind].rows
    pictures = inputs[name]
    with torch.no_grad():
        dense = model(**inputs).logits
        other = model(**{**inputs, name: pictures.flip(-1)}).logits
        assert len(calls) == 2 and not torch.equal(dense, other)
        with seen_once(model):
            for _ in range(3):
                assert torch.equal(model(**inputs).logits, dense)
            assert len(calls) == 3
            # Which may ask in other words.
            for _ in range(2):
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert len(calls) <= 4
            calls.clear()
            # Another tensor, and then what may stand where that one stood.
            for _ in range(2):
                assert torch.equal(model(**{**inputs, name: pictures.flip(-1)}).logits, other)
            assert len(calls) == 2
    assert backbone.get_image_features is counted


def test_nothing_stays_behind() -> None:
    model = a_model("llava")
    with pytest.raises(ZeroDivisionError), seen_once(model):
        raise ZeroDivisionError
    assert "get_image_features" not in vars(model.model)
