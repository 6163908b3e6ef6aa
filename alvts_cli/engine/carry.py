"""What becomes of the tokens that skip a layer: a fitted stand-in for the layer's update.

A token that skips layers stays as it was, and a later layer meets a state that no token has at
that depth. Some models take no harm; in others its keys and values are poison (see
`calibration/README.md`). So a skipped token gets `x + U V n(x)`, with the layer's input RMSNorm
`n`: the update that the layer would have made, as far as a linear map of low rank can tell.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Carry:
    """The fitted update of one layer.

    Attributes:
        down: `[R, D]`, `V` with the norm weight folded in.
        up: `[D, R]`, `U`.
        eps: of the layer's input RMSNorm.
    """

    down: Tensor
    up: Tensor
    eps: float

    def to(self, device: torch.device, dtype: torch.dtype) -> "Carry":
        """A copy for a layer's device and dtype."""
        return replace(self, down=self.down.to(device, dtype), up=self.up.to(device, dtype))


def carried(hidden: Tensor, latent: Tensor, carry: Carry, in_place: bool) -> Tensor:
    """`hidden` `[B, T, D]` with the fitted update added to every token.

    What ran through the layer is put over it afterwards. `in_place` is for a `hidden` that nobody
    else holds on to.

    Args:
        hidden: the layer's input.
        latent: `V n(x)` of it, `[B, T, R]` in its dtype.
        carry: of the layer.
        in_place: write to `hidden`.
    """
    latent, up = latent.flatten(0, 1), carry.up.T
    if in_place:
        hidden.view(-1, hidden.shape[-1]).addmm_(latent, up)
        return hidden
    added = torch.addmm(hidden.flatten(0, 1), latent, up).view(hidden.shape)
    # Autocast, where it is on, has the product in half precision.
    return added.to(hidden.dtype)
