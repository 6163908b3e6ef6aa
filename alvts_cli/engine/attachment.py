"""The selection in a model: hooks on its layers and a wrapper around its backbone, of which nothing
is left when it ends."""

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial, wraps
from types import TracebackType
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..errors import AlvtsError
from ..families import family_of
from ..families.placing import is_offloaded, where
from .cache import SelectiveLayer, prepare_cache, remask
from .calls import (
    by_name,
    cache_of,
    check_checkpointing,
    check_layer_call,
    check_output,
    names_of,
    warn_if_untested,
)
from .compiling import check_not_compiled, compile_decoder, usual_options, with_forward
from .forward import Forward, Pieces, Scorer, Watch, no_phase
from .keep import Keep
from .masks import check_bias, mask_style
from .plan import Plan, make_plan, read_inputs
from .policy import PAPER, Policy
from .probe import check_layers

_attached: WeakSet[nn.Module] = WeakSet()


_CHANGED = (
    "the decoder's layers are not those that alvts was attached to; change them before attach, or "
    "after detach"
)


Compile = bool | Mapping[str, Any]
"""How an attached model is compiled, see `attach`."""


@dataclass(frozen=True)
class Prefill:
    """What the latest forward with visual tokens kept.

    Attributes:
        visual_tokens: per sample.
        kept: `[layer][sample]`.
        policy: under which.
        carry_rank: of the carried updates; 0 where nothing is carried.
    """

    visual_tokens: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    policy: Policy = PAPER
    carry_rank: int = 0

    @property
    def layer_average(self) -> float:
        """Visual tokens kept, mean over layers and samples."""
        return sum(map(sum, self.kept)) / (len(self.kept) * len(self.visual_tokens))


