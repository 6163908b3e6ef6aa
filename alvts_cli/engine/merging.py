"""Take the selected tokens out of a sequence, and put the results back in their places."""

import torch
from torch import Tensor

# Taking and putting whole rows copies them as blocks; gather and scatter look up every number,
# which on a CPU takes ten times as long.


def gather_hidden(hidden: Tensor, index: Tensor) -> Tensor:
    """`hidden` `[B, T, D]` at `index` `[B, K]` -> `[B, K, D]`."""
    _, tokens, width = hidden.shape
    rows = index + tokens * _samples(index)
    return hidden.reshape(-1, width).index_select(0, rows.flatten()).view(*index.shape, width)


def gather_positions(embeddings: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """`(cos, sin)` `[..., B or 1, T, head_dim]` at `index` `[B, K]` -> `[..., B, K, head_dim]`.

    Leading dimensions are those of 3-D positions in models that rotate inside the attention.
    """

    def gather(table: Tensor) -> Tensor:
        rows = torch.zeros_like(index) if table.shape[-3] == 1 else _samples(index)
        return table.to(index.device)[..., rows, index, :]

    cos, sin = embeddings
    return gather(cos), gather(sin)


def merge(
    hidden: Tensor, index: Tensor, new: Tensor, valid: Tensor | None, in_place: bool = False
) -> Tensor:
    """`hidden` `[B, T, D]` with the rows at `index` `[B, K]` replaced by `new` `[B, K, D]`.

    Where `valid` `[B, K]` is False the old row stays. `in_place` is for a `hidden` that nobody
    else holds on to.
    """
    if valid is not None:
        new = torch.where(valid[..., None], new, gather_hidden(hidden, index))
    put = hidden.index_put_ if in_place else hidden.index_put
    return put((_samples(index), index), new)


def _samples(index: Tensor) -> Tensor:
    """`[B, 1]`: the number of the sample that each row of `index` `[B, K]` is of."""
    return torch.arange(index.shape[0], device=index.device)[:, None]
