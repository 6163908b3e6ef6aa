"""Importance-consistency alignment: move a layer's factors until its importance matches `S*`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alvts_cli.engine import importance
from alvts_cli.families import QueryKey

from .initialise import Factors
from .settings import Settings

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`S`, `S*` and the visual mask, all `[B, T]` and 0 where not visual -> one loss per sample."""


@dataclass
class Target:
    """One sample of one layer: `hidden` `[1, T, D]`, bool `visual` `[1, T]`, `reference` `S*`
    float32 `[1, T]`, 0 where not visual."""

    hidden: Tensor
    visual: Tensor
    reference: Tensor


def squared_error(selected: Tensor, reference: Tensor, visual: Tensor) -> Tensor:
    """`sum_i (p(i) - p*(i))^2 / sum_i p*(i)^2`, with `p = S / sum S` and `p* = S* / sum S*`."""
    wanted = _normalised(reference)
    error = (_normalised(selected) - wanted).square().sum(dim=-1)
    # What sums to one over T places has at least this square: the clamp only meets all zeros.
    return error / wanted.square().sum(dim=-1).clamp(min=1 / wanted.shape[-1])


def _normalised(importance: Tensor) -> Tensor:
    return importance / importance.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def align(
    factors: Factors,
    projections: QueryKey,
    targets: Sequence[Target],
    settings: Settings,
    seed: int,
    objective: Objective = squared_error,
) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    parameters = [tensor.clone().requires_grad_() for tensor in factors.tensors()]
    moved = Factors(*parameters)
    device = parameters[0].device
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    order: list[int] = []
    for step in range(settings.steps):
        if len(order) < settings.batch:
            order = torch.randperm(len(targets), generator=generator).tolist()
        batch = [targets[order.pop()] for _ in range(min(settings.batch, len(targets)))]
        hidden, visual, text, reference = collate(batch, device)
        for group in optimizer.param_groups:
            group["lr"] = (
                settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
            )
        selected = importance(hidden, moved.selector(projections), visual, text, settings.causal)
        loss = objective(selected.masked_fill(~visual, 0), reference, visual).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Factors(*(tensor.detach() for tensor in parameters))


def collate(batch: Sequence[Target], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad on the right: `hidden` float32 `[B, T, D]`, `visual`, `text` `[B, T]`, `S*` `[B, T]`."""
    longest = max(target.visual.shape[1] for target in batch)

    def pad(tensor: Tensor) -> Tensor:
        missing = longest - tensor.shape[1]
        width = (0, 0, 0, missing) if tensor.dim() == 3 else (0, missing)
        return torch.nn.functional.pad(tensor, width)

    hidden = torch.cat([pad(target.hidden).to(device) for target in batch]).float()
    visual = torch.cat([pad(target.visual) for target in batch]).to(device)
    text = torch.cat([pad(~target.visual) for target in batch]).to(device)
    reference = torch.cat([pad(target.reference) for target in batch]).to(device)
    return hidden, visual, text, reference
