"""What a calibration run can be told."""

import math
from dataclasses import dataclass
from typing import Any

from alvts_cli.errors import AlvtsError

FORMS = ("alvts", "paper")


@dataclass(frozen=True)
class Settings:
    """Options of one run; checked when made.

    Attributes:
        form: of the selectors: "alvts", or "paper" for the paper's own and nothing on top: no
            carried updates, no policies.
        rank: `R`; None takes `engine.default_rank` of the model, or `engine.paper_rank`.
        keep: ratio at which recall is measured, and the artifact's default: 64 of 576 tokens.
        held_out: share of the samples that is not fitted but measured on; at least one is.
        steps: optimiser steps per layer (see `align`); 300 keep no more answers (see the README of
            this folder).
        batch: samples per step.
        learning_rate: its peak (see `align`).
        seed: of the choice and order of samples.
        carry_samples: fitted samples that the carried updates are fitted on, the first ones.
        policy_samples: held-out samples that policies are tried on, the first ones.
        answer_tokens: the longest answer in these measurements.
    """

    form: str = "alvts"
    rank: int | None = None
    keep: float = 1 / 9
    held_out: float = 1 / 4
    steps: int = 150
    batch: int = 8
    learning_rate: float = 0.003
    seed: int = 0
    carry_samples: int = 40
    policy_samples: int = 64
    answer_tokens: int = 16

    @classmethod
    def paper(cls, **options: Any) -> "Settings":
        """For the paper's form: the steps and the rate that were best for its objective (see
        `align`); the paper names neither."""
        return cls(form="paper", **{"steps": 400, "learning_rate": 1e-3, **options})

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise AlvtsError(f"unknown form {self.form!r}; known: {', '.join(FORMS)}")
        if self.rank is not None and self.rank < 1:
            raise AlvtsError(f"the rank must be at least 1, not {self.rank}")
        if not 0 < self.keep <= 1:
            raise AlvtsError(f"the keep ratio must be above 0 and at most 1, not {self.keep}")
        if not 0 < self.held_out < 1:
            raise AlvtsError(f"the held-out share must be between 0 and 1, not {self.held_out}")
        if self.steps < 1 or self.batch < 1:
            raise AlvtsError("steps and batch must be at least 1")
        if min(self.carry_samples, self.policy_samples, self.answer_tokens) < 1:
            raise AlvtsError("carry_samples, policy_samples and answer_tokens must be at least 1")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise AlvtsError(f"the learning rate must be above 0, not {self.learning_rate}")
        if self.seed < 0:
            raise AlvtsError(f"the seed must be at least 0, not {self.seed}")
