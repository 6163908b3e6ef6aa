"""Stage 1: the vision tower alone learns to say, in the language model's words, what is on a patch.

Each patch's projected feature is scored against the word embeddings as the model's own head would
score it (root-mean-square norm, then the inner product), one softmax per group of words. The
language model then starts from visual tokens that already mean something to it; trained together
from nothing, it stalls near chance.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from ..scenes import GRID
from ..words import VOCABULARY

GROUND_WEIGHT = 0.05
"""Of the word `background`: the ground fills most patches and would rule the loss."""
LOUDNESS = 0.15
"""Root mean square of a visual token, near that of the sum of a few word embeddings."""


def encode(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Projected visual tokens [B, 256, D] of `pixels` [B, 3, 192, 192]."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return model.model.multi_modal_projector(hidden[:, 1:])


def loudness_loss(features: Tensor) -> Tensor:
    """Keeps the size of visual tokens [B, 256, D] near `LOUDNESS`."""
    loudness = features.float().pow(2).mean(-1).add(1e-8).sqrt()
    return (loudness / LOUDNESS).log().pow(2).mean()


def speech_loss(
    features: Tensor, embeddings: Tensor, labels: Tensor, groups: Sequence[Sequence[str]]
) -> Tensor:
    """How far features are from saying the right word of each group.

    Args:
        features: projected visual tokens or hidden states [B, T, D].
        embeddings: word embeddings [V, D].
        labels: int64 [B, groups, T], the word's index in its group; -1 where nothing need be said.
        groups: words, of which one is said at a time.

    Returns:
        The sum over groups of the mean cross-entropy; a group nobody has to speak adds nothing.
    """
    unit = _unit(features)
    loss = features.new_zeros((), dtype=torch.float32)
    for number, words in enumerate(groups):
        target = labels[:, number].flatten()
        weight = torch.tensor([GROUND_WEIGHT if word == "background" else 1.0 for word in words])
        spoken = embeddings[[VOCABULARY.index(word) for word in words]].float()
        entropy = nn.functional.cross_entropy(
            (unit @ spoken.T).flatten(0, 1), target, weight, ignore_index=-1, reduction="sum"
        )
        loss = loss + entropy / weight[target[target >= 0]].sum().clamp(min=1)
    return loss


class CellProbe(nn.Module):
    """Asks for the exact cell of a thing, so that places finer than the nine words survive the
    projector. Used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.probe = nn.Linear(width, 2 * GRID)

    def forward(self, features: Tensor, cells: Tensor) -> Tensor:
        """Cross-entropy of row and column: `features` [B, T, D], `cells` int64 [B, 2, T] or -1."""
        places = self.probe(_unit(features)).unflatten(-1, (2, GRID)).permute(0, 3, 2, 1)
        entropy = nn.functional.cross_entropy(places, cells, ignore_index=-1, reduction="sum")
        return entropy / (cells >= 0).sum().clamp(min=1)


def _unit(features: Tensor) -> Tensor:
    features = features.float()
    return features * features.pow(2).mean(-1, keepdim=True).add(1e-8).rsqrt()
