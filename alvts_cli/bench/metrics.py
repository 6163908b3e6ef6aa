"""The figures of a benchmark by name, and gates on them.

No torch here: gates are read before anything heavy is loaded.
"""

import math
from dataclasses import dataclass

from ..errors import AlvtsError
from ..gates import ANY, AT_LEAST_0, POSITIVE, Gate, Values, read_gate

FORMAT = 1
"""Of the JSON object with these figures; raised when a name in it changes its meaning."""


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        about: what it is, in a few words.
        better: 1 when more is better, -1 when less is, 0 when it only describes the prompt.
        portable: whether it means something on another day: a ratio or a count, not a time.
        values: what it can be.
    """

    about: str
    better: int
    portable: bool
    values: Values = POSITIVE


METRICS: dict[str, Metric] = {
    "prefill_speedup": Metric("language model's prefill, dense / selective", 1, True),
    "prefill_speedup_limit": Metric("the same, dense / short", 0, True),
    # Of differences of times: too unsteady to be compared with another day's.
    "efficiency": Metric("of prefill, (dense - selective) / (dense - short)", 1, False, ANY),
    "ttft_speedup": Metric("time to the first token, dense / selective", 1, True),
    "decode_speedup": Metric("time per new token, dense / selective", 1, True),
    "total_speedup": Metric("whole generation, dense / selective", 1, True),
    "scoring_share": Metric(
        "part of the selective prefill spent on scoring", -1, False, Values(0, 1)
    ),
    "flops": Metric("decoder and selectors in selective prefill, counted", -1, True),
    "flops_dense": Metric("decoder in dense prefill, counted", 0, True),
    "flops_ratio": Metric("flops_dense / flops", 1, True),
    "kv_bytes": Metric("KV cache after selective prefill, measured", -1, True),
    "kv_bytes_dense": Metric("KV cache after dense prefill, measured", 0, True),
    "kv_ratio": Metric("kv_bytes_dense / kv_bytes", 1, True),
    "launches_dense": Metric(
        "operators that a GPU would launch, a dense layer", 0, True, AT_LEAST_0
    ),
    "launches_over_dense": Metric("more in a layer that chooses, counted", -1, True, ANY),
    "launches_going_on": Metric("more in one that goes on with a choice, counted", -1, True, ANY),
    "launches_text_only": Metric("more in one that keeps no visual token, counted", -1, True, ANY),
    "launches_once": Metric("more beside the layers of a prefill, counted", -1, True, ANY),
    "launches_prefill": Metric("more in the whole prefill, counted", -1, True, ANY),
    "launches_decode": Metric("more in a layer for a decoded token, counted", -1, True, ANY),
    "host_syncs": Metric(
        "waits of the host for the device in the layers, counted", -1, True, AT_LEAST_0
    ),
    "host_copies": Metric(
        "copies from the host to the device there, counted", -1, True, AT_LEAST_0
    ),
    "visual_tokens": Metric("per sample", 0, True),
    "visual_tokens_kept": Metric("per sample, mean over layers", -1, True, AT_LEAST_0),
    "text_tokens": Metric("per sample", 0, True),
    "vision_ms": Metric("vision tower", -1, False, AT_LEAST_0),
    "prefill_ms": Metric("language model's prefill, selective", -1, False),
    "prefill_ms_dense": Metric("the same, dense", 0, False),
    "short_ms": Metric("the same, dense on text and layer average alone", 0, False),
    "scoring_ms": Metric("selectors, all layers", -1, False, AT_LEAST_0),
    "ttft_ms": Metric("time to the first token, selective", -1, False),
    "ttft_ms_dense": Metric("the same, dense", 0, False),
    "decode_ms": Metric("per new token, selective", -1, False),
    "decode_ms_dense": Metric("the same, dense", 0, False),
    "total_ms": Metric("whole generation, selective", -1, False),
    "total_ms_dense": Metric("the same, dense", 0, False),
    "plan_error": Metric(
        "predicted prefill speed-up off the measured, --against-plan", -1, False, AT_LEAST_0
    ),
}


def parse_gate(text: str) -> Gate:
    """Read `NAME OP NUMBER`.

    Raises:
        AlvtsError: another form, an unknown metric, or as `Gate.check_limit` has it.
    """
    example = "NAME>=NUMBER with >=, <=, ==, > or <, such as prefill_speedup>=2"
    gate = read_gate(text, r"\w+", example)
    if gate.metric not in METRICS:
        raise AlvtsError(f"unknown metric {gate.metric!r}; known: {', '.join(METRICS)}")
    gate.check_limit(METRICS[gate.metric].values)
    return gate


def parse_share(text: str) -> float:
    """`10%` or `0.1` as 0.1.

    Raises:
        AlvtsError: not a number of at least 0, or all of it and more: no ratio gets worse by that.
    """
    try:
        share = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        share = math.nan
    if not (math.isfinite(share) and share >= 0):
        raise AlvtsError(f"{text!r} is not a share; write 10% or 0.1")
    if share >= 1:
        raise AlvtsError(
            f"{text!r} is {100 * share:g} %, and no ratio can get worse by that; write less than "
            "100%, such as 10% or 0.1"
        )
    return share
