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

With `mode="reduce-overhead"`, or whatever else asks for them, a prefill runs as a CUDA graph, one
for every number of tokens, and what it leaves behind is copied out of the graph's memory, which the
next prefill writes to. A decoded token runs compiled without one: its caches grow, and every length
would be another graph.
"""

import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import AlvtsError
from .calls import cache_of

State = TypeVar("State")

_WITHOUT_GRAPHS = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
"""Modes of `torch.compile` that make CUDA graphs, and the same ones without."""

_INDUCTOR_GRAPHS = "triton.cudagraphs"
"""Inductor's option that asks for them."""


def usual_options(device: torch.device) -> Mapping[str, Any]:
    """What `torch.compile` is told where nothing is asked for. On a GPU launching takes longer than
    computing, and one graph is launched at once."""
    return {"mode": "reduce-overhead"} if device.type == "cuda" else {}


def check_not_compiled(backbone: nn.Module, inner: Iterable[nn.Module]) -> None:
    """Refuse parts that torch.compile compiled by themselves: hooks that are put in afterwards are
    not called there. The whole model may be compiled, the backbone runs as ever in it.

    Raises:
        AlvtsError: one of them is.
    """
    for part in (backbone, *inner):
        # `torch.compile(part)` and, in place, `part.compile()`.
        wrapped = isinstance(part, torch._dynamo.OptimizedModule)
        if wrapped or (part is not backbone and part._compiled_call_impl is not None):
            name = type(part._orig_mod if wrapped else part).__name__
            raise AlvtsError(
                f"torch.compile has compiled {name}, a part of the model, where alvts cannot "
                "select; load it without, and attach with compile=True"
            )


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

    Raises:
        AlvtsError: options that `torch.compile` does not take.
    """
    # Takes a second or more to import, and is wanted here alone.
    from torch._dynamo.exc import FailOnRecompileLimitHit

    plain = decoder.forward

    def run(state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An int that the graph finds on a module is a constant of it; one of an argument may vary.
        set_state(state)
        return plain(*args, **kwargs)

    def compiled(options: Mapping[str, Any]) -> Callable[..., Any]:
        # Compiled code is kept with the code object, at most so many versions of it: a new object,
        # lest the versions of former attachments count, or those of prefill for decoding.
        fresh = types.FunctionType(
            run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__
        )
        try:
            graph: Callable[..., Any] = torch.compile(fresh, fullgraph=True, **options)
        # Whatever torch raises for a name or a value that it does not know.
        except Exception as error:
            why = str(error).strip().partition("\n")[0]
            raise AlvtsError(f"torch.compile does not take compile={options}: {why}") from error
        return graph

    without = _without_graphs(options)
    graphs = without is not None
    prefill, decode = compiled(options), compiled(options if without is None else without)

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
            if single:
                return decode(state, args, kwargs)
            if not graphs:
                return prefill(state, args, kwargs)
            # Nothing of an earlier prefill is wanted any more.
            torch.compiler.cudagraph_mark_step_begin()
            return _copied(prefill(state, args, kwargs))
        except FailOnRecompileLimitHit:
            warnings.warn(
                "alvts runs a step uncompiled, because torch holds as many compiled versions "
                "as it may; raise torch._dynamo.config.recompile_limit to allow more",
                stacklevel=2,
            )
            return plain(*args, **kwargs)

    return with_forward(decoder, lambda _: forward)


def with_forward(
    module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Callable[[], None]:
    """Let the `forward` of `module` be what `around` makes of it, until the returned function is
    called, which puts the module's own back. Not over what somebody else put there meanwhile, as
    accelerate does: what `around` made may be called in it for ever."""
    own = vars(module).get("forward")
    made = module.forward = around(module.forward)

    def put_back() -> None:
        if vars(module).get("forward") is not made:
            return
        if own is None:
            del module.forward
        else:
            module.forward = own

    return put_back


def _without_graphs(options: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The same options of `torch.compile` without CUDA graphs; None where they ask for none."""
    if options.get("mode") in _WITHOUT_GRAPHS:
        return {**options, "mode": _WITHOUT_GRAPHS[options["mode"]]}
    if options.get("backend") == "cudagraphs":
        return {**options, "backend": "aot_eager"}
    inductor = options.get("options") or {}
    if inductor.get(_INDUCTOR_GRAPHS):
        return {**options, "options": {**inductor, _INDUCTOR_GRAPHS: False}}
    return None


def keep_in_place(selectors: Sequence[Any], pieces: Any) -> None:
    """Say that fitted maps stay where they are, as torch knows of weights: a CUDA graph reads them
    there, and does not copy them at every run.

    Args:
        selectors: of any form.
        pieces: a `forward.Pieces`.
    """
    maps = [vars(one).values() for one in (*selectors, *pieces.carries)]
    for tensor in (*chain(*maps), *pieces.joined):
        if isinstance(tensor, Tensor):
            torch._dynamo.mark_static_address(tensor)


def _copied(output: Any) -> Any:
    """The decoder's output in memory of its own, cache and all."""
    cache = cache_of(output)
    for layer in () if cache is None else cache.layers:
        for name in ("keys", "values", "valid", "bias"):
            # A dense model's cache has not all of them.
            if hasattr(layer, name):
                setattr(layer, name, _clone(getattr(layer, name)))
    for name, value in output.items():
        if value is not cache:
            output[name] = _clone(value)
    return output


def _clone(value: Any) -> Any:
    """A tensor, or several, or None."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_clone, value))
    return value.clone() if isinstance(value, Tensor) else value
