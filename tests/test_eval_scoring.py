"""Normalising answers, scoring them, gates, and intervals."""

import math

import numpy as np
import pytest

from alvts_cli import AlvtsError
from alvts_cli.evaluate.bootstrap import Bootstrap
from alvts_cli.evaluate.gates import FIGURES, parse_gate, read_budget
from alvts_cli.evaluate.scoring import choice, exact, normalise, phrases, suitable, yes_no


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat.", "cat"),
        ("  two   dogs ", "2 dogs"),
        ("ten", "10"),
        ("none", "0"),
        ("someone", "someone"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("3.5 m.", "3.5 m"),
        ("don't", "dont"),
        ("top-left", "top left"),
        ('"red"; (dark)', "red dark"),
        ("Yes!", "yes"),
        ("an", "an"),
        ("", ""),
        ("10:30", "10:30"),
        (" - ", "-"),
        ("?", "?"),
        ("the.", "the"),
    ],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_exact_takes_any_of_the_answers():
    assert exact("A red one", ["red 1"])
    assert exact("two", ["three", "2"])
    assert not exact("two dogs", ["two"])
    assert not exact("", ["red"])


@pytest.mark.parametrize("right", ["-", "?", "...", "()", ""])
def test_nothing_is_no_answer(right):
    """To that of punctuation alone neither, which says something."""
    assert not exact("", [right]) and not exact("!", [right])
    assert phrases("", [right]) == 0
    assert exact(f" {right} ", [right]) is (right != "")


@pytest.mark.parametrize(
    ("said", "right", "hit"),
    [
        ("Yes, there is a dog.", "yes", True),
        ("no", "No", True),
        ("There is no dog", "no", True),
        ("Yes. There is no cat.", "no", False),
        ("nothing", "no", False),
        ("I see a dog", "yes", False),
    ],
)
def test_yes_no(said, right, hit):
    assert yes_no(said, [right]) is hit


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(C)", "C"),
        ("D: a dog", "D"),
        ("The answer is B", "B"),
        ("A dog", "A"),
        ("I think it is C.", "C"),
        ("a dog", None),
        ("", None),
    ],
)
def test_choice(said, letter):
    for right in "ABCD":
        assert choice(said, [right]) is (right == letter)


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ([["yes"], ["No"]], "yes-no"),
        ([["A"], ["D"]], "choice"),
        ([["yes"], ["red"]], "exact"),
        ([["A"], ["dog"]], "exact"),
    ],
)
def test_the_answers_choose_the_scoring(answers, name):
    assert suitable(answers) == name


def test_a_gate_names_method_budget_and_figure():
    gate = parse_gate("random-static@0.11.retention >= 97", ["random-static"], ["0.11"], False)
    assert str(gate) == "random-static@0.11.retention>=97"
    passed, line = gate.check({"random-static@0.11.retention": 95.5})
    assert not passed
    assert "measured 95.5, off by 1.5" in line
    assert gate.check({"random-static@0.11.retention": 97.0})[0]
    assert not gate.check({"random-static@0.11.retention": math.nan})[0]
    assert parse_gate("alvts@64.kl<0.5", ["alvts"], ["192", "64"], False).metric == "alvts@64.kl"


@pytest.mark.parametrize(
    ("texts", "name", "value"),
    [
        (("0.1", "0.10", "1e-1", " .1 ", "1E-1", "10e-2"), "0.1", 0.1),
        (("1e-07",), "0.0000001", 1e-7),
        (("64", "64.0", "6.4e1", "064"), "64", 64),
        (("1.0", "1.", "1e0"), "1.0", 1.0),
        (("1",), "1", 1),
    ],
)
def test_a_budget_has_one_name_however_it_is_written(texts, name, value):
    for text in texts:
        found = read_budget(text)
        assert (found, type(found[1])) == ((name, value), type(value))
        gate = parse_gate(f"alvts@{text.strip()}.accuracy>=97", ["alvts"], [name], False)
        assert gate.metric == f"alvts@{name}.accuracy"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("alvts@1.2.3.retention>=97", "not a number"),
        ("retention>=97", "METHOD@BUDGET"),
        ("alvts.retention>=97", "METHOD@BUDGET"),
        ("alvts@64.retention", "METHOD@BUDGET"),
        ("fast@64.retention>=97", "unknown method 'fast'"),
        ("vtw@64.retention>=97", "leaves out"),
        ("dense@64.retention>=97", "dense"),
        ("alvts@65.retention>=97", "--keep leaves out"),
        ("alvts@64.speed>=97", "unknown figure 'speed'"),
        ("alvts@64.kl<=small", "not a number"),
        ("alvts@64.kl<=nan", "not a number"),
        ("alvts@64.retention>=0.97", "in percent: write alvts@64.retention>=97"),
        ("alvts@64.flops<=1", "in percent: write alvts@64.flops<=100"),
        ("alvts@64.retention>=-5", "can never fail: the figure is at least 0"),
        ("alvts@64.retention>=0", "can never fail"),
        ("alvts@64.accuracy<=100", "can never fail: the figure is at least 0 and at most 100"),
        ("alvts@64.accuracy>100", "can never hold"),
        ("alvts@64.kl>=0", "can never fail"),
        ("alvts@64.kl<0", "can never hold"),
        ("alvts@64.difference>=-100", "can never fail"),
        ("alvts@64.over_alvts>=0", "over itself"),
        ("alvts@1.0.retention>=97", "everything is kept"),
        ("alvts@1.0.kl<=0.1", "everything is kept"),
    ],
)
def test_bad_gates(text, word):
    with pytest.raises(AlvtsError) as caught:
        parse_gate(text, ["dense", "alvts"], ["64", "1.0"], False)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("alvts@64.difference>=-0.5", "alvts@64.difference>=1", "alvts@64.kl<=0.5"),
        *("alvts@1.0.accuracy>=90", "alvts@1.retention>=97", "alvts@64.retention>=100"),
        *("alvts@64.accuracy==100", "alvts@64.tokens==64"),
    ],
)
def test_gates_that_say_something(text):
    assert str(parse_gate(text, ["alvts"], ["64", "1", "1.0"], False)) == text


