"""A kept token stands for those like it: proportional attention.

Every visual token that is skipped is counted with the kept one nearest to it by the cosine of their
latents. A kept token's logits get `+ log(count)`, as if it were there `count` times (ToMe,
arXiv 2210.09461; ERA, 2606.31982, in decoders).
"""

import torch
from torch import Tensor

from .merging import gather_hidden
from .scene import Scene
from .selecting import Layout


def log_mass(
    states: Tensor, rows: Tensor, layout: Layout, scene: Scene, dtype: torch.dtype
) -> Tensor:
    """What the logits of the kept tokens get.

    Args:
        states: as `diversity.directions`, 0 where not visual.
        rows, layout: what the layer runs on, text included, as `select` has them.
        scene: says what is visual, and of which image: none stands for another's.
        dtype: of the logits.

    Returns:
        `[B, K]` in `dtype`: the logarithm of how many tokens each stands for, itself included; 0 at
        text and fill.
    """
    batch, tokens = scene.visual.shape
    flat = rows.flatten()
    kept = gather_hidden(states, rows)
    # Only what is visual and kept stands for others.
    column = scene.log_present().flatten().index_select(0, flat).view(rows.shape)
    if layout.valid is not None:
        column = column.masked_fill(~layout.valid, -torch.inf)
    likeness = torch.baddbmm(column[:, None], states, kept.transpose(1, 2))
    apart = scene.apart()
    if apart is not None:
        columns = (rows % tokens)[:, None].expand(batch, tokens, -1)
        likeness = likeness.masked_fill(apart.gather(2, columns), -torch.inf)
    best, nearest = likeness.max(dim=-1)
    # A kept token is most like itself, unless another kept one equals it: count it at home.
    present = scene.present().flatten()
    if layout.valid is None:
        counted = present.scatter(0, flat, 0.0)
    else:
        left = present.index_select(0, flat).masked_fill(layout.valid.flatten(), 0.0)
        counted = present.scatter(0, flat, left)
    counted = counted.view(batch, tokens)
    if layout.valid is not None or apart is not None:
        # Of an image without any kept token, none stands for the others.
        counted = counted * (best > -torch.inf)
    members = scene.ones()[:, : rows.shape[1]].scatter_add(1, nearest, counted)
    return torch.log(members, out=torch.empty_like(members, dtype=dtype))
