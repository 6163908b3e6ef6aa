"""Questions about a scene, one function per kind, each with one right answer.

A thing is named by the shortest description that fits it alone: its colour, its shape, or both.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from .scenes import COLORS, SHAPES, Scene, Thing


class Phrase(NamedTuple):
    """A part of a question: the one thing it names, if it does, and what else it comes down to:
    how many things it names, or on which side of it the thing named before it is. `asked` is what
    the answer will be compared with."""

    text: str
    thing: Thing | None
    words: tuple[str, ...] = ()
    asked: tuple[str, ...] = ()


class Question(NamedTuple):
    """A question with its answer; its phrases are for training only."""

    kind: str
    text: str
    answer: str
    phrases: tuple[Phrase, ...] = ()


Made = tuple[str, str, tuple[Phrase, ...]]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


def ask(scene: Scene, count: int, rng: random.Random) -> list[Question]:
    """Up to `count` different questions about `scene`, kinds drawn as `SHARES` says."""
    asked: dict[str, Question] = {}
    for _ in range(3 * count):
        if len(asked) == count:
            break
        (kind,) = rng.choices(tuple(SHARES), tuple(SHARES.values()))
        made = KINDS[kind](scene, rng)
        if made is not None:
            asked.setdefault(made[0], Question(kind, *made))
    return list(asked.values())


def ask_kind(scene: Scene, kind: str, rng: random.Random) -> Question | None:
    """One question of `kind` about `scene`, or None where the scene allows none."""
    made = KINDS[kind](scene, rng)
    return None if made is None else Question(kind, *made)


def describe(scene: Scene) -> Question:
    """A request for all there is, and the answer: every thing in reading order. Pocket was never
    asked this (it is not one of `KINDS`); smol was."""
    things = sorted(scene.things, key=lambda thing: (thing.row, thing.column))
    said = [
        f"a {thing.color} {thing.shape}" + ("" if thing.digit is None else f" with a {thing.digit}")
        for thing in things
    ]
    return Question("describe", "describe the picture.", ", ".join(said))


def _names(scene: Scene, thing: Thing) -> list[str]:
    """The descriptions that fit `thing` and nothing else in the scene."""
    names = [f"{thing.color} {thing.shape}"]
    if sum(other.shape == thing.shape for other in scene.things) == 1:
        names.append(thing.shape)
    if sum(other.color == thing.color for other in scene.things) == 1:
        names.append(f"{thing.color} object")
    return names


def _presence(scene: Scene, rng: random.Random) -> Made:
    present = {(thing.color, thing.shape) for thing in scene.things}
    if rng.random() < 0.5:
        thing = rng.choice(scene.things)
        name = f"{thing.color} {thing.shape}"
        return f"is there a {name}?", "yes", (Phrase(name, thing),)
    # Half of the absent pairs are made of a colour and a shape that are there, on other things.
    colors = sorted({color for color, _ in present})
    shapes = sorted({shape for _, shape in present})
    near = [(c, s) for c in colors for s in shapes if (c, s) not in present]
    far = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
    color, shape = rng.choice(near if near and rng.random() < 0.5 else far)
    return f"is there a {color} {shape}?", "no", ()


def _color(scene: Scene, rng: random.Random) -> Made | None:
    single = [t for t in scene.things if t.shape in _names(scene, t)]
    marked = [t for t in scene.things if t.digit is not None]
    if marked and (not single or rng.random() < 0.4):
        thing = rng.choice(marked)
        name = f"object with the {thing.digit}"
        return f"what color is the {name}?", thing.color, (Phrase(name, thing),)
    if not single:
        return None
    thing = rng.choice(single)
    return f"what color is the {thing.shape}?", thing.color, (Phrase(thing.shape, thing),)


def _shape(scene: Scene, rng: random.Random) -> Made | None:
    single = [t for t in scene.things if f"{t.color} object" in _names(scene, t)]
    marked = [t for t in scene.things if t.digit is not None]
    if marked and (not single or rng.random() < 0.4):
        thing = rng.choice(marked)
        name = f"object with the {thing.digit}"
        return f"what shape is the {name}?", thing.shape, (Phrase(name, thing),)
    if not single:
        return None
    thing = rng.choice(single)
    name = f"{thing.color} object"
    return f"what shape is the {name}?", thing.shape, (Phrase(name, thing),)


def _count(scene: Scene, rng: random.Random) -> Made:
    choice = rng.random()
    if choice < 0.3:
        found = len(scene.things)
        return "how many objects are there?", NUMBERS[found], _counted("objects", found)
    # Asked of the things that are there more often than of any colour: most answers are not zero.
    thing = rng.choice(scene.things)
    if choice < 0.65:
        shape = thing.shape if rng.random() < 0.85 else rng.choice(SHAPES)
        found = sum(t.shape == shape for t in scene.things)
        name = f"{shape}s".replace("crosss", "crosses")
        return f"how many {name} are there?", NUMBERS[found], _counted(name, found)
    color = thing.color if rng.random() < 0.85 else rng.choice(tuple(COLORS))
    found = sum(t.color == color for t in scene.things)
    name = f"{color} objects"
    return f"how many {name} are there?", NUMBERS[found], _counted(name, found)


def _counted(name: str, found: int) -> tuple[Phrase]:
    return (Phrase(name, None, (NUMBERS[found],)),)


def _place(scene: Scene, rng: random.Random) -> Made:
    thing = rng.choice(scene.things)
    name = rng.choice(_names(scene, thing))
    return f"where is the {name}?", thing.place, (Phrase(name, thing),)


def _relation(scene: Scene, rng: random.Random) -> Made | None:
    pairs = [
        (a, b, axis)
        for a in scene.things
        for b in scene.things
        for axis, apart in (("side", a.column - b.column), ("height", a.row - b.row))
        if abs(apart) >= 2
    ]
    if not pairs:
        return None
    a, b, axis = rng.choice(pairs)
    first, second = rng.choice(_names(scene, a)), rng.choice(_names(scene, b))
    if axis == "side":
        words, found = ("left", "right"), "left" if a.column < b.column else "right"
    else:
        words, found = ("above", "below"), "above" if a.row < b.row else "below"
    asked: tuple[str, ...] = ()
    of = " of" if axis == "side" else ""
    if rng.random() < 0.3:
        text = f"is the {first} {words[0]} or {words[1]}{of} the {second}?"
        answer = found
    else:
        word = rng.choice(words)
        text = f"is the {first} {word}{of} the {second}?"
        answer = "yes" if word == found else "no"
        asked = (word,)
    sides = []
    if a.column != b.column:
        sides.append("left" if a.column < b.column else "right")
    if a.row != b.row:
        sides.append("above" if a.row < b.row else "below")
    # A yes or no is the side compared with the word asked for. Until the end of the prompt holds
    # both, neither is of any use to it, and it learns nothing: 3,000 steps left it at chance.
    end = Phrase("assistant:", None, (found,), asked)
    phrases = (Phrase(first, a), Phrase(second, b, tuple(sides)), end)
    return text, answer, phrases


def _read(scene: Scene, rng: random.Random) -> Made | None:
    marked = [t for t in scene.things if t.digit is not None]
    if not marked:
        return None
    thing = rng.choice(marked)
    name = rng.choice(_names(scene, thing))
    return f"what digit is on the {name}?", str(thing.digit), (Phrase(name, thing),)


KINDS: dict[str, Callable[[Scene, random.Random], Made | None]] = {
    "presence": _presence,
    "color": _color,
    "shape": _shape,
    "count": _count,
    "place": _place,
    "relation": _relation,
    "read": _read,
}

# Kinds that need a judgement over the whole picture are learned last, and asked more in training.
SHARES = {
    "presence": 1,
    "color": 1,
    "shape": 1,
    "count": 4,
    "place": 1,
    "relation": 3,
    "read": 1,
}
