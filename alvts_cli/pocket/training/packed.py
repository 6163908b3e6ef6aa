"""Many questions about one picture in one forward pass, none of which sees another.

A training sequence is a shared prefix (`<s> user: <image>...`) and `Q` segments (a question and its
answer). Every segment attends to the prefix and to itself, and its positions continue the prefix's,
so each question is seen exactly as in a prompt of its own while the picture is encoded once. Plain
matrix products are used, which need no mask of the whole sequence.
"""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import AttentionInterface, LlavaForConditionalGeneration

from ..words import VOCABULARY

NAME = "pocket_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    segments: tuple[int, int, int],
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of shape [B, H, P + Q*S, d] with `segments` = (P, Q, S); see the module's text."""
    prefix, count, length = segments
    query = query * scaling
    q_pre, q_seg = query[:, :, :prefix], query[:, :, prefix:]
    k_pre, k_seg = key[:, :, :prefix], key[:, :, prefix:].unflatten(2, (count, length))
    v_pre, v_seg = value[:, :, :prefix], value[:, :, prefix:].unflatten(2, (count, length))
    weights = (q_pre @ k_pre.mT + _causal(prefix, query)).softmax(-1).to(value.dtype)
    out_pre = weights @ v_pre
    to_prefix = (q_seg @ k_pre.mT).unflatten(2, (count, length))
    to_self = q_seg.unflatten(2, (count, length)) @ k_seg.mT + _causal(length, query)
    weights = torch.cat([to_prefix, to_self], -1).softmax(-1).to(value.dtype)
    out_seg = weights[..., :prefix].flatten(2, 3) @ v_pre
    out_seg = out_seg + (weights[..., prefix:] @ v_seg).flatten(2, 3)
    return torch.cat([out_pre, out_seg], 2).transpose(1, 2).contiguous(), None


def _causal(size: int, like: Tensor) -> Tensor:
    return torch.full((size, size), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


AttentionInterface.register(NAME, packed_attention)


def packed_logits(
    model: LlavaForConditionalGeneration,
    visual: Tensor,
    where: Tensor,
    text: Tensor,
    taps: Collection[int],
) -> tuple[Tensor, list[Tensor]]:
    """Next-token logits of every segment token, and what the tokens hold halfway.

    Args:
        visual: projected visual tokens [B, K, D], all 256 or some of them.
        where: int64 [B, K], each visual token's place among the 256, ascending.
        text: int64 [B, Q, S] segments, padded on the right with any token.
        taps: numbers of layers after which to look at the hidden states.

    Returns:
        Logits [B, Q, S, V], and hidden states [B, Q, S, D] after each of `taps`.
    """
    language = model.model.language_model
    language.config._attn_implementation = NAME
    config = model.config
    visual_count = config.image_seq_length
    batch, count, length = text.shape
    head = text.new_tensor([language.config.bos_token_id, VOCABULARY.index("user:")]).expand(
        batch, 2
    )
    words = language.embed_tokens(torch.cat([head, text.flatten(1)], 1))
    hidden = torch.cat([words[:, :2], visual.to(words.dtype), words[:, 2:]], 1)
    after = torch.arange(length, device=text.device) + 2 + visual_count
    position = torch.cat(
        [
            torch.arange(2, device=text.device).expand(batch, 2),
            where + 2,
            after.repeat(count).expand(batch, -1),
        ],
        1,
    )
    rotary = language.rotary_emb(hidden, position_ids=position)
    segments = (2 + visual.shape[1], count, length)
    tapped = []
    for number, layer in enumerate(language.layers, start=1):
        hidden = layer(hidden, position_embeddings=rotary, segments=segments)
        if number in taps:
            tapped.append(hidden[:, segments[0] :].unflatten(1, (count, length)))
    hidden = language.norm(hidden[:, segments[0] :])
    return model.lm_head(hidden).unflatten(1, (count, length)), tapped
