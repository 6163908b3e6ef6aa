"""A release of transformers that calls its layers otherwise is refused by name, never obeyed."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CACHE, FAMILIES, make_inputs, make_model, make_selectors, one_image
from torch import nn
from transformers import DynamicCache

import alvts_cli
from alvts_cli.engine import calls
from alvts_cli.errors import AlvtsError

TOKENS = 28
"""Of a prompt with one image of the tiny LLaVA."""

Change = Callable[[dict[str, Any]], None]


def rename(old: str, new: str) -> Change:
    def change(kwargs: dict[str, Any]) -> None:
        kwargs[new] = kwargs.pop(old)

    return change


def call(change: Change, keep: float = 0.4, **more: Any) -> Any:
    """A forward of a tiny model whose layers are called with other arguments, as a newer release
    might call them."""
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    for layer in model.model.language_model.layers:

        def hook(
            module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            changed = dict(kwargs)
            change(changed)
            return args, changed

        # Ours comes after it: hooks run in the order in which they were put in.
        layer.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad(), alvts_cli.attach(model, make_selectors("llava"), keep):
        return model(**inputs, **more)


@pytest.mark.parametrize("keep", [0.4, 1.0])
def test_a_cache_under_another_name(keep: float) -> None:
    with pytest.raises(AlvtsError, match="KV cache as 'memory'"):
        call(rename(CACHE, "memory"), keep)


@pytest.mark.parametrize("keep", [0.4, 1.0])
@pytest.mark.parametrize("hidden", [(CACHE,), (CACHE, "use_cache")])
def test_a_cache_that_is_filled_behind_the_hooks(hidden: tuple[str, ...], keep: float) -> None:
    def hide(kwargs: dict[str, Any]) -> None:
        for name in hidden:
            del kwargs[name]

    with pytest.raises(AlvtsError, match="were not called with"):
        call(hide, keep)


def test_told_to_cache_without_a_cache_is_no_caching() -> None:
    """Granite 4 Vision's decoder tells its layers so, where it is given no cache."""

    def tell(kwargs: dict[str, Any]) -> None:
        kwargs["use_cache"] = True

    expected = call(lambda kwargs: None, use_cache=False).logits
    assert torch.equal(call(tell, use_cache=False).logits, expected)


def test_a_layer_without_rotary_tables() -> None:
    with pytest.raises(AlvtsError, match="without 'position_embeddings'"):
        call(rename("position_embeddings", "rotary"))


@pytest.mark.parametrize("value", [torch.zeros, lambda *shape: (torch.zeros(*shape),)])
def test_an_unknown_argument_with_a_value_for_every_token(value: Any) -> None:
    def add(kwargs: dict[str, Any]) -> None:
        kwargs["token_weights"] = value(1, TOKENS, 3)

    with pytest.raises(AlvtsError, match="'token_weights', which has a value for every token"):
        call(add)


def test_an_unknown_argument_of_a_layer_that_selects_nothing_is_none_of_our_business() -> None:
    def add(kwargs: dict[str, Any]) -> None:
        kwargs["token_weights"] = torch.zeros(1, TOKENS)

    assert call(add, 1.0).logits.shape[1] == TOKENS


def test_an_unknown_argument_of_another_size_is_none_of_our_business() -> None:
    def add(kwargs: dict[str, Any]) -> None:
        kwargs["scales"] = torch.zeros(TOKENS + 1)

    assert call(add).logits.shape[1] == TOKENS


def test_hidden_states_by_keyword() -> None:
    """As some decoders call their layers."""

    def by_keyword(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {**kwargs, "hidden_states": args[0]}

    model, inputs = make_model("llava"), make_inputs(make_model("llava"), one_image("llava"))
    with torch.no_grad(), alvts_cli.attach(model, make_selectors("llava"), 0.4):
        expected = model(**inputs).logits
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(by_keyword, with_kwargs=True)
    with torch.no_grad(), alvts_cli.attach(model, make_selectors("llava"), 0.4):
        assert torch.equal(model(**inputs).logits, expected)


def test_without_a_cache_nothing_is_refused() -> None:
    out = call(lambda kwargs: None, use_cache=False)
    assert calls.cache_of(out) is None


def test_the_cache_goes_on_by_its_first_name() -> None:
    """5.24 knows both, and warns of the old one."""
    new, old = calls.CACHE_NAMES
    cache = DynamicCache()
    for output in ({new: cache}, {new: cache, old: cache}):
        assert calls.going_on(output) == {new: cache}
    for output in ({old: cache}, {new: None, old: cache}):
        assert calls.going_on(output) == {old: cache}
    assert calls.going_on({"logits": 1, new: None}) == {}


def test_a_newer_transformers_is_said_once_per_attachment(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llava")
    monkeypatch.setattr(calls.transformers, "__version__", "99.1.0")
    with (
        pytest.warns(UserWarning, match=r"99\.1\.0 is newer than 5\.") as seen,
        alvts_cli.attach(model, make_selectors("llava"), 0.4),
    ):
        pass
    assert len(seen) == 1


def test_newer_is_a_later_minor_not_a_later_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    major, minor = map(int, calls.NEWEST_TESTED.split("."))
    for version in (f"{major}.{minor}.{minor + 1}", f"{major - 1}.{minor + 1}.0"):
        monkeypatch.setattr(calls.transformers, "__version__", version)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            calls.warn_if_untested()
    monkeypatch.setattr(calls.transformers, "__version__", f"{major}.{minor + 1}.0.dev0")
    with pytest.warns(UserWarning, match="is newer than"):
        calls.warn_if_untested()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_installed_transformers_is_known(family: str) -> None:
    model = make_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.no_grad(), alvts_cli.attach(model, make_selectors(family), 0.4):
            model(**make_inputs(model, one_image(family)))


class Around(nn.Module):
    """A layer that is checkpointed around its hooks, as all were before transformers 5.24."""

    gradient_checkpointing = True

    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args)


def test_checkpointing_around_the_hooks() -> None:
    with pytest.raises(AlvtsError, match="would run alvts a second time in the backward pass"):
        calls.check_checkpointing(Around())
    with torch.no_grad():
        calls.check_checkpointing(Around())
    calls.check_checkpointing(Around().eval())
    once = Around()
    once.gradient_checkpointing = False
    calls.check_checkpointing(once)
    inside = nn.Identity()
    inside.gradient_checkpointing = True  # type: ignore[assignment]
    calls.check_checkpointing(inside)
