"""All that the engine offers, loaded together: torch comes with it."""

from .attaching import attach, attach_scorer, keep_of, policy_of
from .attachment import Attachment, Prefill, is_attached
from .cache import SelectiveLayer, prepare_cache
from .calls import cache_of, new_cache
from .carry import Carry
from .flops import PrefillFlops, Selection, kv_bytes, kv_bytes_expected, prefill_flops
from .forward import Chosen, Forward, Pieces, Scorer, Watch
from .keep import Keep, KeepArgument, Schedules, Solved, resolve_keep, spend
from .paper import PaperSelector
from .placing import Selector, Selectors, make_pieces
from .plan import Plan
from .policy import NAMED, PAPER, Picked, Policy, parse_policy, policy_for
from .scoring import LayerSelector, importance
from .selecting import select
from .sizes import default_carry_rank, default_rank, paper_rank

__all__ = [
    "NAMED",
    "PAPER",
    "Attachment",
    "Carry",
    "Chosen",
    "Forward",
    "Keep",
    "KeepArgument",
    "LayerSelector",
    "PaperSelector",
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
    "Selector",
    "Selectors",
    "Solved",
    "Watch",
    "attach",
    "attach_scorer",
    "cache_of",
    "default_carry_rank",
    "default_rank",
    "importance",
    "is_attached",
    "keep_of",
    "kv_bytes",
    "kv_bytes_expected",
    "make_pieces",
    "new_cache",
    "paper_rank",
    "parse_policy",
    "policy_for",
    "policy_of",
    "prefill_flops",
    "prepare_cache",
    "resolve_keep",
    "select",
    "spend",
]
