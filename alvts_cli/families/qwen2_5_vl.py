"""Qwen2.5-VL: images and videos of any size, biased grouped-query attention, 3-D positions."""

from .base import Family

FAMILY = Family(
    name="Qwen2.5-VL",
    model_types=("qwen2_5_vl",),
    visual_token_ids=("image_token_id", "video_token_id"),
)
