"""Tiny random models of every family and valid inputs for them, without files or a processor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from alvts_cli.engine import PAPER, Carry, LayerSelector, PaperSelector, Picked, Policy, Selector
from alvts_cli.engine.calls import CACHE_NAMES

torch.set_num_threads(1)

CACHE = next(name for name in CACHE_NAMES if name in signature(LlamaModel.forward).parameters)
"""What the installed transformers calls the KV cache that a model is given."""

LAYERS = 4
WIDTH = 32
IMAGE, VIDEO, VISION_START, PAD = 90, 91, 92, 0
FAMILIES = ("llava", "llava_next", "llava_next_mistral", "qwen2_5_vl", "qwen3_vl")
QWEN = ("qwen2_5_vl", "qwen3_vl")
HEAD_SIZES = {"llava_next_mistral": 12}
"""Of a head, where it is not the width by the heads, 8."""

_TEXT: dict[str, Any] = dict(
    vocab_size=100,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=PAD,
)


def make_model(
    family: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, layers: int = LAYERS
) -> Any:
    """A model in eval mode with the same random weights at every call."""
    torch.manual_seed(0)
    described = _TEXT | {"num_hidden_layers": layers}
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    special = dict(image_token_id=IMAGE, tie_word_embeddings=False)
    if family == "llava":
        text = LlamaConfig(**described)
        model = LlavaForConditionalGeneration(
            LlavaConfig(vision_config=vision, text_config=text, **special)
        )
    elif family in ("llava_next", "llava_next_mistral"):
        text = (
            LlamaConfig(**described)
            if family == "llava_next"
            else MistralConfig(**described, head_dim=HEAD_SIZES[family], sliding_window=None)
        )
        model = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=vision,
                text_config=text,
                image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
                **special,
            )
        )
    elif family == "qwen2_5_vl":
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=dict(
                    **described,
                    rope_parameters=dict(
                        rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]
                    ),
                ),
                vision_config=dict(
                    depth=2,
                    hidden_size=16,
                    intermediate_size=24,
                    num_heads=2,
                    patch_size=4,
                    spatial_merge_size=2,
                    temporal_patch_size=2,
                    window_size=16,
                    fullatt_block_indexes=[1],
                    out_hidden_size=WIDTH,
                    in_channels=3,
                ),
                video_token_id=VIDEO,
                vision_start_token_id=VISION_START,
                **special,
            )
        )
    elif family == "qwen3_vl":
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=dict(
                    **described,
                    head_dim=8,
                    rope_parameters=dict(
                        rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1]
                    ),
                ),
                vision_config=dict(
                    depth=2,
                    hidden_size=16,
                    intermediate_size=24,
                    num_heads=2,
                    patch_size=4,
                    spatial_merge_size=2,
                    temporal_patch_size=2,
                    num_position_embeddings=64,
                    deepstack_visual_indexes=[0, 1],
                    out_hidden_size=WIDTH,
                    in_channels=3,
                ),
                video_token_id=VIDEO,
                vision_start_token_id=VISION_START,
                **special,
            )
        )
    else:
        raise ValueError(family)
    return randomise(model, attn).to(dtype)


def randomise(model: Any, attn: str = "sdpa") -> Any:
    """Give every weight a random value of our own; in eval mode.

    Weights are spread wider than a fresh model's, so that attention is far from uniform and
    different tokens give clearly different outputs.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1 and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter))
            elif any(part in name for part in ("language_model", "text_model", "lm_head")):
                parameter.copy_(torch.randn_like(parameter) * 0.25)
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    model.set_attn_implementation(attn)
    # An end token would end the generations of the tests at random, and a generated image token
    # would be taken for a visual one when a test recomputes the whole sequence.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [PAD, IMAGE, VIDEO, VISION_START]
    return model.eval()


@dataclass
class Selectors:
    """What an artifact offers to `attach`."""

    layers: list[Selector | None]
    default_keep: float = 0.25
    schedules: tuple[tuple[float, ...], ...] = ()
    carries: Sequence[Carry] = ()
    picked: Sequence[Picked] = ()
    visual_tokens: int = 0


def random_selector(
    generator: torch.Generator, keys: int, bias: bool = False, rank: int = 3, norm: int = 0
) -> LayerSelector:
    """One that tells tokens clearly apart.

    Args:
        keys: numbers of a token's keys, all key heads together.
        bias: whether there is a `key_bias`.
        norm: size of a head where its keys have a norm.
    """

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return LayerSelector(
        down=random(rank, WIDTH) * 0.4,
        up=random(keys, rank) * 0.7,
        key_bias=random(keys) if bias else None,
        eps=1e-6,
        key_norm=1 + 0.3 * random(norm) if norm else None,
    )


