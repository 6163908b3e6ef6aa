"""The adapter's file: every row of a matrix as 8-bit numbers and one scale."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from ..errors import AlvtsError
from ..files import read_bytes

_SCALE = ".scale"


def save_adapter(tensors: dict[str, Tensor], path: Path) -> None:
    """Write `tensors` (any float dtype): matrices as int8 rows with a float32 scale a row, the
    largest number of a row at 127; vectors as float32."""
    packed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().float()
        if tensor.dim() < 2:
            packed[name] = tensor.contiguous()
            continue
        scale = tensor.abs().amax(dim=1).clamp(min=1e-12) / 127
        packed[name] = (tensor / scale[:, None]).round().to(torch.int8)
        packed[name + _SCALE] = scale
    save_file(packed, path)


def load_adapter(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `save_adapter`, or of one that holds floats, in float32.

    Raises:
        AlvtsError: no such file, or not a safetensors file.
    """
    try:
        packed = load(read_bytes(path, "adapter"))
    except (SafetensorError, ValueError, KeyError) as error:
        raise AlvtsError(f"{path} is not a safetensors file: {error}") from None
    return {
        name: tensor.float() * packed[name + _SCALE][:, None]
        if name + _SCALE in packed
        else tensor.float()
        for name, tensor in packed.items()
        if not name.endswith(_SCALE)
    }
