"""One forward through the layers: what each runs on, and what its result is put back into."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import AlvtsError
from .cache import SelectiveLayer
from .calls import POSITIONS
from .carry import Carry, carried
from .diversity import directions, diverse, diverse_in_turn
from .masks import build_mask
from .mass import Members, find_members, pooled
from .merging import gather_hidden, merge, rows_of, sample_starts, take_positions
from .normed import Normed
from .plan import Plan
from .policy import PAPER, Policy
from .scene import Scene
from .scoring import LayerSelector, scaled_by_position
from .selecting import Layout, make_layout, positions_of, select

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
    """A method of choosing tokens: one number per visual token, in every layer that ranks.

    Where a visual token has nan it is the last, and with infinity the first, as with the largest
    number there is.

    One that has `fills = True` puts what `Scene.fill` has where `plan.visual` is False, or anything
    finite and not negative if `plan.compares`; that saves the engine a look.
    """

    def importance(
        self,
        layer_index: int,
        layer: nn.Module,
        hidden: Tensor,
        plan: Plan,
        layer_kwargs: dict[str, Any],
    ) -> Tensor:
        """Importance `[B, T]`, of a float dtype and on the device of `hidden`; the largest of the
        visual tokens are kept, whatever the others have.

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


def _check_importance(scores: Any, plan: Plan) -> None:
    """
    Raises:
        AlvtsError: a scorer gave something else than a number for every token.
    """
    shape, device = plan.visual.shape, plan.visual.device
    if not isinstance(scores, Tensor):
        raise AlvtsError(f"a scorer gives a tensor, not a {type(scores).__name__}")
    dense = scores.layout == torch.strided and scores.is_floating_point()
    if scores.shape != shape or not dense or scores.device != device:
        kind = f"{scores.layout} {scores.dtype}".replace("torch.strided ", "").replace("torch.", "")
        raise AlvtsError(
            f"a scorer gives floats {list(shape)} on {device}, as many as there are tokens, not "
            f"{kind} {list(scores.shape)} on {scores.device}"
        )


def _of_others(scores: Tensor, fill: Tensor, visual: Tensor, compares: bool) -> Tensor:
    """Importance of a scorer that does not fill, as ranking wants it: in the same order, nan last.

    Args:
        scores: `[B, T]`, anything, of any float dtype.
        fill: `Scene.fill`.
        visual: bool `[B, T]`.
        compares: see `Plan`: finite and not negative then.

    Returns:
        float32 `[B, T]`; where not visual `fill`, or 0 if `compares`.
    """
    scores = scores.float()
    if not compares:
        # Of two that are infinite, and of padding, none would be told from the other.
        scores = scores.nan_to_num(nan=torch.finfo(scores.dtype).min)
        return torch.where(visual, scores, fill)
    finite = visual & scores.isfinite()
    low = scores.masked_fill(~finite, torch.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~finite, -torch.inf).amax(dim=1, keepdim=True)
    # Those that are no numbers beside the others, lest these look alike.
    scores = torch.where(finite, scores, torch.where(scores == torch.inf, high, low))
    # From 0 on where some are negative; a sample without any number has 0.
    return (scores - low.clamp(max=0)).nan_to_num(nan=0, neginf=0) * visual


@dataclass(frozen=True)
class Pieces:
    """A policy and the fitted tensors it needs, each on its layer's device and in its dtype.

    Attributes:
        policy: which pieces are in use.
        selectors: one per layer, whose latents tokens are compared by; empty where the policy
            compares none.
        carries: one per layer; empty where the policy carries nothing.
        norms: what each layer's input RMSNorm multiplies by, `[D]`; empty where that is folded into
            selectors and carries, see `normed.Normed`.
        joined: `down` of selector and carry one below the other, where one product makes both.
    """

    policy: Policy = PAPER
    selectors: Sequence[LayerSelector | None] = ()
    carries: Sequence[Carry] = ()
    norms: Sequence[Tensor] = ()
    joined: Sequence[Tensor | None] = ()


@dataclass
class _Choice:
    """What was chosen, for the layers that go on with it.

    Attributes:
        layer: that ranked, the latest that did for any sample.
        scores: `[B, T]` to rank by; None where the layers run on text alone.
        states: `diversity.directions` of that layer, or None where tokens are not compared.
        importance: `[B, T]`, the scores before tokens were compared; None where nobody watches.
        fresh: bool `[B, 1]`, False at samples that go on with an earlier layer's ranking; None
            where none does.
        counts: `k` per sample that the rest is for.
        rows, layout: as `select` has them.
        members: whom those stand for; None where that is not asked.
        bias: `[B, K]` of the logits, or None.
        positions: `(cos, sin)` at `rows`.
        mask: of the attention, where nothing is cached yet; () before it was made.
    """

    layer: int
    scores: Tensor | None = None
    states: Tensor | None = None
    importance: Tensor | None = None
    fresh: Tensor | None = None
    counts: tuple[int, ...] = ()
    rows: Tensor | None = None
    layout: Layout | None = None
    members: Members | None = None
    bias: Tensor | None = None
    positions: tuple[Tensor, Tensor] | None = None
    mask: Tensor | tuple[()] | None = ()

    def move(self, device: torch.device) -> None:
        """Put what later layers need on the device of the coming one; the rest is made again."""
        for name in ("scores", "states", "importance"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))
        self.counts = ()


