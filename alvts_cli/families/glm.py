"""GLM-V: the frames of a video are marked as an image's tokens are."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Family
from .layout import View


class Glm(Family):
    """A family whose `input_ids` do not tell a video from an image; `mm_token_type_ids` do."""

    def layout(
        self,
        model: Any,
        processor: Any,
        inputs: Mapping[str, Tensor],
        sizes: Sequence[tuple[int, int]],
        videos: Sequence[tuple[int, int]] = (),
    ) -> tuple[View, ...]:
        """See `Family.layout`."""
        kinds = inputs.get("mm_token_type_ids")
        if kinds is not None:
            ids = inputs["input_ids"]
            ids = torch.where(kinds == 2, model.config.video_token_id, ids)
            inputs = {**inputs, "input_ids": ids}
        return super().layout(model, processor, inputs, sizes, videos)
