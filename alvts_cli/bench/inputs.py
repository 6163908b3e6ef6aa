"""Prompts of a wanted size, built directly: random pixels, random words, no processor."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AlvtsError

# Visual tokens of a Qwen2.5-VL prompt when none are asked for: a photograph of about 1250 x 1250.
_QWEN_TOKENS = 1980


def synthetic_inputs(
    model: Any, batch: int, visual_tokens: int | None, text_tokens: int
) -> dict[str, Tensor]:
    """Inputs of `batch` equal prompts, on the model's device and in its dtype.

    Args:
        model: of a known family.
        batch: samples.
        visual_tokens: per sample. None: one image of the family's largest usual size. The LLaVA
            families have a fixed number per image: several images make up a multiple of it.
        text_tokens: per sample, at least 2; a quarter stands before the image.

    Raises:
        AlvtsError: the family cannot have this many visual tokens, or the prompt is longer than
            the model reads.
    """
    config = model.config
    # Before any pixels are made.
    check_length(config, (visual_tokens or usual_visual_tokens(config)) + text_tokens)
    generator = torch.Generator().manual_seed(0)
    if config.model_type == "qwen2_5_vl":
        pixels, counts = _qwen_pixels(config, visual_tokens, generator)
    else:
        pixels, counts = _llava_pixels(config, visual_tokens, generator)

    before = max(1, text_tokens // 4)
    row = _words(config, before, generator)
    for count in counts:
        row += [config.image_token_id] * count
    row += _words(config, text_tokens - before, generator)

    input_ids = torch.tensor([row] * batch)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    for name, value in pixels.items():
        inputs[name] = torch.cat([value] * batch)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    if config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (input_ids == config.image_token_id).int()
    return {name: value.to(model.device) for name, value in inputs.items()}


def check_length(config: Any, tokens: int) -> None:
    """
    Raises:
        AlvtsError: the prompt is longer than the model reads.
    """
    longest = config.text_config.max_position_embeddings
    if tokens > longest:
        raise AlvtsError(f"the prompt has {tokens} tokens but the model reads {longest}")


def usual_visual_tokens(config: Any) -> int:
    """Visual tokens of a prompt when none are asked for: of one large image."""
    return _QWEN_TOKENS if config.model_type == "qwen2_5_vl" else _llava_grid(config).tokens


def _llava_pixels(
    config: Any, wanted: int | None, generator: torch.Generator
) -> tuple[dict[str, Tensor], list[int]]:
    """Square images for LLaVA; for LLaVA-NeXT of the largest grid of tiles."""
    grid = _llava_grid(config)
    images = 1 if wanted is None else wanted // grid.tokens
    if wanted is not None and (images < 1 or wanted % grid.tokens):
        raise AlvtsError(
            f"this model has {grid.tokens} visual tokens per image; "
            f"--visual-tokens must be a multiple of that, not {wanted}"
        )
    side = config.vision_config.image_size
    if config.model_type == "llava_next":
        pixels = {
            "pixel_values": torch.randn(images, grid.tiles, 3, side, side, generator=generator),
            "image_sizes": torch.tensor([[grid.height, grid.width]] * images),
        }
    else:
        pixels = {"pixel_values": torch.randn(images, 3, side, side, generator=generator)}
    return pixels, [grid.tokens] * images


@dataclass(frozen=True)
class _Grid:
    """One image of a LLaVA model: its pixels, tiles and visual tokens."""

    height: int
    width: int
    tiles: int
    tokens: int


def _llava_grid(config: Any) -> _Grid:
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    if config.model_type == "llava":
        return _Grid(side, side, 1, patches**2)
    height, width = max(config.image_grid_pinpoints, key=lambda size: size[0] * size[1])
    rows, columns = height // side, width // side
    tiles = 1 + rows * columns
    # The whole image, its tiles, and a line break after each row of patches.
    return _Grid(height, width, tiles, patches**2 * tiles + rows * patches)


def _qwen_pixels(
    config: Any, wanted: int | None, generator: torch.Generator
) -> tuple[dict[str, Tensor], list[int]]:
    """One image of exactly the wanted number of tokens, as near to a square as that allows."""
    vision = config.vision_config
    tokens = _QWEN_TOKENS if wanted is None else wanted
    if tokens < 1:
        raise AlvtsError(f"--visual-tokens must be at least 1, not {tokens}")
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    merge = vision.spatial_merge_size
    grid = [1, height * merge, tokens // height * merge]
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(grid[1] * grid[2], width, generator=generator),
        "image_grid_thw": torch.tensor([grid]),
    }, [tokens]


def _words(config: Any, count: int, generator: torch.Generator) -> list[int]:
    """Random ids that mean no image."""
    special = {config.image_token_id, getattr(config, "video_token_id", None)}
    plain = [i for i in range(min(1000, config.text_config.vocab_size)) if i not in special]
    picks = torch.randint(len(plain), (count,), generator=generator)
    return [plain[i] for i in picks.tolist()]
