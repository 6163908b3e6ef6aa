"""Choosing tokens that are important and unlike each other.

The most important tokens look alike, so the `k` best of them say the same thing `k` times. A
token's worth is its importance to a power, `w(i) = S(i)^q`, and what counts is what of it another
token does not say already. `z` is the latent of scoring, not the state itself: an eighth of its
width or less, and as good (measured, see `calibration/README.md`).

- **At once** (`diverse`), against all that is more important, chosen or not:

      score(i) = w(i) (1 - max over j with S(j) > S(i) of |cos(z_i, z_j)|)

- **In turn** (`diverse_in_turn`): the best of what is left, then the best of what that one leaves,
  as a greedy determinantal choice does (DivPrune, CDPruner):

      next = argmax over i of w(i) (1 - max over chosen j of cos(z_i, z_j)^2)

  Three launches a token, so only the first few are chosen like this, the rest at once of what they
  leave.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .merging import sample_starts
from .scene import Scene

# Of a likeness: so that something is left of a token that is exactly like a more important one,
# far more than rounding, and such tokens are ranked by their importance too.
_MOST = 0.99999

# Far above any worth.
_FIRST = 1e9


def diverse(importance: Tensor, states: Tensor, quality: float, scene: Scene) -> Tensor:
    """Scores to rank visual tokens by, in the place of their importance.

    Args:
        importance: float32 `[B, T]`, finite and not negative, whatever is not visual too.
        states: as `directions`, 0 where not visual.
        quality: `q`.
        scene: says of which image a token is: those of different ones are not compared.

    Returns:
        float32 `[B, T]`, where not visual as `Scene.fill`.
    """
    likeness = states @ states.transpose(1, 2)
    apart = scene.apart()
    if apart is not None:
        likeness.masked_fill_(apart, 0)
    return scene.fill() + _unsaid(importance.pow(quality), importance, likeness, states.shape[-1])


def diverse_in_turn(
    importance: Tensor, states: Tensor, quality: float, scene: Scene, turns: int
) -> Tensor:
    """As `diverse`, but the first `turns` are chosen in turn, and score above all others, the first
    of them most. A sample with fewer visual tokens has all of them chosen so."""
    batch, tokens, rank = states.shape
    likeness = states @ states.transpose(1, 2)
    apart = scene.apart()
    if apart is not None:
        likeness.masked_fill_(apart, 0)
    worth = importance.pow(quality)
    of = worth[:, None]
    # `[B, T, T]`: what each token leaves of every other one; of itself next to nothing.
    leaves = torch.addcmul(of, of, likeness.square(), value=-_MOST / rank**2)
    leaves = leaves.flatten(0, 1)
    # Where all is taken, it is taken again.
    left = torch.where(scene.visual, worth, -1.0)
    starts = sample_starts(batch, tokens, left.device)[:, 0] if batch > 1 else 0
    taken = []
    for _ in range(turns):
        best = left.argmax(dim=-1)
        taken.append(best)
        left = torch.minimum(left, leaves.index_select(0, best + starts if batch > 1 else best))
    scores = scene.fill() + _unsaid(left, left, likeness, rank)
    first = torch.arange(turns * _FIRST, 0, -_FIRST, device=left.device).expand(batch, -1)
    return scores.scatter_reduce(1, torch.stack(taken, dim=1), first, "amax")


def _unsaid(worth: Tensor, rank_by: Tensor, likeness: Tensor, rank: int) -> Tensor:
    """What of `worth` `[B, T]` no token says that has more to `rank_by`.

    Args:
        likeness: `[B, T, T]`, of directions; written to, for it is as large as an attention matrix.
        rank: directions are of length `sqrt(rank)`.
    """
    likeness.mul_(rank_by[:, None, :] > rank_by[:, :, None])
    nearest = torch.linalg.vector_norm(likeness, ord=torch.inf, dim=-1)
    return torch.addcmul(worth, worth, nearest, value=-_MOST / rank)


def directions(latent: Tensor, present: Tensor) -> Tensor:
    """Latents `[B, T, R]` at length `sqrt(R)` in float32; nothing where `present` `[B, T]` is 0."""
    seen = latent * present[..., None]
    tiny = torch.finfo(torch.float32).tiny
    return functional.rms_norm(seen.float(), seen.shape[-1:], None, tiny)
