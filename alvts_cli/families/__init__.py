"""The supported architectures: a table, and a file for each that is more than its row."""

from typing import Any

from torch import nn

from ..errors import AlvtsError
from .base import CAUSAL, Family
from .layer import QueryKey
from .layout import View
from .table import FAMILIES, REFUSED

__all__ = ["FAMILIES", "Family", "QueryKey", "View", "check_whole", "family_of"]


def family_of(model_or_config: Any) -> Family:
    """The family of a model, or of a model's config.

    Raises:
        AlvtsError: no family declares this `model_type`, or one that cannot run.
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            if family.mask != CAUSAL:
                raise AlvtsError(f"alvts does not support {family.name}: {family.mask}")
            return family
    if model_type in REFUSED:
        raise AlvtsError(f"alvts does not support {model_type}: {REFUSED[model_type]}")
    able = (family for family in FAMILIES if family.mask == CAUSAL)
    known = ", ".join(name for family in able for name in family.model_types)
    raise AlvtsError(f"alvts does not know the architecture {model_type!r}; it knows: {known}")


def check_whole(model: Any) -> None:
    """Refuse anything but a model as transformers makes it.

    Raises:
        AlvtsError: not a loaded model, an unknown architecture, a part of a model or a wrapper
            around one.
    """
    if not isinstance(model, nn.Module):
        raise AlvtsError(
            f"a model as from_pretrained gives it is wanted here, not a {type(model).__name__}"
        )
    family = family_of(model)
    try:
        family.backbone(model), family.layers(model)
    except AttributeError:
        raise AlvtsError(
            "alvts attaches to a model as from_pretrained gives it, not to a part of it or to a "
            f"wrapper around it such as {type(model).__name__}; pass what is inside, of PEFT "
            "model.get_base_model()"
        ) from None
