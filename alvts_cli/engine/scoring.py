"""The selector of a layer at run time: importance of every visual token from the raw residual.

With the layer's input RMSNorm `n(x) = s(x) * x * w`, `s(x) = rsqrt(mean(x^2) + eps)`, and the
low-rank projections `y_q = U_Q V_Q n(x) + b_q`, `y_k = U_K V_K n(x) + b_k`, a logit is

    y_q(i) . y_k(j) / sqrt(d_k)
        = (U_K^T U_Q V_Q n(x_i) + U_K^T b_q) . (V_K n(x_j)) / sqrt(d_k)  +  y_q(i) . b_k / sqrt(d_k)

The last term is the same for all `j`, so the softmax over `j` cancels it. What is left needs two
`R x D` matrices: `w` and the scale fold into them, and `s(x)` is one number per token.
"""

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional

# Rows of the attention matrix held at once: bounds memory to B * 1024 * T floats, and still lets
# an image of 576 tokens with its prompt go through in one block.
ROW_BLOCK = 1024
# On a CPU a block is to stay in its cache, and so are the numbers that are copied to float32.
CPU_ROW_BLOCK = 256
CPU_COPIED = 2**18

_HAS_TRITON = find_spec("triton") is not None
# Where the Triton kernels run; the tests have them interpreted on the CPU.
_KERNEL_DEVICE = "cuda"


@dataclass(frozen=True)
class LayerSelector:
    """The folded selector of one layer.

    Attributes:
        query: `[R, D]`, with the `R x R` core, the norm weight and `1 / sqrt(d_k)` folded in.
        key: `[R, D]`, with the norm weight folded in.
        query_bias: `[R]` or None, with `1 / sqrt(d_k)` folded in.
        eps: of the layer's input RMSNorm.
        both: `[2R, D]`, query above key, where they were put together; else None.
    """

    query: Tensor
    key: Tensor
    query_bias: Tensor | None
    eps: float
    both: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> "LayerSelector":
        """A copy for a layer's device and dtype. The small bias stays in float32."""
        bias = self.query_bias
        return replace(
            self,
            query=self.query.to(device, dtype),
            key=self.key.to(device, dtype),
            query_bias=None if bias is None else bias.to(device, torch.float32),
            both=None,
        )

    def joined(self) -> "LayerSelector":
        """The same with both matrices in one tensor, so that scoring reads its input once."""
        both = torch.cat([self.query, self.key])
        query, key = both.chunk(2)
        return replace(self, query=query, key=key, both=both)


