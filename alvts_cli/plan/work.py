"""What every phase of a generation asks of a machine: products, attention, launches, bytes.

The arithmetic is that of `engine.flops.prefill_flops`, operator by operator; a test holds the two
together. Not counted: the norms' and activations' arithmetic (their bytes are), and the embedding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine.policy import Policy, what_layers_do
from ..engine.sizes import ROWS, default_carry_rank, default_rank
from .shape import Counts, Kind, Shape

VALUE = 2
"""Bytes of a number in bfloat16. `Ceilings.wide` makes them those of another precision."""


@dataclass(frozen=True)
class Product:
    """`[rows, inner] @ [inner, columns]`, `times` over.

    Attributes:
        weights: bytes of the right side that come from memory; 0 for activations.
        shared: right sides of this size that the rows are shared among, as among experts.
    """

    rows: int
    inner: int
    columns: int
    weights: int = 0
    times: int = 1
    shared: int = 1

    @property
    def flops(self) -> int:
        """A multiply-add counts as two."""
        return 2 * self.rows * self.inner * self.columns * self.times

    @property
    def activations(self) -> int:
        """Bytes of what goes in and comes out."""
        return VALUE * self.rows * (self.inner + self.columns) * self.times


@dataclass(frozen=True)
class Attention:
    """One attention kernel.

    Attributes:
        flops: of the pairs of a row and a column that it may see.
        computed: of the pairs that the kernel computes.
        tokens: rows of a sample.
        cache: bytes of keys and values read, and of the growing cache copied.
        biased: whether a number is added to the logits.
    """

    flops: int
    computed: int
    tokens: int
    cache: int = 0
    biased: bool = False


@dataclass(frozen=True)
class Stretch:
    """Operators that run one after the other, `times` over: most often a layer.

    Attributes:
        products, attention: the arithmetic.
        launches: operators that are no views.
        moved: bytes of the others.
    """

    products: tuple[Product, ...] = ()
    attention: Attention | None = None
    launches: int = 0
    moved: float = 0.0
    times: int = 1

    @property
    def flops(self) -> int:
        """Of all its runs."""
        attention = self.attention.flops if self.attention else 0
        return self.times * (attention + sum(product.flops for product in self.products))

    @property
    def read(self) -> int:
        """Bytes of weights and cache, of all its runs."""
        cache = self.attention.cache if self.attention else 0
        return self.times * (cache + sum(product.weights for product in self.products))


@dataclass(frozen=True)
class Case:
    """A generation to predict.

    Attributes:
        shape: the model.
        policy: how tokens are chosen.
        counts: launches under it.
        kept: visual tokens of every layer; `visual_tokens` everywhere for the dense model.
        visual_tokens, text_tokens: of every prompt.
        batch: prompts at once.
        rank, carry_rank: of the selectors and of the carried updates; None for the defaults.
    """

    shape: Shape
    policy: Policy
    counts: Counts
    kept: tuple[int, ...]
    visual_tokens: int
    text_tokens: int
    batch: int
    rank: int | None = None
    carry_rank: int | None = None

    @property
    def tokens(self) -> int:
        """Of a prompt."""
        return self.visual_tokens + self.text_tokens

    @property
    def running(self) -> tuple[int, ...]:
        """Tokens that every layer runs on."""
        return tuple(self.text_tokens + kept for kept in self.kept)

    @property
    def selects(self) -> bool:
        """Whether any layer leaves a token out."""
        return any(kept < self.visual_tokens for kept in self.kept)

    def dense(self) -> "Case":
        """The same of the dense model."""
        return replace(self, kept=(self.visual_tokens,) * len(self.kept))


def vision(case: Case) -> list[Stretch]:
    """The vision tower; its arithmetic grows with the visual tokens, as products of that many
    rows."""
    shape = case.shape
    tokens = case.batch * case.visual_tokens
    share = tokens / shape.visual_tokens
    # One product with the tower's arithmetic and weights: it is many like it.
    flops = shape.vision.flops * share
    columns = max(1, round(flops / (2 * tokens * shape.width)))
    product = Product(tokens, shape.width, columns, VALUE * shape.vision.parameters)
    return [Stretch((product,), launches=shape.vision.launches)]


def prefill(case: Case) -> list[Stretch]:
    """The decoder layers on the prompt, scoring and all."""
    stretches = []
    layers = what_layers_do(case.policy, case.kept, case.visual_tokens, case.shape.adds_behind)
    for kept, does in zip(case.kept, layers, strict=True):
        kind: Kind = getattr(case.counts, does)
        if does == "dense":
            stretches.append(_layer(case, kind, case.tokens, False))
            continue
        running = case.text_tokens + kept
        layer = _layer(case, kind, running, case.policy.mass and kept > 0)
        more = (_scoring(case, running) if does == "chooses" else ()) + _carrying(case)
        stretches.append(replace(layer, products=layer.products + more))
    stretches.append(_beside(case, case.counts.rest))
    if case.selects:
        stretches.append(_beside(case, case.counts.once))
    return _joined(stretches)


def _beside(case: Case, kind: Kind) -> Stretch:
    """What runs once a prefill."""
    return Stretch(launches=kind.launches, moved=case.batch * kind.moved.bytes(0, case.tokens))


def decode(case: Case) -> list[Stretch]:
    """The first token behind the prompt's, head included."""
    shape = case.shape
    selecting = case.counts.decode if case.selects else case.counts.decode_dense
    stretches = []
    for running in case.running:
        slots = running + 1
        held = case.batch * slots * 2 * shape.kv_heads * shape.head_dim * VALUE
        flops = 4 * case.batch * shape.heads * shape.head_dim * slots
        # The dynamic cache is copied to grow: read and written, then read by the attention.
        attention = Attention(flops, flops, 1, 3 * held)
        stretches.append(Stretch(_projections(shape, case.batch), attention, selecting))
    return _joined([*stretches, Stretch(launches=case.counts.decode_rest), *head(case)])