def test_a_gate_over_alvts_needs_alvts():
    with pytest.raises(AlvtsError, match="needs alvts"):
        parse_gate("dart@64.over_alvts<0", ["dart"], ["64"], False)
    assert "over_alvts" in FIGURES


def test_intervals_are_those_of_the_binomial():
    right = np.array([1.0] * 300 + [0.0] * 100)
    interval = Bootstrap(400, 0).mean(right)
    error = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert interval.value == 0.75
    assert interval.low == pytest.approx(0.75 - error, abs=0.006)
    assert interval.high == pytest.approx(0.75 + error, abs=0.006)


def test_pairing_narrows_a_ratio():
    """Two methods that fail on the same samples differ for sure; unpaired they would not."""
    dense = np.array([1.0] * 200 + [0.0] * 200)
    method = dense.copy()
    method[:10] = 0
    bootstrap = Bootstrap(400, 0)
    paired = bootstrap.ratio(method, dense)
    assert paired.value == 0.95
    assert paired.high < 1 and paired.low > 0.91
    unpaired = bootstrap.ratio(np.random.default_rng(1).permutation(method), dense)
    assert unpaired.high > 1.05
    # That none of 200 is lost does not say that none ever will be.
    same = bootstrap.ratio(dense, dense)
    assert same.low == pytest.approx(0.025 ** (1 / 200)) and same.value == 1 < same.high < 1.02


def test_samples_that_are_all_the_same_are_no_certainty():
    """As Clopper and Pearson have it; the wider, the fewer."""
    for samples, least in ((1, 0.025), (10, 0.6915), (350, 0.9895)):
        bootstrap, all_right = Bootstrap(samples, 0), np.ones(samples)
        right, kept = bootstrap.mean(all_right), bootstrap.ratio(all_right, all_right)
        assert (right.low, right.high) == (pytest.approx(least, abs=1e-4), 1)
        assert (kept.low, kept.high) == (right.low, 1)
        wrong = bootstrap.mean(1 - all_right)
        assert (wrong.low, wrong.high) == (0, pytest.approx(1 - least, abs=1e-4))
    difference = Bootstrap(10, 0).mean(np.zeros(10), least=-1)
    assert difference.low == -difference.high == pytest.approx(-0.3085, abs=1e-4)
    # One wrong answer of ten, and it is the resamples that say it.
    one_wrong = np.array([0.0, *[1.0] * 9])
    varied = Bootstrap(10, 0).mean(one_wrong)
    assert (varied.low, varied.high) == (0.7, 1)


def test_same_seed_same_interval():
    values = np.random.default_rng(0).random(50)
    assert Bootstrap(50, 1).mean(values) == Bootstrap(50, 1).mean(values)
    assert Bootstrap(50, 1).mean(values) != Bootstrap(50, 2).mean(values)


def test_a_ratio_to_nothing_is_not_defined():
    interval = Bootstrap(3, 0).ratio(np.ones(3), np.zeros(3))
    assert math.isnan(interval.value) and math.isnan(interval.low)


@pytest.mark.parametrize(
    ("said", "share"),
    [
        ("a red cross, a blue ring with a 3", 1),
        ("the blue ring with a three, red cross", 1),
        # One of two found, and one of one right.
        ("a red cross", 2 / 3),
        ("a red cross, a red cross", 1 / 2),
        ("a red cross, a green ring with a 3, a blue ring", 2 / 5),
        ("", 0),
    ],
)
def test_phrases_count_what_is_found_and_what_is_made_up(said, share):
    assert phrases(said, ["a red cross, a blue ring with a 3"]) == pytest.approx(share)


def test_of_several_lists_the_best_counts():
    assert phrases("a dog", ["a cat", "a dog"]) == 1