def make_selectors(
    family: str = "llava",
    rank: int = 3,
    policy: Policy = PAPER,
    layers: int = LAYERS,
    **more: Any,
) -> Selectors:
    """Random selectors that rank tokens very differently from layer to layer; `policy` is what was
    picked for any keep ratio."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    keys = _TEXT["num_key_value_heads"] * HEAD_SIZES.get(family, 8)
    selectors: list[Selector | None] = [
        random_selector(
            generator,
            keys,
            bias=family == "qwen2_5_vl",
            rank=rank,
            norm=8 if family == "qwen3_vl" else 0,
        )
        for _ in range(layers)
    ]
    carries = []
    if policy.carry:
        for _ in range(layers):
            down, up = (
                torch.randn(*shape, generator=generator) for shape in ((2, WIDTH), (WIDTH, 2))
            )
            carries.append(Carry(down * 0.2, up * 0.5, 1e-6))
    return Selectors(selectors, carries=carries, picked=[Picked(0.25, policy)], **more)


def paper_selector(seed: int, rank: int = 3) -> PaperSelector:
    """Random, of the paper's form."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return PaperSelector(random(rank, WIDTH) * 0.4, random(rank, WIDTH) * 0.4, random(rank), 1e-6)


def make_paper_selectors() -> Selectors:
    """Random selectors of the paper's form, another one in each layer."""
    return Selectors([paper_selector(i) for i in range(LAYERS)])


@dataclass
class Prompt:
    """One sample: `text` ids with images put among them.

    `images` are (height, width) in pixels; LLaVA takes 16 x 16 only. `at` says before which text
    token each image stands. `videos` (Qwen only) are (frames, height, width), after the images.
    """

    text: list[int]
    images: list[tuple[int, int]] = field(default_factory=list)
    at: int = 2
    videos: list[tuple[int, int, int]] = field(default_factory=list)
    seed: int = 0


def image_tokens(model: Any, size: tuple[int, int]) -> int:
    """Visual tokens of an image, by asking the model for its features."""
    prompt = Prompt([1], [size])
    pixels = _pixels(model, [prompt])
    with torch.no_grad():
        features = model.model.get_image_features(**pixels, return_dict=True).pooler_output
    return sum(len(f) for f in features)


def _pixels(model: Any, prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """What stands for pixels in the inputs, for all images of all prompts."""
    family = model.config.model_type
    rows, sizes, video_rows, video_sizes = [], [], [], []
    for prompt in prompts:
        generator = torch.Generator(torch.get_default_device()).manual_seed(prompt.seed)
        for height, width in prompt.images:
            if family == "llava":
                rows.append(torch.randn(1, 3, height, width, generator=generator))
            elif family == "llava_next":
                # One whole picture and the tiles of the best fitting grid.
                tiles = 1 + (height // 16) * (width // 16)
                rows.append(torch.randn(1, tiles, 3, 16, 16, generator=generator))
                sizes.append([height, width])
            else:
                grid = [1, height // 4, width // 4]
                patches = grid[1] * grid[2]
                rows.append(torch.randn(patches, 3 * 2 * 4 * 4, generator=generator))
                sizes.append(grid)
        for frames, height, width in prompt.videos:
            grid = [frames // 2, height // 4, width // 4]
            patches = grid[0] * grid[1] * grid[2]
            video_rows.append(torch.randn(patches, 3 * 2 * 4 * 4, generator=generator))
            video_sizes.append(grid)
    result = {}
    if rows and family == "llava_next":
        most = max(row.shape[1] for row in rows)
        rows = [
            torch.nn.functional.pad(row, (0, 0, 0, 0, 0, 0, 0, most - row.shape[1])) for row in rows
        ]
    if rows:
        result["pixel_values"] = torch.cat(rows).to(model.dtype)
    if sizes:
        key = "image_sizes" if family == "llava_next" else "image_grid_thw"
        result[key] = torch.tensor(sizes)
    if video_rows:
        result["pixel_values_videos"] = torch.cat(video_rows).to(model.dtype)
        result["video_grid_thw"] = torch.tensor(video_sizes)
    return result


def make_inputs(model: Any, *prompts: Prompt) -> dict[str, torch.Tensor]:
    """Inputs of a left-padded batch, as a processor would make them."""
    # Qwen marks where a picture starts, and counts the pictures of a prompt by that.
    family = model.config.model_type
    start = [VISION_START] if family in QWEN else []
    rows = []
    for prompt in prompts:
        ids = list(prompt.text[: prompt.at])
        for i, size in enumerate(prompt.images):
            ids += start + [IMAGE] * image_tokens(model, size)
            ids += prompt.text[prompt.at + i : prompt.at + i + 1]
        for frames, height, width in prompt.videos:
            # Qwen3-VL has every two frames by themselves.
            times = frames // 2 if family == "qwen3_vl" else 1
            ids += times * (start + [VIDEO] * (frames // 2 // times * (height // 8) * (width // 8)))
        rows.append(ids + list(prompt.text[prompt.at + len(prompt.images) :]))
    longest = max(map(len, rows))
    input_ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": input_ids, "attention_mask": mask, **_pixels(model, list(prompts))}
    if family in QWEN:
        inputs["mm_token_type_ids"] = (input_ids == IMAGE).int() + 2 * (input_ids == VIDEO).int()
    return inputs


def one_image(family: str, seed: int = 0) -> Prompt:
    """A prompt with one image of the family's usual size, 12 text tokens."""
    size = {"llava": (16, 16)}.get(family, (32, 48) if family in QWEN else (32, 32))
    return Prompt([1, 5, 9, 12, 33, 47, 51, 60, 71, 72, 80, 3], [size], seed=seed)
