"""Prompts of a wanted size, built directly: random pixels, random words, no processor."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AlvtsError

# Visual tokens of a prompt when none are asked for, where images may be of any size: a photograph
# of about 1250 x 1250 for Qwen, the largest image for Mistral.
_QWEN_TOKENS = 1980
_MISTRAL_TOKENS = 3025

# Tiles of a photograph where all are of one size and each has the same number of tokens: the grid
# and the whole image in small.
_INTERNVL_TILES = 7
_IDEFICS_TILES = 17

# Pixels a side of the image that LLaVA-OneVision is given: four tiles and the whole.
_ONEVISION_SIDE = 768


def synthetic_inputs(
    model: Any, batch: int, visual_tokens: int | None, text_tokens: int
) -> dict[str, Tensor]:
    """Inputs of `batch` equal prompts, on the model's device and in its dtype.

    Args:
        model: of a known family.
        batch: samples.
        visual_tokens: per sample. None: one image of the family's largest usual size. Where images
            or their tiles have a fixed number, several of them make up a multiple of it.
        text_tokens: per sample, at least 2; a quarter stands before the image.

    Raises:
        AlvtsError: the family cannot have this many visual tokens, or the prompt is longer than
            the model reads.
    """
    config = model.config
    # Before any pixels are made.
    check_length(config, (visual_tokens or usual_visual_tokens(config)) + text_tokens)
    generator = torch.Generator().manual_seed(0)
    pixels, counts = _maker(config)(config, visual_tokens, generator)

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
    if config.model_type in _QWEN:
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
    """Visual tokens of a prompt when none are asked for: of one large image.

    Raises:
        AlvtsError: no prompt can be made up for this family.
    """
    if config.model_type in _QWEN:
        return _QWEN_TOKENS
    if config.model_type == "mistral3":
        return _MISTRAL_TOKENS
    if config.model_type in _TILED:
        tiles, tokens = _tiles(config)
        return tiles * tokens
    _maker(config)
    return _llava_grid(config).tokens


# Of Qwen's vision tower, or of one that is given its patches in the same way.
_QWEN = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
    *("glm4v", "glm4v_moe", "glm46v", "glm_ocr"),
)
_TILED = ("internvl", "idefics3", "smolvlm")

_Pixels = tuple[dict[str, Tensor], list[int]]


def _maker(config: Any) -> Callable[[Any, int | None, torch.Generator], _Pixels]:
    """What makes up images for a family.

    Raises:
        AlvtsError: nothing does.
    """
    if config.model_type in _QWEN:
        return _qwen_pixels
    if config.model_type in _TILED:
        return _tile_pixels
    if config.model_type == "mistral3":
        return _mistral_pixels
    if config.model_type in ("llava", "llava_next", "llava_onevision"):
        return _llava_pixels
    raise AlvtsError(f"alvts makes up no images for {config.model_type}; give --image and --prompt")


def _tiles(config: Any) -> tuple[int, int]:
    """Tiles of a photograph, and visual tokens of each."""
    vision = config.vision_config
    if config.model_type == "internvl":
        return _INTERNVL_TILES, config.image_seq_length
    side = vision.image_size // vision.patch_size // config.scale_factor
    return _IDEFICS_TILES, side * side


def _tile_pixels(config: Any, wanted: int | None, generator: torch.Generator) -> _Pixels:
    """Square tiles, all alike."""
    usual, tokens = _tiles(config)
    count = usual if wanted is None else wanted // tokens
    if wanted is not None and (count < 1 or wanted % tokens):
        raise AlvtsError(
            f"this model has {tokens} visual tokens per tile; "
            f"--visual-tokens must be a multiple of that, not {wanted}"
        )
    side = config.vision_config.image_size
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    pixels = torch.randn(count, 3, height, width, generator=generator, device="cpu")
    # InternVL has all tiles of a batch in a row, the others those of a sample.
    return {"pixel_values": pixels if config.model_type == "internvl" else pixels[None]}, [
        count * tokens
    ]


def _mistral_pixels(config: Any, wanted: int | None, generator: torch.Generator) -> _Pixels:
    """One image of exactly the wanted number of tokens, as near to a square as that allows."""
    height, width = _near_square(_MISTRAL_TOKENS if wanted is None else wanted)
    vision = config.vision_config
    each = vision.patch_size * config.spatial_merge_size
    if width * each > vision.image_size:
        raise AlvtsError(
            f"{wanted} visual tokens make an image of {height * each} x {width * each} pixels, but "
            f"this model takes {vision.image_size} a side; choose another --visual-tokens"
        )
    size = height * each, width * each
    pixels = torch.randn(1, 3, *size, generator=generator, device="cpu")
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size])}, [height * width]


def _near_square(tokens: int) -> tuple[int, int]:
    """Two factors of `tokens`, the smaller one first, as near to each other as can be.

    Raises:
        AlvtsError: there are no tokens.
    """
    if tokens < 1:
        raise AlvtsError(f"--visual-tokens must be at least 1, not {tokens}")
    height = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    return height, tokens // height


def _llava_pixels(config: Any, wanted: int | None, generator: torch.Generator) -> _Pixels:
    """Square images for LLaVA; for LLaVA-NeXT of the largest grid of tiles."""
    grid = _llava_grid(config)
    images = 1 if wanted is None else wanted // grid.tokens
    if wanted is not None and (images < 1 or wanted % grid.tokens):
        raise AlvtsError(
            f"this model has {grid.tokens} visual tokens per image; "
            f"--visual-tokens must be a multiple of that, not {wanted}"
        )
    side = config.vision_config.image_size
    if config.model_type != "llava":
        pixels = {
            "pixel_values": torch.randn(
                images, grid.tiles, 3, side, side, generator=generator, device="cpu"
            ),
            "image_sizes": torch.tensor([[grid.height, grid.width]] * images),
        }
    else:
        pixels = {
            "pixel_values": torch.randn(images, 3, side, side, generator=generator, device="cpu")
        }
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
    sizes = config.image_grid_pinpoints
    if config.model_type == "llava_onevision":
        sizes = [size for size in sizes if max(size) <= _ONEVISION_SIDE]
    height, width = max(sizes, key=lambda size: size[0] * size[1])
    rows, columns = height // side, width // side
    tiles = 1 + rows * columns
    # The whole image, its tiles, and a line break after each row of patches.
    return _Grid(height, width, tiles, patches**2 * tiles + rows * patches)


def _qwen_pixels(config: Any, wanted: int | None, generator: torch.Generator) -> _Pixels:
    """As `_mistral_pixels`."""
    vision = config.vision_config
    tokens = _QWEN_TOKENS if wanted is None else wanted
    height, across = _near_square(tokens)
    merge = vision.spatial_merge_size
    grid = [1, height * merge, across * merge]
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "pixel_values": torch.randn(grid[1] * grid[2], width, generator=generator, device="cpu"),
        "image_grid_thw": torch.tensor([grid]),
    }, [tokens]


def _words(config: Any, count: int, generator: torch.Generator) -> list[int]:
    """Random ids that mean no image."""
    special = {config.image_token_id, getattr(config, "video_token_id", None)}
    plain = [i for i in range(min(1000, config.text_config.vocab_size)) if i not in special]
    picks = torch.randint(len(plain), (count,), generator=generator, device="cpu")
    return [plain[i] for i in picks.tolist()]
