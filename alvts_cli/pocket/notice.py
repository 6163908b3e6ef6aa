"""What `run` says when it is asked about things that pocket was never shown."""

from typing import Any

import numpy as np
from PIL import Image

# Of all pixels, how many must have one and the same colour, give or take compression.
_GROUND_SHARE = 0.5
_TOLERANCE = 6
# The grounds of scenes and of easy-VQA are pale; the darkest channel of the darkest is 225.
_PALE = 200


def is_pocket(tokenizer: Any) -> bool:
    """Whether a tokenizer has pocket's vocabulary."""
    from .words import VOCABULARY

    return tuple(sorted(tokenizer.get_vocab())) == tuple(sorted(VOCABULARY))


def foreign_words(tokenizer: Any, prompt: str) -> list[str]:
    """The words of `prompt` that are not in the vocabulary, each once, as the user wrote them."""
    encoded = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    found = [
        prompt[start:end]
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if token == tokenizer.unk_token_id
    ]
    return list(dict.fromkeys(found))


def looks_rendered(image: Image.Image) -> bool:
    """Whether a large part of the picture is one flat pale colour, as in a scene or easy-VQA."""
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(np.int16)
    # The commonest colour, on a grid coarse enough to survive JPEG; then all that is close to it.
    coarse = (pixels // 4).astype(np.int32) @ np.array([64 * 64, 64, 1], dtype=np.int32)
    values, counts = np.unique(coarse, return_counts=True)
    ground = np.median(pixels[coarse == values[counts.argmax()]], axis=0)
    share = (np.abs(pixels - ground).max(axis=1) <= _TOLERANCE).mean()
    return bool(ground.min() >= _PALE and share >= _GROUND_SHARE)
