"""Arithmetic and memory, by formula and as measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .policy import PAPER, Policy
from .sizes import ROWS


@dataclass(frozen=True)
class PrefillFlops:
    """Floating-point operations of one prefill of one sample; a multiply-add counts as two.

    Attributes:
        layers: of the decoder layers.
        scoring: of the selectors.
    """

    layers: int
    scoring: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.layers + self.scoring


@dataclass(frozen=True)
class Selection:
    """What choosing tokens costs, beside the layers.

    Attributes:
        rank: `R` of the selectors; 0 when nothing is scored.
        policy: how often they score, and what else happens.
        carry_rank: of the carried updates.
        paper: whether the selectors are of the paper's form (see `paper`).
    """

    rank: int = 0
    policy: Policy = PAPER
    carry_rank: int = 0
    paper: bool = False


def prefill_flops(
    text_config: Any,
    tokens_per_layer: Sequence[int],
    selection: Selection,
    total_tokens: int,
    text_tokens: int = 0,
) -> PrefillFlops:
    """Analytic FLOPs of the decoder layers and of the scoring.

    A layer that runs on `t` tokens, with hidden size `D`, MLP size `I`, `H` query heads and `G`
    key-value heads of size `d`:

        projections  2 t D (H d)  for q,  2 t D (G d)  each for k and v,  2 t (H d) D  for o
        attention    2 d H  for Q K^T and the same for A V, per pair of a row and a column it may
                     see: t (t + 1) / 2 pairs, as the causal kernels compute them
        MLP          3 * 2 t D I  (gate, up, down); with `E` experts, of which a token goes through
                     `e` of size `I` (and through those that all share), 2 t D E for the choice and
                     e * 3 * 2 t D I

    A selector of rank `R` over all `T` tokens, in every layer that ranks them anew:

        keys     2 T D R to the latent,  2 T R (G d) to the heads
        text     2 m D (H d) for the queries,  2 m T (H d) for logits,  2 m T H for their mean

        compare  2 N^2 R between all `N` visual tokens where they are to differ,
                 2 T t R with those that the layer runs on where these carry a mass or are pooled
        pool     2 T t D for their means

    where a selector of the paper's form takes 4 T D R to queries and keys, and 2 R + 4 per pair of
    a row and a column it sees, for a logit and two means;

    and in every layer that runs on fewer than `T`, with carried updates of rank `C`, 4 T D C;
    with `m` text tokens that ask, `M` but at most `ROWS`; those in front of the image, which ask
    nothing, are counted as if they did. Norms, softmax, rotary and activation functions, the vision
    tower and the output head are not counted.

    Args:
        text_config: of the decoder.
        tokens_per_layer: text and kept visual tokens of every layer.
        selection: what choosing them takes.
        total_tokens: `T`.
        text_tokens: `M`. A layer that runs on no more than these keeps no visual token, and is
            not scored.
    """
    width = text_config.hidden_size
    heads, kv_heads = text_config.num_attention_heads, text_config.num_key_value_heads
    head_dim = head_size(text_config)
    layers = scoring = 0
    rank, policy = selection.rank, selection.policy
    ranked: int | None = None
    for i, tokens in enumerate(tokens_per_layer):
        projections = 2 * tokens * width * head_dim * (2 * heads + 2 * kv_heads)
        attention = 4 * head_dim * heads * tokens * (tokens + 1) // 2
        layers += projections + attention + tokens * _mlp_flops(text_config, i)
        if policy.carry and tokens < total_tokens:
            scoring += 4 * total_tokens * width * selection.carry_rank
        due = ranked is None or (policy.every > 0 and i - ranked >= policy.every)
        if rank and due and text_tokens < tokens < total_tokens:
            ranked = i
            if selection.paper:
                scoring += 4 * total_tokens * width * rank
                scoring += (2 * rank + 4) * total_tokens * (total_tokens + 1) // 2
                continue
            scoring += 2 * total_tokens * rank * (width + kv_heads * head_dim)
            rows = min(text_tokens, ROWS)
            scoring += 2 * rows * width * heads * head_dim
            scoring += 2 * rows * total_tokens * heads * (head_dim + 1)
            if policy.quality is not None:
                scoring += 2 * (total_tokens - text_tokens) ** 2 * rank
            if policy.mass or policy.pool:
                scoring += 2 * total_tokens * tokens * rank
            if policy.pool:
                scoring += 2 * total_tokens * tokens * width
    return PrefillFlops(layers, scoring)


@dataclass(frozen=True)
class Mlp:
    """The MLP of a layer.

    Attributes:
        size: numbers inside it or, where there are several, inside each expert.
        experts: how many there are.
        chosen: how many a token goes through.
        shared: how many more there are that every token goes through.
    """

    size: int
    experts: int = 1
    chosen: int = 1
    shared: int = 0


def mlp_of(text_config: Any, layer: int) -> Mlp:
    """That of one layer of a decoder."""
    # By Qwen's names, and by GLM's.
    experts = getattr(text_config, "num_experts", None)
    experts = experts or getattr(text_config, "n_routed_experts", None)
    step = getattr(text_config, "decoder_sparse_step", 1)
    plain = layer in (getattr(text_config, "mlp_only_layers", None) or ())
    plain = plain or layer < getattr(text_config, "first_k_dense_replace", 0)
    if not experts or plain or (layer + 1) % step:
        return Mlp(text_config.intermediate_size)
    return Mlp(
        text_config.moe_intermediate_size,
        experts,
        text_config.num_experts_per_tok,
        getattr(text_config, "n_shared_experts", 0),
    )


def _mlp_flops(text_config: Any, layer: int) -> int:
    """Of one token in a layer's MLP, the choice of its experts included."""
    width, mlp = text_config.hidden_size, mlp_of(text_config, layer)
    choice = 2 * width * mlp.experts if mlp.experts > 1 else 0
    return int(6 * width * mlp.size * (mlp.chosen + mlp.shared) + choice)


def kv_bytes(cache: Any) -> int:
    """Bytes of the key and value tensors a dynamic cache holds now."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        if isinstance(tensor, Tensor)
    )


def kv_bytes_expected(
    text_config: Any, tokens_per_layer: Sequence[int], bytes_per_value: int, batch: int = 1
) -> int:
    """Analytic `kv_bytes`: `sum over layers of 2 B t G d` values.

    `t` is the number of slots of a layer: in a batch, those of its longest sample.
    """
    per_token = 2 * text_config.num_key_value_heads * head_size(text_config) * bytes_per_value
    return batch * per_token * sum(tokens_per_layer)


def head_size(text_config: Any) -> int:
    """Size of a head; configs give it or leave it to `hidden_size / heads`."""
    explicit = getattr(text_config, "head_dim", None)
    return explicit or text_config.hidden_size // text_config.num_attention_heads
