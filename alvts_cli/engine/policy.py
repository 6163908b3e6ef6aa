"""How a layer's tokens are chosen and what becomes of the others: which pieces are in use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import AlvtsError

MOST_TURNS = 64
"""Each is three launches."""


@dataclass(frozen=True)
class Policy:
    """A combination of pieces; without arguments, the method of the paper.

    Attributes:
        every: a choice holds for so many layers, then the next one ranks all tokens again; 0: the
            first choice holds to the end.
        quality: with a number, tokens are to differ from each other too (see `diversity`): the
            exponent of importance there; None ranks by importance alone.
        turns: so many tokens are chosen one after the other, each by what the ones before it leave
            unsaid (see `diversity`), and only then the rest at once; 0 for none. Needs `quality`.
        mass: a kept token counts for those that it stands for (see `mass`).
        pool: where it is chosen, a kept token becomes the mean of those that it stands for.
        carry: skipped tokens get the layer's fitted update instead of none (see `carry`).
    """

    every: int = 1
    quality: float | None = None
    turns: int = 0
    mass: bool = False
    pool: bool = False
    carry: bool = False

    def __post_init__(self) -> None:
        """
        Raises:
            AlvtsError: a number out of range.
        """
        if self.every < 0:
            raise AlvtsError(f"a choice holds for 0 (all) or more layers, not {self.every}")
        if self.quality is not None and not (math.isfinite(self.quality) and self.quality > 0):
            raise AlvtsError(f"the exponent of importance must be above 0, not {self.quality}")
        if not 0 <= self.turns <= MOST_TURNS:
            raise AlvtsError(f"0 to {MOST_TURNS} tokens are chosen in turn, not {self.turns}")
        if self.turns and self.quality is None:
            raise AlvtsError("tokens are chosen in turn only where they are to differ (quality)")

    @property
    def compares(self) -> bool:
        """Whether tokens are compared with each other."""
        return self.quality is not None or self.mass or self.pool

    def __str__(self) -> str:
        often = "once" if self.every == 0 else "in each layer"
        parts = [f"chosen {often if self.every < 2 else f'in every {self.every} layers'}"]
        if self.quality is not None:
            parts.append(f"diverse (importance^{self.quality:g})")
        if self.turns:
            parts.append(f"{self.turns} in turn")
        parts += [name for name in ("mass", "pool", "carry") if getattr(self, name)]
        return ", ".join(parts)


PAPER = Policy()
"""Each layer chooses the most important tokens; what is skipped stays as it is."""


NAMED = {
    "paper": PAPER,
    "once": Policy(every=0, quality=0.3, mass=True),
    "in-turn": Policy(every=0, quality=0.3, turns=8, mass=True, pool=True),
    "every-4": Policy(every=4, quality=0.3, mass=True, pool=True, carry=True),
    "each": Policy(every=1, quality=0.3, mass=True, carry=True),
}
"""Policies by the names that the command line has for them."""


LAYERS = (
    "dense",
    "chooses",
    "goes_on",
    "goes_on_again",
    "goes_on_otherwise",
    "text_only",
    "text_goes_on",
)
"""What a layer of a prefill may do: run on all tokens; rank and run on the best; run on the
selection that the layer before ran on; on an earlier one, taken up again; on another number of an
earlier ranking's best; on text alone; on text alone like the layer before."""


def due_layers(
    keep_counts: Sequence[Sequence[int]], visual_counts: Sequence[int], every: int
) -> tuple[tuple[bool, ...], ...]:
    """Where each sample's tokens are ranked, `[layer][sample]`: in the layers that they would be in
    without the others of its batch.

    That is where some but not all are kept, for the first time, and then again from `every` layers
    behind on; with 0 never again.

    Args:
        keep_counts: `[layer][sample]`, `k`.
        visual_counts: per sample, `N`.
        every: see `Policy`.
    """
    ranked: list[int | None] = [None] * len(visual_counts)
    found = []
    for i, kept in enumerate(keep_counts):
        row = []
        for b, (k, n) in enumerate(zip(kept, visual_counts, strict=True)):
            last = ranked[b]
            now = 0 < k < n and (last is None or (every > 0 and i - last >= every))
            ranked[b] = i if now else last
            row.append(now)
        found.append(tuple(row))
    return tuple(found)


def what_layers_do(
    policy: Policy, kept: Sequence[int], visual_tokens: int, adds_behind: int
) -> list[str]:
    """One of `LAYERS` for every layer of a prefill.

    Args:
        policy: that tokens are chosen under.
        kept: visual tokens of every layer.
        visual_tokens: of the prompt.
        adds_behind: as `families.Family.adds_behind` has it: up to there all tokens are put back
            behind every layer, as everywhere if the policy carries what is skipped.
    """
    found, number = [], -1
    due = due_layers([(count,) for count in kept], (visual_tokens,), policy.every)
    for i, count in enumerate(kept):
        # The selection of the layer before, where that is handed on.
        handed = None if i == 0 or i <= adds_behind or policy.carry else kept[i - 1]
        if count == visual_tokens:
            found.append("dense")
        elif count == 0:
            found.append("text_goes_on" if handed == 0 else "text_only")
        elif due[i][0]:
            number = count
            found.append("chooses")
        elif count != number:
            number = count
            found.append("goes_on_otherwise")
        else:
            found.append("goes_on" if handed == count else "goes_on_again")
    return found


def parse_policy(name: str) -> Policy:
    """A policy by its name.

    Raises:
        AlvtsError: not one of `NAMED`.
    """
    if name not in NAMED:
        raise AlvtsError(f"unknown policy {name!r}; known: {', '.join(NAMED)}")
    return NAMED[name]


@dataclass(frozen=True)
class Picked:
    """The policy that calibration picked for a keep ratio.

    Attributes:
        keep: ratio of visual tokens in every layer.
        policy: the one picked.
    """

    keep: float
    policy: Policy


def policy_for(picked: Sequence[Picked], keep: float) -> Policy:
    """What was picked for the nearest ratio, by their quotient; `PAPER` where nothing was.

    Args:
        picked: in any order.
        keep: ratio of visual tokens, mean over layers; above 0.
    """
    if not picked:
        return PAPER
    nearest = min(picked, key=lambda one: abs(math.log(one.keep / max(keep, 1e-9))))
    return nearest.policy
