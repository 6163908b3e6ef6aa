"""What a calibration is given from outside, checked where it enters."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from alvts_cli.data import Reader, Sample
from alvts_cli.engine import is_attached
from alvts_cli.engine.probe import check_layers
from alvts_cli.errors import AlvtsError
from alvts_cli.families import Family, check_whole, family_of

T = TypeVar("T")

_PARTS = {"id": (str, "text"), "images": (Sequence, "a list of pictures"), "prompt": (str, "text")}
"""What a sample has for every model, and what it is."""


def of_kind(value: Any, kind: type[T], name: str = "") -> T:
    """An argument that is of its kind.

    Raises:
        AlvtsError: it is of another one.
    """
    if not isinstance(value, kind):
        name = name or kind.__name__.lower()
        raise AlvtsError(f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    return value


def given(value: T | None, kind: type[T]) -> T:
    """`of_kind`, or the default of that kind in the place of None; the same errors."""
    return kind() if value is None else of_kind(value, kind)


def family_to_run(model: Any) -> Family:
    """The family of a model that samples can be run through, dense.

    Raises:
        AlvtsError: an unknown architecture, a part of a model, one that alvts is attached to, or
            one that it cannot select in.
    """
    check_whole(model)
    if is_attached(model):
        raise AlvtsError("alvts is attached to this model; detach it before calibrating")
    family = family_of(model)
    family.check(model)
    check_layers(model)
    return family


def each_sample(samples: Reader | Iterable[Sample]) -> Iterator[Sample]:
    """The samples one at a time.

    Raises:
        AlvtsError: something else is among them, or they are nothing to go through.
    """
    try:
        each = iter(samples)
    except TypeError:
        raise AlvtsError(
            "samples must be what read_data gives, or a list of Sample; their type is "
            f"{type(samples).__name__}"
        ) from None
    for number, one in enumerate(each):
        if not isinstance(one, Sample):
            its = type(one).__name__
            raise AlvtsError(f"samples[{number}] must be a Sample; its type is {its}")
        for name, (kind, words) in _PARTS.items():
            if not isinstance(part := getattr(one, name), kind):
                its = type(part).__name__
                raise AlvtsError(f"samples[{number}].{name} must be {words}; its type is {its}")
        yield one
