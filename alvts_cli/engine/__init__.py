"""Adaptive layer-wise visual token selection at run time.

In prefill every decoder layer

1. scores all visual tokens with its selector (`scoring`),
2. picks the `k` best (`selecting`, with `k` from `keep` and `plan`),
3. runs on these and all text tokens, at their original positions, while the others stay in the
   residual stream (`merging`, `masks`),
4. caches the keys and values of what it ran on, and no others (`cache`).

The next layer scores all tokens again. Everything is done by forward hooks (`attach`); nothing of
the model or of transformers is patched. Another way of ranking tokens is one class with one
method, a `Scorer`, given to `attach_scorer`.
"""

from .attach import Attachment, Prefill, Scorer, Selectors, attach, attach_scorer, keep_of
from .cache import SelectiveLayer, prepare_cache
from .calls import cache_of
from .flops import PrefillFlops, kv_bytes, kv_bytes_expected, prefill_flops
from .keep import Keep, KeepArgument, Schedules, Solved, resolve_keep, spend
from .plan import Plan
from .scoring import LayerSelector, default_rank, importance
from .selecting import select

__all__ = [
    "Attachment",
    "Keep",
    "KeepArgument",
    "LayerSelector",
    "Plan",
    "Prefill",
    "PrefillFlops",
    "Schedules",
    "Scorer",
    "SelectiveLayer",
    "Selectors",
    "Solved",
    "attach",
    "attach_scorer",
    "cache_of",
    "default_rank",
    "importance",
    "keep_of",
    "kv_bytes",
    "kv_bytes_expected",
    "prefill_flops",
    "prepare_cache",
    "resolve_keep",
    "select",
    "spend",
]
