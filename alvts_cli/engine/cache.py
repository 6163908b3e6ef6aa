"""A cache layer that holds only what its decoder layer ran on."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import AlvtsError


class SelectiveLayer(DynamicLayer):
    """Keys and values of all text and of this layer's own `k` visual tokens.

    It reports the tokens that were *seen*, not those it holds: positions and masks of the model
    are computed from that number (the sliding-window layer does the same).

    Attributes:
        seen: tokens that went by, held or not.
        valid: bool `[B, slots]`, False at slots that fill a shorter sample; None when all are
            real.
        bias: `[B, slots]`, what the logits of each slot get, in the dtype of the keys; None for
            nothing.
        plain: True while it holds everything it has seen, slot for slot.
        skipped: tokens seen at the end of the latest turn of which it skipped some: all that came
            behind it holds, slot for slot; 0 if `plain`.
        real: bool `[B, seen]`, of every token seen, False at padding; None when all are real. Of
            the first layer of a cache alone: it is the same for all.
    """

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.valid: Tensor | None = None
        self.bias: Tensor | None = None
        self.plain = True
        self.skipped = 0
        self.real: Tensor | None = None
        self._expected: tuple[int, Tensor | None, Tensor | None, bool] | None = None

    @classmethod
    def holding(cls, layer: Any) -> "SelectiveLayer":
        """Take over what a plain layer holds, without copying."""
        new = cls()
        if layer.is_initialized:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            new.seen = layer.get_seq_length()
        return new

    @property
    def slots(self) -> int:
        """Keys held per sample."""
        if self.keys is None or self.keys.numel() == 0:
            return 0
        return self.keys.shape[-2]

    def expect(
        self, seen: int, valid: Tensor | None, plain: bool, bias: Tensor | None = None
    ) -> None:
        """Say what the coming `update` brings.

        Args:
            seen: tokens the forward has, including those that skip this layer.
            valid: bool `[B, slots]`, of all slots after the update; None when all are real.
            plain: whether the update holds all of the `seen` tokens, in order.
            bias: `[B, slots]`, of all slots after the update; None for none.
        """
        self._expected = (seen, valid, bias, plain)

    def whole_bias(self, new: int, bias: Tensor | None) -> Tensor | None:
        """The `bias` of all slots after an update with `new` more, `[B, slots + new]`; None where
        neither they nor those before have any."""
        if self.slots == 0 or (bias is None and self.bias is None):
            return bias
        if bias is None:
            assert self.bias is not None
            return functional.pad(self.bias, (0, new))
        if self.bias is None:
            return functional.pad(bias, (self.slots, 0))
        return torch.cat([self.bias, bias.to(self.bias)], dim=1)

    def whole_valid(self, new: int, valid: Tensor | None) -> Tensor | None:
        """The `valid` of all slots after an update with `new` more, `[B, slots + new]`; None where
        all are real."""
        return _joined(self.valid, self.slots, valid, new)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append `[B, H, new, d]` keys and values; without `expect`, `new` plain tokens.

        Raises:
            AlvtsError: without `expect`, where it lacks tokens: the model runs without alvts.
        """
        if self._expected is None and not self.plain:
            raise AlvtsError(
                "this KV cache was filled while alvts was attached and lacks the tokens that the "
                "layers skipped; go on with it while attached, or begin with a new one"
            )
        new = key_states.shape[-2]
        if self._expected is None:
            valid, bias = self.whole_valid(new, None), self.whole_bias(new, None)
            self._expected = (new, valid, bias, True)
            # Nobody said, so they are taken for what most are.
            self.real = _joined(self.real, self.seen, None, new)
        seen, self.valid, self.bias, plain = self._expected
        self._expected = None
        self.seen += seen
        self.plain = self.plain and plain
        if not plain:
            self.skipped = self.seen
        return super().update(key_states, value_states, *args, **kwargs)

    def forget(self) -> None:
        """Expect nothing any more: the forward that said what comes has ended."""
        self._expected = None

    def remember(self, tokens: int, real: Tensor | None) -> None:
        """Add to `real` that of the latest `tokens`, which `update` has counted: `[B, tokens]`, or
        None where all are real."""
        self.real = _joined(self.real, self.seen - tokens, real, tokens)

    def get_seq_length(self) -> int:
        """Tokens seen, held or not."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask the model builds, which counts the tokens seen."""
        return self.seen + query_length, 0

    def reset(self) -> None:
        """Empty the layer."""
        self.keys = self.values = None
        self.is_initialized = False
        self.seen, self.valid, self.bias, self.plain, self._expected = 0, None, None, True, None
        self.skipped, self.real = 0, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._samples(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        super().batch_repeat_interleave(repeats)
        self._samples(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self._samples(lambda rows: rows[indices])

    def _samples(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do with what is known of the slots, and of the tokens seen, as with the slots."""
        self.valid = None if self.valid is None else change(self.valid)
        self.bias = None if self.bias is None else change(self.bias)
        self.real = None if self.real is None else change(self.real)

    def crop(self, tokens_to_remove: int) -> NoReturn:
        """Always refused, a crop by nothing too, so that a run does not fail halfway by chance."""
        raise AlvtsError(
            "alvts cannot roll its cache back, which assisted decoding and prompt lookup need; "
            "generate without assistant_model and prompt_lookup_num_tokens"
        )


def _joined(old: Tensor | None, before: int, real: Tensor | None, new: int) -> Tensor | None:
    """bool `[B, before + new]` out of both parts, of which None says that all are real; None where
    that is so of both."""
    if before == 0 or (old is None and real is None):
        return real
    if real is None:
        assert old is not None
        return functional.pad(old, (0, new), value=True)
    if old is None:
        return functional.pad(real, (before, 0), value=True)
    return torch.cat([old, real.to(old.device)], dim=1)


def prepare_cache(cache: Any, num_layers: int) -> None:
    """Turn the layers of a dynamic cache into `SelectiveLayer`s, in place; no-op if they are. What
    a filled one holds is taken for real, see `remask`.

    Args:
        cache: a `DynamicCache`, empty or filled by plain use, made with or without a config.
        num_layers: layers of the decoder.

    Raises:
        AlvtsError: another kind of cache.
    """
    if not isinstance(cache, DynamicCache) or any(
        type(layer) not in (DynamicLayer, SelectiveLayer) for layer in cache.layers
    ):
        raise AlvtsError(
            f"alvts needs the dynamic KV cache, not {type(cache).__name__}; "
            "drop cache_implementation, or pass a DynamicCache of this model"
        )
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, SelectiveLayer):
            cache.layers[i] = SelectiveLayer.holding(layer)
    # A cache made without a config creates its layers at the first update: too late for us.
    while len(cache.layers) < num_layers:
        cache.layers.append(SelectiveLayer())


def remask(cache: Any, mask: Tensor | None) -> None:
    """Let a new mask say which of the cached tokens are padding. Waits for the device.

    Args:
        cache: of `SelectiveLayer`s, the first of which knows what was said before.
        mask: `[B, seen]`, 0 at padding; None where all are real.

    Raises:
        AlvtsError: it says otherwise of a turn of which some was skipped, in every layer something
            else, so that it could not be obeyed.
    """
    first = cache.layers[0]
    before = first.keys.new_ones(len(first.keys), first.seen, dtype=torch.bool)
    before = before if first.real is None else first.real
    # A copy: the mask may be written to.
    real = (
        torch.ones_like(before) if mask is None else mask.to(before.device, torch.bool, copy=True)
    )
    until = max(layer.skipped for layer in cache.layers)
    if not torch.equal(real[:, :until], before[:, :until]):
        raise AlvtsError(
            "this attention_mask, or its absence, says something else of a picture's turn in the "
            "KV cache than when it was cached; give each call the mask of all tokens so far, with "
            "the same padding, or begin with a new cache"
        )
    for layer in cache.layers:
        if layer.slots:
            behind = real[:, until:].to(layer.keys.device)
            old = behind.new_ones(len(behind), layer.slots) if layer.valid is None else layer.valid
            layer.valid = torch.cat([old[:, : layer.slots - behind.shape[1]], behind], dim=1)
    first.real = real
