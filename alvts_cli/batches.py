"""Prepared prompts put together into one batch, whatever the family."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .prompts import padding_token

# What has one number per token of the prompt; everything else is about pictures.
TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


def collate(samples: Sequence[Any], pad_id: int) -> dict[str, Tensor]:
    """What the processor made of single prompts, as one batch, padded on the left.

    Args:
        samples: each a batch of one.
        pad_id: token to fill with.
    """
    longest = max(sample["input_ids"].shape[1] for sample in samples)
    batch = {}
    for name in samples[0]:
        parts = [sample[name] for sample in samples]
        if name in TOKENS:
            fill = pad_id if name == "input_ids" else 0
            parts = [pad(part, (longest - part.shape[1], 0), value=fill) for part in parts]
        elif parts[0].dim() == 5:
            # LLaVA-NeXT's tiles: pictures have different numbers of them.
            most = max(part.shape[1] for part in parts)
            parts = [pad(part, (0, 0) * 3 + (0, most - part.shape[1])) for part in parts]
        batch[name] = torch.cat(parts)
    return batch


def ended(tokens: list[int], end: int | list[int] | None) -> list[int]:
    """An answer without what fills the batch behind its end token."""
    ends = set(end) if isinstance(end, list) else {end}
    length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length]


def end_token(model: Any, tokenizer: Any) -> int:
    """What to fill with: the tokenizer's padding token, or else the model's."""
    if tokenizer.pad_token_id is not None:
        return int(tokenizer.pad_token_id)
    return padding_token(model)
