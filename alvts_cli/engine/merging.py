"""Take the selected tokens out of a sequence, and put the results back in their places.

Tokens are named by their row among all rows of a batch, `sample * T + position`: taking and putting
whole rows copies them as blocks, where two indices would have every number looked up.
"""

import torch
from torch import Tensor


def rows_of(index: Tensor, tokens: int) -> Tensor:
    """The rows of positions `index` `[B, K]` in samples of `tokens` tokens: int64 `[B, K]`."""
    if index.shape[0] == 1:
        return index
    return index + sample_starts(index.shape[0], tokens, index.device)


def sample_starts(batch: int, tokens: int, device: torch.device) -> Tensor:
    """`[B, 1]`: the row of every sample's first token."""
    return tokens * torch.arange(batch, device=device)[:, None]


def gather_hidden(hidden: Tensor, rows: Tensor) -> Tensor:
    """`hidden` `[B, T, D]` at `rows` `[B, K]` -> `[B, K, D]`."""
    width = hidden.shape[-1]
    return hidden.reshape(-1, width).index_select(0, rows.flatten()).view(*rows.shape, width)


def join_positions(
    embeddings: tuple[Tensor, Tensor], batch: int, device: torch.device | None = None
) -> Tensor:
    """`(cos, sin)` `[..., B or 1, T, d]` side by side, a row for every token: `[B T, ..., 2 d]`.

    Leading dimensions are those of 3-D positions in models that rotate inside the attention.
    """
    joined = torch.cat(embeddings, dim=-1)
    if device is not None:
        joined = joined.to(device)
    joined = joined.movedim((-3, -2), (0, 1))
    if joined.shape[0] < batch:
        joined = joined.expand(batch, *joined.shape[1:])
    return joined.flatten(0, 1)


def take_positions(joined: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`(cos, sin)` `[..., B, K, d]` of `rows` `[B, K]`, out of what `join_positions` made."""
    taken = joined.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    cos, sin = taken.movedim((0, 1), (-3, -2)).chunk(2, dim=-1)
    return cos, sin


def merge(
    hidden: Tensor, rows: Tensor, new: Tensor, valid: Tensor | None, in_place: bool = False
) -> Tensor:
    """`hidden` `[B, T, D]` with the `rows` `[B, K]` replaced by `new` `[B, K, D]`.

    Where `valid` `[B, K]` is False the old row stays. `in_place` is for a `hidden` that nobody
    else holds on to.
    """
    if valid is not None:
        new = torch.where(valid[..., None], new, gather_hidden(hidden, rows))
    flat = hidden.view(-1, hidden.shape[-1]) if in_place else hidden.flatten(0, 1)
    put = flat.index_put_ if in_place else flat.index_put
    merged = put((rows.flatten(),), new.flatten(0, 1))
    return hidden if in_place else merged.view(hidden.shape)
