"""What is the same in every layer that scores: who asks, what is seen, and where everything is."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..families.rotary import Rotary
from .merging import join_positions, rows_of, take_positions


@dataclass
class Scene:
    """One batch of prompts, as scoring sees them.

    Attributes:
        visual: bool `[B, T]`.
        positions: `(cos, sin)` as the layers take them, `[B or 1, T, w]`; `w` is the size of a head
            `d`, or less where the rest of a head is not turned.
        index: int64 `[B, M]`, where the text that asks stands in the sequence.
        valid: bool `[B, M]`, False at the fill of shorter samples; None where there is none.
        real: bool `[B, T]`, False at padding, which is no column; None when nothing is padded.
        images: int64 `[B, T]`, the image a visual token is of; None where no sample has several.
        ids: int64 `[B or 1, T]`, position ids, for layers that scale their queries by them.
    """

    visual: Tensor
    positions: tuple[Tensor, Tensor]
    index: Tensor
    valid: Tensor | None = None
    real: Tensor | None = None
    images: Tensor | None = None
    ids: Tensor | None = None
    _present: Tensor | None = field(default=None, init=False)
    _alone: Tensor | None = field(default=None, init=False)
    _order: Tensor | None = field(default=None, init=False)
    _fill: Tensor | None = field(default=None, init=False)
    _apart: Tensor | None = field(default=None, init=False)
    _row_weights: Tensor | None = field(default=None, init=False)
    _causal: Tensor | None = field(default=None, init=False)
    _unseen: Tensor | None = field(default=None, init=False)
    _rows: Tensor | None = field(default=None, init=False)
    _joined: Tensor | None = field(default=None, init=False)
    _asked: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _columns: tuple[Tensor, Tensor] | None = field(default=None, init=False)
    _together: "Together | None" = field(default=None, init=False)

    def rows(self) -> Tensor:
        """int64 `[B, M]`: the text that asks, as `merging` names tokens."""
        if self._rows is None:
            self._rows = rows_of(self.index, self.visual.shape[1])
        return self._rows

    def joined(self) -> Tensor:
        """The rotary tables as `merging.join_positions` makes them."""
        if self._joined is None:
            batch, device = self.visual.shape[0], self.visual.device
            self._joined = join_positions(self.positions, batch, device)
        return self._joined

    def asked(self) -> tuple[Tensor, Tensor]:
        """The rotary tables of the text that asks, `[B, M, w]` each."""
        if self._asked is None:
            self._asked = take_positions(self.joined(), self.rows())
        return self._asked

    def present(self) -> Tensor:
        """float32 `[B, T]`: 1 where visual, else 0."""
        if self._present is None:
            self._present = self.visual.float()
        return self._present

    def alone(self) -> Tensor:
        """float32 `[B, T]`: next to 0 where visual, which 1 swallows; else 1."""
        if self._alone is None:
            self._alone = torch.where(self.visual, 2.0**-25, 1.0)
        return self._alone

    def order(self) -> Tensor:
        """int64 `[T]`, from 0."""
        if self._order is None:
            self._order = torch.arange(self.visual.shape[1], device=self.visual.device)
        return self._order

    def fill(self) -> Tensor:
        """float32 `[B, T]`, what `selecting.select` wants beside the scores: 0 where visual, inf at
        text, -inf at padding."""
        if self._fill is None:
            fill = torch.zeros(self.visual.shape, device=self.visual.device)
            fill = fill.masked_fill(~self.visual, torch.inf)
            self._fill = fill if self.real is None else fill.masked_fill(~self.real, -torch.inf)
        return self._fill

    def apart(self) -> Tensor | None:
        """bool `[B, T, T]`: pairs of different images; None where no sample has several."""
        if self._apart is None and self.images is not None:
            self._apart = self.images[:, :, None] != self.images[:, None, :]
        return self._apart

    def row_weights(self) -> Tensor:
        """float32 `[B, 2, T]`: the part of every row in the mean over visual rows, and in that over
        text rows; where there is no text, over visual ones again."""
        if self._row_weights is None:
            text = ~self.visual if self.real is None else self.real & ~self.visual
            text = text | (self.visual & ~text.any(dim=1, keepdim=True))
            rows = torch.stack([self.visual, text], dim=1).float()
            self._row_weights = rows / rows.sum(dim=-1, keepdim=True).clamp(min=1)
        return self._row_weights

    def causal(self, dtype: torch.dtype) -> Tensor:
        """`[B or 1, T, T]`: what is added to the logits of all rows."""
        if self._causal is None:
            order = self.order()
            unseen = (order > order[:, None])[None]
            unseen = unseen if self.real is None else unseen | ~self.real[:, None]
            # Not -inf: a padding row may have no column at all.
            lowest = torch.finfo(dtype).min
            self._causal = torch.zeros_like(unseen, dtype=dtype).masked_fill(unseen, lowest)
        return self._causal

    def unseen(self) -> Tensor:
        """bool `[B, M, T]`: the tokens that a row does not attend to."""
        if self._unseen is None:
            unseen = self.order() > self.index[..., None]
            self._unseen = unseen if self.real is None else unseen | ~self.real[:, None]
        return self._unseen

    def weights(self) -> Tensor:
        """float32 `[B, M]`: the part of every row in a mean; 0 at fill."""
        if self.valid is None:
            count = self.index.shape[1]
            return torch.full(self.index.shape, 1 / count, device=self.index.device)
        return self.valid / self.valid.sum(dim=1, keepdim=True).clamp(min=1)

    def columns(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The rotary tables as columns: `[B or 1, 1, w, T]`."""
        if self._columns is None or self._columns[0].dtype != dtype:
            cos, sin = (
                table.to(self.visual.device, dtype).transpose(1, 2)[:, None].contiguous()
                for table in self.positions
            )
            self._columns = cos, sin
        return self._columns

    def together(
        self, dtype: torch.dtype, groups: int, sharing: int, width: int, rotary: Rotary
    ) -> "Together":
        """Tables for queries and keys in one tensor, see `Together`.

        Args:
            dtype: of the states.
            groups: `G`.
            sharing: `r`.
            width: `d`.
            rotary: how the layers turn their heads, the same in all.
        """
        if self._together is None:
            self._together = _together(self, dtype, groups, sharing, width, rotary)
        return self._together


