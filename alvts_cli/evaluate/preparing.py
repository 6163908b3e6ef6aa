"""Questions, and what was said before them, as batches that the model takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..batches import collate, end_token
from ..digests import of_question
from ..errors import AlvtsError
from ..models import Loaded
from ..prompts import assistant_turn, build_inputs, process, render, user_turn
from ..terminal import one_line
from .data import DataSet, Item, check_any


@dataclass(frozen=True)
class Prepared:
    """A batch of questions.

    Attributes:
        inputs: of the turn that the pictures come with, padded on the left.
        later: of conversations, what is said behind it up to the question: `input_ids` and
            `attention_mask`, int64 `[B, n]`, padded on the left; None where there is no more.
    """

    inputs: dict[str, Tensor]
    later: dict[str, Tensor] | None

    def whole(self) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` of all that the model reads, `[B, T + n]`."""
        assert self.later is not None, "asked of conversations only"
        return {name: torch.cat([self.inputs[name], more], 1) for name, more in self.later.items()}


class Preparing:
    """Makes a batch of inputs for the items, with whatever pictures."""

    def __init__(self, loaded: Loaded, items: Sequence[Item], max_new_tokens: int) -> None:
        """
        Args:
            loaded: the model.
            items: all behind earlier turns, or none of them.
            max_new_tokens: of the longest answer.
        """
        self._loaded = loaded
        self._items = items
        text = loaded.model.config.text_config
        self._longest = text.max_position_embeddings - max_new_tokens
        self._pad = end_token(loaded.model, loaded.processor.tokenizer)

    def __call__(self, pictures: Sequence[list[Image.Image]]) -> Prepared:
        """
        Args:
            pictures: of each item.

        Raises:
            AlvtsError: what `build_inputs` refuses, or a conversation that is too long or that the
                model's chat template does not go on with.
        """
        device, dtype = self._loaded.device, self._loaded.dtype
        firsts, laters = [], []
        for item, images in zip(self._items, pictures, strict=True):
            first, later = self.sample(item, images)
            firsts.append(first.to(device, dtype))
            laters.append({name: ids.to(device) for name, ids in later.items()})
        talked = bool(self._items[0].earlier)
        return Prepared(collate(firsts, self._pad), collate(laters, self._pad) if talked else None)

    def sample(self, item: Item, images: list[Image.Image]) -> tuple[Any, dict[str, Tensor]]:
        """The turn with the pictures, and what is said behind it; empty where that is nothing. The
        errors of a call."""
        processor = self._loaded.processor
        if not item.earlier:
            return build_inputs(processor, images, item.question, self._longest), {}
        turns: list[dict[str, Any]] = []
        for question, answer in item.earlier:
            turns.append(user_turn(processor, question, 0 if turns else len(images)))
            turns.append(assistant_turn(answer))
        begin = render(processor, turns[:1])
        first = process(processor, images, begin, self._longest)
        whole = render(processor, [*turns, user_turn(processor, item.question, 0)])
        if not whole.startswith(begin):
            raise AlvtsError(
                f"the chat template of {self._loaded.name} writes the first turn in another way "
                "once there is a later one, so that no conversation goes on with one KV cache"
            )
        said = processor.tokenizer(whole[len(begin) :], add_special_tokens=False)["input_ids"]
        tokens = first["input_ids"].shape[1] + len(said)
        if tokens > self._longest:
            raise AlvtsError(
                f"the conversation of {item.id} makes {tokens} tokens but the model takes "
                f"{self._longest} beside an answer"
            )
        ids = torch.tensor([said])
        return first, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def usable(
    loaded: Loaded, data: DataSet, advance: Callable[[], None]
) -> tuple[DataSet, tuple[str, ...]]:
    """The questions that the model takes, and a digest of the pictures and words of each.

    One that it does not take, such as one that is too long for it, is left out as a broken record
    is: found in the middle of a batch, it would end the whole run.

    Args:
        loaded: the model.
        data: the questions.
        advance: called after every question.

    Raises:
        AlvtsError: it takes none of them.
    """
    prepare = Preparing(loaded, data.items, data.max_new_tokens)
    taken, digests, skipped = [], [], list(data.skipped)
    for item in data.items:
        try:
            images = item.images()
            prepare.sample(item, images)
        except AlvtsError as error:
            skipped.append(one_line(f"{item.id}: {error}"))
        else:
            taken.append(item)
            said = (word for turn in item.earlier for word in turn)
            digests.append(of_question(images, *said, item.question))
        advance()
    check_any(data.name, taken, skipped)
    return replace(data, items=tuple(taken), skipped=tuple(skipped)), tuple(digests)
