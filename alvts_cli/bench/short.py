"""The short prefill: what is left to do when selection costs nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..families import family_of


@contextmanager
def shortened(model: Any, tokens: int) -> Iterator[None]:
    """Let the decoder of `model` run on the first `tokens` tokens of a prompt only.

    They are what its layers would get: text and visual tokens together, behind the embedding. It
    fills a cache of that size, with the attention kernel and in the dtype of the model. Which
    tokens these are matters to the answer alone, and the answer means nothing; a generation must
    end with its first token, for the cache no longer fits the prompt.
    """

    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        short = {
            name: kwargs[name][..., :tokens]
            for name in ("attention_mask", "position_ids", "cache_position")
            if isinstance(kwargs.get(name), Tensor)
        }
        embeds = kwargs["inputs_embeds"][:, :tokens].contiguous()
        marked = kwargs.get("visual_pos_masks")
        if marked is not None:
            # Qwen3-VL adds features to its visual tokens behind early layers.
            first = torch.arange(marked.shape[1], device=marked.device) < tokens
            within = first.expand_as(marked)[marked]
            added = [features[within] for features in kwargs["deepstack_visual_embeds"]]
            short |= {
                "visual_pos_masks": marked[:, :tokens],
                "deepstack_visual_embeds": added,
            }
        return args, {**kwargs, **short, "inputs_embeds": embeds}

    text_model: Any = family_of(model).text_model(model)
    handle = text_model.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
