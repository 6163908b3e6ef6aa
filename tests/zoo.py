"""Tiny random models of every family in the table, and prompts for them.

`tiny.py` has a few families with whole prompts (videos, batches, later turns); here is one builder
a family, each with its image and, where it has them, its video.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny import IMAGE, LAYERS, PAD, VIDEO, VISION_START, WIDTH, randomise

START = 93
"""Further ids that a family sets around images."""


def text_config(kind: str, **more: Any) -> dict[str, Any]:
    """The config of a text model."""
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    common = dict(
        model_type=kind,
        vocab_size=100,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=PAD,
        **heads,
    )
    special: dict[str, dict[str, Any]] = {
        "qwen3": dict(head_dim=8),
        "mistral": dict(sliding_window=None, head_dim=8),
        "hunyuan_v1_dense": dict(head_dim=8),
    }
    return common | special.get(kind, {}) | more


def _clip(**more: Any) -> dict[str, Any]:
    return (
        dict(
            model_type="clip_vision_model",
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        | more
    )


_SPECIAL: dict[str, Any] = dict(image_token_id=IMAGE, tie_word_embeddings=False)
_INDEX: dict[str, Any] = dict(image_token_index=IMAGE, tie_word_embeddings=False)
_VIDEOS: dict[str, Any] = dict(video_token_index=VIDEO)
_TILES = [[16, 32], [32, 16], [32, 32]]

_QWEN_VISION: dict[str, Any] = dict(
    depth=2,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    in_channels=3,
)
_QWEN_IDS: dict[str, Any] = dict(
    **_SPECIAL, video_token_id=VIDEO, vision_start_token_id=VISION_START
)


def _mrope(*sections: int) -> dict[str, Any]:
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=list(sections))


def llava_config(text: dict[str, Any]) -> Any:
    return transformers.LlavaConfig(vision_config=_clip(), text_config=text, **_INDEX)


def _internvl(text: dict[str, Any]) -> Any:
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=[32, 32],
        patch_size=[4, 4],
    )
    return transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_seq_length=16, **_SPECIAL
    )


def _idefics(config: Any) -> Any:
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    return config(
        vision_config=vision, text_config=text_config("llama"), scale_factor=2, **_SPECIAL
    )


def _mistral3(text: dict[str, Any]) -> Any:
    vision = dict(
        model_type="pixtral",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
    )
    return transformers.Mistral3Config(
        vision_config=vision, text_config=text, spatial_merge_size=2, **_INDEX
    )


def _ministral() -> dict[str, Any]:
    rope = dict(
        rope_type="default",
        rope_theta=10000.0,
        llama_4_scaling_beta=0.5,
        # Passed by a tiny prompt, so that the scale is at work.
        original_max_position_embeddings=8,
    )
    return text_config("ministral3", head_dim=8, sliding_window=None, rope_parameters=rope)


def _qwen3_vl(experts: bool) -> Any:
    more = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24) if experts else {}
    config = transformers.Qwen3VLMoeConfig if experts else transformers.Qwen3VLConfig
    kind = "qwen3_vl_moe_text" if experts else "qwen3_vl_text"
    vision = _QWEN_VISION | dict(
        num_position_embeddings=64, deepstack_visual_indexes=[0, 1], out_hidden_size=WIDTH
    )
    text = text_config(kind, head_dim=8, rope_parameters=_mrope(2, 1, 1), **more)
    return config(text_config=text, vision_config=vision, **_QWEN_IDS)


def _qwen2_5_vl() -> Any:
    vision = dict(window_size=16, fullatt_block_indexes=[1], out_hidden_size=WIDTH)
    return transformers.Qwen2_5_VLConfig(
        text_config=text_config("qwen2_5_vl_text", rope_parameters=_mrope(1, 1, 2)),
        vision_config=_QWEN_VISION | vision,
        **_QWEN_IDS,
    )


def _qwen2_vl() -> Any:
    vision = {k: v for k, v in _QWEN_VISION.items() if k != "intermediate_size"}
    return transformers.Qwen2VLConfig(
        text_config=text_config("qwen2_vl_text", rope_parameters=_mrope(1, 1, 2)),
        vision_config=vision | dict(embed_dim=16, hidden_size=WIDTH, mlp_ratio=2),
        **_QWEN_IDS,
    )


def _paddle() -> Any:
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        spatial_merge_size=2,
    )
    text = text_config("paddleocr_vl_text", head_dim=8, rope_parameters=_mrope(1, 1, 2))
    return transformers.PaddleOCRVLConfig(text_config=text, vision_config=vision, **_QWEN_IDS)


def _ovis2() -> Any:
    vision = dict(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        vocab_size=40,
        hidden_stride=2,
    )
    return transformers.Ovis2Config(
        vision_config=vision,
        text_config=text_config("qwen2"),
        visual_indicator_token_ids=[94, 95, 96, 97, 98],
        vocab_size=100,
        hidden_size=WIDTH,
        **_SPECIAL,
    )


def _granite() -> Any:
    former = dict(
        model_type="blip_2_qformer",
        num_hidden_layers=1,
        intermediate_size=24,
        cross_attention_frequency=1,
    )
    return transformers.Granite4VisionConfig(
        vision_config=_clip(hidden_size=64, image_size=32),
        text_config=text_config(
            "granite4_vision_text",
            logits_scaling=2.0,
            residual_multiplier=0.7,
            attention_multiplier=0.3,
            embedding_multiplier=1.5,
        ),
        qformer_config=former,
        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]],
        downsample_rate="2/4",
        deepstack_layer_map=[(-1, 0), (-2, 1)],
        spatial_target_layers=[0, 1, 2, 3],
        **_INDEX,
    )


def _glm(kind: str, turned: float = 0.5, **text: Any) -> Any:
    """GLM's vision tower in front of a decoder that turns a part of each head of 16 numbers."""
    name, inside = {
        "glm4v": ("Glm4vConfig", "glm4v_text"),
        "glm4v_moe": ("Glm4vMoeConfig", "glm4v_moe_text"),
        "glm46v": ("Glm46VConfig", "glm4v_text"),
        "glm_ocr": ("GlmOcrConfig", "glm_ocr_text"),
    }[kind]
    pairs = int(16 * turned) // 2
    rope = _mrope(pairs // 4, pairs // 4, pairs // 2) | dict(partial_rotary_factor=turned)
    vision = _QWEN_VISION | dict(image_size=32, out_hidden_size=WIDTH)
    return getattr(transformers, name)(
        text_config=text_config(inside, rope_parameters=rope, **text),
        vision_config=vision,
        **_SPECIAL,
        video_token_id=VIDEO,
        # By which old releases count images.
        image_start_token_id=VISION_START,
    )


# The size of a head follows from the width.
_WIDE: dict[str, Any] = dict(num_attention_heads=2, num_key_value_heads=1)
_GLM_EXPERTS: dict[str, Any] = dict(
    head_dim=16,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
)

Pixels = dict[str, torch.Tensor]


def _flat(count: int, side: int, random: Any) -> Pixels:
    return {"pixel_values": random(count, 3, side, side)}


def _of_sizes(count: int, side: int, random: Any) -> Pixels:
    return _flat(count, side, random) | {"image_sizes": torch.tensor([[side, side]] * count)}


def _in_one(count: int, side: int, random: Any) -> Pixels:
    return {"pixel_values": random(1, count, 3, side, side)}


def _tiled(count: int, side: int, random: Any) -> Pixels:
    """The whole image and two tiles of the grid."""
    return {
        "pixel_values": random(count, 3, 3, side, side),
        "image_sizes": torch.tensor([[side, 2 * side]] * count),
    }


def _patches(count: int, side: int, random: Any) -> Pixels:
    """Qwen's: 4 x 6 patches of two frames."""
    return {
        "pixel_values": random(count * 24, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * count),
    }


def _paddle_patches(count: int, side: int, random: Any) -> Pixels:
    return {
        "pixel_values": random(count * 24, 3, 4, 4),
        "image_grid_thw": torch.tensor([[1, 4, 6]] * count),
    }


def _qwen_video(random: Any) -> Pixels:
    """Two steps of 4 x 4 patches."""
    return {
        "pixel_values_videos": random(32, 3 * 2 * 4 * 4),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
    }


def _frames(random: Any) -> Pixels:
    return {"pixel_values_videos": random(1, 2, 3, 16, 16)}


@dataclass(frozen=True)
class Kind:
    """A family, or a family with one of its text models.

    Attributes:
        config: builds the config.
        pixels: of so many images, of that many pixels a side.
        side: pixels.
        video: what stands for a video, and its visual tokens in the groups they come in; None
            where the family has none.
        norms: whether queries and keys have norms.
        rows: name of the argument with the pixels, if it is another.
        video_id: that marks a video's tokens in `input_ids`.
        mixes: whether a prompt may have both images and videos.
    """

    config: Callable[[], Any]
    pixels: Callable[[int, int, Any], Pixels] = _flat
    side: int = 16
    video: tuple[Callable[[Any], Pixels], list[int]] | None = None
    norms: bool = False
    rows: str = "pixel_values"
    video_id: int = VIDEO
    mixes: bool = True


_QWEN_VIDEO = (_qwen_video, [8])
_TIMED_VIDEO = (_qwen_video, [4, 4])
# Of the id that images have, so that transformers takes one kind alone.
_GLM_VIDEO: dict[str, Any] = dict(video=_TIMED_VIDEO, video_id=IMAGE, mixes=False)

KINDS: dict[str, Kind] = {
    "llava": Kind(lambda: llava_config(text_config("llama"))),
    "llava-qwen2": Kind(lambda: llava_config(text_config("qwen2"))),
    "llava-qwen3": Kind(lambda: llava_config(text_config("qwen3")), norms=True),
    "llava_next": Kind(
        lambda: transformers.LlavaNextConfig(
            vision_config=_clip(),
            text_config=text_config("mistral"),
            image_grid_pinpoints=_TILES,
            **_INDEX,
        ),
        _tiled,
    ),
    "llava_next_video": Kind(
        lambda: transformers.LlavaNextVideoConfig(
            vision_config=_clip(),
            text_config=text_config("llama"),
            image_grid_pinpoints=_TILES,
            **_INDEX,
            **_VIDEOS,
        ),
        _tiled,
        video=(_frames, [8]),
    ),
    "llava_onevision": Kind(
        lambda: transformers.LlavaOnevisionConfig(
            vision_config=_clip(model_type="siglip_vision_model"),
            text_config=text_config("qwen2"),
            image_grid_pinpoints=_TILES,
            **_INDEX,
            **_VIDEOS,
        ),
        _tiled,
        video=(_frames, [9]),
    ),
    "vipllava": Kind(
        lambda: transformers.VipLlavaConfig(
            vision_config=_clip(),
            text_config=text_config("llama"),
            vision_feature_layer=[-1, -2, -3, 0, 1],
            **_INDEX,
        )
    ),
    "video_llava": Kind(
        lambda: transformers.VideoLlavaConfig(
            vision_config=_clip(), text_config=text_config("llama"), **_INDEX, **_VIDEOS
        ),
        rows="pixel_values_images",
        video=(_frames, [34]),
    ),
    "qwen2_vl": Kind(_qwen2_vl, _patches, video=_QWEN_VIDEO),
    "qwen2_5_vl": Kind(_qwen2_5_vl, _patches, video=_QWEN_VIDEO),
    "qwen3_vl": Kind(lambda: _qwen3_vl(False), _patches, video=_TIMED_VIDEO, norms=True),
    "qwen3_vl_moe": Kind(lambda: _qwen3_vl(True), _patches, video=_TIMED_VIDEO, norms=True),
    "internvl": Kind(lambda: _internvl(text_config("qwen2")), side=32),
    "internvl-qwen3": Kind(lambda: _internvl(text_config("qwen3")), side=32, norms=True),
    "idefics3": Kind(lambda: _idefics(transformers.Idefics3Config), _in_one, side=32),
    "smolvlm": Kind(lambda: _idefics(transformers.SmolVLMConfig), _in_one, side=32),
    "mistral3": Kind(lambda: _mistral3(text_config("mistral")), _of_sizes, side=32),
    "mistral3-ministral3": Kind(lambda: _mistral3(_ministral()), _of_sizes, side=32),
    "ovis2": Kind(_ovis2, side=32),
    "fast_vlm": Kind(
        lambda: transformers.FastVlmConfig(
            # What takes the place of FastViT, which needs another package: as it does, it gives a
            # grid of features.
            vision_config=transformers.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], hidden_size=16
            ),
            text_config=text_config("qwen2"),
            **_INDEX,
        ),
        side=32,
    ),
    "perception_lm": Kind(
        lambda: transformers.PerceptionLMConfig(
            # Likewise, for the Perception Encoder.
            vision_config=_clip(model_args={"embed_dim": 16}),
            text_config=text_config("llama"),
            video_token_id=VIDEO,
            **_SPECIAL,
        ),
        lambda count, side, random: {"pixel_values": random(count, 1, 3, side, side)},
        video=(_frames, [32]),
        mixes=False,
    ),
    "paddleocr_vl": Kind(_paddle, _paddle_patches),
    "granite4_vision": Kind(_granite, _tiled, side=32),
    "glm4v": Kind(lambda: _glm("glm4v", **_WIDE), _patches, **_GLM_VIDEO),
    "glm4v_moe": Kind(lambda: _glm("glm4v_moe", **_GLM_EXPERTS), _patches, **_GLM_VIDEO),
    "glm46v": Kind(lambda: _glm("glm46v", **_WIDE), _patches, **_GLM_VIDEO),
    "glm_ocr": Kind(lambda: _glm("glm_ocr", 1.0, head_dim=16), _patches, **_GLM_VIDEO),
}

