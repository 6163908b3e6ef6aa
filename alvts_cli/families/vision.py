"""Pictures go through the vision tower once, however often a prompt is run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from . import family_of


@dataclass(frozen=True)
class _Features:
    """What the tower made of some pictures.

    Attributes:
        told: what it was told, held because it is known by its place in memory.
        leaves: tensors on the CPU and where they were, and whatever else there is.
        form: of what the leaves are part of.
    """

    told: list[Any]
    leaves: list[tuple[Any, torch.device | None]]
    form: TreeSpec

    def back(self) -> Any:
        return tree_unflatten(
            [leaf if device is None else leaf.to(device) for leaf, device in self.leaves],
            self.form,
        )


def _away(leaf: Any) -> tuple[Any, torch.device | None]:
    return (leaf.cpu(), leaf.device) if isinstance(leaf, Tensor) else (leaf, None)


@contextmanager
def seen_once(model: Any) -> Iterator[None]:
    """Within, the features of pictures are remembered, on the CPU.

    For whoever runs the same prompts dense and under many policies: with few tokens kept, most of
    a forward may be the vision tower's. Pictures are the same where their tensors are the very same
    objects, so nothing has to be compared; these are held until the end.

    Args:
        model: of a known family. The features are those of its `get_image_features`, which every
            family in transformers has by now. Of one without they are made every time, and so are
            those of videos.
    """
    backbone = family_of(model).backbone(model)
    see = getattr(backbone, "get_image_features", None)
    if see is None:
        yield
        return
    seen: dict[tuple[object, ...], _Features] = {}

    # transformers reads its signature.
    @wraps(see)
    def remembered(*args: Any, **kwargs: Any) -> Any:
        told = tree_leaves((args, sorted(kwargs.items())))
        key = tuple(id(one) if isinstance(one, Tensor) else repr(one) for one in told)
        if key not in seen:
            leaves, form = tree_flatten(see(*args, **kwargs))
            away = [_away(leaf) for leaf in leaves]
            seen[key] = _Features(told, away, form)
        return seen[key].back()

    own = vars(backbone)
    before = own.get("get_image_features")
    own["get_image_features"] = remembered
    try:
        yield
    finally:
        del own["get_image_features"]
        if before is not None:
            own["get_image_features"] = before
