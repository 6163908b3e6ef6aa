"""Take the selected tokens out of a sequence, and put the results back in their places."""

import torch
from torch import Tensor


def gather_hidden(hidden: Tensor, index: Tensor) -> Tensor:
    """`hidden` `[B, T, D]` at `index` `[B, K]` -> `[B, K, D]`."""
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def gather_positions(embeddings: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """`(cos, sin)` `[..., B or 1, T, head_dim]` at `index` `[B, K]` -> `[..., B, K, head_dim]`.

    Leading dimensions are those of 3-D positions in models that rotate inside the attention.
    """

    def gather(table: Tensor) -> Tensor:
        *lead, _, tokens, width = table.shape
        batch, kept = index.shape
        table = table.to(index.device).expand(*lead, batch, tokens, width)
        return table.gather(-2, index[..., None].expand(*lead, batch, kept, width))

    cos, sin = embeddings
    return gather(cos), gather(sin)


def merge(hidden: Tensor, index: Tensor, new: Tensor, valid: Tensor | None) -> Tensor:
    """`hidden` `[B, T, D]` with the rows at `index` `[B, K]` replaced by `new` `[B, K, D]`.

    Where `valid` `[B, K]` is False the old row stays. Not in place: the caller of the model may
    hold on to `hidden`.
    """
    if valid is not None:
        new = torch.where(valid[..., None], new, gather_hidden(hidden, index))
    return hidden.scatter(1, index[..., None].expand(-1, -1, hidden.shape[-1]), new)
