"""Machines: what they reach.

A card's peaks are its maker's: `cards.json` names the document, and the page on which its numbers
were read, for the documents themselves could not be had here. What a program reaches of them is
**assumed**, alike for all cards; on one H100 it was measured (in brackets):

- matrix products get `MATMUL_SHARE` of the arithmetic: large ones in bfloat16 were seen at 79 % on
  an A100 and 75 % on a B200 (lists of measured cards), those of a layer are smaller (65 % at
  768 rows, 75 at 1,536);
- attention gets `ATTENTION_SHARE`, and `BIASED_SHARE` with a number added to every logit, which the
  flash kernel has no place for: then another kernel runs, that computes the upper triangle too
  (33 % and 24 at 1,536 tokens, both less at fewer);
- memory gives `MEMORY_SHARE` of its bandwidth (87 %);
- an eager launch costs the host `LAUNCH`: torch, Python modules around it, and the driver. A token
  of an 8B model decoded in 8.4 ms eager on an H100, with about 40 launches in each of 32 layers,
  makes 6.6 us (a published run, not ours; 17 us in the virtual machine of that H100: the host is
  what differs most, so measure it);
- in a CUDA graph a kernel starts `GRAPH_LAUNCH` behind the one before it.

`alvts plan --on this` measures all of them instead, on the machine it runs on.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..errors import AlvtsError

MATMUL_SHARE = 0.65
ATTENTION_SHARE = 0.4
BIASED_SHARE = 0.25
MEMORY_SHARE = 0.85
LAUNCH = 6e-6
GRAPH_LAUNCH = 1e-6

Curve = tuple[tuple[float, float], ...]
"""Points of a rate over a size, sorted by the size, at least one."""

Surface = tuple[tuple[float, Curve], ...]
"""Curves over another size, sorted by it, at least one."""


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches. All in units per second, seconds and bytes.

    Attributes:
        name: short.
        about: what it is, and where the numbers come from.
        matmul: FLOP/s of a product by the numbers in its right side (inner times columns), and by
            its number of rows; where measured, reading the weights is in it.
        attention: FLOP/s of causal attention, counted as causal, by the number of tokens.
        biased: the same with a number added to the logits, the whole square counted.
        bandwidth: of memory, for weights and cache.
        elementwise: bytes per second of operators on activations, by the bytes that one moves.
        launch: of one operator, on the host.
        graph_launch: between two kernels of a graph; None where there are no graphs.
        overlaps: whether the host runs ahead, so that launches hide behind work.
        memory: that a model may fill.
        dtype: the precision that all this is of.
        wide: bytes of a number in it, over the two of bfloat16, which `work` counts in.
        spread: how far apart timings of one figure were, as a share; 0 where nothing was measured.
    """

    name: str
    about: str
    matmul: Surface
    attention: Curve
    biased: Curve
    bandwidth: float
    elementwise: Curve
    launch: float
    graph_launch: float | None
    overlaps: bool
    memory: float
    dtype: str = "bfloat16"
    wide: float = 1.0
    spread: float = 0.0


def at(curve: Curve, size: float) -> float:
    """The rate at a size: between two points along a straight line of logarithms, and beyond the
    ends as at the ends."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (low, before), (high, after) in pairwise(curve):
        if size <= high:
            step = math.log(size / low) / math.log(high / low)
            return math.exp(math.log(before) + step * math.log(after / before))
    return curve[-1][1]


def over(surface: Surface, size: float, then: float) -> float:
    """The rate at two sizes, of the curves and on them, in the same way."""
    return at(tuple((where, at(curve, then)) for where, curve in surface), size)


def card(name: str) -> Ceilings:
    """A card by its name, at the assumed shares of its peaks.

    Raises:
        AlvtsError: not one of `card_names()`.
    """
    cards = _cards()
    if name not in cards:
        raise AlvtsError(f"unknown card {name!r}; known: {', '.join(cards)}, and this")
    data = cards[name]
    peak, bandwidth = data["tflops"] * 1e12, data["gb_per_s"] * 1e9
    return Ceilings(
        name=name,
        about=f"{data['about']} ({data['source']}); shares of these peaks are assumed: "
        f"{MATMUL_SHARE:.0%} in products, {ATTENTION_SHARE:.0%} in attention "
        f"({BIASED_SHARE:.0%} with a bias), {MEMORY_SHARE:.0%} of the bandwidth; "
        f"a launch {LAUNCH * 1e6:g} us, in a graph {GRAPH_LAUNCH * 1e6:g} us",
        matmul=((1, ((1, peak * MATMUL_SHARE),)),),
        attention=((1, peak * ATTENTION_SHARE),),
        biased=((1, peak * BIASED_SHARE),),
        bandwidth=bandwidth * MEMORY_SHARE,
        elementwise=((1, bandwidth * MEMORY_SHARE),),
        launch=LAUNCH,
        graph_launch=GRAPH_LAUNCH,
        overlaps=True,
        memory=data["gb"] * 1e9,
    )


def card_names() -> list[str]:
    """Of all cards that are known."""
    return list(_cards())


@cache
def _cards() -> dict[str, dict[str, Any]]:
    cards: dict[str, dict[str, Any]] = json.loads(
        Path(__file__).with_name("cards.json").read_text()
    )
    return cards
