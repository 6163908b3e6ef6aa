"""How long work takes: every operator as its slowest resource, and all of them as fast as they can
be launched (Williams et al., Roofline, 2009, with launches for a third ceiling)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .cards import Ceilings, at, over
from .work import Attention, Product, Stretch


@dataclass(frozen=True)
class Phase:
    """A part of a generation on a machine. Times in seconds.

    Attributes:
        flops, read, launches: arithmetic, bytes of weights and cache, operators.
        arithmetic, memory, launching: what each alone would take.
        eager: launched one by one.
        graph: as one CUDA graph; None where there are none.
    """

    flops: int
    read: int
    launches: int
    arithmetic: float
    memory: float
    launching: float
    eager: float
    graph: float | None

    @property
    def binds(self) -> str:
        """What the eager time is made of above all: arithmetic, memory or launches."""
        times = {"arithmetic": self.arithmetic, "memory": self.memory, "launches": self.launching}
        return max(times, key=lambda name: times[name])

    @property
    def graph_binds(self) -> str:
        """The same of the graph, whose launches cost little: arithmetic or memory."""
        return "arithmetic" if self.arithmetic >= self.memory else "memory"


def phase(work: Sequence[Stretch], machine: Ceilings) -> Phase:
    """How long `work` takes.

    An operator takes as long as its arithmetic or its bytes, whichever is longer. Where the host
    runs ahead, a layer takes as long as the device or as launching does, whichever is longer;
    where it computes itself, as both.
    """
    arithmetic = memory = launching = eager = graph = 0.0
    gap = machine.graph_launch or 0.0
    wide = machine.wide
    for one in work:
        parts = [_product(product, machine) for product in one.products]
        if one.attention is not None:
            parts.append(_attention(one.attention, machine))
        moving = 0.0
        if one.moved:
            moved = wide * one.moved
            moving = moved / at(machine.elementwise, moved / max(1, one.launches))
        device = moving + sum(map(max, parts)) + gap * one.launches
        launch = machine.launch * one.launches
        arithmetic += one.times * sum(busy for busy, _ in parts)
        memory += one.times * (moving + sum(reading for _, reading in parts))
        launching += one.times * launch
        eager += one.times * (max(device, launch) if machine.overlaps else device + launch)
        graph += one.times * device
    return Phase(
        flops=sum(one.flops for one in work),
        read=round(wide * sum(one.read for one in work)),
        launches=sum(one.launches * one.times for one in work),
        arithmetic=arithmetic,
        memory=memory,
        launching=launching,
        eager=eager,
        graph=None if machine.graph_launch is None else graph,
    )


def bias_costs(work: Sequence[Stretch], machine: Ceilings) -> float:
    """Seconds that attention takes longer for the numbers added to its logits: another kernel, and
    both triangles."""
    biased = [one for one in work if one.attention is not None and one.attention.biased]
    return sum(
        one.times * (_attending(one.attention, machine) - _attending(_plain(one), machine))
        for one in biased
    )


def _plain(stretch: Stretch) -> Attention | None:
    attention = stretch.attention
    return attention and replace(attention, computed=attention.flops, biased=False)


def _attending(attention: Attention | None, machine: Ceilings) -> float:
    return 0.0 if attention is None else max(_attention(attention, machine))


def _product(product: Product, machine: Ceilings) -> tuple[float, float]:
    """Seconds of arithmetic, and of memory."""
    activations = machine.wide * product.activations
    moving = activations / at(machine.elementwise, activations / product.times)
    reading = machine.wide * product.weights / machine.bandwidth
    rate = over(machine.matmul, product.inner * product.columns, product.rows / product.shared)
    return product.flops / rate, max(moving, reading)


def _attention(attention: Attention, machine: Ceilings) -> tuple[float, float]:
    """Seconds of arithmetic, and of memory."""
    curve = machine.biased if attention.biased else machine.attention
    return (
        attention.computed / at(curve, attention.tokens),
        machine.wide * attention.cache / machine.bandwidth,
    )
