"""Fit the updates that skipped tokens are carried on with: ridge regression, cut to a low rank.

Layer after layer, on the hidden states that a selecting model really has there: tokens that were
skipped before are where the fitted updates of earlier layers took them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from alvts_cli.engine import Carry, Forward, Keep, LayerSelector, Pieces, Policy
from alvts_cli.engine.calls import POSITIONS
from alvts_cli.engine.placing import make_scorer, place_carry, place_selectors, shared_norms
from alvts_cli.engine.plan import make_plan
from alvts_cli.families import family_of
from alvts_cli.families.layer import norm_eps, norm_weight
from alvts_cli.families.placing import where

from .capture import Captured, on_device, run_layer

POLICY = Policy(quality=0.3, mass=True, carry=True)
"""Under which the states are made."""

KEEP = 1 / 9
"""At which they are made. On pocket, fitted at 28 of 256 tokens and used at 28, 13, 8 and 5: 99.0,
98.1, 93.3, 88.6 % of the answers the dense model's own; fitted at 13: 99.0, 98.1, 93.3, 85.7 (105
questions, a throw-away script): one fit serves all."""

RIDGE = 0.01
"""Of the mean square of the states."""

# As in `initialise`: beyond this a full decomposition takes too long.
_EXACT = 1024


@dataclass
class _Sums:
    """Of one layer over all samples: `X^T X` and `X^T Y`, float32."""

    states: Tensor
    products: Tensor
    count: int = 0

    def add(self, states: Tensor, updates: Tensor) -> None:
        """`X` and `Y`, `[N, D]` each."""
        self.states += states.T @ states
        self.products += states.T @ updates
        self.count += len(states)

    def solve(self, rank: int) -> tuple[Tensor, Tensor]:
        """`down` `[R, D]` and `up` `[D, R]`: the least ridge error of any map of this rank, which
        is the ridge map projected on the main directions of what it predicts."""
        width = len(self.states)
        ridge = RIDGE * self.states.diagonal().mean() + torch.finfo(torch.float32).tiny
        regular = self.states + ridge * torch.eye(width, device=self.states.device)
        whole = torch.linalg.solve(regular, self.products)
        spread = whole.T @ self.states @ whole
        if width <= _EXACT:
            main = torch.linalg.eigh(spread).eigenvectors[:, -rank:]
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                main = torch.svd_lowrank(spread, q=min(2 * rank, width), niter=4)[0][:, :rank]
        return (whole @ main).T.contiguous(), main.contiguous()


@torch.no_grad()
def fit_carries(
    model: Any,
    selectors: Sequence[LayerSelector],
    samples: Sequence[Captured],
    rank: int,
    on_layer: Callable[[int], None] = lambda i: None,
) -> tuple[Carry, ...]:
    """One update for each layer of `model`.

    Args:
        model: of a known family, in eval mode.
        selectors: fitted, one per layer.
        samples: in front of layer 0; not written to.
        rank: of every update, at most the width.
        on_layer: called after each layer.

    Returns:
        On the CPU, in the dtype of each layer's norm.
    """
    family = family_of(model)
    text_model: Any = family.text_model(model)
    implementation = text_model.config._attn_implementation
    layers: Any = family.layers(model)
    places = [where(layer.input_layernorm) for layer in layers]
    there = place_selectors(selectors, layers)
    scorer = make_scorer(there, layers)
    running: list[Carry] = []
    pieces = Pieces(POLICY, there, running, shared_norms(layers))  # type: ignore[arg-type]
    keep = Keep((KEEP,) * len(layers))
    states = [replace(one) for one in samples]
    forwards = []
    for one in states:
        ids = torch.zeros_like(one.visual, dtype=torch.int64)
        plan = make_plan(ids, one.visual, None, keep)
        forwards.append(Forward(plan, scorer, pieces, implementation))
    found = []
    for i, layer in enumerate(layers):
        device, dtype = places[i]
        width = len(layer.input_layernorm.weight)
        empty = torch.zeros(width, width, device=device)
        sums = _Sums(empty, empty.clone())
        for one in states:
            hidden, positions = on_device(layer, [one])
            visual = one.visual.to(device)
            update = run_layer(layer, implementation, hidden, positions) - hidden
            normed = layer.input_layernorm(hidden)
            sums.add(normed[visual].float(), update[visual].float())
        down, up = sums.solve(min(rank, width))
        norm = layer.input_layernorm
        down = down * norm_weight(norm).float()
        carry = Carry(down, up, norm_eps(norm)).to(device, dtype)
        running.append(place_carry(carry, norm))
        found.append(carry.to(torch.device("cpu"), dtype))
        for one, forward in zip(states, forwards, strict=True):
            hidden, positions = on_device(layer, [one])
            ids = torch.arange(hidden.shape[1], device=device)[None]
            kwargs = {
                POSITIONS: positions,
                "position_ids": ids,
                "attention_mask": None,
                "use_cache": False,
            }
            changed = forward.before(i, layer, hidden, kwargs)
            if changed is None:
                output = run_layer(layer, implementation, hidden, positions)
            else:
                chosen, told = changed
                merged = forward.after(layer(chosen, **told))
                assert merged is not None
                output = merged
            one.enter(i + 1, output)
        on_layer(i)
    return tuple(found)
