"""The ceilings of the machine at hand, measured in some seconds.

- Products in the wanted precision at many numbers of rows, with wide matrices and narrow ones: a
  product of few rows is bound by reading its weights, which lie in several matrices that no cache
  holds together, and a narrow one fills the cores less well.
- Causal attention at several lengths, plain and with a number added to the logits.
- Memory: a copy of a block that no cache holds.
- All other operators, at several sizes: those of a decoder layer, one after the other, so that
  memory is taken and given back as there. One operator again and again finds everything in the
  caches, and is many times as fast.
- A launch: a decoder layer on next to nothing, modules, dispatch and all.

On a GPU all but launching runs as CUDA graphs, lest the host be what is timed. Each is measured
again and again in turns with all others, so that what disturbs the machine for a while disturbs
all of them, and is taken out of all of them; the median counts, and how far the figures were apart
is said. **It does not see a load that is there all the time**: measure on an idle machine.

The shapes are none that `alvts bench` is held against: widths 768 and 3072, lengths between its
own.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from ..bench.launches import Counter
from ..bench.report import hardware_name
from ..bench.timing import synchronize
from ..memory import memory_free
from ..models import parse_device, parse_dtype, usual_dtype
from .cards import GRAPH_LAUNCH, Ceilings, Curve, Surface
from .work import VALUE

WIDTHS, HEADS, HEAD = (768, 3072), 24, 128
ROWS = (1, 4, 16, 48, 96, 192, 384, 768, 1536)
LENGTHS = (48, 192, 768, 1536)
LAYER_WIDTH = 1536
"""Of the layer whose operators are measured."""
TOKENS = (24, 96, 384, 1536, 3072)
"""That they run on."""

_HELD = 2**27
"""Bytes that no cache holds."""
_LEAST = 0.02
"""Seconds that a figure is measured for in every round, at least."""
_ROUNDS = 15
"""Of 60 on 2 shared cores, any 7 in a row had products of 768 rows and of 96 apart by a factor that
varied by 8 % (one standard deviation); any 15 by 5 %, with each round's pace taken out by 4."""


def device_here(device: str = "auto") -> str:
    """What launches are to be counted on for this machine: "cuda" or "cpu".

    Raises:
        AlvtsError: no such device.
    """
    return "cuda" if parse_device(device).type == "cuda" else "cpu"


def measure_machine(device: str = "auto", dtype: str | None = None) -> Ceilings:
    """Measure `device`.

    Args:
        device: as `models.parse_device` reads it.
        dtype: as `models.parse_dtype` reads it; None for `models.usual_dtype`.

    Raises:
        AlvtsError: no such device.
    """
    place = parse_device(device)
    precision = usual_dtype(place) if dtype is None else parse_dtype(dtype)
    bench = _Bench(place, precision)
    name = str(precision).removeprefix("torch.")
    cuda = bench.device.type == "cuda"
    with torch.inference_mode():
        bench.measure()
        return Ceilings(
            name="this",
            about=f"this machine ({hardware_name(bench.device)}, {torch.get_num_threads()} "
            f"threads, {name}), measured just now, every figure {_ROUNDS} times; the fastest and "
            f"the slowest of a figure were {bench.spread:.0%} apart (median)",
            matmul=bench.matmul(),
            attention=bench.attention(biased=False),
            biased=bench.attention(biased=True),
            bandwidth=2 * _HELD / bench.seconds("copy"),
            elementwise=bench.elementwise(),
            launch=bench.launch(),
            graph_launch=GRAPH_LAUNCH if cuda else None,
            overlaps=cuda,
            memory=float(memory_free(bench.device) or 0),
            dtype=name,
            wide=precision.itemsize / VALUE,
            spread=bench.spread,
        )


@dataclass
class _Figure:
    """Work that is timed.

    Attributes:
        work: does it `each` times.
        each: 1, or more where it is a graph.
        together: how often in one timing, lest a GPU's clock be read for every small one.
        times: of one of them, in seconds.
    """

    work: Callable[[], object]
    each: int = 1
    together: int = 1
    times: list[float] = field(default_factory=list)


