"""How right an answer is. No torch here."""

import re
from collections import Counter
from collections.abc import Callable, Iterable

_NUMBERS = {
    "none": "0",
    **{
        word: str(number)
        for number, word in enumerate(
            ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
        )
    },
}
_ARTICLES = ("a", "an", "the")


def normalise(text: str) -> str:
    """`text` as VQA compares answers: lower case, no articles, no punctuation, digits for numbers.

    As the VQA evaluation does, but apostrophes are dropped (so `dont` is `don't`), where that one
    has a list of contractions. An answer of articles alone, or of punctuation alone, stays as it
    is.
    """
    whole = text.strip()
    text = text.lower().replace("'", "").replace("\N{RIGHT SINGLE QUOTATION MARK}", "")
    text = re.sub(r"(?<=\d),(?=\d)", "", text)
    # A point between digits is a decimal point.
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", text)
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-<>@`,?!]", " ", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words) or whole


def exact(said: str, answers: Iterable[str]) -> bool:
    """Normalised, it is one of the answers, and not empty. (VQA's own score counts how many of ten
    people said it; here one is enough.)"""
    found = normalise(said)
    return found != "" and found in {normalise(answer) for answer in answers}


def yes_no(said: str, answers: Iterable[str]) -> bool:
    """Its first `yes` or `no` is the right one; an answer with neither is wrong."""
    found = _first_yes_no(said)
    return found is not None and found in {_first_yes_no(answer) for answer in answers}


def choice(said: str, answers: Iterable[str]) -> bool:
    """Its letter is the right one: `B`, `b.`, `(B)`, `B: a dog`, `The answer is B`."""
    found = _letter(said)
    return found is not None and found in {_letter(answer) for answer in answers}


def phrases(said: str, answers: Iterable[str]) -> float:
    """How much of a list is said, and no more: F1 of the phrases between commas, a phrase that
    stands twice counted twice; the best over the answers."""

    def listed(text: str) -> Counter[str]:
        return Counter(normalise(part) for part in text.split(",") if part.strip())

    found = listed(said)
    shares = []
    for answer in answers:
        wanted = listed(answer)
        both = (found & wanted).total()
        shares.append(2 * both / max(1, found.total() + wanted.total()))
    return max(shares, default=0.0)


SCORINGS: dict[str, Callable[[str, Iterable[str]], float]] = {
    "exact": exact,
    "yes-no": yes_no,
    "choice": choice,
    "phrases": phrases,
}
"""How right an answer is, from 0 to 1, by name."""


def suitable(answers: Iterable[Iterable[str]]) -> str:
    """The name of the scoring that suits a data set with these answers."""
    known = [answer.strip() for one in answers for answer in one]
    if all(normalise(answer) in ("yes", "no") for answer in known):
        return "yes-no"
    if all(re.fullmatch(r"[A-Z]", answer) for answer in known):
        return "choice"
    return "exact"


def _first_yes_no(text: str) -> str | None:
    found = re.search(r"\b(yes|no)\b", text.lower())
    return None if found is None else found[1]


def _letter(text: str) -> str | None:
    """The letter an answer begins with, or the last one that stands alone in it."""
    text = text.strip()
    start = re.match(r"\(?([A-Za-z])\)?(?=[.:)]|$)", text)
    if start:
        return start[1].upper()
    # A capital only: "a" is a word, and so is "I" at the start.
    alone = re.findall(r"\b([A-HJ-Z])\b", text)
    return alone[-1] if alone else None
