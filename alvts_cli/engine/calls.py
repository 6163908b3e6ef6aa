"""How transformers calls a decoder and its layers: the names of arguments, known in one place.

The engine works on the arguments that a layer is called with. A release that renames one must be an
error and not a wrong answer, so whatever is not recognised is refused by name.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from ..errors import AlvtsError

NEWEST_TESTED = "5.24"
"""The newest release of transformers that the tests were run with."""

CACHE_NAMES = ("cache", "past_key_values")
"""What the KV cache is called, in calls and in outputs: since 5.24, and before."""

POSITIONS = "position_embeddings"

# What a layer is called with that has a number for every token, or the cache.
_KNOWN = frozenset(
    {"hidden_states", "attention_mask", POSITIONS, "position_ids", "cache_position", *CACHE_NAMES}
)


def cache_of(call: Any) -> Any:
    """The KV cache among the keyword arguments of a call, or in a model's output; None where there
    is none."""
    # No generator: torch.compile of 2.11 does not take one apart.
    for name in CACHE_NAMES:
        found = call.get(name) if isinstance(call, Mapping) else getattr(call, name, None)
        if found is not None:
            return found
    return None


def names_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """What a function calls its arguments, in order; of a wrapper, what the wrapped one does."""
    return tuple(signature(function).parameters)


def by_name(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The arguments of a call by their names, where those without one go by `names_of`."""
    return {**dict(zip(names, args, strict=False)), **kwargs} if args else kwargs


def going_on(output: Any) -> dict[str, Any]:
    """The KV cache of a model's output, as the keyword argument that the next call takes it by."""
    # By its first name alone: 5.24 knows both, and warns of the old one.
    return next(({n: output[n]} for n in CACHE_NAMES if output.get(n) is not None), {})


def new_cache(text_model: Any) -> dict[str, Any]:
    """An empty KV cache for a decoder, as the keyword argument that calls take it by."""
    taken = signature(text_model.forward).parameters
    name = next(name for name in CACHE_NAMES if name in taken)
    return {name: DynamicCache(config=text_model.config)}


def check_layer_call(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int, selects: bool
) -> None:
    """Refuse a call of a decoder layer that is not as the engine knows it.

    Args:
        args, kwargs: of the call.
        tokens: new tokens of the forward.
        selects: whether the layer will run on a selection of them.

    Raises:
        AlvtsError: a cache under an unknown name; and in a layer that selects, no rotary tables, or
            an argument unknown to alvts that has a number for every token, which would have to be
            selected too.
    """
    for name, value in kwargs.items():
        if isinstance(value, Cache) and name not in CACHE_NAMES:
            raise _unknown(f"hands its layers the KV cache as {name!r}")
    if not selects:
        return
    if kwargs.get(POSITIONS) is None:
        raise _unknown(f"calls its layers without {POSITIONS!r}")
    for name, value in (*(("", value) for value in args[1:]), *kwargs.items()):
        if name not in _KNOWN and any(tokens in tensor.shape for tensor in _tensors(value)):
            what = repr(name) if name else "an argument without a name"
            raise _unknown(f"calls its layers with {what}, which has a value for every token")


def check_checkpointing(layer: Any) -> None:
    """Refuse gradient checkpointing around the hooks of a layer, as older releases do it: they
    would run again in the backward pass, where no forward is running. Since 5.24 it is inside.

    Raises:
        AlvtsError: the layer is checkpointed so.
    """
    around = type(layer).__call__ is not nn.Module.__call__
    on = layer.training and getattr(layer, "gradient_checkpointing", False)
    if around and on and torch.is_grad_enabled():
        raise AlvtsError(
            f"gradient checkpointing in transformers {transformers.__version__} would run alvts a "
            "second time in the backward pass; use transformers 5.24 or newer, or train without it"
        )


def check_output(output: Any, prepared: Any) -> None:
    """Refuse an output of the decoder with a cache that is not `prepared`, the one that the layers
    were given.

    Raises:
        AlvtsError: the layers' cache went by unseen.
    """
    values = output.values() if isinstance(output, Mapping) else output
    if any(isinstance(value, Cache) and value is not prepared for value in values):
        raise _unknown("filled a KV cache that its layers were not called with")


def warn_if_untested() -> None:
    """One warning where transformers is newer than any release that the tests were run with."""
    major, minor = map(int, NEWEST_TESTED.split("."))
    ours = transformers.__version__.split(".")
    if (int(ours[0]), int(ours[1])) > (major, minor):
        warnings.warn(
            f"transformers {transformers.__version__} is newer than {NEWEST_TESTED}, "
            "the newest that this alvts was tested with",
            stacklevel=2,
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)


def _unknown(what: str) -> AlvtsError:
    return AlvtsError(
        f"this model, in transformers {transformers.__version__}, {what}: alvts does not know how "
        f"to select there; use a release up to {NEWEST_TESTED}, or run without alvts"
    )
