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


def divergence(selected: Tensor, reference: Tensor, visual: Tensor) -> Tensor:
    """`KL(p* || p)`, with `p = S / sum S` and `p* = S* / sum S*` over the visual tokens, in nats."""
    wanted = _normalised(reference)
    # Not zero where it underflows: such a token would cost infinitely much, and teach nothing.
    found = _normalised(selected).clamp(min=1e-30)
    terms = torch.special.xlogy(wanted, wanted) - wanted * found.log()
    return terms.masked_fill(~visual, 0).sum(dim=-1)


def _normalised(importance: Tensor) -> Tensor:
    return importance / importance.sum(dim=-1, keepdim=True).clamp(min=1e-30)


def align(
    factors: Factors,
    projections: QueryKey,
    targets: Sequence[Target],
    settings: Settings,
    seed: int,
    objective: Objective = divergence,
) -> Factors:
    """Move the four matrices of a layer, and nothing else, until `S` is like `S*` (Adam, cosine
    schedule to zero).

    The paper gives the loss, `1/N * sum_i (S(i) - S*(i))^2`, and leaves the rest open. The choices
    here were measured on pocket: 256 calibration scenes, 32 of them held out, rank 16, seed 0, mean
    over 16 layers; recall@k of the real attention's choice at k = 1/9, and in brackets the share of
    the real importance that the chosen tokens hold.

    - Scale. `S*` is of order `1/N^2`: the raw error is around 1e-10 and no learning rate suits all
      samples. Both sides are divided by their sum. 400 steps at 1e-3: .628 (.890). Dividing the raw
      error by `sum S*^2` instead: .573 (.827), .592 (.853), .606 (.855) at 1e-4, 3e-4, 1e-3.
    - SVD alone: .560 (.802). Steps at 1e-3: 100 .613 (.864), 200 .619 (.875), 400 .628 (.890), 800
      .635 (.901): 400 pay, 800 cost twice the time. Rates at 400 steps: 3e-4 .615 (.870), 3e-3 .628
      (.886), 1e-2 .607 (.860).
    - Rows. The same mask as in the model, causal: without it in the selector .561 (.887), SVD alone
      .428 (.743).
    - Rank: 8 .625 (.891), 16 .628 (.890), 32 .632 (.892), 64 .630 (.889). It is not what limits
      pocket.
    - A KL of the normalised importance, not the paper's loss, same steps and rate: .665 (.933). It
      is better, and the first thing to try next; the default is the paper's.

    Args:
        factors: where to start (see `initialise`); not written to.
        projections: of the layer, for its bias, norm and head width.
        targets: the samples to fit.
        settings: steps, batch, learning rate, causal.
        seed: of the order of the samples.
        objective: the loss of each sample.

    Returns:
        The fitted factors, float32, on the device of `factors`.
    """
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
