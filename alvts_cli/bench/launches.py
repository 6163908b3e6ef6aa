"""What a prefill asks of a GPU beside arithmetic, counted without one.

An eager model hands the device one operator after the other, and each costs the host some
microseconds. Here a model runs on torch's fake tensors: shapes, dtypes and devices are those of a
GPU, numbers there are none. Whatever reaches the dispatcher is counted.

- A **launch** is an operator that computes something: neither a view nor an allocation. The
  attention kernel is one, whichever it is. A few operators (`addmm`, `baddbmm`, `sort`) start more
  than one kernel; they count as one here, for dense layers as for selecting ones.
- A **host synchronisation** is a read of a tensor's number by the host, or of a shape that depends
  on numbers.
- A **copy** brings a tensor from the host to the device.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..engine import Policy, attach
from ..engine.calls import going_on
from ..engine.masks import mask_style
from ..families import family_of
from ..shapes import cut_decoder, cut_tower
from .selectors import random_selectors

KEEP = 1 / 9
TEXT, VISUAL = 64, 576
"""Of the prompt that is counted; only where scoring has to be split does the size matter."""


@dataclass(frozen=True)
class Launches:
    """Launches of one forward, by what a layer does; a layer's own ones included.

    Attributes:
        dense: of a layer of the dense model.
        chooses, goes_on, goes_on_again, goes_on_otherwise, text_only, text_goes_on: of a layer that
            does what `engine.policy.LAYERS` says. Taking a selection out of all tokens and putting
            it back belong to the layer that begins to run on it, wherever it ends.
        once: in the whole prefill beside the layers, over those of the dense model.
        rest: in a dense prefill beside the layers.
        decode, decode_dense: of a layer for one more token.
        decode_rest: beside the layers, for one more token of the dense model.
        host_syncs: in all layers of the prefills and decoded tokens that were counted.
        host_syncs_once: beside the layers, over those of the dense model.
        copies: from host to device, and tensors made on the host, in all layers.
        copies_once: beside the layers, over those of the dense model.
        operators: the names behind each of the figures that count launches of a layer.
        moved: bytes read and written by all but products and attention: by the name of each figure
            that counts launches of a prefill.
    """

    dense: int
    chooses: int
    goes_on: int
    goes_on_again: int
    goes_on_otherwise: int
    text_only: int
    text_goes_on: int
    once: int
    rest: int
    decode: int
    decode_dense: int
    decode_rest: int
    host_syncs: int
    host_syncs_once: int
    copies: int
    copies_once: int
    operators: dict[str, tuple[str, ...]]
    moved: dict[str, int]

    def over_dense(self, layers: Sequence[str]) -> int:
        """Launches of a whole prefill over those of the dense model; `layers` as
        `engine.policy.what_layers_do` has them."""
        return sum(getattr(self, layer) - self.dense for layer in layers) + self.once


@dataclass(frozen=True)
class Prompts:
    """The prompts that are counted.

    Attributes:
        batch: how many.
        visual_tokens, text_tokens: of each.
        ragged: whether all but the first are a token shorter, and padded.
    """

    batch: int = 1
    visual_tokens: int = VISUAL
    text_tokens: int = TEXT
    ragged: bool = False


def count_launches(
    config: Any,
    policy: Policy,
    prompts: Prompts | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
) -> Launches:
    """Count a model of this shape with random selectors. Neither weights nor a GPU are needed.

    Args:
        config: of a model of a known family; its depth does not matter. FlashAttention is counted
            as sdpa.
        policy: that tokens are chosen under.
        prompts: to run on; None for one of 576 visual and 64 text tokens.
        dtype: of the weights.
        device: "cuda", or "cpu", where scoring takes other operators and nothing is copied.
    """
    prompts = prompts or Prompts()
    with _fake_device():
        model = _fake_model(config, dtype, device)
        selectors = random_selectors(model)
        # Two layers tell: what a first one does beside the others', and what all do.
        with _cut(model, 2):
            dense = _run(model, prompts, nullcontext)

        def selecting(keep: Sequence[float], every: int) -> "_Log":
            changed = replace(policy, every=every)
            return _run(model, prompts, lambda: attach(model, selectors, keep, policy=changed))

        # What a first layer does once for all is seen by the second layer that does the same.
        each = selecting([KEEP, KEEP, 0, 0, 0, KEEP, KEEP], 1)
        held = selecting([KEEP, KEEP, KEEP, 0, KEEP, 0, KEEP / 2], 0)
    usual = dense.layers[1]
    kinds = {
        "dense": usual,
        "chooses": each.layers[1],
        "goes_on": held.layers[1],
        "goes_on_again": held.layers[4],
        "goes_on_otherwise": held.layers[6],
        "text_only": held.layers[5],
        "text_goes_on": each.layers[3],
        "decode": each.decode[1],
        "decode_dense": dense.decode[1],
    }
    first, second = each.layers[:2]
    layers = [*each.layers, *held.layers, *each.decode, *held.decode]
    return Launches(
        **{name: len(span.launches) for name, span in kinds.items()},
        once=len(first.launches)
        - len(second.launches)
        + len(each.rest.launches)
        - len(dense.rest.launches),
        rest=len(dense.rest.launches),
        decode_rest=len(dense.decode_rest.launches),
        host_syncs=sum(span.syncs for span in layers),
        host_syncs_once=each.rest.syncs - dense.rest.syncs,
        copies=sum(span.copies for span in layers),
        copies_once=each.rest.copies - dense.rest.copies,
        operators={name: tuple(span.launches) for name, span in kinds.items()},
        moved={
            **{name: span.moved for name, span in kinds.items()},
            "once": first.moved - second.moved + each.rest.moved - dense.rest.moved,
            "rest": dense.rest.moved,
        },
    )


@dataclass
class Span:
    """A stretch of a forward: what it launched, in order, and how often host and device met, and
    bytes that moved."""

    launches: list[str] = field(default_factory=list)
    syncs: int = 0
    copies: int = 0
    moved: int = 0


@dataclass
class _Log:
    """One forward of a prompt, and of a token behind it: by layer, and the rest of each."""

    layers: list[Span]
    decode: list[Span]
    rest: Span
    decode_rest: Span


class _Shell(nn.Module):
    """A model as the engine sees it, around a decoder alone: counting needs no vision tower."""

    def __init__(self, config: Any, decoder: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.device = next(decoder.parameters()).device
        self.model = _Backbone(decoder, family_of(config).decoder)


class _Backbone(nn.Module):
    def __init__(self, decoder: nn.Module, name: str) -> None:
        super().__init__()
        self._name = name
        self.add_module(name, decoder)

    def forward(self, input_ids: Tensor, embeds: Tensor, **more: Any) -> Any:
        return getattr(self, self._name)(inputs_embeds=embeds, **more)


@contextmanager
def _fake_device() -> Iterator[None]:
    # Experts ask it before they multiply: one kernel for all of them, on every card since the A100.
    capability = patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with FakeTensorMode(), torch.no_grad(), _Indexing(), capability:
        yield


def _fake_model(config: Any, dtype: torch.dtype, device: str) -> _Shell:
    """Seven layers of the decoder of `config`, on a fake device; it adds nothing behind them."""
    from transformers import AutoModelForImageTextToText

    config = copy.deepcopy(config)
    cut_decoder(config, 7)
    # It is thrown away, and building it takes longer than the decoder.
    cut_tower(config, 1)
    if mask_style(config._attn_implementation or "sdpa") == "flash":
        config._attn_implementation = "sdpa"
    with torch.device("meta"):
        whole = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    decoder: Any = family_of(config).text_model(whole)

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    for module in decoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(fake(parameter), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, fake(buffer))
    config.deepstack_layer_map = None
    if hasattr(config.vision_config, "deepstack_visual_indexes"):
        config.vision_config.deepstack_visual_indexes = []
    return _Shell(config, decoder, dtype).eval()


@contextmanager
def _cut(model: _Shell, layers: int) -> Iterator[None]:
    """The decoder without its later layers."""
    decoder: Any = family_of(model).text_model(model)
    whole, depth = decoder.layers, decoder.config.num_hidden_layers
    decoder.layers, decoder.config.num_hidden_layers = whole[:layers], layers
    try:
        yield
    finally:
        decoder.layers, decoder.config.num_hidden_layers = whole, depth


def _run(
    model: _Shell, prompts: Prompts, setting: Callable[[], AbstractContextManager[Any]]
) -> _Log:
    """A prefill and a decoded token in a setting."""
    image = model.config.image_token_id
    row = [1] * (prompts.text_tokens // 4) + [image] * prompts.visual_tokens
    row += [1] * (prompts.text_tokens - prompts.text_tokens // 4)
    mask = [[1] * len(row)] + [[int(not prompts.ragged)] + [1] * (len(row) - 1)] * (
        prompts.batch - 1
    )
    counter = Counter(model.device.type)
    ids = counter.known([row] * prompts.batch)
    more = {}
    if prompts.ragged:
        more["attention_mask"] = counter.known(mask)

    def embeds(tokens: int) -> Tensor:
        width = model.config.text_config.hidden_size
        return torch.empty(prompts.batch, tokens, width, dtype=model.dtype, device=model.device)

    layers: Any = family_of(model).layers(model)
    with setting(), counter.watching(layers), counter:
        output = model.model(ids, embeds(len(row)), use_cache=True, **more)
        prefill, rest = counter.spans, counter.rest
        counter.spans, counter.rest = [], Span()
        if more:
            more = {"attention_mask": counter.known([[*line, 1] for line in mask])}
        model.model(ids[:, -1:], embeds(1), use_cache=True, **going_on(output), **more)
    return _Log(prefill, counter.spans, rest, counter.rest)


class Counter(TorchDispatchMode):
    """Counts what passes between a layer's first hook and its last, and the rest.

    Beside the layers, numbers that follow from the prompt are computed along on the host: there a
    forward may read how many tokens a prompt has. In a layer whatever is read is a 1.
    """

    def __init__(self, device: str) -> None:
        """
        Args:
            device: that the model is on, "cuda" or "cpu".
        """
        super().__init__()
        self._device = device
        self.spans: list[Span] = []
        self.rest = Span()
        self._inside = False
        self._waited: object = None

    def known(self, values: list[list[int]]) -> Tensor:
        """A tensor of the device whose numbers the host may ask for beside the layers."""
        with _real():
            numbers = torch.tensor(values)
        fake = torch.empty(numbers.shape, dtype=numbers.dtype, device=self._device)
        _know(fake, numbers)
        return fake

    @contextmanager
    def watching(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        """A span for every layer, around all of its hooks: not by hooks, which the engine sees."""
        kinds = [type(layer) for layer in layers]
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = _watched(kind, self)
        try:
            yield
        finally:
            for layer, kind in zip(layers, kinds, strict=True):
                layer.__class__ = kind

    @contextmanager
    def span(self) -> Iterator[None]:
        """What runs now is a layer."""
        self.spans.append(Span())
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _read(self, tensor: Tensor) -> Any:
        """The host asks for a number. It waits once for several that it asks for in a row."""
        self._wait()
        values = _known(tensor)
        if values is None and not self._inside:
            raise RuntimeError("the host reads a number that does not follow from the prompt")
        with _real():
            return (torch.ones((), dtype=tensor.dtype) if values is None else values).tolist()

    @property
    def _span(self) -> Span:
        return self.spans[-1] if self._inside else self.rest

    def _wait(self) -> None:
        now = (id(self._span), len(self._span.launches))
        if now != self._waited:
            self._span.syncs += 1
        self._waited = now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::").split(".")[0]
        if name == "_local_scalar_dense":
            return self._read(args[0])
        if name == "nonzero":
            self._wait()
            return args[0].new_empty((1, args[0].dim()), dtype=torch.int64)
        result = func(*args, **kwargs)
        self._note(func, name, args, result)
        if not self._inside:
            _follow(func, args, kwargs, result)
        return result

    def _note(self, func: Any, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Count an operator."""
        made = [one for one in _flat(result) if isinstance(one, Tensor)]
        if func.is_view or name in _ALLOCATIONS or not any(one.numel() for one in made):
            return
        given = [one for one in _flat(args) if isinstance(one, Tensor)]
        places = {one.device.type for one in given}
        if self._device == "cpu":
            self._launch(name, given, made)
        elif made[0].device.type == "cpu":
            # To read a tensor is to wait for it; to make one here is to copy it there later.
            if "cuda" in places:
                self._wait()
            else:
                self._span.copies += self._inside
        elif name in ("_to_copy", "copy_") and "cpu" in places:
            self._span.copies += 1
        else:
            self._launch(name, given, made)

    def _launch(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        self._span.launches.append(name)
        if name not in _PRODUCTS:
            self._span.moved += sum(map(_size, (*given, *made)))


_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "_grouped_mm")
"""Operators that are mostly arithmetic."""