@dataclass(frozen=True)
class Together:
    """For `[B, G, r M + T, d]`: the queries of the `r` heads that share a key head, head by head,
    and behind them the keys of all tokens.

    Attributes:
        cos, sin: `[B, 1, r M + T, d]`, for states times the cosines and their partners times the
            sines, those of the first of every two negated. Where a head is not turned, 1 and 0.
        partners: int64 `[d]`, where the partner of each number stands; None where rolling by half
            the width does it.
        unseen: `[B, G or 1, r M, T]`, what is added to logits.
        weights: float32 `[B, 1, r M]`, of the rows in a mean; None where all have the same.
    """

    cos: Tensor
    sin: Tensor
    partners: Tensor | None
    unseen: Tensor
    weights: Tensor | None


def _together(
    scene: Scene, dtype: torch.dtype, groups: int, sharing: int, width: int, rotary: Rotary
) -> Together:
    batch = scene.visual.shape[0]
    table = scene.joined().to(dtype)
    asked = table.index_select(0, scene.rows().flatten())
    asked, every = (part.unflatten(0, (batch, -1)) for part in (asked, table))
    cos, sin = torch.cat([*[asked] * sharing, every], dim=1)[:, None].chunk(2, dim=-1)
    turning = sin.shape[-1]
    first, second = rotary.split(sin, -1)
    sin = rotary.join(-first, second, -1)
    partners = None
    if rotary.neighbours or turning < width:
        partners = rotary.partners(torch.arange(width, device=sin.device), turning)
    if turning < width:
        cos, sin = pad(cos, (0, width - turning), value=1), pad(sin, (0, width - turning))
    unseen = scene.unseen().repeat(1, sharing, 1)[:, None]
    added = torch.zeros(unseen.shape, dtype=dtype, device=unseen.device)
    # Not -inf: a fill row may be padding, without any column.
    added = added.masked_fill(unseen, torch.finfo(dtype).min)
    if batch > 1:
        added = added.repeat(1, groups, 1, 1)
    weights = None
    if scene.valid is not None:
        weights = scene.weights().repeat(1, sharing)[:, None]
    return Together(cos, sin, partners, added, weights)
