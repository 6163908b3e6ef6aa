"""Choosing tokens that are important and unlike each other, in one shot.

The most important tokens look alike, so the `k` best of them say the same thing `k` times. A
token's score is its importance, less what a more important token already says:

    score(i) = q log S(i) + log(1 - max over j with S(j) > S(i) of cos(z_i, z_j)^2)

which needs no loop over tokens, as a greedy determinantal choice does (DivPrune, CDPruner), and
keeps as many answers (measured, see `calibration/policy.py`). `z` is the latent of scoring, not the
state itself: an eighth of its width or less, and as good.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .scene import Scene

# What is left of a token that is exactly like a more important one. All of them have as much left,
# whatever rounding makes of their likeness.
_LEAST = 1e-6


def diverse(importance: Tensor, states: Tensor, quality: float, scene: Scene) -> Tensor:
    """Scores to rank visual tokens by, in the place of their importance: `exp` of the above.

    Args:
        importance: float32 `[B, T]`, 0 where not visual.
        states: as `directions`, 0 where not visual.
        quality: `q`.
        scene: says of which image a token is: those of different ones are not compared.

    Returns:
        float32 `[B, T]`, where not visual as `Scene.fill`.
    """
    likeness = states @ states.transpose(1, 2)
    # In place: as large as an attention matrix.
    likeness.mul_(importance[:, None, :] > importance[:, :, None])
    apart = scene.apart()
    if apart is not None:
        likeness.masked_fill_(apart, 0)
    nearest = torch.linalg.vector_norm(likeness, ord=torch.inf, dim=-1)
    # Directions are of length sqrt(R).
    part = -1 / states.shape[-1] ** 2
    new = torch.addcmul(scene.ones(), nearest, nearest, value=part).clamp_(min=_LEAST)
    return torch.addcmul(scene.fill(), importance.pow(quality), new)


def directions(latent: Tensor) -> Tensor:
    """Float32 `latent` `[B, T, R]` at length `sqrt(R)`; nothing stays nothing."""
    latent = latent.float()
    tiny = torch.finfo(latent.dtype).tiny
    return functional.rms_norm(latent, latent.shape[-1:], None, tiny)
