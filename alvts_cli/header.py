"""What an artifact says of itself: the header of its file, read and checked without torch.

A safetensors file begins with the length of its header (8 bytes), then comes the header (JSON:
dtype, shape and place of every tensor, and texts), then the tensors. Ours is one of those texts,
`alvts`, a JSON object again. `artifact` says which tensors there are, and reads them.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import ConfigDict, Field, TypeAdapter, model_validator

from .engine.keep import resolve_keep
from .engine.policy import Picked, Policy
from .errors import AlvtsError
from .files import open_regular
from .schema import Count, Finite, Record, Whole, check, parse_json, refuse_newer

FORMAT = 5
"""Raised when an older alvts would misread the file. A new key it may ignore is no reason.

1 had one schedule in the place of several; 1 and 2 had selectors of the paper's form; 3 had no
policies: each layer chooses the most important tokens; 3 and 4 had two more tensors a layer, for
what visual tokens find important, which was worth nothing. All are read as what they are."""

VALUES = 16
"""Values of each weight in the fingerprint."""

_FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""What tensors may be in, by the names that safetensors has, and torch."""

_LONGEST = 100_000_000
"""Bytes of a header, as safetensors itself has it."""


def written_keep(keep: float) -> str:
    """A keep as it is told: a ratio with three digits, a count of tokens as what it is."""
    counted = isinstance(keep, int) or keep > 1
    return f"{keep:.0f} token{'s' * (keep != 1)}" if counted else f"{keep:.3f}"


@dataclass(frozen=True)
class LayerFit:
    """How well a layer's selector does on the samples that were not fitted.

    The loss is the objective that was fitted; recall is the share of the `k` tokens chosen by the
    layer's full attention that the selector chooses too. `before` is the initialisation alone.
    """

    loss_before: float
    loss_after: float
    recall_before: float
    recall_after: float


@dataclass(frozen=True)
class Trial:
    """What a policy does to the answers at a keep ratio.

    Attributes:
        keep: ratio of visual tokens in every layer.
        policy: that was tried.
        loss: KL of the answers' tokens to the dense model's, in nats, mean over tokens, then over
            samples.
        same: share of the answers that are the dense model's own, token for token.
        time: of the language model's prefill on the machine that calibrated, the dense one's
            being 1; None in files from before 0.2, whose policies were picked by loss alone.
        capped: the same mean as `loss`, with no sample's above `calibration.answers.CAP`: what
            policies are picked by; None in files from before.
        dropped_after: so many samples, which is what the figures are of, for it was clearly behind
            others then; None where it was tried on all.
    """

    keep: float
    policy: Policy
    # A KL is not below 0 but for rounding.
    loss: Annotated[float, Field(ge=-0.01)]
    same: Annotated[float, Field(ge=0, le=1)]
    time: Annotated[float, Field(gt=0)] | None = None
    capped: Annotated[float, Field(ge=0)] | None = None
    dropped_after: Annotated[int, Field(gt=0)] | None = None


@dataclass(frozen=True)
class TriedOn:
    """What policies were tried on, apart from the fit.

    Attributes:
        data: in words.
        samples: so many.
    """

    data: str
    samples: Count


@dataclass(frozen=True)
class CalibrationRecord:
    """Where the selectors come from.

    Attributes:
        data: in words.
        fitted: number of samples fitted on.
        held_out: number of other samples, on which `layers` was measured.
        sample_ids: SHA-256 of the ids of all samples in the order of use.
        settings: what was asked for, the seed and the keep ratio of `recall` among it.
        versions: of python packages.
        layers: one entry per layer.
        trials: every policy that was tried, at every keep ratio; empty where none was.
        tried_on: where that was done again after the fit (`alvts calibrate --repick`).
    """

    data: str
    fitted: Count
    held_out: Count
    sample_ids: str
    settings: dict[str, bool | Whole | Finite | str | None]
    versions: dict[str, str]
    layers: tuple[LayerFit, ...]
    trials: tuple[Trial, ...] = ()
    tried_on: TriedOn | None = None

    @property
    def data_tried(self) -> str:
        """What the policies were tried on, in words."""
        return self.data if self.tried_on is None else self.tried_on.data

    @property
    def samples_tried(self) -> int:
        """So many samples the policies were tried on."""
        if self.tried_on is not None:
            return self.tried_on.samples
        most = self.settings.get("policy_samples")
        return min(most, self.held_out) if isinstance(most, int) else self.held_out

    @property
    def mean(self) -> LayerFit:
        """The mean over layers."""
        count = len(self.layers)
        return LayerFit(
            *(sum(getattr(fit, f.name) for fit in self.layers) / count for f in fields(LayerFit))
        )