def head(case: Case) -> list[Stretch]:
    """The logits of one token of every prompt."""
    return [Stretch((_weighted(case.batch, case.shape.width, case.shape.vocabulary),), launches=1)]


def cache_bytes(case: Case) -> int:
    """Keys and values after the prompt."""
    shape = case.shape
    return case.batch * sum(case.running) * 2 * shape.kv_heads * shape.head_dim * VALUE


def _layer(case: Case, kind: Kind, running: int, biased: bool) -> Stretch:
    """A decoder layer on `running` tokens of every prompt."""
    shape, batch = case.shape, case.batch
    pair = 4 * batch * shape.heads * shape.head_dim
    flops = pair * running * (running + 1) // 2
    # With a bias every row meets every column.
    computed = pair * running**2 if biased else flops
    return Stretch(
        _projections(shape, batch * running),
        Attention(flops, computed, running, biased=biased),
        kind.launches,
        batch * kind.moved.bytes(running, case.tokens),
    )


def _projections(shape: Shape, rows: int) -> tuple[Product, ...]:
    """The weights of a layer on so many rows."""
    width, mlp = shape.width, shape.mlp
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = [(width, queries), (width, keys), (width, keys), (queries, width)]
    if shape.experts == 1:
        sizes += [(width, mlp), (width, mlp), (mlp, width)]
        return tuple(_weighted(rows, inner, columns) for inner, columns in sizes)
    choice = [*sizes, (width, shape.experts)]
    attention = tuple(_weighted(rows, inner, columns) for inner, columns in choice)
    return (*attention, _experts(shape, rows, width, 2 * mlp), _experts(shape, rows, mlp, width))


def _experts(shape: Shape, rows: int, inner: int, columns: int) -> Product:
    """One of the products of experts, those of all tokens in one launch.

    As many experts are read as are met on average, where each is as likely as any other: of fitted
    routers that is assumed, who have been trained for it.
    """
    missed = (1 - shape.chosen / shape.experts) ** rows
    met = math.ceil(shape.experts * (1 - missed))
    weights = VALUE * met * inner * columns
    return Product(rows * shape.chosen, inner, columns, weights, shared=met)


def _scoring(case: Case, running: int) -> tuple[Product, ...]:
    """Ranking all tokens, as `prefill_flops` counts it."""
    shape, policy, batch = case.shape, case.policy, case.batch
    rank = default_rank(shape.width) if case.rank is None else case.rank
    tokens, visual = case.tokens, case.visual_tokens
    asking = min(case.text_tokens, ROWS)
    products = [
        _weighted(batch * tokens, shape.width, rank),
        _weighted(batch * tokens, rank, shape.kv_heads * shape.head_dim),
        _weighted(batch * asking, shape.width, shape.heads * shape.head_dim),
        Product(asking, shape.head_dim, tokens, times=batch * shape.heads),
        Product(asking, 1, tokens, times=batch * shape.heads),
    ]
    if policy.quality is not None:
        products.append(Product(visual, rank, visual, times=batch))
    if policy.mass or policy.pool:
        products.append(Product(tokens, rank, running, times=batch))
    if policy.pool:
        products.append(Product(running, tokens, shape.width, times=batch))
    return tuple(products)


def _carrying(case: Case) -> tuple[Product, ...]:
    """The update for what is skipped, computed for all."""
    if not case.policy.carry:
        return ()
    width, rows = case.shape.width, case.batch * case.tokens
    low = default_carry_rank(width) if case.carry_rank is None else case.carry_rank
    return _weighted(rows, width, low), _weighted(rows, low, width)


def _weighted(rows: int, inner: int, columns: int) -> Product:
    return Product(rows, inner, columns, VALUE * inner * columns)


def _joined(stretches: Sequence[Stretch]) -> list[Stretch]:
    """Equal ones as one."""
    counted: dict[Stretch, int] = {}
    for stretch in stretches:
        counted[stretch] = counted.get(stretch, 0) + stretch.times
    return [replace(stretch, times=times) for stretch, times in counted.items()]
