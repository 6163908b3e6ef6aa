"""The supported architectures, one thin declarative file each."""

from typing import Any

from ..errors import AlvtsError
from . import llava, llava_next, qwen2_5_vl, qwen3_vl
from .base import Family
from .layer import QueryKey
from .layout import View

FAMILIES: tuple[Family, ...] = (
    llava.FAMILY,
    llava_next.FAMILY,
    qwen2_5_vl.FAMILY,
    qwen3_vl.FAMILY,
)

__all__ = ["FAMILIES", "Family", "QueryKey", "View", "family_of"]


def family_of(model_or_config: Any) -> Family:
    """The family of a model, or of a model's config.

    Raises:
        AlvtsError: no family declares this `model_type`.
    """
    config = getattr(model_or_config, "config", model_or_config)
    model_type = getattr(config, "model_type", None)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise AlvtsError(f"alvts does not know the architecture {model_type!r}; it knows: {known}")
