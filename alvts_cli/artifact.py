"""The file that calibration writes and every other command reads: one `.safetensors`.

Tensors: `layers.{i}.` with `down`, `up`, `inner`, `outer` and, where the model's keys have them,
`key_bias` and `key_norm` (see `engine.scoring.LayerSelector`), or in the paper's form `query`,
`key` and, where the model's queries have one, `query_bias` (see `engine.paper.PaperSelector`);
`carry.{i}.` with `down` and `up` where what is skipped can be carried (see `engine.carry.Carry`);
and `fingerprint` `[L, 2, 16]` float32. The large ones are in the dtype the model was calibrated in:
`attach` casts to the model's dtype anyway, so float32 for a bfloat16 model would only double the
file.

Metadata: one key, `alvts`, with a JSON object (safetensors writes several keys in random order, and
the same calibration must give the same bytes). Nothing is ever unpickled.
"""

import json
import os
import warnings
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, TypeAdapter, model_validator
from safetensors.torch import load, save
from torch import Tensor

from .engine.attaching import Selector
from .engine.carry import Carry
from .engine.keep import resolve_keep
from .engine.paper import PaperSelector
from .engine.policy import Picked, Policy
from .engine.scoring import LayerSelector
from .engine.sizes import PLACES
from .errors import AlvtsError
from .families import family_of
from .families.layer import is_quantised, parts_of
from .files import open_regular, write_whole
from .schema import Count, Finite, Record, Whole, check, parse_json

FORMAT = 4
"""Raised when an older alvts would misread the file. A new key it may ignore is no reason.

1 had one schedule in the place of several; 1 and 2 had selectors of the paper's form; 3 had no
policies: each layer chooses the most important tokens. All are read as what they are."""

FORMS = {"alvts": LayerSelector, "paper": PaperSelector}
"""Forms of selectors by their names in the file."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What tensors may be in."""

_VALUES = 16
"""Values of each weight in the fingerprint."""


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
    """

    keep: float
    policy: Policy
    loss: float
    same: float


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
    """

    data: str
    fitted: Count
    held_out: Count
    sample_ids: str
    settings: dict[str, bool | Whole | Finite | str | None]
    versions: dict[str, str]
    layers: tuple[LayerFit, ...]
    trials: tuple["Trial", ...] = ()

    @property
    def mean(self) -> LayerFit:
        """The mean over layers."""
        count = len(self.layers)
        return LayerFit(
            *(sum(getattr(fit, f.name) for fit in self.layers) / count for f in fields(LayerFit))
        )


