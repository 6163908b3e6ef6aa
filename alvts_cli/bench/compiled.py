"""A dense model through `torch.compile`, as `attach(..., compile=True)` runs the selecting one."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._inductor.config
from torch._dynamo.exc import TorchDynamoException

from ..engine.compiling import compile_decoder, usual_options
from ..errors import AlvtsError
from ..families import family_of


def weights_frozen() -> bool:
    """Whether torch takes the weights of what it compiles for constants
    (`TORCHINDUCTOR_FREEZING=1`): on a CPU it then packs them once, and not at every product."""
    return bool(torch._inductor.config.freezing)


@contextmanager
def compiled(model: Any) -> Iterator[Any]:
    """A copy of `model` on the same weights, whose decoder runs compiled.

    Modules of its own, because selecting hooks on the modules of `model` would become part of the
    graph.
    """
    weights = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in weights})
    options = usual_options(model.device)
    decoder = family_of(twin).text_model(twin)
    restore = compile_decoder(decoder, lambda: (), lambda _: None, options)
    try:
        yield twin
    finally:
        restore()


@contextmanager
def compiler_errors() -> Iterator[None]:
    """One line of what torch has to say of a compiler that is missing or fails.

    Raises:
        AlvtsError: for an error of `torch.compile`.
    """
    try:
        yield
    except TorchDynamoException as error:
        line = str(error).strip().partition("\n")[0]
        raise AlvtsError(f"torch.compile failed: {line}; leave out --compile") from None
