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

# What is left of a token that is exactly like a more important one.
_LEAST = 1e-6


def diverse(
    importance: Tensor, latent: Tensor, images: Tensor, quality: float, several: bool
) -> Tensor:
    """Scores to rank visual tokens by, in the place of their importance.

    Args:
        importance: float32 `[B, T]`, -inf where not visual.
        latent: `[B, T, R]`, any float dtype.
        images: int64 `[B, T]`, the number of the image a visual token is of; tokens of different
            images are not compared.
        quality: `q`.
        several: whether any sample has more than one image.

    Returns:
        float32 `[B, T]`, -inf where not visual.
    """
    # Best first: then those more important than a token are those in front of it.
    order = importance.argsort(dim=-1, descending=True, stable=True)
    states = directions(latent).gather(1, order[..., None].expand(-1, -1, latent.shape[-1]))
    likeness = (states @ states.transpose(1, 2)).square_()
    if several:
        of = images.gather(1, order)
        likeness = likeness * (of[:, :, None] == of[:, None, :])
    nearest = likeness.tril_(-1).amax(dim=-1)
    new = torch.zeros_like(importance).scatter_(1, order, (1 - nearest).clamp(min=_LEAST).log())
    floor = torch.finfo(torch.float32).tiny
    scores = quality * importance.clamp(min=floor).log() + new
    return scores.masked_fill(importance == -torch.inf, -torch.inf)


def directions(latent: Tensor) -> Tensor:
    """`latent` `[..., R]` at length 1, float32: half precision cannot tell likeness from
    sameness."""
    return functional.normalize(latent.float(), dim=-1)
