"""A layer's input, normed as the layer does, for the low-rank maps that start from it."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

# Numbers copied to float32 at once on a CPU, to stay in its cache.
CPU_COPIED = 2**18


def fused(device: torch.device) -> bool:
    """Whether few operators are better than little memory: not on a CPU, which has no launches to
    save and small caches."""
    return device.type != "cpu"


class Normed:
    """`n(x)` of a layer's input, its RMSNorm, for low-rank maps of it. Whatever is made of it is
    made at most once a layer, whoever asks.

    On a CPU the maps have the norm's weight folded in, and the scale is applied behind them, where
    there is less to scale. On a GPU they have not (see `unfolded`), so that one operator makes the
    states that everybody starts from.
    """

    def __init__(self, hidden: Tensor, weight: Tensor | None = None) -> None:
        """
        Args:
            hidden: `[B, T, D]`, the layer's input.
            weight: `[D]`, what the norm multiplies by; None where the maps have it folded in.
        """
        self._hidden = hidden
        self._weight = weight
        self._made: Tensor | None = None
        self._times: list[tuple[Tensor, Tensor]] = []

    def states(self, eps: float) -> Tensor:
        """All of it, `[B, T, D]`."""
        if self._made is None:
            hidden = self._hidden
            self._made = functional.rms_norm(hidden, hidden.shape[-1:], self._weight, eps)
        return self._made

    def times(self, down: Tensor, eps: float) -> Tensor:
        """`V n(x)` with `down` `[R, D]`: `[B, T, R]`, float32 on a CPU and else in the dtype of
        the input."""
        for known, made in self._times:
            if known is down:
                return made
        hidden = self._hidden
        if fused(hidden.device):
            made = functional.linear(self.states(eps), down)
        else:
            if self._made is None:
                self._made = torch.rsqrt(_norm(hidden).square() / hidden.shape[-1] + eps)
            made = functional.linear(hidden, down) * self._made
        self._times.append((down, made))
        return made

    def times_both(self, joined: Tensor, parts: Sequence[Tensor], eps: float) -> None:
        """Make `times` of all `parts` `[R, D]` ready, by one product with them one below the other,
        `joined`."""
        made = functional.linear(self.states(eps), joined)
        made_parts = made.split([len(part) for part in parts], dim=-1)
        self._times += zip(parts, made_parts, strict=True)


def unfolded(down: Tensor, weight: Tensor) -> Tensor:
    """A map `[R, D]` without the norm's weight `[D]` that it has folded in; 0 where that is 0."""
    return torch.where(weight == 0, 0, down.float() / weight.float()).to(down.dtype)


def _norm(hidden: Tensor) -> Tensor:
    """The length `[B, T, 1]` of every row of `hidden` `[B, T, D]`, at least float32."""
    batch, _, width = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    norm = partial(torch.linalg.vector_norm, dim=-1, keepdim=True, dtype=wide)
    # A CPU's kernel is given a float32 copy, so it gets small parts. Not in a compiled graph, which
    # would have their number for a constant.
    if torch.compiler.is_compiling():
        return norm(hidden)
    size = max(1, CPU_COPIED // (batch * width))
    return torch.cat([norm(part) for part in hidden.split(size, dim=1)], dim=1)
