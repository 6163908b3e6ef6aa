"""From importance to positions, with static shapes and without waiting for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .merging import sample_starts


@dataclass(frozen=True)
class Layout:
    """Where a layer's tokens stand in a batch, as far as numbers of tokens alone decide it.

    Attributes:
        length: tokens of the longest sample.
        valid: bool `[B, length]`, False at the fill of shorter samples, on the left; None where
            there is none.
        fill: the opposite.
        lift: `[B, length]`, added to positions before they are sorted, best first; or None.
        drop: `[B or 1, length or 1]`, taken from them afterwards: what is left are rows, see
            `merging`; or None.
        empty: whether a sample keeps none of its visual tokens.
        whole: bool `[B]`, True at samples that keep all of theirs; None where none does.
    """

    length: int
    valid: Tensor | None
    fill: Tensor | None
    lift: Tensor | None
    drop: Tensor | None
    empty: bool = False
    whole: Tensor | None = None


def make_layout(among: Tensor, lengths: Tensor | None, length: int) -> Layout:
    """
    Args:
        among: `[B, T]`, of whose shape the batch is, and on whose device.
        lengths: int64 `[B]`, tokens that every sample keeps, text included; None where all keep
            as many.
        length: the largest of them, known on the host.
    """
    batch, tokens = among.shape
    starts = None if batch == 1 else sample_starts(batch, tokens, among.device)
    if lengths is None:
        return Layout(length, None, None, None, None if starts is None else -starts)
    order = torch.arange(length, device=lengths.device)
    lift = (order < lengths[:, None]) * tokens
    valid = order >= length - lengths[:, None]
    return Layout(length, valid, ~valid, lift, valid * tokens - (0 if starts is None else starts))


def select(scores: Tensor, layout: Layout) -> Tensor:
    """The rows a layer runs on: every text token and the best visual ones.

    Args:
        scores: `[B, T]`, inf at text and -inf at padding. On a tie the earlier token wins.
        layout: how many of each sample.

    Returns:
        int64 `[B, length]`: distinct rows (see `merging`), the chosen ones ascending on the right.
        Shorter samples are filled on the left with rows that were not chosen.
    """
    best_first = scores.sort(dim=-1, descending=True, stable=True).indices
    taken = best_first[:, : layout.length]
    if layout.lift is not None:
        taken = taken + layout.lift
    rows = taken.sort(dim=-1).values
    return rows if layout.drop is None else rows - layout.drop


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
