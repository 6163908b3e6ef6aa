"""A kept token stands for those like it: proportional attention.

Every visual token that is skipped is counted with the kept one nearest to it by the cosine of their
latents. A kept token's logits get `+ log(count)`, as if it were there `count` times (ToMe,
arXiv 2210.09461; ERA, 2606.31982, in decoders).
"""

import torch
from torch import Tensor

from .diversity import directions


def log_mass(
    latent: Tensor, index: Tensor, valid: Tensor, visual: Tensor, images: Tensor
) -> Tensor:
    """What the logits of the kept tokens get.

    Args:
        latent: `[B, T, R]`, any float dtype.
        index, valid: `[B, K]`, what the layer runs on, text included, as `select` has them.
        visual: bool `[B, T]`.
        images: int64 `[B, T]`, the image a visual token is of: none stands for another's.

    Returns:
        float32 `[B, K]`: the logarithm of how many tokens each stands for, itself included; 0 at
        text and fill.
    """
    states = directions(latent)
    kept = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))
    takes = visual.gather(1, index) & valid
    likeness = states @ kept.transpose(1, 2)
    same = images[:, :, None] == images.gather(1, index)[:, None, :]
    likeness = likeness.masked_fill(~(same & takes[:, None, :]), -torch.inf)
    best, nearest = likeness.max(dim=-1)
    # A kept token is most like itself, unless another kept one equals it: count it at home.
    counted = visual & (best > -torch.inf)
    counted = counted & ~torch.zeros_like(visual).scatter(1, index, valid)
    members = takes.float().scatter_add(1, nearest, counted.float())
    return members.clamp(min=1).log()