class _State:
    """What is known of the forward that runs, if one does.

    Attributes:
        thread: that it runs in; 0 for none.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """No forward runs. All is there from the start, or a graph of torch.compile would be made
        anew when it comes."""
        self.thread = 0
        self.forward: Forward | None = None
        self.cache: Any = None
        self.first_hidden: Tensor | None = None
        self.in_layer: AbstractContextManager[object] | None = None
        self.merged: Tensor | None = None


class _StateOfThread(_State, threading.local):
    """The same for every thread."""


class Attachment:
    """The hooks of one model. Made by `attach`; ends with the `with` block or by `detach()`.

    A KV cache filled while attached belongs to the attached model: it lacks the tokens that each
    layer skipped. Up to the end of the latest turn with a picture, a later attention_mask has to
    say what was said before; what came behind it may be hidden. Several threads may call the model
    at once, but not a compiled one. After `model.to(...)` the selectors follow. A forward pre-hook
    of yours on a layer is given all tokens if it was there before, and what the layer runs on if it
    came later.

    Tokens are ranked by the text that comes in the same forward. So a prompt in pieces
    (`prefill_chunk_size`, or a question that was cached in front of its picture) keeps others than
    in one piece, and so does `use_cache=False`, where the answer so far asks along.

    Attributes:
        last: what the latest forward with visual tokens kept, in whichever thread, or None.
        phase: in a forward with visual tokens, `phase(name)` is entered around "score", "select"
            and "merge" wherever a layer has that to do, and around "layer", every layer itself; a
            benchmark may put a timer here. While it is set, nothing runs compiled.
        watch: with a function here, it is called with a `Chosen` in every layer that a visual token
            skips, before the layer runs. While it is set, nothing runs compiled.
    """

    def __init__(
        self,
        model: Any,
        place: Callable[[], tuple[Scorer, Pieces]],
        keep: Keep,
        compile: Compile = False,
    ) -> None:
        """
        Args:
            model: see `attach`.
            place: makes what ranks the tokens and what else happens to them, each where the
                model's layers are and in their dtype; called again when these have changed.
            keep: what each layer keeps.
            compile: see `attach`.
        """
        family = family_of(model)
        family.check(model)
        # What `detach` lets go of is of any kind.
        self._model: Any = model
        self._family = family
        self._backbone: Any = family.backbone(model)
        text_model: Any = family.text_model(model)
        self._config = text_model.config
        self._keep = keep
        mask_style(self._config._attn_implementation)
        layers: Any = family.layers(model)
        check_not_compiled(self._backbone, (text_model, *layers))
        check_layers(model)
        if compile is not False and is_offloaded(model):
            raise AlvtsError(
                "part of the model is offloaded, and what fetches it cannot be compiled; attach "
                "without compile"
            )
        if len(set(layers)) < len(layers):
            raise AlvtsError(
                "a layer of this model stands in several places; alvts selects where each is a "
                "layer of its own"
            )
        if any(module in _attached for module in (self._backbone, *layers)):
            raise AlvtsError(
                "alvts is attached to this model, or to one that shares layers with it, already; "
                "detach it first"
            )
        warn_if_untested()

        self.last: Prefill | None = None
        self.phase: Callable[[str], AbstractContextManager[object]] = no_phase
        self.watch: Watch | None = None
        # torch.compile loses what is written to a state of a thread.
        self._state = _StateOfThread() if compile is False else _State()
        self._layers: Any = tuple(layers)
        self._num_layers = len(layers)
        self._adds_behind = family.adds_behind(model.config)
        self._place: Any = place
        self._placing = self._where()
        self._scorer: Any
        self._pieces: Any
        self._scorer, self._pieces = self._placed()

        self._uncompile: Callable[[], None] | None = None
        if compile is not False:
            options = usual_options(model.device) if compile is True else compile
            self._uncompile = compile_decoder(
                text_model, self._plan_to_compile, self._set_plan, options
            )
        self._put_back: Any = with_forward(self._backbone, self._around)
        self._handles = [
            self._backbone.register_forward_pre_hook(self._check_original),
            text_model.register_forward_hook(self._after_text_model, prepend=True),
        ]
        for i, layer in enumerate(layers):
            self._handles += [
                layer.register_forward_pre_hook(partial(self._before_layer, i), with_kwargs=True),
                # First, so that hooks that record hidden states see the merged ones.
                layer.register_forward_hook(partial(self._after_layer, i), prepend=True),
            ]
        _attached.update(self._hooked())

    def __enter__(self) -> "Attachment":
        """
        Raises:
            AlvtsError: it has ended.
        """
        if not self._handles:
            raise AlvtsError("this attachment has ended; call attach again")
        return self

    def __deepcopy__(self, memo: Any) -> NoReturn:
        """Refused, and with it a copy of the model: nothing could end its selecting."""
        raise AlvtsError("alvts is attached to this model; detach it before copying the model")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refused, and with it pickling the model."""
        raise AlvtsError(
            "alvts is attached to this model; detach it before pickling the model, or use "
            "save_pretrained"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.detach()

    def detach(self) -> None:
        """Remove every hook. Harmless when done twice."""
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._uncompile is not None:
            self._uncompile()
        self._put_back()
        self._state.clear()
        _attached.difference_update(self._hooked())
        # Whoever keeps the attachment, for what `last` says, does not keep the model.
        self._model = self._backbone = self._layers = self._scorer = self._pieces = None
        self._place = self._uncompile = self._put_back = None

    def _hooked(self) -> tuple[nn.Module, ...]:
        """The parts of the model that no other attachment may have, now."""
        return (self._backbone, *self._layers)

    def _placed(self) -> tuple[Scorer, Pieces]:
        """What `place` makes: constants, wherever this is called, and no part of what training goes
        back through, which could be gone through once."""
        with torch.inference_mode(False), torch.no_grad():
            return self._place()

    def _where(self) -> list[tuple[torch.device, torch.dtype]]:
        """Of every layer; its norm is never quantised."""
        return [where(layer.input_layernorm) for layer in self._layers]

    def _plan_to_compile(self) -> Plan | None:
        """The running forward's plan if it selects or decodes, and nobody watches."""
        if self._state.forward is None or self.phase is not no_phase or self.watch is not None:
            return None
        plan = self._state.forward.plan
        return plan if plan.keep_counts or plan.tokens == 1 else None

    def _set_plan(self, plan: Plan) -> None:
        self._state.forward = Forward(
            plan,
            self._scorer,
            self._pieces,
            self._config._attn_implementation,
            self.phase,
            self.watch,
        )

    def _around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The backbone's `forward`, with a plan made before it and forgotten behind it. No hooks:
        torch calls none behind an interrupt."""

        names = names_of(forward)

        @torch.compiler.disable(reason="alvts selects there; attach(..., compile=True) compiles it")
        @wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self._handles:
                return forward(*args, **kwargs)
            me = threading.get_ident()
            if self._state.thread not in (0, me):
                raise AlvtsError(
                    "the model is compiled and runs in another thread already; attach without "
                    "compile to call it from several threads at once"
                )
            # Of a forward that this one runs inside of, by a hook; it goes on behind.
            outer = dict(vars(self._state))
            try:
                self._state.clear()
                self._state.thread = me
                self._before_model(by_name(names, args, kwargs))
                output = forward(*args, **kwargs)
                self._check_ran()
                self._remember_padding()
                return output
            except Exception:
                self._check_attached()
                raise
            finally:
                # Where it was interrupted, a layer still waits for what was to come.
                for layer in () if self._state.cache is None else self._state.cache.layers:
                    layer.forget()
                vars(self._state).update(outer)

        return run

    def _check_original(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Refuse a shallow copy, which has the hooks and would run the original's weights."""
        if module is not self._backbone:
            raise AlvtsError(
                "this is a copy of a model that alvts is attached to, as DataParallel makes them; "
                "attach to a model of its own for each device"
            )

    def _check_ran(self) -> None:
        """Refuse the result of a forward that did not go through the hooks on its layers."""
        self._check_attached()
        reached = 0 if self._state.forward is None else self._state.forward.reached
        if reached == 0:
            raise AlvtsError(
                "the layers ran without alvts' hooks, as in a graph of torch.compile; attach to a "
                "model of which no part is compiled by itself, with compile=True"
            )
        if reached < self._num_layers:
            raise AlvtsError(_CHANGED)

    def _remember_padding(self) -> None:
        """With the KV cache, so that a later mask can be compared with it."""
        cache, forward = self._state.cache, self._state.forward
        if cache is not None and forward is not None:
            cache.layers[0].remember(forward.plan.tokens, forward.plan.real)

    def _check_attached(self) -> None:
        if not self._handles:
            raise AlvtsError(
                "alvts was detached while the model ran; let the forward end first, in all threads"
            )

    def _check_way(self) -> None:
        """Refuse what would not run the hooks as they are meant to."""
        if torch.jit.is_tracing():
            raise AlvtsError(
                "torch.jit.trace would keep what was chosen for this one prompt; trace the model "
                "without alvts"
            )
        if torch.compiler.is_exporting() or get_proxy_mode() is not None:
            raise AlvtsError(
                "torch.export and make_fx would keep how many tokens this one prompt has; export "
                "the model without alvts"
            )
        # Since `attach`, maybe; there what the hooks share is lost.
        check_not_compiled(self._backbone, [self._family.text_model(self._model)])
        check_checkpointing(self._layers[0])
        if tuple(self._family.layers(self._model)) != self._layers:
            raise AlvtsError(_CHANGED)
        # It may be set anew at any time.
        implementation = self._config._attn_implementation
        mask_style(implementation)
        if self._pieces.policy.mass:
            check_bias(implementation)

    def _before_model(self, call: Mapping[str, Any]) -> None:
        self._check_way()
        # Before the mask: a cache of the wrong kind brings a mask of the wrong kind with it, and
        # the cache is the cause.
        cache = cache_of(call)
        if cache is not None:
            prepare_cache(cache, self._num_layers)
        seen = 0 if cache is None else cache.get_seq_length()
        input_ids, mask = read_inputs(call, seen)
        visual = self._family.visual_mask(self._model, input_ids)
        if seen and (held := len(cache.layers[0].keys)) != len(input_ids):
            raise AlvtsError(
                f"the KV cache holds {held} samples, but the input_ids are of {len(input_ids)}; "
                "give every sample its turn, in the same order"
            )
        real_before = cache.layers[0].real if seen else None
        every = self._pieces.policy.every
        plan = make_plan(input_ids, visual, mask, self._keep, every=every, real_before=real_before)
        if plan.remasks:
            remask(cache, None if mask is None else mask[:, :seen])
        if plan.keep_counts and (placing := self._where()) != self._placing:
            self._scorer, self._pieces = self._placed()
            self._placing = placing
        self._set_plan(plan)
        if plan.keep_counts:
            pieces = self._pieces
            rank = pieces.carries[0].down.shape[0] if pieces.carries else 0
            self.last = Prefill(plan.visual_counts, plan.keep_counts, pieces.policy, rank)

    def _after_text_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        check_output(output, self._state.cache)
        # transformers records the input of layer 0 as it reached the layer: the selected tokens.
        states = getattr(output, "hidden_states", None)
        if states and self._state.first_hidden is not None and states[0] is not None:
            output.hidden_states = (self._state.first_hidden, *states[1:])

    def _before_layer(
        self, i: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        forward = self._state.forward
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if forward is None or not (forward.stays or hidden.shape[1] == forward.plan.tokens):
            raise AlvtsError(
                "the decoder was given tokens that alvts did not see in input_ids; call the whole "
                "model with input_ids, or detach first"
            )
        plan = forward.plan
        if forward.stays:
            # As the layer before, on the same device.
            ours = False
        else:
            # A model spread over devices hands a layer what the device before computed.
            hidden = hidden.to(where(layer.input_layernorm)[0])
            selects = plan.selects(i)
            check_layer_call(args, kwargs, plan.tokens, selects)
            if i == 0 and selects:
                self._state.first_hidden = hidden
            ours = hidden is self._state.merged and self._unseen(i)
        past = self._cache_layer(i, cache_of(kwargs))
        changed = forward.before(i, layer, hidden, kwargs, past, ours)
        self._enter_layer(plan)
        if changed is None:
            return None
        chosen, kwargs = changed
        if args:
            return (chosen, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": chosen}

    def _after_layer(
        self, i: int, layer: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        if self._state.in_layer is not None:
            self._state.in_layer.__exit__(None, None, None)
            self._state.in_layer = None
        forward = self._state.forward
        if forward is None:
            return None
        merged = forward.after(output, self._unseen(i + 1) and self._adds_behind <= i)
        if merged is not None:
            self._state.merged = merged
        return merged

    def _enter_layer(self, plan: Plan) -> None:
        """Begin the phase that `_after_layer` ends. A step on text alone has no phases.

        Not without anyone to see it: torch.compile takes no context that ends in another function.
        """
        if plan.keep_counts and self.phase is not no_phase:
            self._state.in_layer = self.phase("layer")
            self._state.in_layer.__enter__()

    def _unseen(self, i: int) -> bool:
        """Whether nobody but layer `i`, on the same device, is given what the layer before it made.

        A hook that is not ours, such as that which records hidden states, may keep it, and so does
        autograd.
        """
        return (
            0 < i < self._num_layers
            and not torch.is_grad_enabled()
            and self._placing[i - 1] == self._placing[i]
            and len(self._layers[i - 1]._forward_hooks) == 1
            and len(self._layers[i]._forward_pre_hooks) == 1
            and not (_global_forward_hooks or _global_forward_pre_hooks)
        )

    def _cache_layer(self, i: int, cache: Any) -> SelectiveLayer | None:
        """The layer's cache. Without one from the caller, the decoder made it a moment ago."""
        if cache is None:
            return None
        if cache is not self._state.cache:
            prepare_cache(cache, self._num_layers)
            self._state.cache = cache
        return cache.layers[i]


def is_attached(model: Any) -> bool:
    """Whether alvts is attached to `model`, a whole one of a known family."""
    return family_of(model).backbone(model) in _attached
