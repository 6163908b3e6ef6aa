"""A kept token stands for those like it.

Every visual token that is skipped is counted with the kept one nearest to it by the cosine of their
latents. A kept token's logits get `+ log(count)`, as if it were there `count` times: proportional
attention (ToMe, arXiv 2210.09461; ERA, 2606.31982, in decoders). And it may become the mean of what
it stands for, where it is chosen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .merging import gather_hidden
from .scene import Scene
from .selecting import Layout


@dataclass(frozen=True)
class Members:
    """Whom every kept token stands for.

    Attributes:
        nearest: int64 `[B, T]`, among the `K` tokens that are kept; `K` where a token is counted
            nowhere.
        own: float32 `[B, K]`: 1 where a token stands for itself alone, text and fill; else next to
            nothing, for a visual token is counted among its members.
        count: float32 `[B, K]`: how many it stands for, itself included.
    """

    nearest: Tensor
    own: Tensor
    count: Tensor

    def log(self, dtype: torch.dtype) -> Tensor:
        """What the logits of the kept tokens get, `[B, K]`: 0 at text and fill. Of kept tokens that
        are all alike, one stands for all."""
        return torch.log(self.count, out=torch.empty_like(self.count, dtype=dtype))


def find_members(
    states: Tensor, rows: Tensor, layout: Layout, scene: Scene, targets: bool
) -> Members:
    """
    Args:
        states: as `diversity.directions`, 0 where not visual.
        rows, layout: what the layer runs on, text included, as `select` has them.
        scene: says what is visual, and of which image: none stands for another's.
        targets: whether `nearest` is to be right where a token is counted nowhere.
    """
    batch, tokens = scene.visual.shape
    kept = gather_hidden(states, rows)
    own = scene.alone().flatten().index_select(0, rows.flatten()).view(rows.shape)
    if layout.fill is not None:
        own = own.masked_fill(layout.fill, 1)
    # Directions are of length sqrt(R): further away than any, where nothing stands for others.
    far = -4.0 * states.shape[-1]
    likeness = torch.baddbmm(own[:, None], states, kept.transpose(1, 2), beta=far)
    apart = scene.apart()
    if apart is not None:
        columns = (rows % tokens)[:, None].expand(batch, tokens, -1)
        likeness = likeness.masked_fill(apart.gather(2, columns), 2 * far)
    best, nearest = likeness.max(dim=-1)
    if layout.whole is not None:
        # Of a sample that keeps all, each stands for itself, and none for those just like it: as if
        # the sample were alone, where nothing is selected.
        order = scene.order()[: rows.shape[1]].expand(rows.shape)
        itself = nearest.scatter(1, rows % tokens, order)
        nearest = torch.where(layout.whole[:, None], itself, nearest)
    there, counted = scene.visual, scene.present()
    if layout.empty or apart is not None:
        # Of an image without any kept token, none stands for the others.
        there = there & (best > far / 2)
        counted = there.float()
    count = own.scatter_add(1, nearest, counted)
    if targets:
        nearest = torch.where(there, nearest, rows.shape[1])
    return Members(nearest, own, count)


def pooled(kept: Tensor, hidden: Tensor, members: Members, scene: Scene) -> Tensor:
    """The kept tokens, each the mean of those that it stands for; text and fill as they are.

    Args:
        kept: `[B, K, D]`.
        hidden: `[B, T, D]`, all tokens.
        members: with `targets`.
        scene: for what is the same in every layer.
    """
    count, order = members.count, scene.order()[: kept.shape[1], None]
    share, own = (torch.empty_like(count, dtype=hidden.dtype) for _ in range(2))
    torch.reciprocal(count, out=share)
    torch.div(members.own, count, out=own)
    # One row of weights for each kept token: fewer operators than adding up rows.
    # Not a product: half precision has no number for the share of a token that stands for none.
    others = members.nearest[:, None] != order
    weights = share[..., None].expand(others.shape).masked_fill(others, 0)
    # Autocast, where it is on, has the product in half precision.
    return torch.baddbmm(kept * own[..., None], weights, hidden).to(hidden.dtype)