NEW = ("vipllava", "video_llava", "perception_lm", "granite4_vision")
"""Whose tiny models the oldest releases of transformers cannot build or run."""

OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20)
if OLD:
    KINDS = {kind: facts for kind, facts in KINDS.items() if kind not in NEW}


def make_zoo_model(kind: str, attn: str = "sdpa") -> Any:
    """A model in eval mode with the same random weights at every call."""
    torch.manual_seed(0)
    config = KINDS[kind].config()
    auto: Any = transformers.AutoModelForImageTextToText
    model = randomise(auto.from_config(config, attn_implementation="eager"), "eager")
    # Not every stand-in for a vision tower has sdpa.
    model.set_attn_implementation({"text_config": attn})
    return model


def zoo_inputs(
    model: Any,
    kind: str,
    images: int = 1,
    video: bool = False,
    words: tuple[int, int] = (3, 8),
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """One sample: words, images with a word behind each, perhaps a video, and more words.

    Args:
        words: how many stand before and behind.
    """
    this = KINDS[kind]
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def some(count: int) -> list[int]:
        return torch.randint(3, 80, (count,), generator=generator).tolist()

    ids, pixels = [1, *some(words[0])], {}
    # Told of every token whether it is of an image or of a video.
    told = model.config.model_type.startswith(("qwen", "glm", "paddleocr"))
    start = [VISION_START] if told else []
    if images:
        pixels = this.pixels(images, this.side, random)
        with torch.no_grad():
            features = model.model.get_image_features(**pixels, return_dict=True)
        found = features.pooler_output
        if found is None:
            found = features.deepstack_features[0][1]
        total = sum(len(one.flatten(0, -2)) for one in found)
        for _ in range(images):
            ids += start + [IMAGE] * (total // images) + some(1)
    if video:
        assert this.video is not None
        make, groups = this.video
        pixels |= make(random)
        for group in groups:
            ids += start + [VIDEO] * group
    ids += some(words[1])
    if this.rows != "pixel_values" and "pixel_values" in pixels:
        pixels[this.rows] = pixels.pop("pixel_values")
    marked = torch.tensor([ids])
    input_ids = marked.masked_fill(marked == VIDEO, this.video_id)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}
    if told:
        inputs["mm_token_type_ids"] = (marked == IMAGE).int() + 2 * (marked == VIDEO).int()
    return inputs
