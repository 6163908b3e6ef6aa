"""What the engine must know about an architecture, and nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AlvtsError
from .layout import View, layout


@dataclass(frozen=True)
class QueryKey:
    """A layer's query and key projections and the norm in front of them.

    `w_q` is `[num_heads * head_dim, D]`, `w_k` is `[num_kv_heads * head_dim, D]` (not repeated),
    the biases are `[num_heads * head_dim]` / `[num_kv_heads * head_dim]` or None, and
    `norm_weight` is `[D]`. The tensors are the model's own: do not write to them.
    """

    w_q: Tensor
    b_q: Tensor | None
    w_k: Tensor
    b_k: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_weight: Tensor
    norm_eps: float


@dataclass(frozen=True)
class Family:
    """Declares one family: its name, its `config.model_type`s, and where its visual ids are.

    The text backbones (Llama, Mistral, Qwen2) share their attribute names, so the methods below
    serve all families; a family whose names differ overrides the method.
    """

    name: str
    model_types: tuple[str, ...]
    visual_token_ids: tuple[str, ...]
    """Names of the config attributes with the ids that mark a visual token in `input_ids`."""

    def backbone(self, model: Any) -> nn.Module:
        """The module whose forward sees `input_ids`."""
        return model.model

    def text_model(self, model: Any) -> nn.Module:
        """The decoder, whose `config` is the text config."""
        return model.model.language_model

    def layers(self, model: Any) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.text_model(model).layers  # type: ignore[return-value]

    def visual_mask(self, model: Any, input_ids: Tensor) -> Tensor:
        """`input_ids` `[B, T]` -> bool `[B, T]`, True at image (and video) tokens."""
        first, *others = (getattr(model.config, name) for name in self.visual_token_ids)
        mask = input_ids == first
        for token_id in others:
            mask = mask | (input_ids == token_id)
        return mask

    def query_key(self, layer: Any, text_config: Any) -> QueryKey:
        """The projections of one decoder layer.

        Raises:
            AlvtsError: the weights are quantised, so no matrix can be read from them.
        """
        attention, norm = layer.self_attn, layer.input_layernorm
        for projection in (attention.q_proj, attention.k_proj):
            if not torch.is_floating_point(projection.weight):
                raise AlvtsError(
                    "the query and key projections are quantised and cannot be read; "
                    "load the model in bfloat16, float16 or float32"
                )
        return QueryKey(
            w_q=attention.q_proj.weight,
            b_q=attention.q_proj.bias,
            w_k=attention.k_proj.weight,
            b_k=attention.k_proj.bias,
            num_heads=text_config.num_attention_heads,
            num_kv_heads=text_config.num_key_value_heads,
            head_dim=attention.head_dim,
            norm_weight=norm.weight,
            norm_eps=norm.variance_epsilon,
        )

    def logits(self, model: Any, hidden: Tensor) -> Tensor:
        """Output of the last decoder layer `[B, T, D]` -> logits `[B, T, V]`."""
        states: Tensor = self.text_model(model).norm(hidden)  # type: ignore[operator]
        logits: Tensor = model.lm_head(states.to(model.lm_head.weight.device))
        return logits

    def layout(
        self, model: Any, processor: Any, inputs: Mapping[str, Tensor], sizes: Sequence[Any]
    ) -> tuple[View, ...]:
        """Where in the pictures the visual tokens lie; those in no view lie nowhere.

        Args:
            model: of this family.
            processor: that made the inputs.
            inputs: of one prompt.
            sizes: width and height of every image in it, in pixels.

        Raises:
            AlvtsError: not known for this prompt.
        """
        return layout(self.name, model, processor, inputs, sizes)

    def check(self, model: Any) -> None:
        """Refuse what the method cannot run on.

        Raises:
            AlvtsError: a layer attends through a sliding window. A window is counted in tokens,
                and a layer that holds a selection no longer has all of them.
        """
        config = self.text_model(model).config
        layer_types = getattr(config, "layer_types", None)
        if layer_types is None:
            # As transformers itself reads a config without layer types.
            sliding = getattr(config, "sliding_window", None) is not None
        else:
            sliding = "sliding_attention" in layer_types
        if sliding:
            raise AlvtsError(
                "this model uses sliding-window attention, which alvts does not support; "
                "load it with a text config whose sliding_window is None"
            )
