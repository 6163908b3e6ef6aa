"""The ceilings of the machine at hand, measured in a few seconds.

- Products in the wanted precision at many numbers of rows: a product of few rows is bound by
  reading its weights, which lie in several matrices that no cache holds together.
- Causal attention at several lengths, plain and with a number added to the logits.
- Memory: a copy of a block that no cache holds.
- An operator on activations, at several sizes: small ones stay in the caches.
- The launch of an operator: one on a few numbers, again and again.

The shapes are none that `alvts bench` is held against: width 3072, lengths between its own.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional

from ..bench.report import hardware_name
from ..bench.timing import synchronize
from ..memory import memory_free
from ..models import parse_device, parse_dtype
from .cards import GRAPH_LAUNCH, Ceilings, Curve

WIDTH, HEADS, HEAD = 3072, 24, 128
ROWS = (1, 4, 16, 48, 96, 192, 384, 768, 1536)
LENGTHS = (48, 192, 768, 1536)
SIZES = tuple(3 * 2**exponent for exponent in range(14, 27, 2))
"""Bytes that an operator moves."""

_HELD = 2**27
"""Bytes that no cache holds."""
_LEAST = 0.15
"""Seconds that a figure is measured for, at least."""
_OPERATORS = 5
"""That a launch is measured on."""


def measure_machine(device: str = "auto", dtype: str = "bfloat16") -> Ceilings:
    """Measure `device`.

    Args:
        device: as `models.parse_device` reads it.
        dtype: as `models.parse_dtype` reads it.

    Raises:
        AlvtsError: no such device.
    """
    bench = _Bench(parse_device(device), parse_dtype(dtype))
    cuda = bench.device.type == "cuda"
    with torch.inference_mode():
        return Ceilings(
            name="this",
            about=f"this machine ({hardware_name(bench.device)}, {torch.get_num_threads()} "
            f"threads, {dtype}), measured just now",
            matmul=bench.matmul(),
            attention=bench.attention(biased=False),
            biased=bench.attention(biased=True),
            bandwidth=bench.bandwidth(),
            elementwise=bench.elementwise(),
            launch=bench.launch(),
            graph_launch=GRAPH_LAUNCH if cuda else None,
            overlaps=cuda,
            memory=float(memory_free(bench.device) or 0),
        )


class _Bench:
    """Times operators on a device, in a precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self._dtype = device, dtype

    def matmul(self) -> Curve:
        """FLOP/s by the number of rows."""
        size = WIDTH**2
        weights = [
            self._random(WIDTH, WIDTH)
            for _ in range(math.ceil(_HELD / (size * self._dtype.itemsize)))
        ]
        points = []
        for rows in ROWS:
            turn = cycle(weights)
            states = self._random(rows, WIDTH)
            product = partial(_next_product, states, turn)
            points.append((float(rows), 2 * rows * size / self._seconds(product)))
        return tuple(points)

    def attention(self, biased: bool) -> Curve:
        """FLOP/s by the number of tokens."""
        points = []
        for tokens in LENGTHS:
            query, key, value = (self._random(1, HEADS, tokens, HEAD) for _ in range(3))
            mask = self._random(1, 1, tokens, tokens) if biased else None
            attend = partial(
                functional.scaled_dot_product_attention,
                *(query, key, value),
                attn_mask=mask,
                is_causal=mask is None,
            )
            pairs = tokens**2 if biased else tokens * (tokens + 1) // 2
            points.append((float(tokens), 4 * HEADS * HEAD * pairs / self._seconds(attend)))
        return tuple(points)

    def bandwidth(self) -> float:
        """Bytes per second read and written by a copy."""
        source = self._random(_HELD // self._dtype.itemsize)
        target = torch.empty_like(source)
        return 2 * _HELD / self._seconds(lambda: target.copy_(source))

    def elementwise(self) -> Curve:
        """Bytes per second of a sum, by the bytes it moves."""
        points = []
        for size in SIZES:
            states = self._random(size // 3 // self._dtype.itemsize)
            points.append((float(size), size / self._seconds(partial(torch.add, states, states))))
        return tuple(points)

    def launch(self) -> float:
        """Seconds of the host for one operator, on the few numbers of an RMSNorm."""
        states = self._random(4, 64)

        def norm() -> None:
            states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)

        return self._seconds(norm) / _OPERATORS

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self._dtype)

    def _seconds(self, work: Callable[[], object]) -> float:
        """Median of one call; after a first one that does not count."""
        work()
        times: list[float] = []
        # Together, lest a GPU's clock be read for every small one.
        together = 1
        while len(times) < 3 or sum(times) < _LEAST:
            synchronize(self.device)
            start = time.perf_counter()
            for _ in range(together):
                work()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
            if times[-1] < _LEAST / 100:
                together, times = 2 * together, []
        return median(times) / together


def _next_product(states: Tensor, weights: Iterator[Tensor]) -> Tensor:
    return functional.linear(states, next(weights))
