import pytest
from tiny import LAYERS, make_selectors

from alvts_cli import AlvtsError
from alvts_cli.engine import keep_of, resolve_keep, spend


@pytest.mark.parametrize(
    ("keep", "visual_tokens", "count"),
    [
        (0.11, 100, 11),
        (0.29, 100, 29),  # 0.29 * 100 is 28.999999999999996
        (0.07, 100, 7),
        (0.5, 7, 3),
        (0.001, 100, 1),  # never nothing
        (1.0, 100, 100),
        (1, 100, 1),  # an int is a number of tokens
        (64, 576, 64),
        (64.0, 576, 64),
        (64, 50, 50),
        (64, 0, 0),
        (0.5, 0, 0),
        ("0.11", 100, 11),
        ("1", 100, 1),
        ("1.0", 100, 100),
        ("64", 576, 64),
        (" 64 ", 576, 64),
        ("1e2", 576, 100),
    ],
)
def test_one_number_for_all_layers(keep, visual_tokens, count):
    resolved = resolve_keep(keep, 3)
    assert [resolved.count(layer, visual_tokens) for layer in range(3)] == [count] * 3


@pytest.mark.parametrize(
    ("keep", "counts"),
    [
        ([1.0, 0.5, 0], [100, 50, 0]),
        ([0.0, 64, 1], [0, 64, 1]),
        ("1.0,0.5,0", [100, 50, 0]),
        ((0.25, 0.25, 200), [25, 25, 100]),
    ],
)
def test_one_number_per_layer(keep, counts):
    resolved = resolve_keep(keep, 3)
    assert [resolved.count(layer, 100) for layer in range(3)] == counts


SCHEDULES = [[0.5, 0.125, 0.0, 0.0], [1.0, 0.75, 0.25, 0.0]]
"""Of mean 5/32 and 1/2."""


def counts(keep, tokens, layers=4):
    resolved = resolve_keep(keep, layers, SCHEDULES, 0.5)
    return [resolved.count(layer, tokens) for layer in range(layers)]


def test_what_was_resolved_before_is_taken_as_it_is():
    resolved = resolve_keep(64, LAYERS)
    assert keep_of(make_selectors(), resolved) is resolved


def test_a_layer_average_is_spent_as_the_schedules_say():
    assert counts(0.5, 64) == counts(32, 64) == counts(None, 64) == [64, 48, 16, 0]
    assert counts(10, 64) == [32, 8, 0, 0]
    # Halfway to the second one, to everything, and to nothing.
    assert counts(21, 64) == [48, 28, 8, 0]
    assert counts(48, 64) == [64, 56, 40, 32]
    assert counts(5, 64) == [16, 4, 0, 0]
    assert counts(1.0, 64) == counts(99, 64) == [64] * 4
    assert counts(0.5, 0) == [0] * 4
    # What the user writes for every layer is taken as it is.
    assert counts([0.5, 0, 1.0, 8], 64) == [32, 0, 64, 8]


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 577])
def test_the_layer_average_is_exact(tokens):
    for average in range(1, tokens + 1):
        kept = spend(SCHEDULES, average, tokens)
        assert sum(kept) == 4 * average
        assert all(0 <= count <= tokens for count in kept)


def test_layers_that_choose():
    resolved = resolve_keep([0, 0.0, 1.0, 0.5, 8], 5)
    assert [resolved.chooses(layer) for layer in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "keep",
    [
        None,
        True,
        [True, 0.5, 0.5],
        0,
        0.0,
        -1,
        -0.5,
        2.5,
        10**400,
        float("nan"),
        float("inf"),
        "nan",
        "inf",
        "",
        "a",
        "0.5,",
        "0.5,0.5",
        "50%",
        [0.5, 0.5],
        [0.5, 0.5, -0.1],
        [0.5, 0.5, None],
        [0.5, 0.5, 1.5],
        [0.5, 0.5, "0.5"],
        {},
        b"1",
        object(),
    ],
)
def test_nonsense_is_refused_in_one_line(keep):
    with pytest.raises(AlvtsError) as error:
        resolve_keep(keep, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a", "50%", "0.5,", "0.5,b,0.5"])
def test_a_text_that_is_no_number_is_shown_as_it_was_given(text):
    with pytest.raises(AlvtsError, match=f"keep='{text}' is not a number or a list of numbers"):
        resolve_keep(text, 3)