class Metadata(Record):
    """The metadata of a file of the newest format; `artifact.Artifact` says what they are."""

    # What a newer alvts added is not refused, but told.
    model_config = ConfigDict(extra="allow")

    format: Annotated[int, Field(ge=1, le=2**53)]
    form: Literal["alvts", "paper"]
    model: str
    revision: str | None
    family: str
    num_layers: Annotated[int, Field(ge=1, le=10_000)]
    hidden_size: Count
    rank: Count
    default_keep: float | int
    schedules: tuple[tuple[float | int, ...], ...]
    # RMSNorm's: far above any model's, and it would be the norm.
    norm_eps: tuple[Annotated[float, Field(gt=0, le=0.01)], ...]
    carry_rank: Count
    picked: tuple[Picked, ...]
    visual_tokens: Count
    calibration: CalibrationRecord

    @model_validator(mode="after")
    def _fits_together(self) -> "Metadata":
        """
        Raises:
            AlvtsError: parts that do not go with each other.
        """
        layers = self.num_layers
        record = self.calibration
        if len(record.layers) != layers:
            raise AlvtsError(f"'calibration.layers' has {len(record.layers)} for {layers} layers")
        tried = [(one.keep, one.policy) for one in record.trials]
        if len(set(tried)) < len(tried):
            raise AlvtsError("'calibration.trials' has a policy twice at a keep ratio")
        keep, most = (record.settings.get(name, 1) for name in ("keep", "policy_samples"))
        if type(keep) not in (int, float):
            raise AlvtsError("'calibration.settings.keep' must be a number")
        if most is not None and not (type(most) is int and most > 0):
            raise AlvtsError("'calibration.settings.policy_samples' must be a number above 0")
        if len(self.norm_eps) != layers:
            raise AlvtsError(f"'norm_eps' has {len(self.norm_eps)} values for {layers} layers")
        resolve_keep(self.default_keep, layers)
        means = [0.0]
        for schedule in self.schedules:
            ratios = resolve_keep(schedule, layers).values
            means.append(sum(ratios) / layers)
            if not all(isinstance(ratio, float) for ratio in ratios) or means[-1] <= means[-2]:
                raise AlvtsError("'schedules' must be ratios per layer, sorted by their mean")
        if not all(0 < one.keep <= 1 for one in self.picked):
            raise AlvtsError("'picked' must be of keep ratios above 0 and up to 1")
        if any(one.policy.carry for one in self.picked) and self.carry_rank < 1:
            raise AlvtsError("a policy carries, but nothing can")
        return self


class _Tensor(Record):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]

    def __str__(self) -> str:
        return f"{_FLOATS.get(self.dtype, self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class Header:
    """A checked header.

    Attributes:
        metadata: in the words of the newest format.
        dtype: of the large tensors, such as "bfloat16".
        unknown: names in the metadata and of tensors that this alvts does not know.
    """

    metadata: Metadata
    dtype: str
    unknown: tuple[str, ...]

    def unknown_names(self, path: Path) -> str:
        """A warning about `unknown`."""
        return f"{path} holds things this alvts does not know: {', '.join(self.unknown)}"


def read_header(path: Path) -> Header:
    """The header of a file, and no more of it than that.

    Raises:
        AlvtsError: no such file, not safetensors, cut short, not ours, another format, missing or
            misshapen tensors.
    """
    with open_regular(path, "selector file") as file:
        return take_header(file, path)


def take_header(file: BinaryIO, path: Path) -> Header:
    """The header of a file that is open at its start; the errors of `read_header`.

    Args:
        file: regular, or in memory; left behind its header.
        path: of the file, for messages.
    """
    try:
        start = file.read(8)
        length, text = int.from_bytes(start, "little"), file.read(1)
        if len(start) < 8 or text != b"{" or length > 2**48:
            raise AlvtsError(f"{path} is not a safetensors file")
        # Not the size that a descriptor has: bytes in memory have none.
        size = file.seek(0, os.SEEK_END)
        file.seek(9)
        if size < 8 + length:
            raise AlvtsError(f"{path} is cut short; copy or make it again")
        if length > _LONGEST:
            raise AlvtsError(f"{path} is not a safetensors file: its header is too long")
        text += file.read(length - 1)
    except OSError as error:
        raise AlvtsError(f"cannot read {path}: {error.strerror or error}") from error
    return _parsed(text, size - 8 - length, path)


