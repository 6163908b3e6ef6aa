"""What one forward of the model will do, known on the host before its first layer runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import AlvtsError
from .keep import Keep
from .normed import Normed
from .policy import due_layers
from .scene import Scene
from .scoring import asking
from .selecting import positions_of


@dataclass(eq=False)
class Plan:
    """One forward: `B` samples of `T` new tokens. A new object for every forward.

    Attributes:
        tokens: `T`.
        visual, text: bool `[B, T]`; in neither: padding. A single token is never visual.
        real: bool `[B, T]`, False at padding; None where none of the new tokens is.
        visual_counts, text_counts: per sample, `N` and `M`; empty for a single token.
        keep_counts: `[layer][sample]`, `k`; empty when there is no visual token.
        due: `[layer][sample]`: whether the layer ranks the sample's visual tokens; the others go on
            with an earlier ranking, or need none. Empty likewise.
        keep_tensor, due_tensor: both as int64 `[L, B]`, on the device of the masks.
        visual_tensor, text_tensor: `N` and `M` as int64 `[B]`, likewise; empty for a single token.
        asking_index, asking_valid: `[B, M']`, `scoring.asking` as `positions_of` has it, the
            second None where nothing is filled; empty when there is no visual token.
        images: int64 `[B, T]`: of every token, how many images have begun in its sample. Visual
            tokens without a text token between them are one image. Empty likewise.
        several: whether any sample has more than one image.
        remasks: whether the attention_mask, or its absence, says something else of the tokens in
            the KV cache than was said before.
        compares: whether importance is not yet what tokens are ranked by.
        normed: of the layer that is about to run.
    """

    tokens: int
    visual: Tensor
    text: Tensor
    real: Tensor | None
    visual_counts: tuple[int, ...]
    text_counts: tuple[int, ...]
    keep_counts: tuple[tuple[int, ...], ...]
    due: tuple[tuple[bool, ...], ...]
    keep_tensor: Tensor
    due_tensor: Tensor
    visual_tensor: Tensor
    text_tensor: Tensor
    asking_index: Tensor
    asking_valid: Tensor | None
    images: Tensor
    several: bool
    remasks: bool
    compares: bool = False
    normed: Normed | None = None
    _scene: Scene | None = None

    def selects(self, layer: int) -> bool:
        """Whether a visual token skips this layer."""
        return bool(self.keep_counts) and self.keep_counts[layer] != self.visual_counts

    def ranks(self, layer: int) -> bool:
        """Whether a selecting layer has to rank the tokens of any sample."""
        return any(self.due[layer])

    def goes_on(self, layer: int) -> bool:
        """Whether some sample was ranked before, and is not again in this layer that ranks."""
        due = self.due[layer]
        return any(
            not now and any(each[b] for each in self.due[:layer]) for b, now in enumerate(due)
        )

    def lengths(self, layer: int) -> tuple[int, ...]:
        """Tokens of each sample that run through a selecting layer."""
        return tuple(m + k for m, k in zip(self.text_counts, self.keep_counts[layer], strict=True))

    def move(self, device: torch.device) -> None:
        """Put the tensors on the device of the coming layer."""
        if self.visual.device == device:
            return
        self._scene = None
        for name in (
            "visual",
            "text",
            "real",
            "keep_tensor",
            "due_tensor",
            "visual_tensor",
            "text_tensor",
            "asking_index",
            "asking_valid",
        ):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))
        self.images = self.images.to(device)

    def scene(self, positions: tuple[Tensor, Tensor], ids: Tensor | None = None) -> Scene:
        """What scoring sees, the same object in every layer on a device.

        Args:
            positions: `(cos, sin)` as the layers take them.
            ids: int64 `[B or 1, T]`, their `position_ids`.
        """
        if self._scene is None:
            self._scene = Scene(
                self.visual,
                positions,
                self.asking_index,
                self.asking_valid,
                self.real,
                self.images if self.several else None,
                ids,
            )
        return self._scene


def read_ids(call: Mapping[str, Any]) -> Tensor:
    """`input_ids` `[B, T]` from a call of the backbone, its arguments by their names.

    Raises:
        AlvtsError: there are none, or they are no tensor.
    """
    input_ids = call.get("input_ids")
    if input_ids is not None and not isinstance(input_ids, Tensor):
        raise AlvtsError(f"the input_ids are a tensor, not a {type(input_ids).__name__}")
    if input_ids is None:
        raise AlvtsError(
            "alvts finds the visual tokens in input_ids; pass input_ids, not inputs_embeds alone"
        )
    return input_ids


def read_inputs(call: Mapping[str, Any], seen: int) -> tuple[Tensor, Tensor | None]:
    """`(input_ids [B, T], attention_mask [B, seen + T] or None)` from a call of the backbone.

    Args:
        call: the arguments by their names, see `calls.by_name`.
        seen: tokens behind which these come.

    Raises:
        AlvtsError: there are no `input_ids`, or none of a sample, or the mask is a prepared one, or
            not of their size.
    """
    input_ids = read_ids(call)
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise AlvtsError(
            f"the input_ids have the shape {list(input_ids.shape)}; give one or more tokens of one "
            "or more samples, [B, T]"
        )
    mask = call.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise AlvtsError(
            "alvts builds the masks of the layers itself; pass the 2-D attention_mask of the "
            "tokenizer, or none"
        )
    if mask is not None:
        batch, tokens = input_ids.shape
        if mask.shape != (batch, seen + tokens):
            raise AlvtsError(
                f"the attention_mask is {len(mask)} x {mask.shape[1]}, but the input_ids are "
                f"{batch} x {tokens} behind {seen} in the KV cache; give it a column for each of "
                "these tokens, and the cache as it was left"
            )
    return input_ids, mask


def make_plan(
    input_ids: Tensor,
    visual: Tensor,
    attention_mask: Tensor | None,
    keep: Keep,
    *,
    every: int = 1,
    real_before: Tensor | None = None,
) -> Plan:
    """Plan a forward. Waits for the device once; for single tokens only where there is a mask, and
    transformers does by itself in the same forward, for sdpa and FlashAttention.

    A sample with visual but no text tokens (a chunk out of the middle of an image) keeps at least
    one of them in every layer, for an attention without any row cannot run: the first one, where
    the layer has no selector.

    Args:
        input_ids: `[B, T]`.
        visual: bool `[B, T]`, True at visual tokens.
        attention_mask: `[B, S]`, the last `T` columns being the new tokens; or None.
        keep: one value per layer.
        every: see `policy.Policy`.
        real_before: bool `[B, S - T]`, False at padding among the tokens that the KV cache has
            seen; None where all are real.
    """
    tokens = input_ids.shape[1]
    remasks = attention_mask is None and real_before is not None
    same = _same_before(attention_mask, tokens, real_before, visual.device)
    if tokens == 1:
        text = torch.ones_like(visual)
        nothing, none, padding = ~text, input_ids.new_empty(0), None
        if attention_mask is not None:
            # A sample may have no turn while others have one of a single token. A copy, see below.
            real = attention_mask[:, -1:].to(visual.device, torch.bool, copy=True)
            # One wait for both, as long as nothing is amiss.
            if not bool((real if same is None else torch.cat([same, real], dim=1)).all()):
                remasks = same is not None and not bool(same.all())
                padding = None if bool(real.all()) else real
                text = real
        return Plan(
            tokens=tokens,
            visual=nothing,
            text=text,
            real=padding,
            visual_counts=(),
            text_counts=(),
            keep_counts=(),
            due=(),
            keep_tensor=none,
            due_tensor=none,
            visual_tensor=none,
            text_tensor=none,
            asking_index=none,
            asking_valid=None,
            images=none,
            several=False,
            remasks=remasks,
        )
    real = torch.ones_like(visual)
    if attention_mask is not None:
        # A copy, for the KV cache remembers it, and a mask may be written to.
        real = attention_mask[:, -tokens:].to(visual.device, torch.bool, copy=True)
    # Of all visual tokens: an image does not fall apart where the mask hides some of it.
    begins = visual.clone()
    begins[:, 1:] &= ~visual[:, :-1]
    visual, text = visual & real, real & ~visual
    rows = asking(visual, text)
    masks = (visual, text, rows, begins)
    counts = torch.stack(masks).sum(dim=2)
    read = counts if same is None else torch.cat([counts, same.all(dim=1)[None]])
    visual_counts, text_counts, asked, begun, *unchanged = read.tolist()
    samples = list(zip(visual_counts, text_counts, strict=True))
    keep_counts: tuple[tuple[int, ...], ...] = ()
    if any(n > 0 for n, _ in samples):
        keep_counts = tuple(
            tuple(max(keep.count(layer, n), int(n > 0 and m == 0)) for n, m in samples)
            for layer in range(len(keep.values))
        )
    index = images = input_ids.new_empty(0)
    valid: Tensor | None = None
    if keep_counts:
        index, filled = positions_of(rows, max(asked))
        valid = None if min(asked) == max(asked) else filled
        images = begins.cumsum(dim=1)
    due = due_layers(keep_counts, visual_counts, every)
    # On its way in one go.
    table = torch.tensor([keep_counts, due], dtype=torch.int64, device=visual.device)
    return Plan(
        tokens=tokens,
        visual=visual,
        text=text,
        real=real if any(n + m < tokens for n, m in samples) else None,
        visual_counts=tuple(visual_counts),
        text_counts=tuple(text_counts),
        keep_counts=keep_counts,
        due=due,
        keep_tensor=table[0],
        due_tensor=table[1],
        visual_tensor=counts[0],
        text_tensor=counts[1],
        asking_index=index,
        asking_valid=valid,
        images=images,
        several=max(begun) > 1,
        remasks=remasks or not all(map(all, unchanged)),
    )


def _same_before(
    mask: Tensor | None, tokens: int, real_before: Tensor | None, device: torch.device
) -> Tensor | None:
    """bool `[B, S - T]` on `device`, False where the mask says something else of the tokens before
    than `real_before` does; None where it says nothing of them."""
    if mask is None or mask.shape[1] == tokens:
        return None
    before = mask[:, :-tokens].to(device, torch.bool)
    return before if real_before is None else before == real_before.to(device)
