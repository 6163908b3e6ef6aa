"""LLaVA-1.5: CLIP, a projector, Llama (or Vicuna); 576 tokens for every image."""

from .base import Family

FAMILY = Family(name="LLaVA", model_types=("llava",), visual_token_ids=("image_token_id",))
