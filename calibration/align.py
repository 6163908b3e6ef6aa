"""Importance-consistency alignment: move a layer's factors until its importance matches `S*`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from alvts_cli.engine import PaperSelector, Selector
from alvts_cli.engine.paper import paper_importance
from alvts_cli.engine.scene import Scene
from alvts_cli.engine.scoring import TextRows, importance
from alvts_cli.families import QueryKey

from .initialise import Factors
from .paper import PaperFactors, squared_error
from .settings import Settings


@dataclass
class Target:
    """One sample of one layer, or several of the same length.

    Attributes:
        hidden: `[B, T, D]`, the layer's input.
        positions: `(cos, sin)` `[B, T, d]`.
        visual, text: bool `[B, T]`, neither at padding.
        rows: the text that sees an image, with the layer's real queries.
        index: int64 `[B, M]`, where that text stands.
        valid: bool `[B, M]`, False at the fill of shorter samples.
        reference: `S*` of the selectors' form, float32 `[B, T]`, 0 where not visual.
    """

    hidden: Tensor
    positions: tuple[Tensor, Tensor]
    visual: Tensor
    text: Tensor
    rows: TextRows
    index: Tensor
    valid: Tensor
    reference: Tensor

    def float(self) -> "Target":
        """The same with hidden states and queries in float32."""
        rows = replace(self.rows, query=self.rows.query.float())
        return replace(self, hidden=self.hidden.float(), rows=rows)

    def measure(self, selector: Selector) -> tuple[Tensor, Tensor]:
        """What `selector` finds.

        Returns:
            Importance `[B, T]`, 0 where not visual, and the loss `[B]`: the divergence, or the
            squared error where the selector is of the paper's form.
        """
        visual = self.visual
        if isinstance(selector, PaperSelector):
            found = paper_importance(self.hidden, selector, visual, self.text, padded=True)
            found = found.masked_fill(~visual, 0)
            return found, squared_error(found, self.reference, visual)
        scene = Scene(visual, self.positions, self.index, self.valid)
        found = importance(self.hidden, selector, self.rows, scene).masked_fill(~visual, 0)
        return found, divergence(found, self.reference, visual)


def divergence(selected: Tensor, reference: Tensor, visual: Tensor) -> Tensor:
    """`KL(p* || p)` in nats; `p = S / sum S` and `p* = S* / sum S*`, over the visual tokens.

    Args:
        selected, reference: `S` and `S*`, float32 `[B, T]`, 0 where not visual.
        visual: bool `[B, T]`.

    Returns:
        `[B]`.
    """
    wanted = _normalised(reference)
    # Not zero where it underflows: such a token would cost infinitely much, and teach nothing.
    found = _normalised(selected).clamp(min=1e-30)
    terms = torch.special.xlogy(wanted, wanted) - wanted * found.log()
    return terms.masked_fill(~visual, 0).sum(dim=-1)


def _normalised(importance: Tensor) -> Tensor:
    return importance / importance.sum(dim=-1, keepdim=True).clamp(min=1e-30)


Form = TypeVar("Form", Factors, PaperFactors)
"""Of the selectors: ours or the paper's."""


def align(
    factors: Form,
    projections: QueryKey,
    targets: Sequence[Target],
    settings: Settings,
    seed: int,
) -> Form:
    """Move the matrices of a layer, and nothing else, until `S` is like `S*` (Adam, cosine schedule
    to zero).

    The loss is the KL of `S`, normalised over the visual tokens, and `S*` the mean over text rows.
    The paper's is `1/N * sum_i (S(i) - S*(i))^2`, which sees the largest importances only, of its
    product with the mean over visual rows; and its selector is one joint head without rotary
    positions for all rows (`paper`). What was tried stands in the README of this folder.

    Args:
        factors: where to start (see `initialise`); not written to.
        projections: of the layer, for its bias, norm and head width.
        targets: the samples to fit.
        settings: steps, batch, learning rate.
        seed: of the order of the samples.

    Returns:
        The fitted factors, float32, on the device of `factors`.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [tensor.clone().requires_grad_() for tensor in factors.tensors()]
    moved = type(factors)(*parameters)
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    order: list[int] = []
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order = torch.randperm(len(targets), generator=generator, device="cpu").tolist()
        batch = [targets[order.pop()] for _ in range(min(settings.batch, len(targets)))]
        target = collate(batch, device).float()
        for group in optimizer.param_groups:
            group["lr"] = (
                settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            )
        loss = target.measure(moved.selector(projections))[1].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return type(factors)(*(tensor.detach() for tensor in parameters))


def collate(batch: Sequence[Target], device: torch.device) -> Target:
    """Several targets as one on `device`, padded on the right."""
    longest = max(target.visual.shape[1] for target in batch)
    rows = max(target.index.shape[1] for target in batch)

    def put(tensors: Sequence[Tensor], dim: int, size: int) -> Tensor:
        """Padded along `dim` to `size`, one behind the other."""
        padded = []
        for tensor in tensors:
            missing = size - tensor.shape[dim]
            width = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
            moved = tensor.to(device)
            # Where nothing is missing, too, it would be a copy.
            padded.append(torch.nn.functional.pad(moved, width) if missing else moved)
        return torch.cat(padded)

    def put_all(name: str) -> Tensor:
        return put([getattr(target, name) for target in batch], 1, longest)

    cos, sin = (put([target.positions[i] for target in batch], 1, longest) for i in range(2))
    return Target(
        put_all("hidden"),
        (cos, sin),
        put_all("visual"),
        put_all("text"),
        TextRows(
            put([target.rows.query for target in batch], 2, rows),
            batch[0].rows.scaling,
            batch[0].rows.rotary,
        ),
        put([target.index for target in batch], 1, rows),
        put([target.valid for target in batch], 1, rows),
        put_all("reference"),
    )
