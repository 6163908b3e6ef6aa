"""What tells whether the work of an interrupted run was done for the same questions.

A run that goes on with an earlier one takes its answers or layers for its own. The names of files
and records do not say that these are the same: pictures are replaced, and folders hold files of the
same names. What counts is what the model is given: words, pixels, and how a processor prepares
them.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np


def of_question(images: Iterable[Any], *words: str) -> str:
    """A digest of decoded pictures, by their sizes and pixels, and of the words with them."""
    digest = hashlib.sha256(json.dumps(words).encode())
    for image in images:
        pixels = np.asarray(image)
        digest.update(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes())
    return digest.hexdigest()


def of_processor(processor: Any) -> str:
    """A digest of how a processor prepares pictures and turns: its settings, those of its image
    processor among them, and its chat template."""
    told = [type(processor).__name__, processor.to_json_string()]
    template = getattr(processor, "chat_template", None)
    return hashlib.sha256(json.dumps([*told, template]).encode()).hexdigest()