def _parsed(text: bytes, size: int, path: Path) -> Header:
    """
    Args:
        text: the header.
        size: bytes behind it.
        path: for messages.
    """
    try:
        header = parse_json(text)
    except ValueError as error:
        raise AlvtsError(f"{path} is not a safetensors file: {error}") from None
    texts = check(_TEXTS, header.pop("__metadata__", {}), f"the header of {path}")
    tensors = check(_TENSORS, header, f"the header of {path}")
    if size < max((tensor.data_offsets[1] for tensor in tensors.values()), default=0):
        raise AlvtsError(f"{path} is cut short; copy or make it again")
    if "alvts" not in texts:
        raise AlvtsError(f"{path} is a safetensors file but does not hold alvts selectors")
    about = f"the metadata of {path}"
    try:
        told = parse_json(texts["alvts"])
    except ValueError as error:
        raise AlvtsError(f"{about} is not JSON: {error}") from None
    version = check(_Version, told, about).format
    refuse_newer(told, FORMAT, path)
    metadata = check(Metadata, _as_newest(told, version, path), about)
    known = _known(tensors, metadata, path)
    if version < 5:
        known |= {f"layers.{i}.{one}" for i in range(metadata.num_layers) for one in _FORMER}
    unknown = {*(metadata.model_extra or ()), *(tensors.keys() - known)}
    large = tensors["layers.0.query" if metadata.form == "paper" else "layers.0.down"]
    return Header(metadata, _FLOATS[large.dtype], tuple(sorted(unknown)))


def _known(tensors: Mapping[str, _Tensor], metadata: Metadata, path: Path) -> set[str]:
    """The names of the tensors that are looked for, there or not.

    Raises:
        AlvtsError: one is missing or misshapen.
    """
    rank, width, carried = metadata.rank, metadata.hidden_size, metadata.carry_rank
    known: set[str] = set()

    def look(name: str, shape: tuple[int, ...], optional: bool = False) -> None:
        known.add(name)
        tensor = tensors.get(name)
        if tensor is None:
            if not optional:
                raise AlvtsError(f"{path} is incomplete: it lacks the tensor {name!r}")
        elif tensor.shape != shape or tensor.dtype not in _FLOATS:
            raise AlvtsError(f"{path} is damaged: {name} is {tensor}, not floats {list(shape)}")

    def size(name: str) -> int:
        """The first; of a damaged file there may be none."""
        return sum(tensors[name].shape[:1]) if name in tensors else 0

    for i in range(metadata.num_layers):
        of = f"layers.{i}."
        if metadata.form == "paper":
            look(f"{of}query", (rank, width))
            look(f"{of}key", (rank, width))
            look(f"{of}query_bias", (rank,), optional=True)
        else:
            keys, head = size(f"{of}up"), size(f"{of}key_norm")
            look(f"{of}down", (rank, width))
            look(f"{of}up", (keys, rank))
            look(f"{of}key_bias", (keys,), optional=True)
            # Each head's; all that a file alone can tell is that it divides the keys.
            whole = bool(head) and keys % head == 0
            look(f"{of}key_norm", (head if whole else keys,), optional=True)
        if carried:
            look(f"carry.{i}.down", (carried, width))
            look(f"carry.{i}.up", (width, carried))
    look("fingerprint", (metadata.num_layers, 2, VALUES))
    return known


def _as_newest(metadata: dict[str, Any], version: int, path: Path) -> dict[str, Any]:
    """What a file of an older format says, in the words of the newest.

    Raises:
        AlvtsError: selectors that were fitted without the causal mask, which formats 1 and 2 had.
    """
    if version < FORMAT:
        metadata = {"carry_rank": 0, "picked": [], "visual_tokens": 0, **metadata}
    if "schedule" in metadata:
        schedule = metadata.pop("schedule")
        metadata["schedules"] = [schedule] if schedule else []
    if version < 3 and not metadata.pop("causal", True):
        raise AlvtsError(f"{path} holds selectors without a causal mask; calibrate again")
    return {"form": "paper" if version < 3 else "alvts", **metadata}


_FORMER = ("inner", "outer")
"""Tensors of a layer that formats 3 and 4 had besides."""

_TEXTS: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])
_TENSORS = TypeAdapter(dict[str, _Tensor])


class _Version(Record):
    """The one part of the metadata that every format has."""

    format: Annotated[int, Field(ge=1, le=2**53)]
