"""One description of a decoder layer, read off the layer itself.

Architecture and text model vary apart (a LLaVA may have Llama, Qwen2 or Qwen3 behind it), so what
a layer does in front of its attention kernel is not told by any list of names: `parts_of` looks.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AlvtsError
from .placing import stored, where
from .rotary import Rotary, rotary_of


@dataclass(frozen=True)
class Parts:
    """What stands between a decoder layer's input and its attention kernel.

    Attributes:
        norm: the RMSNorm of the input.
        query, key: the projections.
        query_norm, key_norm: the RMSNorm of each head in front of the rotary positions, or None.
        head_dim: size of a head.
        rotary: how the rotary positions turn a head; a guess until `engine/probe.py` has looked.
    """

    norm: Any
    query: Any
    key: Any
    query_norm: Any
    key_norm: Any
    head_dim: int
    rotary: Rotary


@dataclass(frozen=True)
class QueryKey:
    """The numbers in a layer's query and key projections and in the norms before and behind them.

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


def parts_of(layer: Any) -> Parts:
    """The parts of one decoder layer.

    Raises:
        AlvtsError: it has others than alvts knows.
    """
    attention = getattr(layer, "self_attn", None)
    for part, names in (
        (layer, ("self_attn", "input_layernorm")),
        (attention, ("q_proj", "k_proj", "head_dim", "scaling")),
    ):
        for name in names:
            if not hasattr(part, name):
                raise AlvtsError(
                    f"alvts cannot select in a {type(layer).__name__}: it has no {name}; "
                    "run without alvts"
                )
    assert attention is not None
    return Parts(
        layer.input_layernorm,
        attention.q_proj,
        attention.k_proj,
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
        attention.head_dim,
        rotary_of(attention),
    )


def describe(layer: Any) -> QueryKey:
    """The projections and norms of one decoder layer.

    Raises:
        AlvtsError: it has other parts than alvts knows, or is quantised in a way that is not known.
    """
    parts = parts_of(layer)
    w_q, w_k = matrix_of(parts.query), matrix_of(parts.key)
    eps, heads = norm_eps(parts.norm), (parts.query_norm, parts.key_norm)
    if any(head is not None and norm_eps(head) != eps for head in heads):
        raise AlvtsError(
            f"alvts cannot select in a {type(layer).__name__}: its norms differ in epsilon"
        )
    q_norm, k_norm = (None if head is None else norm_weight(head) for head in heads)
    return QueryKey(
        w_q=w_q,
        b_q=stored(parts.query, "bias"),
        w_k=w_k,
        b_k=stored(parts.key, "bias"),
        num_heads=w_q.shape[0] // parts.head_dim,
        num_kv_heads=w_k.shape[0] // parts.head_dim,
        head_dim=parts.head_dim,
        norm_weight=norm_weight(parts.norm),
        norm_eps=eps,
        q_norm=q_norm,
        k_norm=k_norm,
    )


def is_quantised(projection: Any) -> bool:
    """Whether the weight of a projection is not a plain matrix of floats."""
    weight = getattr(projection, "weight", None)
    if weight is None or hasattr(weight, "tensor_data_names"):
        return True
    return weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@torch.no_grad()
def matrix_of(projection: Any) -> Tensor:
    """The weight of a projection, `[out, in]`; of a quantised one, what its library makes of it.

    Raises:
        AlvtsError: it is quantised in a way that is not known.
    """
    if not is_quantised(projection):
        plain: Tensor = stored(projection)
        return plain
    weight: Any = getattr(projection, "weight", None)
    # On a CPU, bitsandbytes packs its 4 bits anew at the first forward, and the library's own
    # functions then read nonsense.
    if type(weight).__name__ == "Params4bit":
        return _by_unit_vectors(projection, torch.float32)
    if type(weight).__name__ == "Int8Params":
        return _by_unit_vectors(projection, torch.float16)
    # torchao's tensors; one of torch itself has a method of that name, too, which fails.
    if hasattr(weight, "tensor_data_names"):
        try:
            whole: Tensor = weight.dequantize()
            return whole
        except NotImplementedError:
            # Packed for a kernel.
            return _by_unit_vectors(projection, weight.dtype)
    raise AlvtsError(
        f"the query and key projections are quantised ({type(projection).__name__}) and cannot be "
        "read; load the model in bfloat16, float16 or float32 (of compressed-tensors with "
        "CompressedTensorsConfig(dequantize=True)), or quantise it with bitsandbytes or torchao"
    )


def _by_unit_vectors(projection: Any, dtype: torch.dtype) -> Tensor:
    """The matrix `[out, in]` of a projection by what it does to every unit vector of `dtype`."""
    units = torch.eye(projection.in_features, device=where(projection)[0], dtype=dtype)
    made: Tensor = projection(units)
    bias = stored(projection, "bias")
    return (made if bias is None else made - bias.to(made)).T


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
    weight: Tensor = stored(norm).to(where(norm)[0])
    made = norm(torch.ones_like(weight)).float()
    for scale in (weight, 1 + weight):
        if torch.allclose(made, scale.detach().float(), rtol=1e-2, atol=1e-4):
            return scale
    raise AlvtsError(f"alvts does not know the norm {type(norm).__name__}: it is no RMSNorm")