_ALLOCATIONS = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"),
    *("detach", "alias", "lift_fresh", "lift", "_unsafe_view"),
)
"""Operators that compute nothing."""


def _contiguous(tensor: Tensor) -> Tensor:
    """As the method: a copy where it is not so already."""
    if tensor.is_contiguous():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


_PLAIN: dict[Any, Callable[..., Any]] = {
    Tensor.__invert__: torch.bitwise_not,
    Tensor.copy_: torch.ops.aten.copy_.default,
    Tensor.contiguous: _contiguous,
    Tensor.nonzero: torch.ops.aten.nonzero.default,
}
"""Methods that ask for the GPU, by operators that do the same and do not."""


class _Indexing(TorchFunctionMode):
    """What torch itself does in front of the dispatcher.

    A torch that was built without CUDA cannot index a CUDA tensor, though it only takes views.
    Attention is one kernel, but torch would choose it by the GPU that is not there.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and args[0].device.type == "cuda":
            return _item(*args)
        if func is Tensor.__setitem__ and args[0].device.type == "cuda":
            return _set_item(*args)
        if func in _PLAIN:
            return _PLAIN[func](*args, **kwargs)
        if func is torch.allclose:
            # Asked of weights when selectors are made: there are no numbers to differ.
            return True
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            return args[0].to(args[1].device, args[1].dtype)
        if func is functional.rms_norm and args[0].device.type == "cuda":
            return _rms_norm(*args)
        if func is functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _size(tensor: Tensor) -> int:
    """Bytes that are really there, of a tensor that may repeat some."""
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.element_size() * math.prod(size for size, stride in strides if stride)


def _real() -> AbstractContextManager[Any]:
    """Tensors with numbers in them."""
    return torch.utils._python_dispatch._disable_current_modes()


def _counter() -> Counter | None:
    """The one that counts now."""
    modes = torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    return next((mode for mode in modes if isinstance(mode, Counter)), None)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`[B, H, Q, d]`, laid out as the kernels of a GPU give it."""
    counter = _counter()
    if counter is not None:
        counter._span.launches.append("attention")
    batch, heads, rows, _ = query.shape
    return query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)


