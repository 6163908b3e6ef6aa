"""The true shapes of the known models, with random weights, without a download.

Numbers are those of the published configs. Only what decides shapes, arithmetic and positions is
written down; everything else stays at the library's defaults.
"""

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .engine.flops import head_size
from .errors import AlvtsError

# A prime, so that no two rows of a matrix get the same numbers.
_BLOCK = 1_000_003


def _clip() -> dict[str, Any]:
    """CLIP-L/14 at 336 pixels: 24 x 24 patches."""
    return dict(
        model_type="clip_vision_model",
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
        vocab_size=32000,
    )


def _llama(**more: Any) -> dict[str, Any]:
    """Vicuna 7B; 13B changes four numbers."""
    return (
        dict(
            model_type="llama",
            vocab_size=32064,
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            max_position_embeddings=4096,
            rms_norm_eps=1e-5,
        )
        | more
    )


def _mistral() -> dict[str, Any]:
    return dict(
        model_type="mistral",
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
        sliding_window=None,
    )


def _llava(text: dict[str, Any]) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=_clip(),
        text_config=text,
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _llava_next(text: dict[str, Any]) -> Any:
    from transformers import LlavaNextConfig

    return LlavaNextConfig(
        vision_config=_clip(),
        text_config=text,
        image_token_index=32000,
        image_seq_length=576,
        image_grid_pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


_QWEN_IDS: dict[str, Any] = dict(
    image_token_id=151655,
    video_token_id=151656,
    vision_start_token_id=151652,
    vision_end_token_id=151653,
)


def _qwen(tied: bool, **text: Any) -> Any:
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        text_config=_qwen2(mrope=True, tie_word_embeddings=tied) | text,
        vision_config=dict(
            depth=32,
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            in_channels=3,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            tokens_per_second=2,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
            out_hidden_size=text["hidden_size"],
        ),
        **_QWEN_IDS,
        tie_word_embeddings=tied,
    )


def _qwen2(mrope: bool = False, **more: Any) -> dict[str, Any]:
    """Qwen2 and 2.5, apart from their sizes; with 3-D positions as the VL models have them."""
    rope = dict(rope_type="default", rope_theta=1e6)
    return (
        dict(
            max_position_embeddings=128000 if mrope else 32768,
            rms_norm_eps=1e-6,
            rope_parameters=rope | dict(mrope_section=[16, 24, 24]) if mrope else rope,
            use_sliding_window=False,
            bos_token_id=151643,
            eos_token_id=151645,
        )
        | more
    )


_QWEN2_1_5B: dict[str, Any] = dict(
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
)
_QWEN2_7B: dict[str, Any] = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)


def _qwen2_vl(tied: bool, **text: Any) -> Any:
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config=_qwen2(mrope=True, tie_word_embeddings=tied) | text,
        vision_config=dict(
            depth=32,
            embed_dim=1280,
            hidden_size=text["hidden_size"],
            mlp_ratio=4,
            num_heads=16,
            in_channels=3,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
        ),
        **_QWEN_IDS,
        tie_word_embeddings=tied,
    )


_QWEN3_VISION: dict[int, dict[str, Any]] = {
    24: dict(hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]),
    27: dict(hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24]),
}
"""By depth."""


def _qwen3_vl(tied: bool, vision_depth: int, experts: bool = False, **text: Any) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

    config: Any = Qwen3VLMoeConfig if experts else Qwen3VLConfig
    return config(
        text_config=dict(
            vocab_size=151936,
            head_dim=128,
            max_position_embeddings=262144,
            rms_norm_eps=1e-6,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_section=[24, 20, 20],
                mrope_interleaved=True,
            ),
            bos_token_id=151643,
            eos_token_id=151645,
            tie_word_embeddings=tied,
        )
        | text,
        vision_config=dict(
            depth=vision_depth,
            num_heads=16,
            in_channels=3,
            patch_size=16,
            spatial_merge_size=2,
            temporal_patch_size=2,
            num_position_embeddings=2304,
            out_hidden_size=text["hidden_size"],
        )
        | _QWEN3_VISION[vision_depth],
        **_QWEN_IDS,
        tie_word_embeddings=tied,
    )


def _siglip(**more: Any) -> dict[str, Any]:
    """SigLIP so400m; image and patch size differ between models."""
    return (
        dict(
            hidden_size=1152,
            intermediate_size=4304,
            num_attention_heads=16,
            num_hidden_layers=27,
            image_size=384,
            patch_size=14,
        )
        | more
    )


