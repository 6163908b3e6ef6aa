"""One description of a decoder layer, read off the layer itself.

Architecture and text model vary apart (a LLaVA may have Llama, Qwen2 or Qwen3 behind it), so what
a layer does in front of its attention kernel is not told by any list of names: `describe` looks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AlvtsError


@dataclass(frozen=True)
class QueryKey:
    """A layer's query and key projections and the norms before and behind them.

    `w_q` is `[num_heads * head_dim, D]`, `w_k` is `[num_kv_heads * head_dim, D]` (not repeated),
    the biases are `[num_heads * head_dim]` / `[num_kv_heads * head_dim]` or None, and
    `norm_weight` is `[D]`, what the layer's input RMSNorm multiplies by. `q_norm` and `k_norm` are
    `[head_dim]`, the same of the RMSNorms of each query and key head in front of the rotary
    positions, or None. All norms share `norm_eps`. The tensors are the model's own: do not write to
    them.
    """

    w_q: Tensor
    b_q: Tensor | None
    w_k: Tensor
    b_k: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_weight: Tensor
    norm_eps: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


def describe(layer: Any) -> QueryKey:
    """The projections and norms of one decoder layer.

    Raises:
        AlvtsError: it has other parts than alvts knows, or its weights are quantised, so no matrix
            can be read from them.
    """
    attention, norm = getattr(layer, "self_attn", None), getattr(layer, "input_layernorm", None)
    for part, names in (
        (layer, ("self_attn", "input_layernorm")),
        (attention, ("q_proj", "k_proj", "head_dim", "scaling")),
    ):
        for name in names:
            if not hasattr(part, name):
                raise AlvtsError(
                    f"alvts cannot select in a {type(layer).__name__}: it has no {name}"
                )
    assert attention is not None
    for projection in (attention.q_proj, attention.k_proj):
        if not torch.is_floating_point(projection.weight):
            raise AlvtsError(
                "the query and key projections are quantised and cannot be read; "
                "load the model in bfloat16, float16 or float32"
            )
    eps = norm_eps(norm)
    heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    if any(head is not None and norm_eps(head) != eps for head in heads):
        raise AlvtsError(
            f"alvts cannot select in a {type(layer).__name__}: its norms differ in epsilon"
        )
    size = attention.head_dim
    return QueryKey(
        w_q=attention.q_proj.weight,
        b_q=attention.q_proj.bias,
        w_k=attention.k_proj.weight,
        b_k=attention.k_proj.bias,
        num_heads=attention.q_proj.weight.shape[0] // size,
        num_kv_heads=attention.k_proj.weight.shape[0] // size,
        head_dim=size,
        norm_weight=norm_weight(norm),
        norm_eps=eps,
        q_norm=None if heads[0] is None else norm_weight(heads[0]),
        k_norm=None if heads[1] is None else norm_weight(heads[1]),
    )


def norm_eps(norm: Any) -> float:
    """The epsilon of an RMSNorm.

    Raises:
        AlvtsError: it has none under a known name.
    """
    for name in ("variance_epsilon", "eps"):
        value = getattr(norm, name, None)
        if isinstance(value, float):
            return value
    raise AlvtsError(f"alvts does not know the norm {type(norm).__name__}: it has no epsilon")


@torch.no_grad()
def norm_weight(norm: Any) -> Tensor:
    """What an RMSNorm multiplies by, `[D]`: its weight or, as some families have it, 1 + weight.

    Found by giving it ones, of which the root mean square is 1.

    Raises:
        AlvtsError: it does something else.
    """
    weight: Tensor = norm.weight
    made = norm(torch.ones_like(weight)).float()
    for scale in (weight, 1 + weight):
        if torch.allclose(made, scale.detach().float(), rtol=1e-2, atol=1e-4):
            return scale
    raise AlvtsError(f"alvts does not know the norm {type(norm).__name__}: it is no RMSNorm")
