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
(`attach`) call it; nothing of the model or of transformers is patched. Another way of ranking
tokens is one class with one method, a `Scorer`, given to `attach_scorer`.
"""

from .attach import (
    Attachment,
    Prefill,
    Selectors,
    attach,
    attach_scorer,
    keep_of,
    make_pieces,
    policy_of,
)
from .cache import SelectiveLayer, prepare_cache
from .calls import cache_of
from .carry import Carry, default_carry_rank
from .flops import PrefillFlops, Selection, kv_bytes, kv_bytes_expected, prefill_flops
from .forward import Forward, Pieces, Scorer
from .keep import Keep, KeepArgument, Schedules, Solved, resolve_keep, spend
from .plan import Plan
from .policy import NAMED, PAPER, Picked, Policy, parse_policy, policy_for
from .scoring import LayerSelector, default_rank, importance
from .selecting import select

__all__ = [
    "NAMED",
    "PAPER",
    "Attachment",
    "Carry",
    "Forward",
    "Keep",
    "KeepArgument",
    "LayerSelector",
    "Picked",
    "Pieces",
    "Plan",
    "Policy",
    "Prefill",
    "PrefillFlops",
    "Schedules",
    "Scorer",
    "Selection",
    "SelectiveLayer",
    "Selectors",
    "Solved",
    "attach",
    "attach_scorer",
    "cache_of",
    "default_carry_rank",
    "default_rank",
    "importance",
    "keep_of",
    "kv_bytes",
    "kv_bytes_expected",
    "make_pieces",
    "parse_policy",
    "policy_for",
    "policy_of",
    "prefill_flops",
    "prepare_cache",
    "resolve_keep",
    "select",
    "spend",
]