class _Bench:
    """Times operators on a device, in a precision.

    Attributes:
        device: that they run on.
        spread: between the fastest and the slowest timing of a figure, as a share of its median;
            the median over all figures.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype
        self.spread = 0.0
        self._paces: list[float] = []
        self._layers = {tokens: _Layer(self, LAYER_WIDTH, tokens) for tokens in TOKENS}
        self._nothing = _Layer(self, _Layer.HEAD, 1)
        self._figures = {name: _Figure(work) for name, work in self._works()}

    def _works(self) -> Iterator[tuple[object, Callable[[], object]]]:
        """Everything that is timed, by its name."""
        for width in WIDTHS:
            many = math.ceil(_HELD / (width**2 * self._dtype.itemsize))
            weights = [self.random(width, width) for _ in range(many)]
            for rows in ROWS:
                product = partial(_product, self.random(rows, width), cycle(weights))
                yield ("matmul", width, rows), product
        for tokens in LENGTHS:
            query, key, value = (self.random(1, HEADS, tokens, HEAD) for _ in range(3))
            attend = partial(functional.scaled_dot_product_attention, query, key, value)
            yield (False, tokens), partial(attend, is_causal=True)
            yield (True, tokens), partial(attend, attn_mask=self.random(1, 1, tokens, tokens))
        source = self.random(_HELD // self._dtype.itemsize)
        yield "copy", partial(torch.empty_like(source).copy_, source)
        for tokens, layer in self._layers.items():
            yield ("layer", tokens), layer.between
        yield "between", self._nothing.between
        yield "launch", self._nothing.whole

    def measure(self) -> None:
        """Time everything in turns."""
        for name, figure in self._figures.items():
            figure.work()
            # On a GPU the host would be what is timed, everywhere but where it is to be.
            if self.device.type == "cuda" and name != "launch":
                figure.work, figure.each = _captured(figure.work), _IN_A_GRAPH
            while self._timed(figure) < _LEAST:
                figure.together *= 2
        for _ in range(_ROUNDS):
            for figure in self._figures.values():
                figure.times.append(self._timed(figure) / (figure.together * figure.each))
        times = [figure.times for figure in self._figures.values()]
        self.spread = median((max(one) - min(one)) / median(one) for one in times)
        self._paces = paces(times)

    def seconds(self, name: object) -> float:
        """Of work once, the median, had every round had the same pace."""
        times = self._figures[name].times
        return median(time / pace for time, pace in zip(times, self._paces, strict=True))

    def matmul(self) -> Surface:
        """FLOP/s by the numbers in the right side and by the number of rows."""
        curves = []
        for width in WIDTHS:
            times = ((rows, self.seconds(("matmul", width, rows))) for rows in ROWS)
            curve = tuple((float(rows), 2 * rows * width**2 / taken) for rows, taken in times)
            curves.append((float(width**2), curve))
        return tuple(curves)

    def attention(self, biased: bool) -> Curve:
        """FLOP/s by the number of tokens."""
        points = []
        for tokens in LENGTHS:
            pairs = tokens**2 if biased else tokens * (tokens + 1) // 2
            points.append(
                (float(tokens), 4 * HEADS * HEAD * pairs / self.seconds((biased, tokens)))
            )
        return tuple(points)

    def elementwise(self) -> Curve:
        """Bytes per second of a layer's operators beside products and attention, by the bytes that
        one moves, without what launching them takes."""
        idle = self.seconds("between")
        points = []
        for tokens, layer in self._layers.items():
            launches, moved = layer.counted()
            # Nearly nothing is left of the smallest, and noise must not make it less.
            taken = max(self.seconds(("layer", tokens)) - idle, 0.1 * idle)
            points.append((moved / launches, moved / taken))
        return tuple(points)

    def launch(self) -> float:
        """Seconds of the host for one operator of a decoder layer."""
        return self.seconds("launch") / self._nothing.launches()

    def random(self, *shape: int) -> Tensor:
        """Numbers around 0."""
        return torch.randn(*shape, device=self.device, dtype=self._dtype)

    def _timed(self, figure: _Figure) -> float:
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(figure.together):
            figure.work()
        synchronize(self.device)
        return time.perf_counter() - start


class _Layer:
    """A Llama layer on some tokens, as transformers has it."""

    HEAD = 64

    def __init__(self, bench: _Bench, width: int, tokens: int) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, apply_rotary_pos_emb

        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_attention_heads=width // self.HEAD,
            num_key_value_heads=width // self.HEAD,
        )
        config._attn_implementation = "sdpa"
        states = bench.random(1, tokens, width)
        self._device, self._states, self._turn = bench.device, states, apply_rotary_pos_emb
        self._layer = LlamaDecoderLayer(config, 0).to(bench.device, states.dtype)
        self._heads = states.view(1, tokens, -1, self.HEAD).transpose(1, 2)
        self._positions = bench.random(1, tokens, self.HEAD), bench.random(1, tokens, self.HEAD)
        self._inside = bench.random(1, tokens, config.intermediate_size)

    def between(self) -> Tensor:
        """The operators that are no products and no attention, in their order."""
        layer = self._layer
        normed = layer.input_layernorm(self._states)
        turned = self._turn(self._heads, self._heads, *self._positions)
        added = self._states + normed
        normed = layer.post_attention_layernorm(added)
        inside = layer.mlp.act_fn(self._inside) * self._inside
        # All live as long as in the layer, more or less.
        del turned, inside
        return added + normed

    def whole(self) -> Tensor:
        """The layer."""
        found: Tensor = self._layer(self._states, position_embeddings=self._positions)
        return found

    def counted(self) -> tuple[int, int]:
        """Launches of `between`, and bytes that they move."""
        with Counter(self._device.type) as counter:
            self.between()
        return len(counter.rest.launches), counter.rest.moved

    def launches(self) -> int:
        """Of `whole`."""
        with Counter(self._device.type) as counter:
            self.whole()
        return len(counter.rest.launches)


def paces(times: Sequence[Sequence[float]]) -> list[float]:
    """How slow each round was, 1 being usual: the median over the figures of how much longer than
    usual they took.

    Args:
        times: of every figure, one in each round.
    """
    slower = ([time / median(one) for time in one] for one in times)
    return [median(of_a_round) for of_a_round in zip(*slower, strict=True)]


_IN_A_GRAPH = 16


def _captured(work: Callable[[], object]) -> Callable[[], None]:
    """Work on a GPU, `_IN_A_GRAPH` times over, as one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_IN_A_GRAPH):
            work()

    def replay(kept: object = work) -> None:
        # A graph knows only where the work's tensors lie: whoever holds it must hold them too.
        graph.replay()

    return replay


def _product(states: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return functional.linear(states, next(weights))
