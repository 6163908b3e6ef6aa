"""What a calibration run can be told."""

from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter

from alvts_cli.errors import AlvtsError
from alvts_cli.schema import Count, check

FORMS = ("alvts", "paper")

Some = Annotated[Count, Field(ge=1)]
"""A whole number of at least 1."""


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
    rank: Some | None = None
    keep: Annotated[float, Field(gt=0, le=1)] = 1 / 9
    held_out: Annotated[float, Field(gt=0, lt=1)] = 1 / 4
    steps: Some = 150
    batch: Some = 8
    learning_rate: Annotated[float, Field(gt=0)] = 0.003
    seed: Count = 0
    carry_samples: Some = 40
    policy_samples: Some = 64
    answer_tokens: Some = 16

    @classmethod
    def paper(cls, **options: Any) -> "Settings":
        """For the paper's form: the steps and the rate that were best for its objective (see
        `align`); the paper names neither."""
        return cls(form="paper", **{"steps": 400, "learning_rate": 1e-3, **options})

    def __post_init__(self) -> None:
        """
        Raises:
            AlvtsError: a value of another kind, or out of range.
        """
        # As a keep, everywhere else, a whole number is one of tokens.
        whole = isinstance(self.keep, int)
        for name, adapter in _ADAPTERS.items():
            value = check(adapter, getattr(self, name), f"the setting {name!r}", of_json=False)
            # Python's own number in the place of numpy's or torch's: it is written down as JSON.
            object.__setattr__(self, name, value)
        if self.form not in FORMS:
            raise AlvtsError(f"unknown form {self.form!r}; known: {', '.join(FORMS)}")
        if whole:
            raise AlvtsError("the setting 'keep' is a ratio: write 1.0, not 1")


_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))
    for name, kind in get_type_hints(Settings, include_extras=True).items()
}
