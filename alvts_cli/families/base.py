"""What the engine must know about an architecture, and nothing more."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import AlvtsError
from .layer import QueryKey, describe
from .layout import Prompt, View, frame_views, grids, image_views
from .placing import check_placing
from .quantised import check_quantised

CAUSAL = "causal"


@dataclass(frozen=True)
class Family:
    """Declares one family; one that differs in more than the facts below overrides a method.

    Attributes:
        name: in words.
        model_types: its `config.model_type`s.
        visual_token_ids: names of the config attributes with the ids that mark a visual token in
            `input_ids`.
        mask: `CAUSAL` where a token sees itself and all before it, whatever these are; else what is
            different, which no check can see and for which the family is refused.
        decoder: name of the decoder in the module whose forward sees `input_ids`.
        around_frames: how many of the visual tokens lie nowhere: in front of each frame of a video
            (such as a class token), and behind each video.
    """

    name: str
    model_types: tuple[str, ...]
    visual_token_ids: tuple[str, ...]
    mask: str
    decoder: str = "language_model"
    around_frames: tuple[int, int] = (0, 0)

    def backbone(self, model: Any) -> nn.Module:
        """The module whose forward sees `input_ids`."""
        return model.model

    def text_model(self, model: Any) -> nn.Module:
        """The decoder, whose `config` is the text config."""
        found: nn.Module = getattr(model.model, self.decoder)
        return found

    def layers(self, model: Any) -> nn.ModuleList:
        """The decoder layers, in order."""
        return self.text_model(model).layers  # type: ignore[return-value]

    def adds_behind(self, config: Any) -> int:
        """Behind how many of the first layers the decoder of a model of `config` itself may add
        something to the states of visual tokens, of all of them, whichever a layer ran on."""
        if getattr(config, "deepstack_layer_map", None) is not None:
            layers: int = config.text_config.num_hidden_layers
            return layers
        vision = getattr(config, "vision_config", None)
        return len(getattr(vision, "deepstack_visual_indexes", None) or ())

    def visual_mask(self, model: Any, input_ids: Tensor) -> Tensor:
        """`input_ids` `[B, T]` -> bool `[B, T]`, True at image (and video) tokens."""
        first, *others = (getattr(model.config, name) for name in self.visual_token_ids)
        mask = input_ids == first
        for token_id in others:
            mask = mask | (input_ids == token_id)
        return mask

    def query_key(self, layer: Any) -> QueryKey:
        """The projections of one decoder layer; see `layer.describe`."""
        return describe(layer)

    def layout(
        self,
        model: Any,
        processor: Any,
        inputs: Mapping[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        videos: Sequence[tuple[int, int]] = (),
    ) -> tuple[View, ...]:
        """Where in the pictures the visual tokens lie; those in no view lie nowhere.

        Args:
            model: of this family.
            processor: that made the inputs.
            inputs: of one prompt.
            sizes: width and height of every image in it, in pixels.
            videos: of the frames of every video, likewise.

        Raises:
            AlvtsError: not known for this prompt.
        """
        prompt = Prompt(self.name, model, processor, inputs, sizes, videos)
        if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
            return tuple(grids(prompt))
        return (*self.image_views(prompt), *self.frame_views(prompt))

    def image_views(self, prompt: Prompt) -> list[View]:
        """Of the images of a prompt; the same errors."""
        return image_views(prompt)

    def frame_views(self, prompt: Prompt) -> list[View]:
        """Of the frames of its videos; the same errors."""
        return frame_views(prompt, *self.around_frames)

    def check(self, model: Any) -> None:
        """Refuse what the method cannot run on.

        Raises:
            AlvtsError: weights that cannot be read (see `quantised` and `placing`), or a layer that
                attends through a sliding window. A window is counted in tokens, and a layer that
                holds a selection no longer has all of them.
        """
        check_quantised(model.config)
        check_placing(model)
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