@dataclass(frozen=True, eq=False)
class Artifact:
    """The fitted selectors of one model; what `attach` takes.

    Attributes:
        layers: one selector per decoder layer, on the CPU.
        default_keep: ratio used when the user names none.
        schedules: ways of spending a layer average over the layers (see `engine.keep`); none where
            every layer is to keep the same.
        model_id: hub id, name or folder of the base model.
        revision: its commit on the hub, where known.
        family: name of the architecture.
        fingerprint: float32 `[L, 2, 16]`, some values of every query and key projection.
        calibration: where all this comes from.
        carries: one per layer, on the CPU; none where nothing is to be carried.
        picked: the policy for each keep ratio that was tried, ascending; none where every layer is
            to choose the most important tokens.
        visual_tokens: of a calibration sample, the median: what a number of tokens is a share of.
        other_weights: whether the model it is used on has other weights than that which it was
            fitted for; see `check_model`. Not in the file.
    """

    layers: tuple[Selector, ...]
    default_keep: float
    schedules: tuple[tuple[float, ...], ...]
    model_id: str
    revision: str | None
    family: str
    fingerprint: Tensor
    calibration: CalibrationRecord
    carries: tuple[Carry, ...] = ()
    picked: tuple[Picked, ...] = ()
    visual_tokens: int = 0
    other_weights: bool = False

    @property
    def rank(self) -> int:
        """`R`."""
        return self.layers[0].rank

    @property
    def hidden_size(self) -> int:
        """`D`."""
        return self.layers[0].width

    @property
    def paper(self) -> bool:
        """Whether the selectors are of the paper's form."""
        return isinstance(self.layers[0], PaperSelector)

    @property
    def dtype(self) -> torch.dtype:
        """Of the large tensors."""
        return next(iter(self.layers[0].tensors().values())).dtype

    @classmethod
    def from_pretrained(cls, named: str | Path, revision: str | None = None) -> "Artifact":
        """Selectors from a file, a folder, or a repo of the hub.

        Args:
            named: as `--selectors` takes it: a path, `user/repo[@revision]`, `hf://...`.
            revision: of the repo, where `named` has none.

        Raises:
            AlvtsError: they cannot be had, or the file is damaged.
        """
        from .hub import selectors_file

        return load_artifact(selectors_file(str(named) + (f"@{revision}" if revision else "")))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `selectors.safetensors` into a folder, which is made if it is not there.

        In the folder of a model, alvts finds them by itself.

        Raises:
            AlvtsError: it cannot be written.
        """
        from .hub import FILE

        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AlvtsError(f"cannot make {folder}: {error.strerror or error}") from error
        save_artifact(self, Path(folder) / FILE)

    def check_model(
        self, model: Any, model_id: str | None = None, other_weights: bool = False
    ) -> "Artifact":
        """Refuse any other model than the one the selectors were fitted for.

        The same weights in another float dtype pass, and so do they quantised.

        Args:
            model: a loaded model.
            model_id: its name, for the message.
            other_weights: let weights of the same shapes pass, such as a fine-tuned model's.

        Returns:
            The artifact, with `other_weights` set where they are others.

        Raises:
            AlvtsError: another model; an unknown architecture; quantised or offloaded weights.
        """
        name = model_id or getattr(model.config, "_name_or_path", "") or "this model"
        mine = f"{len(self.layers)} layers of width {self.hidden_size}"
        family = family_of(model)
        config: Any = family.text_model(model).config
        its = f"{len(family.layers(model))} layers of width {config.hidden_size}"
        made_for = f"the selectors were made for {self.model_id}"
        if its != mine:
            raise AlvtsError(f"{made_for} ({mine}), not for {name} ({its})")
        if not _same(fingerprint(model), self.fingerprint, quantised(model)):
            if other_weights:
                return replace(self, other_weights=True)
            raise AlvtsError(
                f"{made_for}; the weights of {name} are others: fit selectors for it with alvts "
                "calibrate, or use these as they are with --other-weights"
            )
        return self


def quantised(model: Any) -> bool:
    """Whether the decoder's projections are quantised."""
    return is_quantised(parts_of(family_of(model).layers(model)[0]).key)


def _same(values: Tensor, wanted: Tensor, rounded: bool) -> bool:
    """Whether two fingerprints are of the same weights, in another float dtype or `rounded`."""
    if values.shape != wanted.shape:
        return False
    if rounded:
        # 4 bits are off by up to a quarter of a layer's values, other weights by more than all.
        off = (values - wanted).square().sum(dim=(1, 2))
        return bool((off <= 0.3 * wanted.square().sum(dim=(1, 2))).all())
    # bfloat16 rounds by up to 0.4 %; float16 by 3e-8 where values are tiny.
    return torch.allclose(values, wanted, rtol=0.01, atol=1e-6)


def fingerprint(model: Any) -> Tensor:
    """float32 `[L, 2, 16]` on the CPU: values at even strides of every layer's W_q and W_k.

    Raises:
        AlvtsError: an unknown architecture; weights that cannot be read.
    """
    family = family_of(model)
    rows = []
    for layer in family.layers(model):
        projections = family.query_key(layer)
        for weight in (projections.w_q, projections.w_k):
            if weight.is_meta:
                raise AlvtsError("part of the model is offloaded; load it whole")
            flat = weight.detach().flatten()
            index = torch.linspace(0, flat.numel() - 1, _VALUES, dtype=torch.float64).long()
            rows.append(flat[index.to(flat.device)].float().cpu())
    return torch.stack(rows).unflatten(0, (-1, 2))