def default_rank(hidden_size: int) -> int:
    """`R` where nobody asks for another: a quarter of the paper's (256 for a width of 4096, 128 for
    2048), and no less than 16. Scoring costs in proportion to it.

    With the KL as its objective, a quarter of the rank has more recall than the squared error has
    with all of it (held out, 200 steps, from the same start): .650 at rank 4 against .623 at 16 on
    pocket (covariance start), .397 at 9 against .368 at 36 on six layers of SmolLM2-135M (SVD
    start). More rank may still help there (KL at 36: .478); on pocket it adds little (64: .673).
    """
    return max(16, hidden_size // 64)


def fold(
    u_q: Tensor,
    v_q: Tensor,
    u_k: Tensor,
    v_k: Tensor,
    b_q: Tensor | None,
    norm_weight: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Fold fitted matrices into `(query [R, D], key [R, D], query_bias [R] or None)`.

    `W_Q ~ u_q @ v_q` with `u_q` `[H * head_dim, R]` and `v_q` `[R, D]` (as `nn.Linear` weights lie,
    so `y = W x`), and the same for the keys. The heads are one joint head of `H * head_dim`; with
    grouped-query attention the rows of `u_k` are those of the key projection repeated once per
    query head. `b_q` is `[H * head_dim]`; a key bias cancels in the softmax and is not asked for.

    The result is float32 and differentiable in `u` and `v`.
    """
    scale = head_dim**-0.5
    u_k = u_k.float()
    norm = norm_weight.float()
    query = (u_k.T @ u_q.float()) @ v_q.float() * norm * scale
    key = v_k.float() * norm
    bias = None if b_q is None else u_k.T @ b_q.float() * scale
    return query, key, bias


def _kernels_fit(projected: Tensor, bias: Tensor | None) -> bool:
    """Whether the Triton kernels can take the projections: on a GPU, and no gradient wanted."""
    if not (_HAS_TRITON and projected.device.type == _KERNEL_DEVICE):
        return False
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (projected, bias)
    ):
        return False
    from . import kernels

    return kernels.fit(projected)


def importance(
    hidden: Tensor,
    selector: LayerSelector,
    visual: Tensor,
    text: Tensor,
    causal: bool,
    padded: bool = True,
) -> Tensor:
    """`S(i) = S_V2V(i) * S_T2V(i)` of every visual token.

    With `A = softmax(q k^T)` over all real tokens, `S_V2V(i)` is the mean of `A[j, i]` over the
    visual rows `j` and `S_T2V(i)` the mean over the text rows. A sample without text tokens has
    no `S_T2V`: its importance is `S_V2V` alone.

    Args:
        hidden: `[B, T, D]`, the layer's input as it is (before its norm), any float dtype.
        selector: on the device and in the dtype of `hidden`.
        visual: bool `[B, T]`.
        text: bool `[B, T]`; a position in neither mask is padding, ignored as row and column.
        causal: let a row see only columns up to its own. The paper does not say which it means;
            the artifact records what its selectors were fitted for.
        padded: False promises that there is no padding, which saves looking for it.

    Returns:
        float32 `[B, T]`, -inf where not visual. Differentiable; never waits for the device.
    """
    _, tokens, width = hidden.shape
    both, bias = selector.both, selector.query_bias
    if both is None:
        both = torch.cat([selector.query, selector.key])
    norm, projected = _norm(hidden), functional.linear(hidden, both)
    if _kernels_fit(projected, bias):
        from . import kernels

        score = kernels.operator if torch.compiler.is_compiling() else kernels.importance
        return score(projected, norm[..., 0], bias, visual, text, causal, width, selector.eps)

    scale = torch.rsqrt(norm.square() / width + selector.eps)
    query, key = (projected * scale).chunk(2, dim=-1)
    if bias is not None:
        query = query + bias
    key = key.transpose(1, 2)

    # [B, 2, T]: how much each row counts in the mean over visual, and over text rows.
    rows = torch.stack([visual, text], dim=1).float()
    counts = rows.sum(dim=-1, keepdim=True)
    rows = rows / counts.clamp(min=1)
    padding = ~(visual | text)[:, None, :] if padded else None
    size = min(ROW_BLOCK, CPU_ROW_BLOCK) if hidden.device.type == "cpu" else ROW_BLOCK
    later = torch.ones(size, size, dtype=torch.bool, device=hidden.device).triu(1)
    # Not -inf: a padding row may have no column at all, and its nan would spoil the means.
    lowest = torch.finfo(torch.float32).min

    means = torch.zeros_like(rows)
    start = 0
    # Not a range: torch.compile would make a constant of the number of tokens.
    while start < tokens:
        end = min(start + size, tokens)
        # Nothing behind the block's last row is seen from it: half of the work is not done at all.
        seen = end if causal else tokens
        # float() is for autocast, which would make them half precision.
        logits = (query[:, start:end] @ key[:, :, :seen]).float()
        if padding is not None:
            logits = logits.masked_fill_(padding[..., :seen], lowest)
        if causal:
            logits[:, :, start:].masked_fill_(later[: end - start, : end - start], lowest)
        means[:, :, :seen] += rows[:, :, start:end] @ logits.softmax(dim=-1)
        start = end

    from_visual, from_text = means.unbind(dim=1)
    from_text = torch.where(counts[:, 1] > 0, from_text, 1.0)
    return (from_visual * from_text).masked_fill(~visual, -torch.inf)


def _norm(hidden: Tensor) -> Tensor:
    """The length `[B, T, 1]` of every row of `hidden` `[B, T, D]`, at least float32."""
    batch, _, width = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    norm = partial(torch.linalg.vector_norm, dim=-1, keepdim=True, dtype=wide)
    # A GPU's kernel has a float32 accumulator; a CPU's is given a float32 copy, so it gets small
    # parts. Not in a compiled graph, which would have their number for a constant.
    if hidden.device.type != "cpu" or torch.compiler.is_compiling():
        return norm(hidden)
    size = max(1, CPU_COPIED // (batch * width))
    return torch.cat([norm(part) for part in hidden.split(size, dim=1)], dim=1)
