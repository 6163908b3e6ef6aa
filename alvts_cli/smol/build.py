"""The model and its processor, of stock transformers classes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ..pocket import WEIGHTS
from ..pocket.build import VISUAL_TOKENS, make_processor
from ..pocket.build import make_config as make_pocket_config
from . import IMAGE

PROMPT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's chat template without its standing system turn, images in front of the words."""

WORDS, END = 49152, 2
"""SmolLM2's vocabulary, after which the image token comes, and its token `<|im_end|>`."""

LORA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections of a layer that the adapter changes."""

LORA_SCALE = 2.0
"""`W + LORA_SCALE * b @ a`."""


def make_config() -> LlavaConfig:
    """SmolLM2-135M's decoder with one more token, behind pocket's vision tower."""
    text = LlamaConfig(
        vocab_size=WORDS + 1,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=END,
    )
    return LlavaConfig(
        vision_config=make_pocket_config().vision_config,
        text_config=text,
        image_token_index=WORDS,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )


def make_model(gguf: Path) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Language model and vision tower put together, float32, with an untrained projector.

    Args:
        gguf: SmolLM2-135M-Instruct as a GGUF file.

    Raises:
        ImportError: `gguf` or `accelerate`, which read such a file, are not installed.
    """
    folder, name = str(gguf.parent), gguf.name
    auto: Any = AutoModelForCausalLM
    language = auto.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.image_token = IMAGE
    pocket: Any = LlavaForConditionalGeneration.from_pretrained(WEIGHTS, dtype=torch.float32)
    config = make_config()
    model = LlavaForConditionalGeneration(config)
    words = language.state_dict()
    # No layer ever reads the row of the added token: its places are filled with the image.
    embedded = words.pop("model.embed_tokens.weight")
    words = {
        name.removeprefix("model."): value for name, value in words.items() if "lm_head" not in name
    }
    words["embed_tokens.weight"] = torch.cat([embedded, embedded.mean(0, keepdim=True)])
    model.model.language_model.load_state_dict(words)
    model.model.vision_tower.load_state_dict(pocket.model.vision_tower.state_dict())
    model.tie_weights()
    processor = LlavaProcessor(
        image_processor=make_processor().image_processor,
        tokenizer=tokenizer,
        patch_size=pocket.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=PROMPT,
    )
    model.generation_config.eos_token_id = END
    model.generation_config.pad_token_id = END
    return model.eval(), processor


@torch.no_grad()
def merge_adapter(model: LlavaForConditionalGeneration, adapter: dict[str, Tensor]) -> None:
    """Put the projector of `adapter` in place, and add its LoRA to the weights.

    Args:
        model: of `make_model`.
        adapter: `proj.*` as the projector's own names have it, and `lora.{layer}.{module}.a`
            `[r, in]` and `.b` `[out, r]`.
    """
    load_projector(model, adapter)
    for number, layer in enumerate(model.model.language_model.layers):
        for module in LORA:
            holder: Any = layer.self_attn if hasattr(layer.self_attn, module) else layer.mlp
            a, b = (adapter[f"lora.{number}.{module}.{half}"] for half in "ab")
            getattr(holder, module).weight += LORA_SCALE * b @ a


def load_projector(model: LlavaForConditionalGeneration, adapter: dict[str, Tensor]) -> None:
    """Put the projector of `adapter` in place."""
    projector = {k.removeprefix("proj."): v for k, v in adapter.items() if k.startswith("proj.")}
    model.model.multi_modal_projector.load_state_dict(projector)
