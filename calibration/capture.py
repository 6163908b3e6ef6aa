"""What reaches the first decoder layer, sample by sample."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alvts_cli.engine.calls import POSITIONS
from alvts_cli.engine.masks import build_mask
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of
from alvts_cli.families.placing import where

from .answers import MOST, MOST_TOKENS


@dataclass
class Captured:
    """One sample on its way through the layers.

    Attributes:
        hidden: `[1, T, D]` in the model's dtype, on the CPU: the input of the coming layer.
        positions: `(cos, sin)` as the layers take them, on the CPU.
        visual: bool `[1, T]`; every other token is text.
        added: by the number of a later layer, what the decoder adds to its input beside the output
            of the layer before, `[1, T, D]` on the CPU: features of the vision tower's middle
            layers, in families that have them.
    """

    hidden: Tensor
    positions: tuple[Tensor, Tensor]
    visual: Tensor
    added: Mapping[int, Tensor] = field(default_factory=dict)

    def enter(self, index: int, output: Tensor) -> None:
        """Make `hidden` the input of layer `index`, from the output of the layer before."""
        output = output.cpu()
        self.hidden = output + self.added[index] if index in self.added else output


class _Reached(Exception):
    """The last layer was reached; the rest of the forward is not wanted."""


@torch.no_grad()
def capture(model: Any, inputs: Mapping[str, Any]) -> Captured:
    """Run vision tower, projector and embeddings, and no decoder layer.

    Args:
        model: of a known family.
        inputs: a batch of one, on the model's device and in its dtype.

    Raises:
        AlvtsError: there is no visual token in them.
    """
    family = family_of(model)
    layers: Any = family.layers(model)
    calls: list[dict[str, Any]] = []

    def stand_in(*args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        calls.append({**kwargs, "hidden": hidden})
        if len(calls) == len(layers):
            raise _Reached
        # So that the next layer's input is what was added to it, and nothing else.
        return torch.zeros_like(hidden)

    with _standing_in(layers, stand_in), suppress(_Reached):
        model(**inputs, use_cache=False)
    first, *others = calls
    cos, sin = first[POSITIONS]
    added = {i: call["hidden"].cpu() for i, call in enumerate(others, 1) if call["hidden"].any()}
    visual = family.visual_mask(model, inputs["input_ids"])
    if not bool(visual.any()):
        raise AlvtsError("the processor made no visual tokens of the images")
    return Captured(first["hidden"].cpu(), (cos.cpu(), sin.cpu()), visual.cpu(), added)


@contextmanager
def _standing_in(layers: Any, stand_in: Any) -> Iterator[None]:
    """Let `stand_in` be called in the place of every layer."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = stand_in
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@torch.no_grad()
def advance(layer: Any, index: int, implementation: str, samples: Sequence[Captured]) -> None:
    """Replace every `sample.hidden` by the next layer's input, with the dense `layer` in between.

    Args:
        layer: a decoder layer.
        index: its number.
        implementation: the attention implementation in use, which decides on the mask.
        samples: changed in place.
    """
    for numbers in alike(samples):
        batch = [samples[number] for number in numbers]
        hidden, positions = on_device(layer, batch)
        output = run_layer(layer, implementation, hidden, positions).cpu()
        for sample, own in zip(batch, output.split(1), strict=True):
            # A copy: parts of one tensor would keep all of it.
            sample.enter(index + 1, own.clone())


def alike(samples: Sequence[Captured]) -> list[list[int]]:
    """The numbers of samples that go through a layer at once: those of the same length, which need
    no padding, as many as trials run at once."""
    batches: list[list[int]] = []
    open_at: dict[tuple[torch.Size, ...], list[int]] = {}
    for number, one in enumerate(samples):
        shape = (one.hidden.shape, one.positions[0].shape)
        own = open_at.get(shape)
        if own is None or len(own) == MOST or one.hidden.shape[1] * (len(own) + 1) > MOST_TOKENS:
            own = open_at[shape] = []
            batches.append(own)
        own.append(number)
    return batches


def run_layer(
    layer: Any, implementation: str, hidden: Tensor, positions: tuple[Tensor, Tensor]
) -> Tensor:
    """The output `[B, T, D]` of `layer` for `hidden` of that shape, on the layer's device."""
    device = where(layer.input_layernorm)[0]
    hidden, (cos, sin) = hidden.to(device), positions
    # For layers that scale their queries by them.
    ids = torch.arange(hidden.shape[1], device=device)[None]
    out: Tensor = layer(
        hidden,
        attention_mask=build_mask(implementation, hidden, 0, None, None),
        **{POSITIONS: (cos.to(device), sin.to(device))},
        position_ids=ids,
        use_cache=False,
    )
    return out


def on_device(layer: Any, samples: Sequence[Captured]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Hidden states `[B, T, D]` and positions of samples of one length on the device of `layer`."""
    device = where(layer.input_layernorm)[0]
    cos, sin = (torch.cat([one.positions[i] for one in samples]).to(device) for i in range(2))
    return torch.cat([one.hidden for one in samples]).to(device), (cos, sin)