def _rms_norm(states: Tensor, *args: Any) -> Tensor:
    """One kernel on a GPU; elsewhere torch takes it apart."""
    counter = _counter()
    if counter is not None:
        counter._span.launches.append("rms_norm")
        counter._span.moved += 2 * _size(states)
    return torch.empty_like(states)


def _item(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]` by the operators that torch would take for it."""
    index = index if isinstance(index, tuple) else (index,)
    if any(one is Ellipsis for one in index):
        at = next(i for i, one in enumerate(index) if one is Ellipsis)
        named = sum(one is not None for one in index) - 1
        index = (*index[:at], *[slice(None)] * (tensor.dim() - named), *index[at + 1 :])
    tensors: list[Tensor | None] = []
    dim = 0
    for one in index:
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(one, slice):
            if one != slice(None):
                start, stop, step = one.indices(tensor.shape[dim])
                tensor = torch.ops.aten.slice.Tensor(tensor, dim, start, stop, step)
        elif isinstance(one, Tensor):
            tensors += [None] * (dim - len(tensors)) + [one]
        else:
            tensor = tensor.select(dim, one)
            continue
        dim += 1
    return torch.ops.aten.index.Tensor(tensor, tensors) if tensors else tensor


def _set_item(tensor: Tensor, index: Any, value: Any) -> None:
    """`tensor[index] = value` where the index takes a view."""
    part = _item(tensor, index)
    if isinstance(value, Tensor):
        torch.ops.aten.copy_.default(part, value)
    else:
        part.fill_(value)


def _watched(kind: type, counter: Counter) -> type:
    """`kind`, with every call a span of `counter`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with counter.span():
            return kind.__call__(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"__call__": call})


def _follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Compute an operator along on the host, where all that it takes is known."""
    if any(isinstance(one, Tensor) and _known(one) is None for one in _flat((args, kwargs))):
        return
    host = {
        name: torch.device("cpu") if name == "device" else value for name, value in kwargs.items()
    }
    with _real():
        values = func(*_there(args), **_there(host))
    for one, value in zip(_flat(result), _flat(values), strict=True):
        if isinstance(one, Tensor):
            _know(one, value)


def _known(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, "_alvts_known", None)


def _know(tensor: Tensor, values: Tensor) -> None:
    tensor._alvts_known = values  # type: ignore[attr-defined]


def _there(value: Any) -> Any:
    """The known numbers in the place of every tensor."""
    if isinstance(value, Tensor):
        return _known(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_there(one) for one in value)
    if isinstance(value, dict):
        return {name: _there(one) for name, one in value.items()}
    return value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _flat(one)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value
