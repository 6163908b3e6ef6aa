"""Where the fit of a layer starts: truncated SVD of its projections, as in the paper."""

from dataclasses import dataclass

import torch
from torch import Tensor

from alvts_cli.engine import LayerSelector, fold
from alvts_cli.families import QueryKey

# A full decomposition takes 10 s at a width of 2048 on one core, and eight times that at 4096. The
# randomised one takes a sixth; it leaves an error 0.00 % above the least possible where singular
# values fall as the root of their index, and 0.2 % above where they hardly fall (a random matrix).
_EXACT = 1024


@dataclass
class Factors:
    """`W_Q ~ u_q @ v_q` and `W_K ~ u_k @ v_k`, float32: `u` `[H * d_k, R]`, `v` `[R, D]`."""

    u_q: Tensor
    v_q: Tensor
    u_k: Tensor
    v_k: Tensor

    def tensors(self) -> list[Tensor]:
        """What an optimiser moves."""
        return [self.u_q, self.v_q, self.u_k, self.v_k]

    def selector(self, projections: QueryKey) -> LayerSelector:
        """The folded selector, float32, differentiable in the factors.

        The joint head's logit, a sum over heads of `q k^T / sqrt(d_k)`, is divided by the number
        of heads: `S*` averages heads, and a sum of them makes a far sharper softmax. Measured as
        in `align`, recall (share of importance), SVD alone and after the fit: sum over heads .518
        (.767) and .585 (.836), mean over heads .560 (.802) and .628 (.890). Divided by the root of
        the number, as if the joint head were one of width `D`, SVD alone is at .550 (.793).
        """
        heads = projections.num_heads
        bias = projections.b_q
        query, key, query_bias = fold(
            self.u_q,
            self.v_q,
            self.u_k,
            self.v_k,
            None if bias is None else bias.detach(),
            projections.norm_weight.detach(),
            projections.head_dim,
        )
        return LayerSelector(
            query / heads,
            key,
            None if query_bias is None else query_bias / heads,
            projections.norm_eps,
        )


@torch.no_grad()
def initialise(projections: QueryKey, rank: int) -> Factors:
    """Truncated SVD of both projections, the singular values split evenly.

    `rank` is at most the smaller side of `W_Q`.
    """
    w_q = projections.w_q.float()
    # One joint head: with grouped queries, the key of every query head.
    repeats = projections.num_heads // projections.num_kv_heads
    w_k = projections.w_k.float().unflatten(0, (projections.num_kv_heads, -1))
    w_k = w_k.repeat_interleave(repeats, dim=0).flatten(0, 1)
    return Factors(*_factor(w_q, rank), *_factor(w_k, rank))


def _factor(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[M, R]` and `[R, D]` whose product is the best approximation of `weight` of this rank."""
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
