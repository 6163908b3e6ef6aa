"""The architectures that alvts knows, and those of which it knows why they cannot run.

A row says where the decoder is, which ids are visual, and what mask the decoder's layers have. What
the layers themselves are is read off them (`layer`), for text models vary within a row.
"""

from .base import CAUSAL, Family
from .glm import Glm
from .llava_next import LlavaNext

IMAGE = ("image_token_id",)
BOTH = ("image_token_id", "video_token_id")

FAMILIES: tuple[Family, ...] = (
    # CLIP, a projector and any of Llama, Vicuna, Qwen2, Qwen3: 576 tokens for every image.
    Family("LLaVA", ("llava",), IMAGE, CAUSAL),
    # CLIP over tiles of the image: up to 2,880 tokens.
    LlavaNext("LLaVA-NeXT", ("llava_next",), IMAGE, CAUSAL),
    LlavaNext("LLaVA-NeXT-Video", ("llava_next_video",), BOTH, CAUSAL),
    # A token behind each video.
    LlavaNext("LLaVA-OneVision", ("llava_onevision",), BOTH, CAUSAL, around_frames=(0, 1)),
    Family("VipLLaVA", ("vipllava",), IMAGE, CAUSAL),
    Family("Video-LLaVA", ("video_llava",), BOTH, CAUSAL, around_frames=(1, 0)),
    # Images and videos of any size, 3-D positions.
    Family("Qwen2-VL", ("qwen2_vl",), BOTH, CAUSAL),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), BOTH, CAUSAL),
    # Features of the vision tower's middle layers are added to the visual tokens behind the first
    # decoder layers: to all of them, whichever a layer ran on.
    Family("Qwen3-VL", ("qwen3_vl", "qwen3_vl_moe"), BOTH, CAUSAL),
    # Qwen2 in InternVL3, Qwen3 in 3.5.
    Family("InternVL", ("internvl",), IMAGE, CAUSAL),
    Family("Idefics3", ("idefics3",), IMAGE, CAUSAL, decoder="text_model"),
    Family("SmolVLM", ("smolvlm",), IMAGE, CAUSAL, decoder="text_model"),
    # Mistral, or Ministral 3, which scales its queries by their positions.
    Family("Mistral 3", ("mistral3",), IMAGE, CAUSAL),
    Family("Ovis2", ("ovis2",), IMAGE, CAUSAL),
    Family("FastVLM", ("fast_vlm",), IMAGE, CAUSAL),
    Family("PerceptionLM", ("perception_lm",), BOTH, CAUSAL),
    Family("PaddleOCR-VL", ("paddleocr_vl",), IMAGE, CAUSAL),
    # Adds features in front of some layers, as Qwen3-VL does behind them.
    LlavaNext("Granite 4 Vision", ("granite4_vision",), IMAGE, CAUSAL),
    # Frames of a video carry the image's id, each with its time behind it.
    Glm("GLM-V", ("glm4v", "glm4v_moe", "glm46v"), IMAGE, CAUSAL),
    Glm("GLM-OCR", ("glm_ocr",), IMAGE, CAUSAL),
    Family("Gemma 3", ("gemma3",), IMAGE, "the tokens of an image see each other"),
    Family("PaliGemma", ("paligemma",), IMAGE, "the image and the question see each other"),
    Family("Molmo 2", ("molmo2",), IMAGE, "all image tokens see each other"),
)

_LINEAR = "most of its layers have no attention in which tokens could be skipped"

REFUSED = {
    "ernie4_5_vl_moe": "its layers are told of every token whether it is visual, and alvts would "
    "have to select that too",
    "qwen3_5": _LINEAR,
    "qwen3_5_moe": _LINEAR,
    "lfm2_vl": _LINEAR,
    "gemma4": "the tokens of an image see each other, and some layers share keys",
    "gemma3n": "its layers have hidden states of another shape",
    "kimi_k25": "its attention has no keys for every head",
    "mllama": "its image is seen by cross-attention and stands in no sequence",
}
"""Why other architectures cannot run, by their `model_type`."""
