"""One forward through the layers: what each runs on, and what its result is put back into."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .cache import SelectiveLayer
from .calls import POSITIONS
from .carry import Carry, carried
from .diversity import diverse
from .masks import build_mask
from .mass import log_mass
from .merging import gather_hidden, gather_positions, merge
from .plan import Plan
from .policy import PAPER, Policy
from .scoring import LayerSelector, latent_of, scaled_by_position
from .selecting import positions_of, select

Phase = Callable[[str], AbstractContextManager[object]]


def no_phase(name: str) -> AbstractContextManager[object]:
    """Nobody watches."""
    return nullcontext()


@dataclass(frozen=True)
class Chosen:
    """What a selecting layer runs on, as those are told who watch (`Attachment.watch`).

    Attributes:
        layer: number of the layer, from 0.
        ranked_in: the layer that ranked the tokens: this one, or an earlier one whose choice holds.
        index: int64 `[B, K]`, positions of text and kept visual tokens.
        valid: bool `[B, K]`, False at the fill of shorter samples; None where there is none.
        importance: `[B, T]` as the scorer gave it, -inf where not visual; None where the layer runs
            on text alone.
    """

    layer: int
    ranked_in: int
    index: Tensor
    valid: Tensor | None
    importance: Tensor | None


Watch = Callable[[Chosen], None]


class Scorer(Protocol):
    """A method of choosing tokens: one number per visual token, in every layer that ranks."""

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """Importance `[B, T]`, -inf where `plan.visual` is False; the largest are kept.

        Args:
            layer_index: from 0.
            layer: the decoder layer about to run.
            hidden: its input `[B, T, D]`, all tokens; not to be written to, nor to be kept: later
                layers may write to it.
            plan: of this forward; a new object for every forward.
            layer_kwargs: what the layer is called with (`position_embeddings`, ...); not to be
                written to.
        """
        ...


@dataclass(frozen=True)
class Pieces:
    """A policy and the fitted tensors it needs, each on its layer's device and in its dtype.

    Attributes:
        policy: which pieces are in use.
        selectors: one per layer, whose latents tokens are compared by; empty where the policy
            compares none.
        carries: one per layer; empty where the policy carries nothing.
    """

    policy: Policy = PAPER
    selectors: Sequence[LayerSelector | None] = ()
    carries: Sequence[Carry] = ()


@dataclass
class _Choice:
    """What was chosen, for the layers that go on with it.

    Attributes:
        layer: that ranked.
        scores: `[B, T]`.
        latent: `[B, T, R]` of that layer, or None where tokens are not compared.
        importance: `[B, T]`, the scores before tokens were compared; None where nobody watches.
        counts: `k` per sample that the rest is for.
        index, valid: as `select` has them; `valid` is None where all are real.
        bias: `[B, K]` of the logits, or None.
        positions: `(cos, sin)` at `index`.
    """

    layer: int
    scores: Tensor
    latent: Tensor | None
    importance: Tensor | None = None
    counts: tuple[int, ...] = ()
    index: Tensor | None = None
    valid: Tensor | None = None
    bias: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None

    def move(self, device: torch.device) -> None:
        """Put the tensors on the device of the coming layer."""
        for name in ("scores", "latent", "importance", "index", "valid", "bias"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))
        if self.positions is not None:
            cos, sin = self.positions
            self.positions = cos.to(device), sin.to(device)


@dataclass
class _Running:
    """A layer that is running on a selection: what its result is merged with."""

    hidden: Tensor
    index: Tensor
    valid: Tensor | None
    in_place: bool
    carry: Carry | None


class Forward:
    """The state of one forward. `before` and `after` are called around every layer, in order.

    Attributes:
        plan: of this forward.
        phase: entered around the parts of a selecting layer, see `Attachment.phase`.
    """

    def __init__(
        self,
        plan: Plan,
        scorer: Scorer,
        pieces: Pieces,
        implementation: str,
        phase: Phase = no_phase,
        watch: Watch | None = None,
    ) -> None:
        """
        Args:
            plan: of this forward.
            scorer: ranks the visual tokens.
            pieces: what else happens to them.
            implementation: `config._attn_implementation`.
            phase, watch: see `Attachment`.
        """
        self.plan = plan
        self.phase = phase
        self._scorer = scorer
        self._pieces = pieces
        self._implementation = implementation
        self._watch = watch
        self._choice: _Choice | None = None
        self._running: _Running | None = None

    def before(
        self,
        i: int,
        layer: Any,
        hidden: Tensor,
        kwargs: dict[str, Any],
        past: SelectiveLayer | None = None,
        ours: bool = False,
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """What layer `i` is to run on: hidden states `[B, K, D]` and keyword arguments; None to
        run it as it was called.

        Args:
            i: number of the layer, from 0.
            layer: itself.
            hidden: its input `[B, T, D]`, on its device.
            kwargs: what it is called with.
            past: its cache, if there is one.
            ours: whether `hidden` may be written to.
        """
        plan = self.plan
        plan.move(hidden.device)
        if not plan.selects(i):
            return self._whole(hidden, kwargs, past)
        if plan.ranks(i):
            choice = self._choose(i, layer, hidden, kwargs)
        else:
            # Text alone: nothing to rank, and what was chosen before may hold again later.
            choice = _Choice(i, hidden, None)
            with self.phase("select"):
                self._settle(choice, positions_of(plan.text, max(plan.lengths(i))), i, kwargs)
        index, valid, bias = choice.index, choice.valid, choice.bias
        assert index is not None
        if self._watch is not None:
            self._watch(Chosen(i, choice.layer, index, valid, choice.importance))
        carry = self._pieces.carries[i] if self._pieces.policy.carry else None
        self._running = _Running(hidden, index, valid, ours, carry)
        with self.phase("select"):
            chosen = gather_hidden(hidden, index)
            mask = self._mask(chosen, past, valid, bias)
        if past is not None:
            past.expect(plan.tokens, valid, plain=False, bias=bias)
        return chosen, {
            **kwargs,
            "attention_mask": mask,
            POSITIONS: choice.positions,
            "position_ids": self._position_ids(layer, kwargs, index),
        }

    def after(self, output: Tensor) -> Tensor | None:
        """The layer's `output` put back among all tokens, `[B, T, D]`; None where the layer ran on
        all of them."""
        running, self._running = self._running, None
        if running is None:
            return None
        with self.phase("merge"):
            hidden, in_place = running.hidden, running.in_place
            if running.carry is not None:
                hidden = carried(hidden, running.carry, in_place)
                # A new tensor, unless it was ours before.
                in_place = in_place or not torch.is_grad_enabled()
            return merge(hidden, running.index, output, running.valid, in_place)

    def _position_ids(self, layer: Any, kwargs: dict[str, Any], index: Tensor) -> Tensor | None:
        """None wherever a layer can do without, for the rotary tables carry the positions, and
        FlashAttention would take ids with gaps for several packed sequences."""
        if scaled_by_position(layer) is None:
            return None
        ids: Tensor = kwargs["position_ids"].to(index.device)
        return ids.expand(len(index), -1).gather(1, index)

    def _whole(
        self, hidden: Tensor, kwargs: dict[str, Any], past: SelectiveLayer | None
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """A layer that runs on all new tokens; behind a past with gaps it needs our mask."""
        plain = past is None or past.plain
        valid = self.plan.real()
        mask = None if plain else self._mask(hidden, past, valid, None)
        if past is not None:
            past.expect(self.plan.tokens, valid, plain=True)
        # The model's own mask fits a layer that has skipped nothing so far.
        return None if plain else (hidden, {**kwargs, "attention_mask": mask})

    def _choose(self, i: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> _Choice:
        """The choice that holds in layer `i`: a new one, or that of an earlier layer."""
        policy, plan = self._pieces.policy, self.plan
        choice = self._choice
        if choice is None or (policy.every and i - choice.layer >= policy.every):
            with self.phase("score"):
                scores = self._scorer.importance(i, layer, hidden, plan, kwargs)
            latent, importance = None, scores if self._watch is not None else None
            if policy.compares:
                selector = self._pieces.selectors[i]
                assert selector is not None
                with self.phase("select"):
                    latent = latent_of(hidden, selector)
                    if policy.quality is not None:
                        scores = diverse(scores, latent, plan.images, policy.quality, plan.several)
            choice = self._choice = _Choice(i, scores, latent, importance)
        elif choice.scores.device != hidden.device:
            choice.move(hidden.device)
        if choice.counts != plan.keep_counts[i]:
            with self.phase("select"):
                chosen = select(choice.scores, plan.keep_tensor[i], plan.text, max(plan.lengths(i)))
                self._settle(choice, chosen, i, kwargs)
                if policy.mass and choice.latent is not None:
                    choice.bias = log_mass(choice.latent, *chosen, plan.visual, plan.images)
        return choice

    def _settle(
        self, choice: _Choice, chosen: tuple[Tensor, Tensor], i: int, kwargs: dict[str, Any]
    ) -> None:
        lengths = self.plan.lengths(i)
        choice.counts = self.plan.keep_counts[i]
        choice.index = chosen[0]
        choice.valid = None if min(lengths) == max(lengths) else chosen[1]
        choice.positions = gather_positions(kwargs[POSITIONS], chosen[0])

    def _mask(
        self,
        hidden: Tensor,
        past: SelectiveLayer | None,
        valid: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        batch, rows, _ = hidden.shape
        if past is not None:
            bias = past.whole_bias(batch, rows, bias)
        return build_mask(
            self._implementation,
            hidden,
            0 if past is None else past.slots,
            None if past is None else past.valid,
            valid,
            bias,
        )
