"""LLaVA-NeXT (1.6): CLIP over tiles of the image, Llama, Mistral or Qwen2; up to 2,880 tokens."""

from .base import Family

FAMILY = Family(
    name="LLaVA-NeXT", model_types=("llava_next",), visual_token_ids=("image_token_id",)
)
