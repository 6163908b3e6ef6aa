"""A small model of pocket's kind, with pocket's processor and data, for calibration tests."""

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from alvts_cli.pocket.build import make_config, make_processor
from calibration import Settings, Source, read_data

torch.set_num_threads(1)

LAYERS = 3
WIDTH = 32
RANK = 8

__all__ = ["LAYERS", "RANK", "WIDTH", "fast", "make_processor", "make_small", "scenes"]


def make_small(seed: int = 0) -> Any:
    """A Llava of 3 thin layers whose attention is far from uniform; float32, eval mode."""
    torch.manual_seed(seed)
    config = make_config()
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.hidden_size, text.intermediate_size = LAYERS, WIDTH, 48
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 4, 2, 8
    vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size = 1, 16, 16
    vision.num_attention_heads = 2
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and weight.dim() == 2:
                weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
    return model.eval()


def scenes(count: int = 12, seed: int = 0) -> Any:
    """A reader of shipped scenes."""
    return read_data(Source("pocket"), count, seed)


def fast(**more: Any) -> Settings:
    """Few steps and few trials."""
    few = {"rank": RANK, "steps": 10, "batch": 4, "policy_samples": 2, "answer_tokens": 4}
    return Settings(**{**few, **more})
