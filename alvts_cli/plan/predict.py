"""Dense and selective, phase by phase."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..engine.keep import KeepArgument, resolve_keep
from ..engine.policy import NAMED
from ..errors import AlvtsError
from .cards import Ceilings
from .roofline import Phase, bias_costs, phase
from .shape import Shape
from .work import VALUE, Case, Stretch, cache_bytes, decode, head, prefill, vision

SPARE = 0.05
"""Of a card's memory, for the driver, torch and fragmentation: assumed."""

PHASES: dict[str, Callable[[Case], list[Stretch]]] = {
    "vision": vision,
    "prefill": prefill,
    "first token": lambda case: [*vision(case), *prefill(case), *head(case)],
    "decode": decode,
}
"""The parts of a generation; the decoded token is the first behind the prompt's."""


@dataclass(frozen=True)
class Prediction:
    """What a machine will do.

    Attributes:
        case: the selective side.
        dense, selective: by the name of the phase.
        cache_dense, cache: bytes of keys and values after the prompt.
        bias: seconds of the selective prefill that `roofline.bias_costs`.
    """

    case: Case
    dense: dict[str, Phase]
    selective: dict[str, Phase]
    cache_dense: int
    cache: int
    bias: float

    def speedup(self, name: str, graph: bool = False) -> float | None:
        """Of a phase, dense over selective; None where there are no graphs."""
        dense, selective = self.dense[name], self.selective[name]
        if not graph:
            return dense.eager / selective.eager
        if dense.graph is None or selective.graph is None:
            return None
        return dense.graph / selective.graph


@dataclass(frozen=True)
class Wanted:
    """A question.

    Attributes:
        keep: as `resolve_keep` reads it.
        policy: by its name.
        visual_tokens: None for those of one usual image.
        text_tokens: of the prompt.
    """

    keep: KeepArgument
    policy: str
    visual_tokens: int | None
    text_tokens: int


def make_case(shape: Shape, wanted: Wanted) -> Case:
    """The question about a model, at batch 1.

    Raises:
        AlvtsError: a keep that does not fit the model, an unknown policy, or a prompt longer than
            the model reads.
    """
    if wanted.policy not in shape.counts:
        raise AlvtsError(f"unknown policy {wanted.policy!r}; known: {', '.join(shape.counts)}")
    visual = wanted.visual_tokens or shape.visual_tokens
    if visual + wanted.text_tokens > shape.positions:
        raise AlvtsError(
            f"the prompt has {visual + wanted.text_tokens} tokens but {shape.name} reads "
            f"{shape.positions}"
        )
    keep = resolve_keep(wanted.keep, shape.layers)
    return Case(
        shape,
        NAMED[wanted.policy],
        shape.counts[wanted.policy],
        tuple(keep.count(i, visual) for i in range(shape.layers)),
        visual,
        wanted.text_tokens,
        batch=1,
    )


def predict(case: Case, machine: Ceilings) -> Prediction:
    """Every phase of `case` on a machine, beside the dense model."""
    dense = case.dense()
    return Prediction(
        case,
        {name: phase(work(dense), machine) for name, work in PHASES.items()},
        {name: phase(work(case), machine) for name, work in PHASES.items()},
        round(machine.wide * cache_bytes(dense)),
        round(machine.wide * cache_bytes(case)),
        bias_costs(prefill(case), machine),
    )


def longest_batch(case: Case, machine: Ceilings) -> int:
    """Prompts that can be prefilled at once and held; 0 where the weights alone do not fit.

    Beside weights and cache stand the widest moment of a layer (hidden states of all tokens a few
    times over, and the MLP's three tensors of those that run), as in `memory.memory_need`. Of the
    tokens that go to experts there is a copy for each of these, three times over.
    """
    shape, one = case.shape, replace(case, batch=1)
    inside = 3 * shape.mlp * shape.chosen
    if shape.experts > 1:
        inside += 3 * shape.width * shape.chosen
    widest = VALUE * (8 * case.tokens * shape.width + max(case.running) * inside)
    free = (1 - SPARE) * machine.memory / machine.wide - VALUE * shape.parameters
    return max(0, int(free // (cache_bytes(one) + widest)))
