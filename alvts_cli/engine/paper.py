"""The selector as the paper has it: low-rank queries and keys in one joint head, for all rows.

With the layer's input RMSNorm `n(x) = s(x) * x * w`, `s(x) = rsqrt(mean(x^2) + eps)`, and the
low-rank projections `y_q = U_Q V_Q n(x) + b_q`, `y_k = U_K V_K n(x) + b_k`, a logit is

    y_q(i) . y_k(j) / sqrt(d_k)
        = (U_K^T U_Q V_Q n(x_i) + U_K^T b_q) . (V_K n(x_j)) / sqrt(d_k)  +  y_q(i) . b_k / sqrt(d_k)

The last term is the same for all `j`, so the softmax over `j` cancels it. What is left needs two
`R x D` matrices: `w` and the scale fold into them, and `s(x)` is one number per token. There are no
rotary positions. It keeps fewer answers than the form of `scoring`, and is here to be compared.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .normed import Normed
from .scene import Scene

# Rows of the attention held at once: bounds memory to B * ROWS * T floats.
_ROWS = 1024
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class PaperSelector:
    """The fitted selector of one layer, folded.

    Attributes:
        query: `[R, D]`, with the `R x R` core, the norm weight and `1 / sqrt(d_k)` folded in.
        key: `[R, D]`, with the norm weight folded in.
        query_bias: `[R]` or None, with `1 / sqrt(d_k)` folded in.
        eps: of the layer's input RMSNorm.
    """

    query: Tensor
    key: Tensor
    query_bias: Tensor | None
    eps: float

    @property
    def rank(self) -> int:
        """`R`."""
        return self.key.shape[0]

    @property
    def width(self) -> int:
        """`D`."""
        return self.key.shape[1]

    def to(self, device: torch.device, dtype: torch.dtype) -> "PaperSelector":
        """A copy for a layer's device and dtype. The small bias stays in float32."""
        bias = self.query_bias
        return replace(
            self,
            query=self.query.to(device, dtype),
            key=self.key.to(device, dtype),
            query_bias=None if bias is None else bias.to(device, torch.float32),
        )

    def tensors(self) -> dict[str, Tensor]:
        """By name; without the bias where there is none."""
        named = {"query": self.query, "key": self.key}
        return named if self.query_bias is None else {**named, "query_bias": self.query_bias}


def paper_importance(
    hidden: Tensor, selector: PaperSelector, visual: Tensor, text: Tensor, padded: bool
) -> Tensor:
    """`S(i) = S_V2V(i) * S_T2V(i)` of every visual token, by the paper's formulas.

    With `A = softmax(q k^T)`, causal, over all real tokens: `S_V2V(i)` is the mean of `A[j, i]`
    over the visual rows `j` and `S_T2V(i)` the mean over the text rows. A sample without text is
    ranked by `S_V2V` alone.

    Args:
        hidden: `[B, T, D]`, the layer's input as it is (before its norm), any float dtype.
        selector: on the device and in the dtype of `hidden`.
        visual, text: bool `[B, T]`; a position in neither is padding.
        padded: whether there is padding.

    Returns:
        float32 `[B, T]`, -inf where not visual. Differentiable; never waits for the device.
    """
    tokens = hidden.shape[1]
    both = Normed(hidden).times(torch.cat([selector.query, selector.key]), selector.eps)
    query, key = both.chunk(2, dim=-1)
    if selector.query_bias is not None:
        query = query + selector.query_bias
    # How much each row counts in the mean over visual, and over text rows: [B, 2, T].
    rows = torch.stack([visual, text], dim=1).float()
    rows = rows / rows.sum(dim=-1, keepdim=True).clamp(min=1)
    order = torch.arange(tokens, device=hidden.device)
    # Not -inf: a padding row may have no column at all, and its nan would spoil the means.
    lowest = torch.finfo(torch.float32).min
    means = torch.zeros_like(rows)
    start = 0
    # Not a range: torch.compile would make a constant of the number of tokens.
    while start < tokens:
        part = slice(start, start + _ROWS)
        unseen = order[part, None] < order
        if padded:
            unseen = unseen | ~(visual | text)[:, None, :]
        # float() is for autocast, which would make them half precision.
        logits = (query[:, part] @ key.transpose(1, 2)).float().masked_fill(unseen, lowest)
        means = means + rows[:, :, part] @ logits.softmax(dim=-1)
        start += _ROWS
    from_visual, from_text = means.unbind(dim=1)
    from_text = torch.where(text.any(dim=1, keepdim=True), from_text, 1.0)
    return (from_visual * from_text).masked_fill(~visual, -torch.inf)


def paper_means(normed: Normed, selector: PaperSelector, scene: Scene) -> tuple[Tensor, Tensor]:
    """The factors of `paper_importance` in few launches: float32 `[B, T]` each, of all columns. In
    a sample without text the second one ranks as the first.

    Args:
        normed: the layer's input.
        selector: of the layer.
        scene: what is the same in every layer.
    """
    query, key = (normed.times(down, selector.eps) for down in (selector.query, selector.key))
    if selector.query_bias is not None:
        query = (query + selector.query_bias).to(key.dtype)
    # One row of weights for the visual, one for the text tokens.
    weights, added = scene.row_weights(), scene.causal(key.dtype)
    means: Tensor | None = None
    for start in range(0, query.shape[1], _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        logits = torch.baddbmm(added[:, part], query[:, part], key.transpose(1, 2))
        some = weights[:, :, part] @ logits.softmax(dim=-1, dtype=torch.float32)
        means = some if means is None else means + some
    assert means is not None
    from_visual, from_text = means.unbind(dim=1)
    return from_visual, from_text
