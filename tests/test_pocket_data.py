"""Scenes and questions: repeatable, disjoint between splits, and answered rightly."""

import random
import re

import numpy as np
import pytest

from alvts_cli.pocket.easy import load_easy
from alvts_cli.pocket.questions import KINDS, NUMBERS, ask, ask_kind
from alvts_cli.pocket.scenes import CELL, COLORS, SPLITS, make_scene, render, seed_of
from alvts_cli.pocket.training.examples import easy_example, scene_example, to_pixels
from alvts_cli.pocket.training.segments import SEGMENT, make_segments
from alvts_cli.pocket.words import PATCH_GROUPS, make_prompt, make_tokenizer

SEEDS = range(300)


def test_a_scene_and_its_picture_are_made_by_its_seed_alone() -> None:
    assert make_scene(7) == make_scene(7)
    assert make_scene(7) != make_scene(8)
    assert render(make_scene(7)).tobytes() == render(make_scene(7)).tobytes()


def test_splits_share_no_seed() -> None:
    ranges = list(SPLITS.values())
    for i, one in enumerate(ranges):
        for other in ranges[i + 1 :]:
            assert one[-1] < other[0] or other[-1] < one[0]
    assert seed_of("test", 3) in SPLITS["test"]
    with pytest.raises(ValueError, match="no scene"):
        seed_of("test", len(SPLITS["test"]))
    with pytest.raises(ValueError, match="splits are"):
        seed_of("exam", 0)


def test_things_keep_their_distance_and_their_colour() -> None:
    for seed in SEEDS:
        scene = make_scene(seed)
        assert 2 <= len(scene.things) <= 6
        assert len({(t.row, t.column) for t in scene.things}) == len(scene.things)
        assert len({(t.color, t.shape) for t in scene.things}) == len(scene.things)
        pixels = np.asarray(render(scene))
        for thing in scene.things:
            top, left = thing.row * CELL, thing.column * CELL
            cell = pixels[top : top + CELL, left : left + CELL]
            assert (cell == COLORS[thing.color]).all(-1).sum() > 20


def fits(thing, name: str) -> bool:
    """Whether a description, read word by word, is true of `thing`."""
    digit = re.fullmatch(r"object with the (\d)", name)
    if digit:
        return thing.digit == int(digit[1])
    *color, noun = name.split()
    return (not color or color == [thing.color]) and noun in ("object", thing.shape)


def the(scene, name: str):
    (thing,) = [t for t in scene.things if fits(t, name)]
    return thing


def right_answer(scene, text: str) -> str:
    """The answer to a question, worked out from its words alone."""
    if found := re.fullmatch(r"is there a (.+)\?", text):
        return "yes" if any(fits(t, found[1]) for t in scene.things) else "no"
    if found := re.fullmatch(r"what (color|shape) is the (.+)\?", text):
        return getattr(the(scene, found[2]), found[1])
    if found := re.fullmatch(r"how many (.+) are there\?", text):
        name = "crosses" if found[1] == "crosses" else found[1]
        single = "cross" if name == "crosses" else name.removesuffix("s")
        return NUMBERS[sum(fits(t, single) for t in scene.things)]
    if found := re.fullmatch(r"where is the (.+)\?", text):
        thing = the(scene, found[1])
        vertical = ("top",) * 3 + ("middle",) * 2 + ("bottom",) * 3
        horizontal = ("left",) * 3 + ("center",) * 2 + ("right",) * 3
        return f"{vertical[thing.row]} {horizontal[thing.column]}"
    if found := re.fullmatch(r"what digit is on the (.+)\?", text):
        return str(the(scene, found[1]).digit)
    if found := re.fullmatch(r"is the (.+) (left or right of|above or below) the (.+)\?", text):
        a, b = the(scene, found[1]), the(scene, found[3])
        if found[2] == "above or below":
            return "above" if a.row < b.row else "below"
        return "left" if a.column < b.column else "right"
    found = re.fullmatch(r"is the (.+) (left of|right of|above|below) the (.+)\?", text)
    assert found is not None, text
    a, b = the(scene, found[1]), the(scene, found[3])
    true = {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }
    return "yes" if true[found[2]] else "no"


