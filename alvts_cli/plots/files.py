"""What earlier runs of `alvts eval` and `alvts bench` wrote with --json."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from ..bench import metrics
from ..errors import AlvtsError
from ..evaluate import gates
from ..files import read_text
from ..schema import Finite, Record, Text, check, parse_json, refuse_newer

_Share = Annotated[float, Field(ge=-1e6, le=1e6)]
"""A percentage or a ratio, however odd."""
_Tokens = Annotated[float, Field(ge=0, le=1e9)]
_Pair = tuple[_Share, _Share]


class _Row(Record):
    method: Text
    tokens: Annotated[_Tokens, Field(gt=0)]
    retention: _Share | None
    retention_low: _Share | None
    retention_high: _Share | None
    prefill_speedup: _Share | None = None
    prefill_speedup_low: _Share | None = None
    prefill_speedup_high: _Share | None = None

    @model_validator(mode="after")
    def _with_its_interval(self) -> "_Row":
        """
        Raises:
            ValueError: a figure without the ends of its interval.
        """
        for name in ("retention", "prefill_speedup"):
            figure, *ends = (getattr(self, f"{name}{end}") for end in ("", "_low", "_high"))
            if figure is not None and None in ends:
                raise ValueError(f"{name} needs both ends of its interval")
        return self


class _Head(Record):
    dense: _Share
    blind: _Share
    samples: int


class _Data(Record):
    name: Text
    visual_tokens: Annotated[_Tokens, Field(gt=0)]
    head: _Head
    rows: Annotated[tuple[_Row, ...], Field(min_length=1)]


class _Eval(Record):
    settings: dict[str, Any] = Field(default_factory=dict)
    data: Annotated[tuple[_Data, ...], Field(min_length=1)]


class _Metrics(Record):
    prefill_speedup: _Share
    prefill_speedup_limit: _Share
    visual_tokens: Annotated[_Tokens, Field(gt=0)]
    visual_tokens_kept: _Tokens


class _Intervals(Record):
    prefill_speedup: _Pair
    prefill_speedup_limit: _Pair


class _Peer(Record):
    visual_tokens_kept: _Tokens
    prefill_speedup: _Share
    interval: _Pair


class _Settings(Record):
    model: Text
    cut: bool
    layers: int | None = None
    hidden_size: int | None = None
    visual_tokens: Finite
    text_tokens: Finite


class _Environment(Record):
    hardware: Text


class _Bench(Record):
    settings: _Settings
    environment: _Environment
    metrics: _Metrics
    intervals: _Intervals
    against: dict[str, _Peer]


def read_eval(path: Path) -> dict[str, Any]:
    """The object that `alvts eval --json` wrote.

    Raises:
        AlvtsError: no such file, not one of those, or one of a newer format.
    """
    return _read(path, "alvts eval", _Eval, gates.FORMAT)


def read_bench(path: Path) -> dict[str, Any]:
    """The object that `alvts bench --json` wrote.

    Raises:
        AlvtsError: no such file, not one of those, or one of a newer format.
    """
    return _read(path, "alvts bench", _Bench, metrics.FORMAT)


def _read(path: Path, command: str, schema: type[Record], newest: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = parse_json(read_text(path))
    except ValueError:
        raise AlvtsError(f"{path} is not JSON; give what {command} --json wrote") from None
    refuse_newer(found, newest, path)
    try:
        check(schema, found, "it")
    except AlvtsError as error:
        raise AlvtsError(f"{path} is not what {command} --json writes: {error}") from None
    return found