def save_artifact(artifact: Artifact, path: Path) -> None:
    """Write the file, whole or not at all.

    Raises:
        AlvtsError: a value is not finite, or the file cannot be written.
    """
    tensors = {"fingerprint": artifact.fingerprint}
    for i, selector in enumerate(artifact.layers):
        tensors |= pack_layer(f"layers.{i}.", selector)
    for i, carry in enumerate(artifact.carries):
        tensors |= {f"carry.{i}.down": carry.down, f"carry.{i}.up": carry.up}
    _check_finite(tensors, path)
    record = artifact.calibration
    metadata = {
        "format": FORMAT,
        "form": "paper" if artifact.paper else "alvts",
        "model": artifact.model_id,
        "revision": artifact.revision,
        "family": artifact.family,
        "num_layers": len(artifact.layers),
        "hidden_size": artifact.hidden_size,
        "rank": artifact.rank,
        "default_keep": artifact.default_keep,
        "schedules": artifact.schedules,
        "carry_rank": artifact.carries[0].down.shape[0] if artifact.carries else 0,
        "picked": [asdict(one) for one in artifact.picked],
        "visual_tokens": artifact.visual_tokens,
        "norm_eps": [selector.eps for selector in artifact.layers],
        # The means are stored for readers of the file that are not alvts.
        "calibration": {**asdict(record), "mean": asdict(record.mean)},
    }
    text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    write_whole(path, save(tensors, metadata={"alvts": text}))


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and check a file. Its tensors are copies: the file is neither mapped nor locked.

    Raises:
        AlvtsError: no such file, not safetensors, cut short, not ours, another format, missing or
            misshapen tensors, values that are not finite.
    """
    path = Path(path)
    data = _read(path)
    metadata = _metadata(data, path)
    try:
        tensors = load(data)
    # Whatever safetensors and torch raise for a header that contradicts itself.
    except Exception as error:
        raise AlvtsError(f"{path} is damaged: {_first_line(error)}") from error
    layers = tuple(
        _unpack_checked(tensors, i, eps, metadata, path) for i, eps in enumerate(metadata.norm_eps)
    )
    carries = _carries(tensors, metadata, path)
    values = tensors.pop("fingerprint", None)
    if values is None or values.shape != (len(layers), 2, _VALUES) or values.dtype not in _FLOATS:
        raise AlvtsError(f"{path} is incomplete: its fingerprint is missing or misshapen")
    _check_finite({"fingerprint": values}, path)
    unknown = sorted((*metadata.unknown, *tensors))
    if unknown:
        warnings.warn(
            f"{path} holds things this alvts does not know: {', '.join(unknown)}", stacklevel=2
        )
    return Artifact(
        layers=layers,
        default_keep=metadata.default_keep,
        schedules=tuple(tuple(map(float, ratios)) for ratios in metadata.schedules),
        model_id=metadata.model,
        revision=metadata.revision,
        family=metadata.family,
        fingerprint=values.float(),
        calibration=metadata.calibration,
        carries=carries,
        picked=metadata.picked,
        visual_tokens=metadata.visual_tokens,
    )


def pack_layer(prefix: str, selector: Selector) -> dict[str, Tensor]:
    """A layer's tensors under their names in the file."""
    return {
        f"{prefix}{name}": tensor.detach().cpu().contiguous()
        for name, tensor in selector.tensors().items()
    }


def unpack_layer(prefix: str, tensors: dict[str, Tensor], eps: float, form: str) -> Selector:
    """The inverse of `pack_layer`; takes the tensors out of `tensors`.

    Args:
        prefix: of their names.
        tensors: by name.
        eps: of the layer's input RMSNorm.
        form: one of `FORMS`.

    Raises:
        KeyError: one of them, other than the bias and the norm, is not there.
    """
    if form == "paper":
        return PaperSelector(
            query=tensors.pop(f"{prefix}query"),
            key=tensors.pop(f"{prefix}key"),
            query_bias=tensors.pop(f"{prefix}query_bias", None),
            eps=eps,
        )
    return LayerSelector(
        down=tensors.pop(f"{prefix}down"),
        up=tensors.pop(f"{prefix}up"),
        key_bias=tensors.pop(f"{prefix}key_bias", None),
        inner=tensors.pop(f"{prefix}inner"),
        outer=tensors.pop(f"{prefix}outer"),
        eps=eps,
        key_norm=tensors.pop(f"{prefix}key_norm", None),
    )


def _metadata(data: bytes, path: Path) -> "_Metadata":
    """The checked metadata of a safetensors file: length (8 bytes), JSON header, tensors."""
    length = int.from_bytes(data[:8], "little")
    body = data[8:]
    if len(body) < length:
        raise AlvtsError(f"{path} is cut short; copy or make it again")
    try:
        header = parse_json(body[:length])
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
    except ValueError as error:
        raise AlvtsError(f"{path} is not a safetensors file: {error}") from None
    texts = check(_TEXTS, header.pop("__metadata__", {}), f"the header of {path}")
    entries = check(_ENTRIES, header, f"the header of {path}")
    if len(body) - length < max((entry.data_offsets[1] for entry in entries.values()), default=0):
        raise AlvtsError(f"{path} is cut short; copy or make it again")
    if "alvts" not in texts:
        raise AlvtsError(f"{path} is a safetensors file but does not hold alvts selectors")
    about = f"the metadata of {path}"
    try:
        metadata = parse_json(texts["alvts"])
    except ValueError as error:
        raise AlvtsError(f"{about} is not JSON: {error}") from None
    version = check(_Version, metadata, about).format
    if version > FORMAT:
        raise AlvtsError(
            f"{path} has format {version}, this alvts reads up to {FORMAT}; upgrade alvts"
        )
    return check(_Metadata, _as_newest(metadata, version, path), about)


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