def test_every_question_names_what_it_asks_for_and_has_the_right_answer() -> None:
    kinds = set()
    for seed in SEEDS:
        scene = make_scene(seed)
        for question in ask(scene, 12, random.Random(seed)):
            kinds.add(question.kind)
            assert question.answer == right_answer(scene, question.text), question.text
            for phrase in question.phrases:
                assert phrase.text in f"{question.text} assistant:"
                assert phrase.thing is None or the(scene, phrase.text) == phrase.thing
    assert kinds == set(KINDS)


def test_yes_and_no_are_about_as_frequent() -> None:
    for kind in ("presence", "relation"):
        made = [ask_kind(make_scene(seed), kind, random.Random(seed)) for seed in range(2000)]
        said = [question.answer for question in made if question is not None]
        assert 0.45 < said.count("yes") / (said.count("yes") + said.count("no")) < 0.55


def test_the_vocabulary_covers_every_question() -> None:
    tokenizer = make_tokenizer()
    texts = [
        f"{make_prompt(q.text)} {q.answer}"
        for seed in SEEDS
        for q in ask(make_scene(seed), 12, random.Random(seed))
    ]
    for split in ("train", "test"):
        texts += {f"{q} {a}" for source in load_easy(split) for q, a in source.questions}
    for text in texts:
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text
    assert tokenizer.unk_token_id in tokenizer("is there a zebra?").input_ids


def test_patches_are_labelled_where_the_things_are() -> None:
    example = scene_example(3, 4, 2, 6)
    scene = make_scene(seed_of("train", 3), 2, 6)
    labels = example.labels.unflatten(1, (16, 16))
    shown = labels[0] != PATCH_GROUPS[0].index("background")
    assert shown.sum() == 4 * len(scene.things)
    for thing in scene.things:
        for group, word in ((0, thing.color), (1, thing.shape)):
            area = labels[group, 2 * thing.row : 2 * thing.row + 2]
            area = area[:, 2 * thing.column : 2 * thing.column + 2]
            assert (area == PATCH_GROUPS[group].index(word)).all()


def test_easy_vqa_is_labelled_from_its_answers() -> None:
    sources = load_easy("train")[:40]
    for source in sources:
        example = easy_example(source, 3, random.Random(0))
        shapes = {a for q, a in source.questions if "what shape" in q}
        spoken = {PATCH_GROUPS[1][i] for i in example.labels[1].unique().tolist() if i >= 0}
        assert shapes <= spoken or not shapes
    assert {s.path for s in load_easy("train")}.isdisjoint(s.path for s in load_easy("test"))


def test_segments_hold_the_question_and_weigh_the_answer() -> None:
    tokenizer = make_tokenizer()
    example = scene_example(5, 12, 2, 6)
    segments = make_segments([example], tokenizer)
    for q, question in enumerate(example.questions):
        weighed = segments.weight[0, q] == 1
        # The weight sits on the token before: what is predicted there is the answer.
        answer = segments.text[0, q].roll(-1)[weighed].tolist()
        assert tokenizer.decode(answer) == question.answer
        things = segments.things.unflatten(2, (-1, SEGMENT))[0, 0, q]
        named = [PATCH_GROUPS[0][i] for i in things[things >= 0].tolist()]
        assert named == [p.thing.color for p in question.phrases if p.thing is not None]


def test_training_sees_what_the_processor_makes_of_a_picture() -> None:
    from alvts_cli.pocket.build import make_processor

    processor = make_processor()
    for image in (render(make_scene(1)), load_easy("train")[0].open()):
        made = processor(images=image, text=make_prompt("?"), return_tensors="pt")
        assert (made["pixel_values"][0] - to_pixels(image)).abs().max() < 0.01
        assert (made["input_ids"] == processor.image_token_id).sum() == 256
