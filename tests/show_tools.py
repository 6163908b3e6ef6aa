"""A prompt to draw, made up: two pictures in coloured squares, one of them with tiles."""

import numpy as np
import torch
from PIL import Image

from alvts_cli.answer import Answer
from alvts_cli.families import View
from alvts_cli.show.trace import Shown, Trace

LAYERS = 6
WHOLE = (0.0, 0.0, 1.0, 1.0)
SQUARES = (4, 4)


def answered(text: str, kept: float, tokens: int) -> Answer:
    """An answer of which only the words and the counts matter."""
    return Answer(text, "selective", tokens, kept, 9, 2, 1.0, 1.0, 1.0, 1.0, int(1000 * kept))


def squares(rows: int, columns: int, seed: int, size: int = 16) -> Image.Image:
    """A picture in which every square has a bright colour of its own."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, (rows, columns, 3))
    # Far from grey: one channel full, one empty.
    colours[..., seed % 3] = 255
    colours[..., (seed + 1) % 3] = 0
    return Image.fromarray(colours.astype(np.uint8).repeat(size, 0).repeat(size, 1))


def make_trace(tokens: int, share: float, words: str, seed: int, every: int = 1) -> Trace:
    """Random choices, anew in every `every`th layer; in the first layer everything is kept."""
    random = np.random.default_rng(seed)
    kept = np.ones((LAYERS, tokens), dtype=bool)
    importance = np.full((LAYERS, tokens), np.nan, dtype=np.float32)
    ranked_in: list[int | None] = [None] * LAYERS
    for layer in range(1, LAYERS):
        ranked_in[layer] = 1 + (layer - 1) // every * every
        if ranked_in[layer] == layer:
            values = random.gamma(0.5, size=tokens).astype(np.float32)
        importance[layer] = values / values.mean()
        kept[layer] = values >= np.sort(values)[-round(share * tokens)]
    average = kept.sum() / LAYERS
    return Trace(
        answered(words, average, tokens), "chosen in words", kept, tuple(ranked_in), importance
    )


def make_shown(prompt: str = "what is it?") -> Shown:
    """Picture 1 in 4 x 4; picture 2 in 2 x 2 and in tiles of 4 x 6 with a token at every row's end:
    48 tokens."""
    images = [squares(4, 4, 0), squares(4, 6, 1)]
    tiles = torch.arange(20, 48).view(4, 7)[:, :-1]
    views = [
        View(0, WHOLE, torch.arange(16).view(4, 4)),
        View(1, WHOLE, torch.arange(16, 20).view(2, 2), name="whole"),
        View(1, WHOLE, tiles, name="tiles"),
    ]
    traces = [make_trace(48, 0.25, "a cat", 1, every=3), make_trace(48, 0.5, "a dog", 2)]
    return Shown("tiny", prompt, images, [], views, answered("a dog", 48.0, 48), traces)
