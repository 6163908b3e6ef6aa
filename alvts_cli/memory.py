"""What a model needs in memory, known from its config before any of it is built."""

from pathlib import Path
from typing import Any

import torch

from .engine import kv_bytes_expected
from .errors import AlvtsError

_GIB = 1024**3


def count_parameters(config: Any, trust_remote_code: bool = False) -> int:
    """Weights of the model of `config`, tied ones once. Nothing is allocated."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=trust_remote_code)
    return sum(weight.numel() for weight in model.parameters())


def memory_need(
    config: Any,
    dtype: torch.dtype,
    tokens: int = 1024,
    batch: int = 1,
    trust_remote_code: bool = False,
) -> int:
    """Bytes to hold the model and to prefill `batch` prompts of `tokens` tokens, roughly.

    Weights, the whole KV cache, and the widest moment of a layer: hidden states a few times over
    and the three tensors of the MLP, with a tenth on top for the vision tower and fragmentation.
    """
    size = torch.finfo(dtype).bits // 8
    weights = count_parameters(config, trust_remote_code) * size
    return int(1.1 * weights) + prefill_need(config, dtype, tokens, batch)


def prefill_need(config: Any, dtype: torch.dtype, tokens: int, batch: int) -> int:
    """What `memory_need` counts beside the weights."""
    text = config.text_config
    size = torch.finfo(dtype).bits // 8
    cache = kv_bytes_expected(text, [tokens] * text.num_hidden_layers, size, batch)
    widest = batch * tokens * (8 * text.hidden_size + 3 * text.intermediate_size) * size
    return int(1.1 * (cache + widest))


def memory_free(device: torch.device) -> int | None:
    """Bytes that can be had on `device`, or None where there is no telling."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = _meminfo("MemAvailable")
    # In a container the machine's memory is not ours.
    limit = _read_int(Path("/sys/fs/cgroup/memory.max"))
    known = [value for value in (free, limit) if value is not None]
    return min(known) if known else None


def require_memory(name: str, need: int, device: torch.device) -> str:
    """One line saying the need and what is free.

    Raises:
        AlvtsError: it does not fit.
    """
    free = memory_free(device)
    if free is None:
        return f"{name} needs about {_gib(need)} of memory"
    if need > free:
        raise AlvtsError(
            f"{name} needs about {_gib(need)} of memory on {device} but {_gib(free)} is free, "
            f"{_gib(need - free)} too little; try fewer --layers or a smaller model"
        )
    return f"{name} needs about {_gib(need)} of memory; {_gib(free)} is free"


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def _meminfo(key: str) -> int | None:
    """A line of /proc/meminfo in bytes; None outside Linux."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
