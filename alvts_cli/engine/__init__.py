"""Adaptive layer-wise visual token selection at run time.

In prefill every decoder layer

1. scores all visual tokens with its selector (`scoring`), perhaps less what a more important token
   says already (`diversity`), or goes on with an earlier layer's choice (`policy`),
2. picks the `k` best (`selecting`, with `k` from `keep` and `plan`),
3. runs on these and all text tokens, at their original positions (`masks`), perhaps weighed by what
   they stand for (`mass`), while the others stay in the residual stream (`merging`) or get a fitted
   stand-in for the layer's update (`carry`),
4. caches the keys and values of what it ran on, and no others (`cache`).

The next layer has all tokens to choose from again. `forward` puts that together, and forward hooks
on the layers (`attachment`) call it, inside of a wrapper around the backbone's `forward`, so that
what is known of a forward ends with it; nothing of transformers is patched. Another way of ranking
tokens is one class with one method, a `Scorer`, given to `attach_scorer`. Selectors as the paper
has them are in `paper`.

What is offered is listed in `names`, and loaded by the first use of any of it: torch and
transformers come with that. `keep`, `policy` and `sizes` do without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .names import *  # noqa: F403


def __getattr__(name: str) -> Any:
    # Python asks for parts of the package this way too, before it imports them.
    if name.startswith("_") or name == "names":
        raise AttributeError(name)
    names = import_module(".names", __name__)
    if name not in names.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(names, name)
