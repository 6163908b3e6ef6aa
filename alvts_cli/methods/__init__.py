"""The method and its peers, all on one engine, one file each.

Each is written from its description; no code of theirs is in here. A budget is a **layer average**:
the mean over layers of the visual tokens that a layer runs on. Tables in this field often give the
tokens kept *after the pruning layer* instead, which flatters whoever prunes late.

This module loads no torch, so that a name can be checked at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import AlvtsError

if TYPE_CHECKING:
    from ..engine import Selectors
    from .base import Method

METHODS = {
    "dense": "dense:Dense",
    "alvts": "alvts:Alvts",
    "alvts-plain": "alvts:AlvtsPlain",
    "alvts-paper": "alvts:AlvtsPaper",
    "fastv": "fastv:FastV",
    "pyramiddrop": "pyramiddrop:PyramidDrop",
    "dart": "dart:Dart",
    "divprune": "divprune:DivPrune",
    "vtw": "vtw:Vtw",
    "random": "random:Random",
    "random-static": "random:RandomStatic",
    "random-policy": "random:RandomPolicy",
    "downsample": "downsample:Downsample",
    "oracle": "oracle:Oracle",
}
"""Name -> file of this folder, and class in it."""

FITTED = ("alvts", "alvts-plain", "random-policy", "oracle")
"""Those that are given selectors: for their scores, their policies or both."""

PAPER = "alvts-paper"
"""The one that is given selectors of the paper's form."""


def check_method(name: str) -> None:
    """
    Raises:
        AlvtsError: there is no method of this name.
    """
    if name not in METHODS:
        raise AlvtsError(f"unknown method {name!r}; known: {', '.join(METHODS)}")


def make_method(name: str, selectors: "Selectors | None" = None, seed: int = 0) -> "Method":
    """A method by its name.

    Raises:
        AlvtsError: an unknown name, or a method that needs selectors and got none.
    """
    check_method(name)
    module, _, class_name = METHODS[name].partition(":")
    made: Method = getattr(import_module(f".{module}", __name__), class_name)(selectors, seed)
    return made
