"""Qwen3-VL, dense and with experts: query and key norms, interleaved 3-D positions.

The vision tower's middle layers give features of their own, which the decoder adds to the visual
tokens behind its first layers: to all of them, whichever a layer ran on.
"""

from .base import Family

FAMILY = Family(
    name="Qwen3-VL",
    model_types=("qwen3_vl", "qwen3_vl_moe"),
    visual_token_ids=("image_token_id", "video_token_id"),
)
