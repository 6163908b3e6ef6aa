"""The decoder's selecting prefill as one compiled graph, hooks and all.

With `k` fixed nothing in a prefill depends on what the selectors choose: `torch.compile` takes the
whole loop over the layers, with the hooks of the attachment, without a graph break. The numbers of
text tokens, of visual tokens and, where schedules solve another one for every image, `k` become
variables of the graph the first time that they change; it is compiled again where a layer begins
or ends to select, and on a CPU where scoring takes another number of blocks of rows.

Only a prefill with visual tokens into an empty cache is compiled. Decoding, later turns and
text-only prompts run as ever: their caches have another length in every layer and at every step.

That the graph is whole and gives the same result is tested on the CPU. **Its speed on a GPU is
unmeasured, and CUDA graphs (`mode="reduce-overhead"`) are untested**: with them, a KV cache lies in
the graph's memory until the first decoded token copies it, and the next prefill overwrites it.
"""

import types
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

State = TypeVar("State")


def compile_prefill(
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
    own = vars(decoder).get("forward")
    plain = decoder.forward

    def run(state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An int that the graph finds on a module is a constant of it; one of an argument may vary.
        set_state(state)
        return plain(*args, **kwargs)

    # Compiled code is kept with the code object, at most so many versions of it: a new object, lest
    # the versions of former attachments count.
    fresh = types.FunctionType(
        run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
    )
    compiled = torch.compile(fresh, fullgraph=True, **options)

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        state = state_to_compile()
        if state is None or (cache is not None and cache.get_seq_length() > 0):
            return plain(*args, **kwargs)
        try:
            return compiled(state, args, kwargs)
        except FailOnRecompileLimitHit:
            warnings.warn(
                "alvts runs a prefill uncompiled, because torch holds as many compiled versions "
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
