"""The untrained model and its processor, made of stock transformers classes."""

import math
from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from .scenes import CANVAS, PATCH
from .words import BOS, EOS, IMAGE, PAD, VOCABULARY, make_tokenizer

VISUAL_TOKENS = (CANVAS // PATCH) ** 2


def make_config() -> LlavaConfig:
    """16 thin decoder layers over 256 visual tokens; about 7 million weights in all.

    Few wide heads: on a CPU the softmax over `heads x T x T` is what training time goes to.
    """
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=CANVAS,
        patch_size=PATCH,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=16,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=VOCABULARY.index(BOS),
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY.index(IMAGE),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def make_model(seed: int) -> LlavaForConditionalGeneration:
    """An untrained model in float32, the same for the same `seed`.

    Word embeddings have unit expected norm, and every branch ends in zeros: at the start each layer
    is the identity, so what a patch says in words reaches the output untouched.
    """
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(make_config())
    text = model.model.language_model
    with torch.no_grad():
        width = text.config.hidden_size
        torch.nn.init.normal_(text.embed_tokens.weight, std=1 / math.sqrt(width))
        for layer in text.layers:
            for name, weight in layer.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    torch.nn.init.zeros_(weight)
                elif weight.ndim == 2:
                    torch.nn.init.normal_(weight, std=0.8 / math.sqrt(weight.shape[1]))
    model.tie_weights()
    return model


def make_processor() -> LlavaProcessor:
    """Resize to 192 x 192, map to [-1, 1], one `<image>` becomes 256 placeholders."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"height": CANVAS, "width": CANVAS},
            do_center_crop=False,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        tokenizer=make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
    )


def save_model(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model (bfloat16) and processor to `folder`, as `from_pretrained` reads them."""
    model.model.language_model.config._attn_implementation = "sdpa"
    model.bfloat16().save_pretrained(folder)
    make_processor().save_pretrained(folder)
