"""A tiny LLaVA as deep as the 7B, what a dense run of it shows, and what an attached run holds.

Everything about attention comes from eager attention's own output, which the methods never use.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tiny import IMAGE, PAD, Prompt, make_inputs
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from alvts_cli.engine import cache_of
from alvts_cli.methods import make_method

torch.set_num_threads(1)

LAYERS, VISUAL, SIDE = 32, 64, 8


@cache
def deep_model(attn: str = "sdpa") -> Any:
    """32 layers, 8 x 8 visual tokens, grouped queries; the same weights for both kinds."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * SIDE,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=PAD,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn_like(parameter) * 0.25)
    model.set_attn_implementation(attn)
    return model.eval()


def prompts() -> list[Prompt]:
    """Two prompts of different lengths about different pictures."""
    return [
        Prompt([1, 5, 9, 12, 33, 47, 51, 60], [(32, 32)], seed=1),
        Prompt([1, 5, 9, 12, 33], [(32, 32)], seed=2),
    ]


@dataclass
class Dense:
    """One sample through the dense model with eager attention.

    `hidden[i]` is the input of layer `i`, `[T, D]`; `attention[i]` `[H, T, T]`; `keys[i]`
    `[G, T, d]` after rotary positions; `visual` and `text` are positions.
    """

    hidden: list[torch.Tensor]
    attention: list[torch.Tensor]
    keys: list[torch.Tensor]
    visual: list[int]
    text: list[int]


def dense_run(prompt: Prompt) -> Dense:
    """What a plain eager forward of a prompt alone shows."""
    inputs = make_inputs(deep_model("eager"), prompt)
    with torch.no_grad():
        out = deep_model("eager")(
            **inputs, output_attentions=True, output_hidden_states=True, use_cache=True
        )
    ids = inputs["input_ids"][0]
    return Dense(
        [state[0] for state in out.hidden_states],
        [weights[0] for weights in out.attentions],
        [layer.keys[0] for layer in cache_of(out).layers],
        (ids == IMAGE).nonzero()[:, 0].tolist(),
        (ids != IMAGE).nonzero()[:, 0].tolist(),
    )


def best(scores: torch.Tensor, among: list[int], count: int) -> list[int]:
    """The positions of the `count` largest `scores` `[T]` among some, in order."""
    return sorted(sorted(among, key=lambda i: -float(scores[i]))[:count])


@torch.no_grad()
def walk(
    hidden: torch.Tensor, positions: list[int], first: int, end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the layers from `first` to before `end` on tokens that are alone in the sequence.

    Args:
        hidden: `[K, D]`, the input of layer `first`.
        positions: of these tokens.

    Returns:
        The input of layer `end`, `[K, D]`, and its eager attention, `[H, K, K]`.
    """
    text = deep_model("eager").model.language_model
    state = hidden[None]
    rotary = text.rotary_emb(state, torch.tensor([positions]))
    size = len(positions)
    mask = torch.full((size, size), torch.finfo(state.dtype).min).triu(1)[None, None]
    for layer in text.layers[first:end]:
        state = layer(state, attention_mask=mask, position_embeddings=rotary)
    layer = text.layers[end]
    _, weights = layer.self_attn(
        hidden_states=layer.input_layernorm(state),
        attention_mask=mask,
        position_embeddings=rotary,
    )
    return state[0], weights[0]


@dataclass
class Held:
    """One sample of an attached run: per layer, the positions it ran on and its cache's slots."""

    ran: list[list[int]]
    slots: list[int]


def attached_run(name: str, budget: float, batch: list[Prompt], **more: Any) -> list[Held]:
    """Which tokens each layer runs on when the batch goes through a method, padded on the left.

    Positions are read off the rotary tables the layers get, and count from each sample's first
    token.
    """
    model = deep_model("sdpa")
    text = model.model.language_model
    inputs = make_inputs(model, *batch)
    mask = inputs["attention_mask"]
    tables: list[torch.Tensor] = []

    def look(module: Any, args: Any, kwargs: Any) -> None:
        tables.append(torch.cat(kwargs["position_embeddings"], dim=-1))

    method = make_method(name, **more)
    names = [f"sample {prompt.seed}" for prompt in batch]
    with torch.no_grad(), method.attached(model, budget, names) as attachment:
        # Later than the engine's, so they see what the layers really get.
        handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in text.layers]
        places = (mask.cumsum(1) - 1).clamp(min=0)
        cache = cache_of(model(**inputs, position_ids=places, use_cache=True))
        for handle in handles:
            handle.remove()
        kept = attachment.last
        whole = torch.cat(
            text.rotary_emb(torch.zeros(1), torch.arange(mask.shape[1])[None]), dim=-1
        )[0]
    held = []
    for b in range(len(batch)):
        texts = int(mask[b].sum()) - kept.visual_tokens[b]
        ran = []
        for counts, table in zip(kept.kept, tables, strict=True):
            rows = table[min(b, len(table) - 1)][-(texts + counts[b]) :]
            ran.append([int((whole - row).abs().sum(-1).argmin()) for row in rows])
        slots = [
            layer.slots if layer.valid is None else int(layer.valid[b].sum())
            for layer in cache.layers
        ]
        assert all(layer.get_seq_length() == mask.shape[1] for layer in cache.layers)
        held.append(Held(ran, slots))
    return held
