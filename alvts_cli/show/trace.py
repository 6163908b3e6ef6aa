"""An answer, and what every layer kept for it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..answer import Answer, answer
from ..artifact import Artifact
from ..engine import Chosen, keep_of, policy_of
from ..families import View, family_of
from ..models import Loaded


@dataclass(frozen=True, eq=False)
class Trace:
    """What the `L` layers kept of the `N` visual tokens of a prompt.

    Attributes:
        answer: that was given.
        policy: how tokens were chosen, in words.
        kept: bool `[L, N]`.
        ranked_in: per layer, the one whose ranking holds there; None where nothing is ranked,
            because everything or nothing is kept.
        importance: float32 `[L, N]`, the ranking layer's, in shares of its mean over the tokens;
            nan where nothing is ranked.
    """

    answer: Answer
    policy: str
    kept: np.ndarray
    ranked_in: tuple[int | None, ...]
    importance: np.ndarray

    @property
    def counts(self) -> list[int]:
        """Tokens kept, per layer."""
        return [int(count) for count in self.kept.sum(axis=1)]


@dataclass(frozen=True, eq=False)
class Shown:
    """All there is to draw.

    Attributes:
        model: its name.
        prompt: the user's words.
        images: of the prompt, RGB.
        videos: of the prompt, their frames, RGB.
        views: where the visual tokens lie.
        dense: the dense model's answer.
        traces: at least one, ascending by the number of tokens kept.
    """

    model: str
    prompt: str
    images: Sequence[Image.Image]
    videos: Sequence[Sequence[Image.Image]]
    views: Sequence[View]
    dense: Answer
    traces: Sequence[Trace]

    def picture(self, view: View) -> Image.Image:
        """What lies under a view: an image, or the first of its frames."""
        if view.frames is None:
            return self.images[view.picture]
        return self.videos[view.picture][view.frames[0]]

    def label(self, view: View) -> str:
        """What tells a view from the others; empty where there are none."""
        if view.frames is not None:
            first, last = view.frames
            # A video of an odd number of frames ends with one that is seen twice.
            last = min(last, len(self.videos[view.picture]) - 1)
            parts = [f"frames {first + 1}-{last + 1}" if last > first else f"frame {first + 1}"]
            if len(self.videos) > 1:
                parts.insert(0, f"video {view.picture + 1}")
        else:
            parts = [f"image {view.picture + 1}"] if len(self.images) > 1 or self.videos else []
        return ", ".join([*parts, *([view.name] if view.name else [])])


class Recorder:
    """Notes what every layer keeps of one prompt; to be given to `Attachment.watch`."""

    def __init__(self, visual: Tensor, layers: int) -> None:
        """
        Args:
            visual: bool `[T]`, True at visual tokens.
            layers: of the decoder.
        """
        self._places = visual.nonzero()[:, 0].cpu().numpy()
        self._tokens = len(visual)
        shape = (layers, len(self._places))
        # A layer that nothing is told of runs on all tokens.
        self.kept = np.ones(shape, dtype=bool)
        self.importance = np.full(shape, np.nan, dtype=np.float32)
        self.ranked_in: list[int | None] = [None] * layers

    def __call__(self, chosen: Chosen) -> None:
        """Called by every layer that a token skips."""
        runs = np.zeros(self._tokens, dtype=bool)
        index = chosen.index[0] if chosen.valid is None else chosen.index[0][chosen.valid[0]]
        runs[index.cpu().numpy()] = True
        self.kept[chosen.layer] = runs[self._places]
        if chosen.importance is not None:
            values = chosen.importance[0].float().cpu().numpy()[self._places]
            # A mean of 0 would have to be one of zeros.
            self.importance[chosen.layer] = values / max(values.mean(), np.finfo(np.float32).tiny)
            self.ranked_in[chosen.layer] = chosen.ranked_in


def trace(
    loaded: Loaded,
    inputs: dict[str, Any],
    selectors: Artifact,
    keep: str | None,
    max_new_tokens: int,
) -> Trace:
    """Answer greedily, and note what is kept.

    Args:
        loaded: the model.
        inputs: of one prompt, from `answer.prepare`.
        selectors: of this model.
        keep: as `resolve_keep` reads it; None for what the selectors say.
        max_new_tokens: longest answer.

    Raises:
        AlvtsError: a `keep` that does not fit the model.
    """
    family: Any = family_of(loaded.model)
    visual = family.visual_mask(loaded.model, inputs["input_ids"])[0]
    recorder = Recorder(visual, len(family.layers(loaded.model)))
    given = answer(loaded, inputs, selectors, keep, max_new_tokens, False, recorder)
    policy = policy_of(selectors, keep_of(selectors, keep))
    return Trace(given, str(policy), recorder.kept, tuple(recorder.ranked_in), recorder.importance)
