"""What reaches the first decoder layer, sample by sample."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alvts_cli.engine.calls import POSITIONS
from alvts_cli.engine.masks import build_mask
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of


@dataclass
class Captured:
    """One sample on its way through the layers.

    Attributes:
        hidden: `[1, T, D]` in the model's dtype, on the CPU: the input of the coming layer.
        positions: `(cos, sin)` as the layers take them, on the CPU.
        visual: bool `[1, T]`; every other token is text.
    """

    hidden: Tensor
    positions: tuple[Tensor, Tensor]
    visual: Tensor


class _Reached(Exception):
    """The first layer was reached; the rest of the forward is not wanted."""


@torch.no_grad()
def capture(model: Any, inputs: Mapping[str, Any]) -> Captured:
    """Run vision tower, projector and embeddings; stop in front of decoder layer 0.

    Args:
        model: of a known family.
        inputs: a batch of one, on the model's device and in its dtype.

    Raises:
        AlvtsError: there is no visual token in them.
    """
    family = family_of(model)
    seen: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs, hidden=args[0] if args else kwargs["hidden_states"])
        raise _Reached

    handle = family.layers(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**inputs, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    cos, sin = seen[POSITIONS]
    visual = family.visual_mask(model, inputs["input_ids"])
    if not bool(visual.any()):
        raise AlvtsError("the processor made no visual tokens of the images")
    return Captured(seen["hidden"].cpu(), (cos.cpu(), sin.cpu()), visual.cpu())


@torch.no_grad()
def advance(layer: Any, implementation: str, sample: Captured) -> None:
    """Replace `sample.hidden` by the output of the dense `layer` for it.

    Args:
        layer: a decoder layer.
        implementation: the attention implementation in use, which decides on the mask.
        sample: changed in place.
    """
    sample.hidden = run_layer(layer, implementation, sample.hidden, sample.positions).cpu()


def run_layer(
    layer: Any, implementation: str, hidden: Tensor, positions: tuple[Tensor, Tensor]
) -> Tensor:
    """The output `[B, T, D]` of `layer` for `hidden` of that shape, on the layer's device."""
    device = layer.input_layernorm.weight.device
    hidden, (cos, sin) = hidden.to(device), positions
    out: Tensor = layer(
        hidden,
        attention_mask=build_mask(implementation, hidden, 0, None, None),
        **{POSITIONS: (cos.to(device), sin.to(device))},
        use_cache=False,
    )
    return out


def on_device(layer: Any, sample: Captured) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """`sample`'s hidden states and positions on the device of `layer`."""
    device = layer.input_layernorm.weight.device
    cos, sin = sample.positions
    return sample.hidden.to(device), (cos.to(device), sin.to(device))