def _llava_onevision() -> Any:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=_siglip(
            model_type="siglip_vision_model", num_hidden_layers=26, vision_use_head=False
        ),
        text_config=_qwen2(model_type="qwen2") | _QWEN2_7B | dict(vocab_size=152000),
        image_token_index=151646,
        video_token_index=151647,
    )


def _internvl(image_token: int, text: dict[str, Any]) -> Any:
    from transformers import InternVLConfig

    return InternVLConfig(
        vision_config=dict(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            attention_bias=True,
            image_size=[448, 448],
            patch_size=[14, 14],
        ),
        text_config=text,
        image_token_id=image_token,
        image_seq_length=256,
        tie_word_embeddings=False,
    )


def _qwen3_8b() -> dict[str, Any]:
    return dict(
        model_type="qwen3",
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=1e6),
    )


def _smolvlm(second: bool, vision: dict[str, Any], scale: int, **text: Any) -> Any:
    """SmolLM2 behind SigLIP; the first SmolVLMs are Idefics3 to transformers."""
    from transformers import Idefics3Config, SmolVLMConfig

    config: Any = SmolVLMConfig if second else Idefics3Config
    return config(
        vision_config=vision,
        text_config=dict(
            model_type="llama",
            vocab_size=49280,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_type="default", rope_theta=130000.0 if second else 100000.0),
            pad_token_id=2,
        )
        | text,
        scale_factor=scale,
        image_token_id=49190,
    )


_SIGLIP_BASE: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
    image_size=512,
    patch_size=16,
)


def _mistral_small() -> Any:
    from transformers import Mistral3Config

    return Mistral3Config(
        vision_config=dict(
            model_type="pixtral",
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=1540,
            patch_size=14,
        ),
        text_config=_mistral()
        | dict(
            vocab_size=131072,
            hidden_size=5120,
            intermediate_size=32768,
            num_hidden_layers=40,
            head_dim=128,
            max_position_embeddings=131072,
            rope_parameters=dict(rope_type="default", rope_theta=1e9),
        ),
        image_token_index=10,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def _glm() -> Any:
    """GLM-4.1V: half of each head is turned."""
    from transformers import Glm4vConfig

    return Glm4vConfig(
        vision_config=dict(
            depth=24,
            hidden_size=1536,
            intermediate_size=13696,
            num_heads=12,
            in_channels=3,
            image_size=336,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=4096,
        ),
        text_config=dict(
            vocab_size=151552,
            hidden_size=4096,
            intermediate_size=13696,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=2,
            max_position_embeddings=65536,
            rms_norm_eps=1e-5,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10000.0,
                partial_rotary_factor=0.5,
                mrope_section=[8, 12, 12],
            ),
            pad_token_id=151329,
            eos_token_id=[151329, 151336, 151338, 151348],
        ),
        image_token_id=151343,
        video_token_id=151344,
        tie_word_embeddings=False,
    )


def _smol() -> Any:
    from .smol.build import make_config

    return make_config()


def _pocket() -> Any:
    from .pocket.build import make_config

    return make_config()


_13B: dict[str, Any] = dict(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    num_key_value_heads=40,
)

