"""Where the fit of a layer starts: truncated SVD of its key projection, as in the paper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from alvts_cli.engine import LayerSelector
from alvts_cli.families import QueryKey

# A full decomposition takes 10 s at a width of 2048 on one core, and eight times that at 4096. The
# randomised one takes a sixth; it leaves an error 0.00 % above the least possible where singular
# values fall as the root of their index, and 0.2 % above where they hardly fall (a random matrix).
_EXACT = 1024


@dataclass
class Factors:
    """What is fitted, float32: `W_K ~ up @ down`, with `up` `[G * d_k, R]` and `down` `[R, D]`."""

    up: Tensor
    down: Tensor

    def tensors(self) -> list[Tensor]:
        """What an optimiser moves."""
        return [self.up, self.down]

    def selector(self, projections: QueryKey) -> LayerSelector:
        """With the norm weight folded in; float32, differentiable in the factors."""
        bias = projections.b_k
        return LayerSelector(
            down=self.down * projections.norm_weight.detach().float(),
            up=self.up,
            key_bias=None if bias is None else bias.detach().float(),
            eps=projections.norm_eps,
            key_norm=None if projections.k_norm is None else projections.k_norm.detach().float(),
        )


@torch.no_grad()
def initialise(projections: QueryKey, hidden: Tensor, rank: int) -> Factors:
    """Truncated SVD of the key projection.

    Args:
        projections: of the layer.
        hidden: inputs of the layer `[N, D]`, in front of its norm, at visual tokens. Each number
            of the latent is scaled to a variance of 1 over them, so that all count alike where
            tokens are compared by it.
        rank: at most the smaller side of `W_K`.
    """
    up, down = factor(projections.w_k.float(), rank)
    hidden = hidden.to(down.device).float()
    states = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + projections.norm_eps)
    spread = (states * projections.norm_weight.float() @ down.T).std(dim=0).clamp(min=1e-6)
    return Factors(up * spread, down / spread[:, None])


def factor(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[M, R]` and `[R, D]` whose product is the best approximation of `weight` of this rank: its
    truncated SVD, the singular values split evenly."""
    smaller = min(weight.shape)
    if smaller <= _EXACT:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight, q=min(2 * rank, smaller), niter=4)
        v = v.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * v[:rank]
