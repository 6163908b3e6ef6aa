"""What a method is: a number for every visual token, and how many of them each layer keeps.

A new method is one file with one class and, as a rule, one method in it, `importance`; and a line
in the table of `methods`. Everything else (hooks, cache, masks, batches, padding, positions) is the
engine's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from ..engine import (
    Attachment,
    Keep,
    Pieces,
    Plan,
    Selectors,
    Solved,
    attach_scorer,
    keep_of,
    make_pieces,
    policy_of,
    spend,
)
from ..engine.calls import POSITIONS
from ..engine.probe import Projected, project
from ..families import family_of


class Method:
    """A way of spending a budget of visual tokens; made once, attached for every batch.

    Attributes:
        name: on the command line.
        rank: of selectors that score every layer, for counting FLOPs; 0 for the peers, whose
            scores are made of queries and keys that the layers compute anyway.
        paper: whether those selectors are of the paper's form.
    """

    name: ClassVar[str]
    rank: int = 0
    paper: bool = False

    def __init__(self, selectors: Selectors | None = None, seed: int = 0) -> None:
        """
        Args:
            selectors: fitted for the model, for the method that needs them.
            seed: for methods that draw.
        """
        self.selectors = selectors
        self.seed = seed
        self.samples: Sequence[str] = ()

    def schedule(self, visual_tokens: int, layers: int, budget: int) -> tuple[int, ...]:
        """Tokens that each of `layers` layers keeps of a sample's `visual_tokens`, on average
        `budget` of them, or as near to it as the method can come."""
        return (budget,) * layers

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """Importance `[B, T]`, as `engine.Scorer` says. Asked only of layers that keep some
        visual tokens and not all."""
        raise NotImplementedError

    def pieces(self, model: Any, budget: int | float) -> Pieces | None:
        """What else happens to tokens at a budget; None leaves what is skipped alone."""
        return None

    def images(
        self, model: Any, processor: Any, images: list[Image.Image], budget: int | float
    ) -> list[Image.Image]:
        """The pictures of one sample as the processor is to get them; the same list if it may
        have them as they are."""
        return images

    @contextmanager
    def attached(
        self, model: Any, budget: int | float, samples: Sequence[str]
    ) -> Iterator[Attachment]:
        """Let `model` run with this method.

        Args:
            model: of a known family.
            budget: layer average, an int of tokens or a float of a ratio.
            samples: names of the batch's rows. What is drawn at random is drawn by these, so that
                it does not depend on who else is in the batch.

        Raises:
            AlvtsError: what `attach_scorer` refuses.
        """
        self.samples = samples
        layers = len(family_of(model).layers(model))
        target = Keep((budget,))

        @cache
        def solve(visual_tokens: int) -> tuple[int, ...]:
            return self.schedule(visual_tokens, layers, target.count(0, visual_tokens))

        keep = Solved((1.0,) * layers, solve)
        with attach_scorer(model, self, keep, self.pieces(model, budget)) as attachment:
            yield attachment


class Budgeted(Method):
    """A method that spends the budget as alvts does: over the layers as the selectors' schedules
    say, where there are any, and under the policy that was picked for it."""

    def pieces(self, model: Any, budget: int | float) -> Pieces | None:
        """Those of alvts."""
        if self.selectors is None:
            return None
        policy = policy_of(self.selectors, keep_of(self.selectors, budget))
        return make_pieces(model, self.selectors, policy)

    def schedule(self, visual_tokens: int, layers: int, budget: int) -> tuple[int, ...]:
        """The same number in each layer where there are no schedules."""
        if self.selectors is None or not self.selectors.schedules:
            return super().schedule(visual_tokens, layers, budget)
        return spend(self.selectors.schedules, budget, visual_tokens)


class PruneOnce(Method):
    """A method that takes one decision per sample, in front of one layer, by what the layer before
    did. What is dropped there does not come back."""

    _plan: Plan | None = None
    _scores: Tensor
    _inputs: dict[int, tuple[Any, Tensor, tuple[Tensor, Tensor]]]
    text_model: Any

    def score(
        self, before: Projected, hidden: Tensor, plan: Plan, counts: tuple[int, ...]
    ) -> Tensor:
        """Importance `[B, T]`, -inf where not visual.

        Args:
            before: queries and keys of the layer before, after rotary positions.
            hidden: the output of the layer before, `[B, T, D]`.
            plan: of this forward.
            counts: tokens to keep, per sample.
        """
        raise NotImplementedError

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """The scores of each sample's pruning layer, in every layer from there on."""
        counts, before = plan.keep_counts[layer_index], plan.keep_counts[layer_index - 1]
        if self._plan is not plan:
            self._plan = plan
            # A sample that is pruned later still keeps all its visual tokens, and these alone.
            nothing = torch.zeros_like(plan.visual, dtype=torch.float32)
            self._scores = nothing.masked_fill(~plan.visual, -torch.inf)
        self._scores = self._scores.to(hidden.device)
        if counts != before:
            projected = project(*self._inputs[layer_index - 1])
            now = [k != n for k, n in zip(counts, before, strict=True)]
            fresh = torch.tensor(now, device=hidden.device)[:, None]
            self._scores = torch.where(
                fresh, self.score(projected, hidden, plan, counts), self._scores
            )
        return self._scores

    @contextmanager
    def attached(
        self, model: Any, budget: int | float, samples: Sequence[str]
    ) -> Iterator[Attachment]:
        """Also watches the layers before those where tokens may be dropped."""
        family = family_of(model)
        self.text_model = family.text_model(model)
        self._inputs = {}

        def watch(
            index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            self._inputs[index] = (module, hidden, kwargs[POSITIONS])

        layers: Any = family.layers(model)
        handles = [
            layer.register_forward_pre_hook(partial(watch, i), with_kwargs=True)
            for i, layer in enumerate(layers[:FULL_LAYERS])
        ]
        try:
            with super().attached(model, budget, samples) as attachment:
                yield attachment
        finally:
            for handle in handles:
                handle.remove()
            self._plan, self._inputs = None, {}


FULL_LAYERS = 2
"""Layers that see everything before the first tokens are dropped, as FastV and DART have it."""


def full_layers(visual_tokens: int, layers: int, budget: int, least: int) -> int:
    """`K`, the first layer on fewer tokens: 2, as published for 32 and 40 layers.

    1 where the budget would not leave `least` tokens for the layers after two full ones: in a model
    of 16 layers, two of them alone are 12.5 %.
    """
    left = budget * layers - FULL_LAYERS * visual_tokens
    fits = layers > FULL_LAYERS and left >= least * (layers - FULL_LAYERS)
    return FULL_LAYERS if fits else 1


def pruned_once(visual_tokens: int, layers: int, first: int, kept: int) -> tuple[int, ...]:
    """All tokens in the layers before `first`, `kept` from there on."""
    return (visual_tokens,) * first + (kept,) * (layers - first)


def nearest(candidates: Sequence[tuple[int, ...]], budget: int) -> tuple[int, ...]:
    """The schedule whose average is nearest to `budget`; of two as near, the earlier one."""
    return min(candidates, key=lambda counts: abs(sum(counts) - budget * len(counts)))


def real(plan: Plan) -> Tensor:
    """bool `[B, T]`, False at padding."""
    return plan.visual | plan.text


def last_tokens(plan: Plan) -> Tensor:
    """int64 `[B]`: the position of every sample's last token."""
    positions = torch.arange(plan.tokens, device=plan.visual.device)
    return (real(plan) * positions).argmax(dim=1)