class _Entry(Record):
    """What the header says of a tensor."""

    dtype: str
    shape: tuple[Count, ...]
    data_offsets: tuple[Count, Count]


_TEXTS: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])
_ENTRIES = TypeAdapter(dict[str, _Entry])


class _Version(Record):
    """The one part of the metadata that every format has."""

    format: Annotated[int, Field(ge=1, le=2**53)]


class _Metadata(Record):
    """The metadata of a file of the newest format."""

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

    @property
    def unknown(self) -> tuple[str, ...]:
        """Names that this alvts does not know."""
        return tuple(self.model_extra or ())

    @model_validator(mode="after")
    def _fits_together(self) -> "_Metadata":
        """
        Raises:
            AlvtsError: parts that do not go with each other.
        """
        layers = self.num_layers
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


def _carries(tensors: dict[str, Tensor], metadata: _Metadata, path: Path) -> tuple[Carry, ...]:
    """The carried updates, taken out of `tensors`; none where their rank is 0.

    Raises:
        AlvtsError: one is missing, misshapen or not finite.
    """
    rank, width = metadata.carry_rank, metadata.hidden_size
    found = []
    for i, eps in enumerate(metadata.norm_eps if rank else ()):
        pair = {}
        for name, shape in (("down", (rank, width)), ("up", (width, rank))):
            tensor = tensors.pop(f"carry.{i}.{name}", None)
            if tensor is None:
                raise AlvtsError(f"{path} is incomplete: it lacks the tensor 'carry.{i}.{name}'")
            if tensor.shape != shape or tensor.dtype not in _FLOATS:
                raise AlvtsError(
                    f"{path} is damaged: carry.{i}.{name} is {tensor.dtype} "
                    f"{list(tensor.shape)}, not floats {list(shape)}"
                )
            pair[f"carry.{i}.{name}"] = tensor
        _check_finite(pair, path)
        found.append(Carry(pair[f"carry.{i}.down"], pair[f"carry.{i}.up"], eps))
    return tuple(found)


def _unpack_checked(
    tensors: dict[str, Tensor], i: int, eps: float, metadata: _Metadata, path: Path
) -> Selector:
    prefix = f"layers.{i}."
    try:
        selector = unpack_layer(prefix, tensors, eps, metadata.form)
    except KeyError as error:
        raise AlvtsError(f"{path} is incomplete: it lacks the tensor {error}") from None
    rank, width = metadata.rank, metadata.hidden_size
    shapes: dict[str, tuple[int, ...]]
    if isinstance(selector, PaperSelector):
        shapes = {"query": (rank, width), "key": (rank, width), "query_bias": (rank,)}
    else:
        # Of a damaged file they may have no dimension at all.
        keys, units = (sum(tensor.shape[:1]) for tensor in (selector.up, selector.inner))
        norm = selector.key_norm
        # Each head's; all that a file alone can tell is that it divides the keys.
        head = sum(norm.shape[:1]) if norm is not None else keys
        shapes = {
            "down": (rank, width),
            "up": (keys, rank),
            "key_bias": (keys,),
            "inner": (units, rank + PLACES + 1),
            "outer": (units + PLACES,),
            "key_norm": (head if head and keys % head == 0 else keys,),
        }
    named = pack_layer(prefix, selector)
    for name, tensor in named.items():
        expected = shapes[name.removeprefix(prefix)]
        if tensor.shape != expected or tensor.dtype not in _FLOATS:
            raise AlvtsError(
                f"{path} is damaged: {name} is {tensor.dtype} {list(tensor.shape)}, "
                f"not floats {list(expected)}"
            )
    _check_finite(named, path)
    return selector


def _read(path: Path) -> bytes:
    """All of the file, but of another kind only as much as shows that."""
    with open_regular(path, "selector file") as file:
        try:
            start = file.read(9)
            if len(start) < 9 or start[8:] != b"{" or start[6:8] != b"\0\0":
                raise AlvtsError(f"{path} is not a safetensors file")
            return start + file.read()
        except OSError as error:
            raise AlvtsError(f"cannot read {path}: {error.strerror or error}") from error


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AlvtsError(f"{path}: the tensor {name} holds values that are not finite")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
