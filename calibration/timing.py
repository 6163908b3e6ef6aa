"""What every policy's prefill takes on this machine, timed in turns."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor

from alvts_cli.bench.timing import generate, in_turns
from alvts_cli.engine import Policy, Selectors, attach
from alvts_cli.families.vision import seen_once
from alvts_cli.spread import Group

from .answers import Answered

ROUNDS = 5
"""Of turns, after one to warm up."""

TOGETHER = 8
"""Prompts at once on a GPU, or as many as fit: there, an eager prefill of one waits for the host,
whatever it keeps."""

Choice = tuple[float, Policy]
"""A keep ratio, and the policy under which it is kept."""


def time_policies(
    model: Any,
    selectors: Selectors,
    choices: Sequence[Choice],
    samples: Sequence[Answered],
    on_turn: Callable[[], None],
    group: Group | None = None,
) -> dict[Choice, float]:
    """Time of the language model's prefill under every choice, the dense one's being 1.

    In every round the dense model and all choices take their turn on the same prompt, another one
    each round; the median over rounds counts.

    Args:
        model: of a known family.
        selectors: with all that the choices need.
        choices: to time.
        samples: whose prompts are read.
        on_turn: called after each of `turns(choices)`.
        group: of processes; the first one's times are those of all.
    """
    every: list[Choice | None] = [None, *choices]
    most = TOGETHER if model.device.type == "cuda" else 1
    together = _fitting(model, samples[0].inputs, most)
    prompts = [
        _repeated(samples[number % len(samples)].inputs, together) for number in range(ROUNDS + 1)
    ]
    taken: dict[Choice | None, list[float]] = {choice: [] for choice in every}
    # The vision tower is not timed.
    with seen_once(model):
        for number, choice in in_turns(every, ROUNDS):
            with _attached(model, selectors, choice):
                spent = generate(model, prompts[number], 1).prefill_ms
            if number:
                taken[choice].append(spent)
            on_turn()
    # Round by round: what slows the machine down for a while does so to all.
    found = {
        choice: median(own / dense for own, dense in zip(taken[choice], taken[None], strict=True))
        for choice in choices
    }
    return (group or Group()).gather([found])[0]


def turns(choices: Sequence[Choice]) -> int:
    """How many prefills `time_policies` takes."""
    return (ROUNDS + 1) * (1 + len(choices))


def _attached(
    model: Any, selectors: Selectors, choice: Choice | None
) -> AbstractContextManager[object]:
    if choice is None:
        return nullcontext()
    keep, policy = choice
    return attach(model, selectors, [keep] * len(selectors.layers), policy=policy)


def _fitting(model: Any, prompt: Mapping[str, Tensor], together: int) -> int:
    """The most of `together` copies of a prompt that the dense model has memory for, by halves."""
    while together > 1:
        try:
            generate(model, _repeated(prompt, together), 1)
            break
        except torch.OutOfMemoryError:
            together //= 2
    return together


def _repeated(prompt: Mapping[str, Tensor], together: int) -> dict[str, Tensor]:
    return {name: torch.cat([value] * together) for name, value in prompt.items()}
