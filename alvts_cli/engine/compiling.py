"""The decoder as compiled graphs, hooks and all: of a selecting prefill, and of a decoded token.

With `k` fixed nothing in a prefill depends on what the selectors choose: `torch.compile` takes the
whole loop over the layers, with the hooks of the attachment, without a graph break. The numbers of
text tokens, of visual tokens and, where schedules solve another one for every image, `k` become
variables of the graph the first time that they change; it is compiled again where a layer begins
or ends to select, where scoring takes another number of blocks, and where prompts begin to have
several images.

A decoded token is compiled twice, for the length that every layer's cache happens to have, and at
the second token for all lengths.

Only a prefill with visual tokens into an empty cache is compiled, and single tokens behind a
filled one. Later turns of several tokens and text-only prompts run as ever.

That the graphs are whole and give the same result is tested on the CPU. **Their speed on a GPU is
unmeasured, and CUDA graphs (`mode="reduce-overhead"`) are untested**: every length of the caches
would be a graph of its own.
"""

import types
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn

from .calls import cache_of

State = TypeVar("State")


def compile_decoder(
    decoder: nn.Module,
    state_to_compile: Callable[[], State | None],
    set_state: Callable[[State], None],
    options: Mapping[str, Any],
) -> Callable[[], None]:
    """Let `decoder.forward` run compiled where it can, until the returned function is called.

    Args:
        decoder: the text model.
        state_to_compile: gives what the hooks of the running forward share, such as its `Plan`, or
            None to run it as ever.
        set_state: called in the graph with that, before the first layer.
        options: keyword arguments of `torch.compile`.

    Returns:
        Puts the model's own forward back.
    """
    # Takes a second or more to import, and is wanted here alone.
    from torch._dynamo.exc import FailOnRecompileLimitHit

    own = vars(decoder).get("forward")
    plain = decoder.forward

    def run(state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An int that the graph finds on a module is a constant of it; one of an argument may vary.
        set_state(state)
        return plain(*args, **kwargs)

    def compiled() -> Callable[..., Any]:
        # Compiled code is kept with the code object, at most so many versions of it: a new object,
        # lest the versions of former attachments count, or those of prefill for decoding.
        fresh = types.FunctionType(
            run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
        )
        graph: Callable[..., Any] = torch.compile(fresh, fullgraph=True, **options)
        return graph

    prefill, decode = compiled(), compiled()

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        state, embeds = state_to_compile(), kwargs.get("inputs_embeds")
        if state is None or embeds is None:
            return plain(*args, **kwargs)
        cache = cache_of(kwargs)
        filled = cache is not None and cache.get_seq_length() > 0
        single = embeds.shape[1] == 1
        if filled != single:
            return plain(*args, **kwargs)
        try:
            return (decode if single else prefill)(state, args, kwargs)
        except FailOnRecompileLimitHit:
            warnings.warn(
                "alvts runs a step uncompiled, because torch holds as many compiled versions "
                "as it may; raise torch._dynamo.config.recompile_limit to allow more",
                stacklevel=2,
            )
            return plain(*args, **kwargs)

    def restore() -> None:
        if own is None:
            del decoder.forward
        else:
            decoder.forward = own

    decoder.forward = forward
    return restore