@dataclass
class _Running:
    """Layers that are running on a selection: what their result is merged with.

    Attributes:
        layer: number of the layer that runs.
        choice: that it runs on.
        hidden: all tokens, `[B, T, D]`, as they were in front of the first of these layers.
        in_place: whether that may be written to.
        carry, latent: of what is skipped; None where nothing is carried.
    """

    layer: int
    choice: _Choice
    hidden: Tensor
    in_place: bool
    carry: Carry | None
    latent: Tensor | None


class Forward:
    """The state of one forward. `before` and `after` are called around every layer, in order.

    Attributes:
        plan: of this forward.
        phase: entered around the parts of a selecting layer, see `Attachment.phase`.
        stays: the coming layer is handed the selection, `[B, K, D]`, as the layer before it left
            it, and not all tokens.
        reached: layers so far.
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
        self._text: _Choice | None = None
        self._layouts: list[tuple[tuple[int, ...], Layout]] = []
        self._masks: list[tuple[Layout, Tensor | None]] = []
        self.stays = False
        self.reached = 0
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
            hidden: its input `[B, T, D]`, on its device; `[B, K, D]` if `stays`.
            kwargs: what it is called with.
            past: its cache, if there is one.
            ours: whether `hidden` may be written to.
        """
        plan = self.plan
        self.reached = i + 1
        if self.stays:
            assert self._running is not None
            self._running.layer = i
            return hidden, self._call(layer, hidden, kwargs, self._running.choice, past)
        plan.move(hidden.device)
        if not plan.selects(i):
            return self._whole(hidden, kwargs, past)
        scene = plan.scene(kwargs[POSITIONS], kwargs.get("position_ids"))
        plan.normed = Normed(hidden, self._pieces.norms[i] if self._pieces.norms else None)
        choice = self._decide(i, layer, hidden, kwargs)
        rows, layout = choice.rows, choice.layout
        assert rows is not None and layout is not None
        if self._watch is not None:
            index = rows - sample_starts(len(rows), plan.tokens, rows.device)
            self._watch(Chosen(i, choice.layer, index, layout.valid, choice.importance))
        with self.phase("select"):
            chosen = gather_hidden(hidden, rows)
            if self._pieces.policy.pool and choice.layer == i and choice.members is not None:
                means = pooled(chosen, hidden, choice.members, scene)
                fresh = choice.fresh
                chosen = means if fresh is None else torch.where(fresh[..., None], means, chosen)
            called = self._call(layer, chosen, kwargs, choice, past)
            self._running = self._run(i, hidden, choice, ours)
        plan.normed = None
        return chosen, called

    def after(self, output: Tensor, unseen: bool = False) -> Tensor | None:
        """The layer's `output` put back among all tokens, `[B, T, D]`; None where it stays as it
        is: the layer ran on all of them, or the next one runs on the same selection.

        Args:
            output: `[B, K, D]`, or all tokens.
            unseen: whether nobody but the next layer, on the same device, is given the result.
        """
        running = self._running
        if running is None:
            return None
        self.stays = unseen and self._watch is None and self._holds(running)
        if self.stays:
            return None
        self._running = None
        with self.phase("merge"):
            hidden, in_place = running.hidden, running.in_place
            if running.carry is not None and running.latent is not None:
                hidden = carried(hidden, running.latent, running.carry, in_place)
                # A new tensor, unless it was ours before.
                in_place = in_place or not torch.is_grad_enabled()
            rows, layout = running.choice.rows, running.choice.layout
            assert rows is not None and layout is not None
            return merge(hidden, rows, output, layout.valid, in_place)

    def _holds(self, running: _Running) -> bool:
        """Whether the next layer runs on the selection that this one runs on."""
        plan, choice, after = self.plan, running.choice, running.layer + 1
        if running.carry is not None or not plan.selects(after):
            return False
        if plan.keep_counts[after] != choice.counts:
            return False
        return choice is self._text or not plan.ranks(after)

    def _call(
        self,
        layer: Any,
        chosen: Tensor,
        kwargs: dict[str, Any],
        choice: _Choice,
        past: SelectiveLayer | None,
    ) -> dict[str, Any]:
        """What a layer that runs on `chosen` is called with."""
        return {
            **kwargs,
            "attention_mask": self._selected_mask(choice, chosen, past),
            POSITIONS: choice.positions,
            "position_ids": self._position_ids(layer, kwargs, choice),
        }

    def _position_ids(self, layer: Any, kwargs: dict[str, Any], choice: _Choice) -> Tensor | None:
        """None wherever a layer can do without, for the rotary tables carry the positions, and
        FlashAttention would take ids with gaps for several packed sequences."""
        if scaled_by_position(layer) is None:
            return None
        scene, rows = self.plan.scene(kwargs[POSITIONS], kwargs.get("position_ids")), choice.rows
        if scene.ids is None or rows is None:
            return None
        ids = scene.ids.to(rows.device).expand(len(rows), -1).flatten()
        return ids.index_select(0, rows.flatten()).view(rows.shape)

    def _whole(
        self, hidden: Tensor, kwargs: dict[str, Any], past: SelectiveLayer | None
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """A layer that runs on all new tokens; behind a past with gaps it needs our mask."""
        plain = past is None or past.plain
        valid = self.plan.real
        mask = None if plain else self._mask(hidden, past, valid, None)
        if past is not None and plain:
            past.expect(self.plan.tokens, past.whole_valid(self.plan.tokens, valid), plain=True)
        # The model's own mask fits a layer that has skipped nothing so far.
        return None if plain else (hidden, {**kwargs, "attention_mask": mask})

    def _decide(self, i: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> _Choice:
        """Score and select: the choice that layer `i` runs on, made or gone on with."""
        plan = self.plan
        keeps = any(plan.keep_counts[i])
        choice = self._choose(i, layer, hidden, kwargs) if keeps else self._text_alone(i)
        if choice.counts != plan.keep_counts[i]:
            scene = plan.scene(kwargs[POSITIONS], kwargs.get("position_ids"))
            with self.phase("select"):
                self._settle(choice, i, scene, hidden.dtype)
        return choice

    def _choose(self, i: int, layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> _Choice:
        """The choice that holds in layer `i`: a new one, or that of an earlier layer."""
        policy, plan = self._pieces.policy, self.plan
        before = self._choice
        if before is not None:
            assert before.scores is not None, "those without are not kept here"
            if before.scores.device != hidden.device:
                before.move(hidden.device)
        if not plan.ranks(i):
            if before is None:
                # Every sample keeps all of its tokens or none.
                scene = plan.scene(kwargs[POSITIONS], kwargs.get("position_ids"))
                return _Choice(i, scores=scene.fill())
            return before
        # A layer that ranks only in need has none, see `make_plan`.
        selector = self._pieces.selectors[i] if policy.compares else None
        plan.compares = policy.quality is not None and selector is not None
        scene = plan.scene(kwargs[POSITIONS], kwargs.get("position_ids"))
        with self.phase("score"):
            self._map_at_once(i)
            scores = self._scorer.importance(i, layer, hidden, plan, kwargs)
        _check_importance(scores, plan)
        choice = self._choice = _Choice(i)
        if self._watch is not None:
            # A scorer of ours leaves there what ranking wants.
            choice.importance = scores.masked_fill(~plan.visual, -torch.inf)
        with self.phase("select"):
            if not getattr(self._scorer, "fills", False):
                scores = _of_others(scores, scene.fill(), plan.visual, plan.compares)
            if selector is not None:
                normed = plan.normed
                assert normed is not None
                latent = normed.times(selector.down, selector.eps)
                choice.states = directions(latent, scene.present())
                if policy.turns and policy.quality is not None:
                    scores = diverse_in_turn(
                        scores, choice.states, policy.quality, scene, policy.turns
                    )
                elif policy.quality is not None:
                    scores = diverse(scores, choice.states, policy.quality, scene)
        choice.scores = scores
        # With 1 nobody goes on with a ranking.
        if before is not None and policy.every != 1 and plan.goes_on(i):
            self._mix(choice, before)
        return choice

    def _mix(self, choice: _Choice, before: _Choice) -> None:
        """Let samples that would not rank here without the others of their batch go on."""
        choice.fresh = fresh = self.plan.due_tensor[choice.layer].bool()[:, None]
        for name in ("scores", "importance", "states"):
            new, old = getattr(choice, name), getattr(before, name)
            if new is not None and old is not None:
                by_sample = fresh if new.dim() == 2 else fresh[..., None]
                setattr(choice, name, torch.where(by_sample, new, old))

    def _map_at_once(self, i: int) -> None:
        """One product for both low-rank maps of layer `i`, where both are wanted."""
        pieces, normed = self._pieces, self.plan.normed
        joined = pieces.joined[i] if pieces.joined else None
        if joined is not None and normed is not None:
            carry, selector = pieces.carries[i], pieces.selectors[i]
            assert selector is not None
            normed.times_both(joined, (selector.down, carry.down), carry.eps)

    def _text_alone(self, i: int) -> _Choice:
        """Nothing to rank: the same in every such layer. What was chosen before may hold again
        later."""
        choice, device = self._text, self.plan.visual.device
        if choice is None or (choice.rows is not None and choice.rows.device != device):
            choice = self._text = _Choice(i)
        return choice

    def _settle(self, choice: _Choice, i: int, scene: Scene, dtype: torch.dtype) -> None:
        """Make of scores what a layer runs on that keeps as many as layer `i`."""
        plan = self.plan
        choice.counts = plan.keep_counts[i]
        choice.layout = layout = self._layout(i)
        if choice.scores is None:
            index, _ = positions_of(plan.text, layout.length)
            choice.rows = rows_of(index, plan.tokens)
        else:
            choice.rows = select(choice.scores, layout)
        choice.positions = take_positions(scene.joined(), choice.rows)
        choice.mask, choice.members, choice.bias = (), None, None
        policy = self._pieces.policy
        if (policy.mass or policy.pool) and choice.states is not None:
            rows, states = choice.rows, choice.states
            choice.members = find_members(states, rows, layout, scene, policy.pool)
            choice.bias = choice.members.log(dtype) if policy.mass else None

    def _layout(self, i: int) -> Layout:
        """Where the tokens of layer `i` stand, as far as their numbers decide; the same for all
        layers that keep as many."""
        plan = self.plan
        kept = plan.keep_counts[i]
        # Not a dictionary, for which torch.compile would make constants of the numbers.
        for counts, known in self._layouts:
            if counts == kept and (known.drop is None or known.drop.device == plan.text.device):
                return known
        lengths = plan.lengths(i)
        ragged = min(lengths) != max(lengths)
        each = plan.keep_tensor[i] + plan.text_tensor if ragged else None
        made = make_layout(plan.text, each, max(lengths))
        empty = any(n > 0 == k for n, k in zip(plan.visual_counts, kept, strict=True))
        whole = None
        if any(n == k > 0 for n, k in zip(plan.visual_counts, kept, strict=True)):
            whole = plan.visual_tensor == plan.keep_tensor[i]
        layout = replace(made, empty=empty, whole=whole)
        self._layouts.append((kept, layout))
        return layout

    def _run(self, i: int, hidden: Tensor, choice: _Choice, ours: bool) -> _Running:
        """What the result of layer `i` is merged with."""
        carry, latent, normed = None, None, self.plan.normed
        if self._pieces.policy.carry and normed is not None:
            carry = self._pieces.carries[i]
            latent = normed.times(carry.down, carry.eps).to(hidden.dtype)
        return _Running(i, choice, hidden, ours, carry, latent)

    def _selected_mask(
        self, choice: _Choice, chosen: Tensor, past: SelectiveLayer | None
    ) -> Tensor | None:
        """The mask of a layer that runs on a choice; made once for all that have cached nothing."""
        assert choice.layout is not None
        valid, bias = choice.layout.valid, choice.bias
        if past is not None and past.slots:
            return self._mask(chosen, past, valid, bias, selects=True)
        if past is not None:
            # To each its own object: of one that several layers hold, torch.compile would make a
            # rule of the graph.
            own = None if valid is None else valid.view(valid.shape)
            past.expect(self.plan.tokens, own, plain=False, bias=bias)
        if isinstance(choice.mask, tuple):
            mask = self._mask_of(choice.layout, chosen, bias is not None)
            if mask is not None and bias is not None:
                mask = mask + bias[:, None, None]
            choice.mask = mask
        return choice.mask

    def _mask_of(self, layout: Layout, chosen: Tensor, adds: bool) -> Tensor | None:
        """Of a layout, without a past; additive if something is to be added to it."""
        for known, mask in self._masks:
            if known is layout and (mask is None or mask.device == chosen.device):
                return mask
        kind = "eager" if adds else self._implementation
        mask = build_mask(kind, chosen, 0, layout.valid)
        self._masks.append((layout, mask))
        return mask

    def _mask(
        self,
        hidden: Tensor,
        past: SelectiveLayer | None,
        valid: Tensor | None,
        bias: Tensor | None,
        selects: bool = False,
    ) -> Tensor | None:
        """The mask of a layer behind what it has cached, which is told what comes."""
        assert past is not None
        rows, slots = hidden.shape[1], past.slots
        bias, valid = past.whole_bias(rows, bias), past.whole_valid(rows, valid)
        past.expect(self.plan.tokens, valid, plain=not selects, bias=bias)
        if valid is not None and rows == 1 and self.plan.real is not None:
            # A single token that is padding sees itself, so that its row is not empty.
            valid = functional.pad(valid[:, :-1], (0, 1), value=True)
        return build_mask(self._implementation, hidden, slots, valid, bias)
