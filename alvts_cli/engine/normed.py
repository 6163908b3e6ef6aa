"""A layer's input, normed as the layer does, for the low-rank maps that start from it."""

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
    """`n(x)` of a layer's input: its RMSNorm without the weight, which the maps have folded in.
    Made at most once a layer, whoever asks."""

    def __init__(self, hidden: Tensor) -> None:
        """
        Args:
            hidden: `[B, T, D]`, the layer's input.
        """
        self._hidden = hidden
        self._made: Tensor | None = None
        self._latent: tuple[Tensor, Tensor, Tensor] | None = None

    def latent(self, down: Tensor, eps: float, present: Tensor) -> tuple[Tensor, Tensor]:
        """`times`, and the same in float32, times `present` `[B, T]`."""
        if self._latent is None or self._latent[0] is not down:
            latent = self.times(down, eps)
            self._latent = down, latent, latent * present[..., None]
        return self._latent[1:]

    def times(self, down: Tensor, eps: float) -> Tensor:
        """`V n(x)` with `down` `[R, D]`: `[B, T, R]`, float32 on a CPU and else in the dtype of
        the input."""
        hidden = self._hidden
        if fused(hidden.device):
            if self._made is None:
                self._made = functional.rms_norm(hidden, hidden.shape[-1:], None, eps)
            return functional.linear(self._made, down)
        # Behind the map there is less to scale.
        if self._made is None:
            self._made = torch.rsqrt(_norm(hidden).square() / hidden.shape[-1] + eps)
        return functional.linear(hidden, down) * self._made


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