SHAPES: dict[str, Callable[[], Any]] = {
    "llava-1.5-7b": lambda: _llava(_llama()),
    "llava-1.5-13b": lambda: _llava(_llama(**_13B)),
    "llava-next-7b": lambda: _llava_next(_llama()),
    "llava-next-13b": lambda: _llava_next(_llama(**_13B)),
    "llava-next-mistral-7b": lambda: _llava_next(_mistral()),
    "qwen2.5-vl-3b": lambda: _qwen(
        tied=True,
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    ),
    "qwen2.5-vl-7b": lambda: _qwen(tied=False, **_QWEN2_7B),
    "qwen3-vl-2b": lambda: _qwen3_vl(
        tied=True,
        vision_depth=24,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
    ),
    "qwen3-vl-4b": lambda: _qwen3_vl(
        tied=True,
        vision_depth=24,
        hidden_size=2560,
        intermediate_size=9728,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "qwen3-vl-8b": lambda: _qwen3_vl(
        tied=False,
        vision_depth=27,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "qwen3-vl-30b-a3b": lambda: _qwen3_vl(
        tied=False,
        vision_depth=27,
        experts=True,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
    ),
    "qwen2-vl-2b": lambda: _qwen2_vl(tied=True, **_QWEN2_1_5B),
    "qwen2-vl-7b": lambda: _qwen2_vl(tied=False, **_QWEN2_7B),
    "llava-onevision-7b": _llava_onevision,
    "internvl3-2b": lambda: _internvl(
        151667, _qwen2(model_type="qwen2") | _QWEN2_1_5B | dict(vocab_size=151674)
    ),
    "internvl3-8b": lambda: _internvl(
        151667, _qwen2(model_type="qwen2") | _QWEN2_7B | dict(vocab_size=151674)
    ),
    "internvl3.5-8b": lambda: _internvl(151671, _qwen3_8b()),
    "smolvlm-256m": lambda: _smolvlm(
        False,
        _SIGLIP_BASE,
        4,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    ),
    "smolvlm-500m": lambda: _smolvlm(
        False,
        _SIGLIP_BASE,
        4,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
    "smolvlm2-2.2b": lambda: _smolvlm(
        True,
        _siglip(),
        3,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "glm-4.1v-9b": _glm,
    "mistral-small-3.1-24b": _mistral_small,
    "pocket": _pocket,
    "smol": _smol,
}


def shape_config(name: str, layers: int | None = None, hidden_size: int | None = None) -> Any:
    """The config of a known model, cut to its first `layers` decoder layers.

    With a `hidden_size`, the decoder has that width: fewer heads of the same size, and an MLP and
    key heads in proportion.

    Raises:
        AlvtsError: an unknown name, a depth that the model does not have, or a width that is no
            multiple of its heads'.
    """
    if name not in SHAPES:
        raise AlvtsError(f"--random-weights needs a known model, not {name!r}: {', '.join(SHAPES)}")
    config = SHAPES[name]()
    if layers is not None:
        text = config.text_config
        if not 1 <= layers <= text.num_hidden_layers:
            raise AlvtsError(
                f"{name} has 1 to {text.num_hidden_layers} decoder layers to bench, not {layers}"
            )
        cut_decoder(config, layers)
    if hidden_size is not None:
        _narrow(name, config, hidden_size)
    return config


def cut_decoder(config: Any, layers: int) -> None:
    """Give the decoder of `config` so many layers, more or fewer than it has; their kinds go on as
    they begin."""
    text = config.text_config
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = list(islice(cycle(text.layer_types), layers))


def cut_tower(config: Any, layers: int) -> None:
    """Cut the vision tower of `config` to its first layers, or leave it where it has no more, or
    does not say how many."""
    vision = config.vision_config
    for name in ("depth", "num_hidden_layers"):
        if hasattr(vision, name):
            setattr(vision, name, min(layers, getattr(vision, name)))
            return


def _narrow(name: str, config: Any, hidden_size: int) -> None:
    """Give the decoder of `config` another width."""
    text = config.text_config
    head, before = head_size(text), text.hidden_size
    if hidden_size < head or hidden_size > before or hidden_size % head:
        raise AlvtsError(
            f"the hidden size of {name} can be a multiple of {head} up to {before}, "
            f"not {hidden_size}"
        )
    text.hidden_size = hidden_size
    text.intermediate_size = text.intermediate_size * hidden_size // before
    text.num_key_value_heads = max(1, text.num_key_value_heads * hidden_size // before)
    text.num_attention_heads = hidden_size // head
    # Query heads share key heads evenly.
    while text.num_attention_heads % text.num_key_value_heads:
        text.num_key_value_heads -= 1
    # The last part of Qwen's vision towers is as wide as the decoder.
    if config.model_type == "qwen2_vl":
        config.vision_config.hidden_size = hidden_size
    elif config.model_type.startswith("qwen"):
        config.vision_config.out_hidden_size = hidden_size


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model of `config` in eval mode, built in `dtype` on `device`, without a float32 copy.

    The weights have the spread of a freshly initialised model, so that arithmetic meets numbers
    of usual size, but repeat one block of random values: drawing billions takes minutes.
    """
    from transformers import AutoModelForImageTextToText

    with device, _CheapInit(dtype, device), torch.no_grad():
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model.eval()


class _CheapInit(TorchFunctionMode):
    """While active, `normal_` copies prepared numbers and other random fills do nothing.

    The fills left out are those of torch's own constructors; transformers fills every weight
    again, with `normal_`.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self._block = torch.randn(_BLOCK, generator=generator, device="cpu").to(device, dtype)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "normal_":
            return self._fill(*args, **kwargs)
        if name in ("uniform_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)

    def _fill(
        self, tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Any = None
    ) -> Tensor:
        block = self._block * std + mean
        flat = tensor.detach().view(-1)
        for start in range(0, flat.numel(), _BLOCK):
            piece = flat[start : start + _BLOCK]
            piece.copy_(block[: piece.numel()])
        return tensor
