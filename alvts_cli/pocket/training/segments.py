"""Training questions as padded token segments, with what each token has to predict and to hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from ..words import PATCH_GROUPS, PHRASE_GROUPS
from .examples import Example, spoken_words

QUESTIONS = 12
"""Questions per picture."""
SEGMENT = 16
"""Words of the longest question with its answer and the end token."""
END_WEIGHT = 0.1
"""Of the end token: it is easy, and as frequent as all the answers together."""


@dataclass(frozen=True)
class Segments:
    """Q questions of S tokens on each of B pictures.

    Attributes:
        text: int64 [B, Q, S].
        weight: float32 [B, Q, S], of predicting the token that follows.
        things: int64 [B, patch groups, Q*S], what the last token of a phrase says of the thing it
            names; -1 elsewhere.
        cells: int64 [B, 2, Q*S], where that thing is; -1 elsewhere.
        asked: int64 [B, phrase groups, Q*S], what the answer will be compared with; -1 elsewhere.
        findings: int64 [B, phrase groups, Q*S], what else the phrase comes down to; -1 elsewhere.
    """

    text: Tensor
    weight: Tensor
    things: Tensor
    cells: Tensor
    asked: Tensor
    findings: Tensor


def make_segments(examples: Sequence[Example], tokenizer: PreTrainedTokenizerFast) -> Segments:
    """The questions of `examples` as segments."""

    def ids(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False).input_ids

    shape = (len(examples), QUESTIONS, SEGMENT)
    text = torch.zeros(shape, dtype=torch.int64)
    weight = torch.zeros(shape)
    things = torch.full((shape[0], len(PATCH_GROUPS), *shape[1:]), -1)
    cells = torch.full((shape[0], 2, *shape[1:]), -1)
    asked = torch.full((shape[0], len(PHRASE_GROUPS), *shape[1:]), -1)
    findings = asked.clone()
    for b, example in enumerate(examples):
        for q, question in enumerate(example.questions):
            prompt = ids(f"{question.text} ASSISTANT:")
            whole = [*prompt, *ids(question.answer), tokenizer.eos_token_id]
            text[b, q, : len(whole)] = torch.tensor(whole)
            weight[b, q, len(prompt) - 1 : len(whole) - 2] = 1.0
            weight[b, q, len(whole) - 2] = END_WEIGHT
            for phrase in question.phrases:
                last = _end_of(ids(phrase.text), prompt)
                if phrase.thing is not None:
                    things[b, :, q, last] = torch.tensor(spoken_words(phrase.thing))
                    place = [phrase.thing.row, phrase.thing.column]
                    cells[b, :, q, last] = torch.tensor(place)
                for number, group in enumerate(PHRASE_GROUPS):
                    for labels, words in ((findings, phrase.words), (asked, phrase.asked)):
                        for word in set(words).intersection(group):
                            labels[b, number, q, last] = group.index(word)
    said = (labels.flatten(2) for labels in (things, cells, asked, findings))
    return Segments(text, weight, *said)


def _end_of(phrase: list[int], text: list[int]) -> int:
    """Where in `text` the last token of `phrase` stands."""
    width = len(phrase)
    return next(i + width - 1 for i in range(len(text)) if text[i : i + width] == phrase)
