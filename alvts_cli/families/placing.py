"""Where the weights of a model are: on its layers' devices, or kept elsewhere by accelerate.

A part that accelerate offloads has weights of the device `meta`; a hook fetches them before the
part runs and drops them behind it. So what is called works as ever, and what is read must be asked
of the hook.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AlvtsError


def where(module: Any) -> tuple[torch.device, torch.dtype]:
    """Where a module with a weight runs, and in what."""
    weight = module.weight
    if not weight.is_meta:
        return weight.device, weight.dtype
    for hook in _hooks(module):
        if hook.execution_device is not None:
            return torch.device(hook.execution_device), weight.dtype
    raise _nowhere()


def stored(module: Any, name: str = "weight") -> Any:
    """A parameter with its numbers, wherever they are kept; None where it is None."""
    parameter = getattr(module, name)
    if parameter is None or not parameter.is_meta:
        return parameter
    for hook in _hooks(module):
        if hook.weights_map is not None:
            kept: Tensor = hook.weights_map[name]
            return kept
    raise _nowhere()


def input_device(model: Any) -> torch.device:
    """Where the inputs of `model` go."""
    return where(model.get_input_embeddings())[0]


def is_offloaded(model: nn.Module) -> bool:
    """Whether any of its weights is kept elsewhere than where it is used."""
    return any(weight.is_meta for weight in model.parameters())


def check_placing(model: Any) -> None:
    """Refuse a model whose weights are not where alvts can have them.

    Raises:
        AlvtsError: it has no weights, some are on a disk, or its layers are shared out among
            processes.
    """
    if getattr(model, "tp_size", None) is not None:
        raise AlvtsError(
            "tensor parallelism (tp_plan) gives each process some heads of every layer, and alvts "
            "ranks tokens by all of them; load the model without tp_plan, on one device or with "
            "device_map"
        )
    for module in model.modules():
        for hook in _hooks(module):
            kept = getattr(hook.weights_map, "dataset", hook.weights_map)
            if getattr(kept, "index", None):
                raise AlvtsError(
                    "part of the model is offloaded to a disk, from where it would be read again "
                    "for every look at it; give it more memory, with device_map or max_memory"
                )
        if not _hooks(module) and any(own.is_meta for own in module.parameters(recurse=False)):
            raise _nowhere()


def _hooks(module: Any) -> list[Any]:
    """accelerate's hooks on a module that know where its weights are."""
    hook = getattr(module, "_hf_hook", None)
    # One, or a sequence of them.
    return [each for each in getattr(hook, "hooks", (hook,)) if hasattr(each, "weights_map")]


def _nowhere() -> AlvtsError:
    return AlvtsError("part of the model has no weights; load it whole, on one or more devices")
