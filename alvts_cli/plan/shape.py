"""The numbers of a model that a prediction needs."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import AlvtsError

MODELS = Path(__file__).with_name("models.json")
"""The known models, written by `python -m alvts_cli.plan.describe`."""


@dataclass(frozen=True)
class Moved:
    """Bytes that a layer's operators read and write beside products and attention.

    With `t` tokens that run through the layer and `T` in all, of one sample:
    `running t + fixed + all T`. Comparing all tokens moves a part that grows with `T^2`: the
    straight line goes through its ends at 640 and 2,368 tokens.
    """

    running: float
    fixed: float
    all: float

    def bytes(self, running: int, tokens: int) -> float:
        """Of one sample."""
        return self.running * running + max(0.0, self.fixed + self.all * tokens)


@dataclass(frozen=True)
class Kind:
    """What a layer of one kind, or a forward beside its layers, does beside arithmetic.

    Attributes:
        launches: operators that are no views.
        moved: bytes.
    """

    launches: int
    moved: Moved


@dataclass(frozen=True)
class Counts:
    """Under one policy, by the kind of a layer; counted with `bench.launches`.

    Attributes:
        dense, chooses, goes_on, goes_on_again, goes_on_otherwise, text_only, text_goes_on: of a
            layer in prefill, as in `bench.launches.Launches`.
        once: in a selecting prefill beside the layers, over the dense one.
        rest: in a dense prefill beside the layers.
        decode, decode_dense, decode_rest: launches of a layer for one more token, and beside them.
    """

    dense: Kind
    chooses: Kind
    goes_on: Kind
    goes_on_again: Kind
    goes_on_otherwise: Kind
    text_only: Kind
    text_goes_on: Kind
    once: Kind
    rest: Kind
    decode: int
    decode_dense: int
    decode_rest: int


@dataclass(frozen=True)
class Vision:
    """The vision tower and what leads from it to the decoder, for one usual image.

    Attributes:
        flops: of the image.
        parameters: weights.
        launches: operators that are no views; an attention is one.
    """

    flops: float
    parameters: int
    launches: int


@dataclass(frozen=True)
class Shape:
    """A model.

    Attributes:
        name: as the user calls it.
        width, mlp, layers, heads, kv_heads, head_dim, vocabulary: of the decoder; `mlp` is the
            width inside its MLPs, or inside each expert.
        positions: tokens that it reads at most.
        parameters: all weights.
        visual_tokens: of one usual image.
        vision: tower.
        counts: by the name of a policy.
        experts, chosen: MLPs of a layer, and how many of them a token goes through.
        adds_behind: as `families.Family.adds_behind` has it.
    """

    name: str
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    parameters: int
    visual_tokens: int
    vision: Vision
    counts: dict[str, Counts]
    experts: int = 1
    chosen: int = 1
    adds_behind: int = 0


def known_shape(name: str) -> Shape | None:
    """A known model as data; None for others."""
    data = _models().get(name)
    return None if data is None else from_json(data)


def from_json(data: dict[str, Any]) -> Shape:
    """What `dataclasses.asdict` made of a `Shape`.

    Raises:
        AlvtsError: the file of the known models is of another version.
    """

    def kind(one: dict[str, Any]) -> Kind:
        return Kind(one["launches"], Moved(**one["moved"]))

    def counts(one: dict[str, Any]) -> Counts:
        kinds: dict[str, Any] = {k: kind(v) for k, v in one.items() if isinstance(v, dict)}
        return Counts(**{**one, **kinds})

    try:
        policies = {name: counts(one) for name, one in data["counts"].items()}
        return Shape(**{**data, "vision": Vision(**data["vision"]), "counts": policies})
    except (TypeError, KeyError) as error:
        raise AlvtsError(f"{MODELS} does not fit this version of alvts: {error}") from None


@cache
def _models() -> dict[str, dict[str, Any]]:
    models: dict[str, dict[str, Any]] = json.loads(MODELS.read_text())
    return models
