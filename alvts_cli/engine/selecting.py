"""From importance to positions, with static shapes and without waiting for the device."""

import torch
from torch import Tensor


def select(
    importance: Tensor, keep_counts: Tensor, text: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """The positions a layer runs on: the `k` best visual tokens and every text token.

    Args:
        importance: `[B, T]`, -inf where not visual. On a tie the earlier token wins.
        keep_counts: int64 `[B]`, at most the number of visual tokens of the sample.
        text: bool `[B, T]`.
        length: the largest `text + k` of the batch, known on the host.

    Returns:
        As `positions_of`.
    """
    best_first = importance.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(importance.shape[1], device=importance.device)
    best = torch.zeros_like(text).scatter_(1, best_first, ranks < keep_counts[:, None])
    return positions_of(text | best, length)


def positions_of(chosen: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Where `chosen` bool `[B, T]` is True, in at most `length` places per sample.

    Returns:
        `index` int64 `[B, length]`: distinct positions, the chosen ones ascending on the right.
        Shorter samples are filled on the left with positions that were not chosen.
        `valid` bool `[B, length]`: False at the fill.
    """
    # Stable, so both the positions left out and the chosen ones after them stay ascending.
    order = chosen.to(torch.uint8).argsort(dim=-1, stable=True)
    index = order[:, order.shape[1] - length :]
    return index, chosen.gather(1, index)
