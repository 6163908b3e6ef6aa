"""A conversation about pictures, several turns on one KV cache."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .answer import longest_prompt
from .artifact import Artifact
from .bench.timing import generate
from .engine import attach, new_cache
from .errors import AlvtsError
from .families import family_of
from .models import Loaded
from .prompts import assistant_turn, process, render, user_turn


@dataclass(frozen=True)
class Reply:
    """An answer of a conversation.

    Attributes:
        text: without special tokens.
        read: tokens that the model ran on for it, those of the cache not among them.
        visual_tokens: of the pictures.
        visual_tokens_kept: layer average.
        ttft_ms: from the question to the first token.
        kv_bytes: cache before the first new token.
    """

    text: str
    read: int
    visual_tokens: int
    visual_tokens_kept: float
    ttft_ms: float
    kv_bytes: int


class Chat:
    """Remembers what was said, and the KV cache of it.

    A later question is read alone: what its layers see of the pictures is what each chose for the
    question that the pictures came with. Where the template writes an earlier turn in another way
    once there is a later one, and behind a change of `use`, all is read again.

    Attributes:
        pictures: that it is about, RGB.
    """

    pictures: Sequence[Image.Image]
    _turns: list[dict[str, Any]]
    _inputs: dict[str, Tensor]
    _cache: dict[str, Any] | None

    def __init__(self, loaded: Loaded, max_new_tokens: int) -> None:
        """
        Args:
            loaded: the model.
            max_new_tokens: longest answer.

        Raises:
            AlvtsError: such an answer leaves no room for a question.
        """
        self._loaded = loaded
        self._new = max_new_tokens
        self._longest = longest_prompt(loaded, max_new_tokens)
        self._selectors: Artifact | None = None
        self._keep: str | None = None
        self.show(())

    def use(self, selectors: Artifact | None, keep: str | None = None) -> None:
        """Select from now on, or do not; the pictures are read again with the next question.

        Args:
            selectors: of this model; None for the dense model.
            keep: as `resolve_keep` reads it; None for what the selectors say.
        """
        self._selectors, self._keep = selectors, keep
        self._cache = None

    def show(self, pictures: Sequence[Image.Image]) -> None:
        """Begin anew, about other pictures, RGB."""
        self.pictures = pictures
        self._turns, self._inputs, self._cache = [], {}, None
        self._rendered = self._answer = ""
        self._kept = 0.0

    def ask(self, words: str, on_tokens: Callable[[Tensor], None] | None = None) -> Reply:
        """Answer greedily.

        Args:
            words: of the user.
            on_tokens: called with the ids `[1]` of the answer as they come.

        Raises:
            AlvtsError: no picture, words with places for images that there are none for, or a
                conversation that has become too long. The question is then forgotten, as it is
                when anything else ends the answer early.
        """
        if not self.pictures:
            raise AlvtsError("there is no picture yet")
        model, processor = self._loaded.model, self._loaded.processor
        images = 0 if self._turns else len(self.pictures)
        turns = [*self._turns, user_turn(processor, words, images)]
        rendered = render(processor, turns)
        behind = self._behind(rendered)
        if behind is None:
            self._cache = None
            made = process(processor, self.pictures, rendered, self._longest)
            inputs = dict(made.to(model.device, model.dtype))
        else:
            inputs = _longer(self._inputs, self._tokens_of(behind))
        tokens = inputs["input_ids"].shape[1]
        if tokens > self._longest:
            raise AlvtsError(
                f"the conversation has come to {tokens} tokens and the model takes "
                f"{self._longest} beside an answer; begin anew"
            )
        # Taken away: where an answer ends early, it is filled halfway and of no use.
        cache, self._cache = self._cache, None
        given = inputs
        if cache is None:
            cache = new_cache(family_of(model).text_model(model))
        else:
            given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ready = next(iter(cache.values())).get_seq_length()
        reply, new = self._generate({**given, **cache}, on_tokens, tokens - ready)
        self._inputs = _longer(inputs, new)
        self._cache, self._rendered, self._answer = cache, rendered, reply.text
        self._turns = [*turns, assistant_turn(reply.text)]
        return reply

    def _generate(
        self, given: dict[str, Any], on_tokens: Callable[[Tensor], None] | None, read: int
    ) -> tuple[Reply, Tensor]:
        """A reply, and its ids `[1, new]`, to all that `generate` takes."""
        model = self._loaded.model
        visual = int(family_of(model).visual_mask(model, given["input_ids"]).sum())
        if self._selectors is None:
            made = generate(model, given, self._new, on_tokens=on_tokens)
            self._kept = float(visual)
        else:
            with attach(model, self._selectors, self._keep) as attachment:
                made = generate(model, given, self._new, attachment, on_tokens=on_tokens)
                # A later turn has no visual tokens to choose from.
                if attachment.last is not None:
                    self._kept = attachment.last.layer_average
        text = self._loaded.processor.tokenizer.decode(made.tokens[0], skip_special_tokens=True)
        reply = Reply(text.strip(), read, visual, self._kept, made.ttft_ms, made.kv_bytes)
        return reply, made.tokens

    def _behind(self, rendered: str) -> str | None:
        """What stands behind the last answer; None where `rendered` does not begin with all that
        has been read and answered."""
        if not self._turns or not rendered.startswith(self._rendered):
            return None
        rest = rendered[len(self._rendered) :].lstrip()
        if not rest.startswith(self._answer):
            return None
        rest = rest[len(self._answer) :]
        # The token that ends an answer was made with it, or else is read now.
        last = int(self._inputs["input_ids"][0, -1])
        ends = self._loaded.model.generation_config.eos_token_id
        if last in (ends if isinstance(ends, list) else [ends]):
            rest = rest.removeprefix(self._loaded.processor.tokenizer.decode([last]))
        return rest

    def _tokens_of(self, text: str) -> Tensor:
        """The ids of `text`, int64 `[1, n]`."""
        made = self._loaded.processor.tokenizer(text, add_special_tokens=False)
        return torch.tensor([made["input_ids"]])


def _longer(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """`inputs` of a prompt with words of the ids `[1, n]` behind it."""
    old, more = inputs["input_ids"], ids.shape[1]
    grown = {"input_ids": torch.cat([old, ids.to(old.device)], dim=1)}
    for name, tensor in inputs.items():
        # What says of every token whether it is real, or of which kind: words are of kind 0.
        if name not in grown and tensor.shape == old.shape:
            grown[name] = functional.pad(tensor, (0, more), value=int(name == "attention_mask"))
    return {**inputs, **grown}
