"""How a layer turns its queries and keys by their positions, read off the layer itself."""

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@dataclass(frozen=True)
class Rotary:
    """Which two numbers of a head are turned together.

    Of tables `(cos, sin)` of width `w`, the first `w` numbers of a head are turned, and those
    behind them, where a head has more, stay as they are. The tables have an angle's numbers at the
    places of both that are turned by it.

    Attributes:
        neighbours: 0 with 1, 2 with 3 and so on (GLM, Ernie); else `i` with `i + w / 2`.
    """

    neighbours: bool = False

    def split(self, states: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """The first and the second of every two, along `dim` of size `w`: views of size `w / 2`."""
        dim %= states.dim()
        if self.neighbours:
            first, second = states.unflatten(dim, (-1, 2)).unbind(dim + 1)
        else:
            first, second = states.chunk(2, dim)
        return first, second

    def join(self, first: Tensor, second: Tensor, dim: int) -> Tensor:
        """What `split` takes apart."""
        dim %= first.dim()
        if self.neighbours:
            return torch.stack([first, second], dim + 1).flatten(dim, dim + 1)
        return torch.cat([first, second], dim)

    def partners(self, order: Tensor, width: int) -> Tensor:
        """The other one of every two, among tables of `width`.

        Args:
            order: int64 `[d]`, the numbers of a head from 0; what is said of those that are not
                turned means nothing.
        """
        return order ^ 1 if self.neighbours else (order + width // 2) % width


def rotary_of(attention: Any) -> Rotary:
    """The form of an attention module.

    Every modeling file of transformers has its own `apply_rotary_pos_emb`, under this name. What it
    does with four numbers tells. Of a module without one it is a guess, as all others are before
    `engine/probe.py` has compared them with what the layer does.
    """
    for kind in type(attention).__mro__:
        turn = getattr(sys.modules.get(kind.__module__), "apply_rotary_pos_emb", None)
        if turn is not None:
            return _read(turn)
    return Rotary()


@cache
def _read(turn: Any) -> Rotary:
    # Real numbers, though the model may have none (`bench/launches.py`).
    with _disable_current_modes(), torch.no_grad():
        states = torch.arange(1.0, 5.0, device="cpu").view(1, 1, 1, 4)
        cos, sin = (torch.full((1, 1, 4), value, device="cpu") for value in (0.0, 1.0))
        try:
            turned = turn(states, states, cos, sin)[0].flatten().tolist()
        except (TypeError, ValueError, RuntimeError, IndexError):
            return Rotary()
    # A quarter of a turn puts the second one, negated, in the place of the first.
    return Rotary(neighbours=turned == [-2, 1, -4, 3])
