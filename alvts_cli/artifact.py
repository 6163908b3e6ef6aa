"""The file that calibration writes and every other command reads: one `.safetensors`.

Tensors: `layers.{i}.` with `down`, `up` and, where the model's keys have them, `key_bias` and
`key_norm` (see `engine.scoring.LayerSelector`), or in the paper's form `query`, `key` and, where
the model's queries have one, `query_bias` (see `engine.paper.PaperSelector`);
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
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load, save
from torch import Tensor

from .engine.carry import Carry
from .engine.paper import PaperSelector
from .engine.placing import Selector
from .engine.policy import Picked
from .engine.scoring import LayerSelector
from .errors import AlvtsError
from .families import check_whole, family_of
from .families.layer import is_quantised, parts_of
from .files import make_folder, open_regular, write_whole
from .header import FORMAT, VALUES, CalibrationRecord, take_header

FORMS = {"alvts": LayerSelector, "paper": PaperSelector}
"""Forms of selectors by their names in the file."""


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
            AlvtsError: no folder is named, it cannot be made, or what `save_artifact` refuses.
        """
        from .hub import FILE

        place = _path(folder, "folder")
        data = _packed(self, place / FILE)
        make_folder(place)
        write_whole(place / FILE, data)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Artifact":
        """The same, its tensors there and in that precision."""
        return replace(
            self,
            layers=tuple(layer.to(device, dtype) for layer in self.layers),
            carries=tuple(carry.to(device, dtype) for carry in self.carries),
        )

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
            AlvtsError: another model, or a part of one; an unknown architecture; weights that
                cannot be read.
        """
        check_whole(model)
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
    """Whether the decoder's projections are quantised.

    Raises:
        AlvtsError: an unknown architecture, or a part of a model.
    """
    check_whole(model)
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
        AlvtsError: an unknown architecture; a part of a model; weights that cannot be read.
    """
    check_whole(model)
    family = family_of(model)
    rows = []
    for layer in family.layers(model):
        projections = family.query_key(layer)
        for weight in (projections.w_q, projections.w_k):
            flat = weight.detach().flatten()
            index = torch.linspace(0, flat.numel() - 1, VALUES, dtype=torch.float64).long()
            rows.append(flat[index.to(flat.device)].float().cpu())
    return torch.stack(rows).unflatten(0, (-1, 2))


def _path(name: Any, what: str) -> Path:
    """
    Raises:
        AlvtsError: it is none. Nor is an empty name, as of a variable that is not set, which would
            be the current folder.
    """
    if not isinstance(name, str | os.PathLike) or name == "":
        raise AlvtsError(f"name a {what} of selectors, not {name!r}")
    return Path(name)


def save_artifact(artifact: Artifact, path: str | os.PathLike[str]) -> None:
    """Write the file, whole or not at all.

    Raises:
        AlvtsError: `load_artifact` would refuse it, or it cannot be written.
    """
    path = _path(path, "file")
    write_whole(path, _packed(artifact, path))


def _packed(artifact: Artifact, path: Path) -> bytes:
    """The bytes of the file, which were read back.

    Args:
        artifact: may hold anything: whoever makes one by hand is told here what is wrong with it.
        path: of the file, for messages.

    Raises:
        AlvtsError: it cannot be packed, or what was packed cannot be read.
    """
    refused = "these selectors cannot be saved"
    try:
        data = _pack(artifact)
        _, unknown = _read(BytesIO(data), path)
    except AlvtsError as error:
        raise AlvtsError(f"{refused}: {error}") from None
    # Whatever the parts of an Artifact raise where they are something else than it says.
    except Exception as error:
        why = f"{type(error).__name__}: {_first_line(error)}"
        raise AlvtsError(f"{refused}: a part is not what Artifact says of it ({why})") from error
    if unknown:
        raise AlvtsError(f"{refused}: {unknown}")
    return data


def _pack(artifact: Artifact) -> bytes:
    """
    Raises:
        AlvtsError: not one selector in every layer, all of one form; a number that is not finite.
    """
    layers = artifact.layers
    forms = [name for name, of in FORMS.items() if all(isinstance(one, of) for one in layers)]
    if not (layers and forms):
        raise AlvtsError(
            "every layer needs a selector, all LayerSelector or all PaperSelector, and there must "
            "be at least one layer"
        )
    tensors = {"fingerprint": _plain(artifact.fingerprint)}
    for i, selector in enumerate(artifact.layers):
        tensors |= pack_layer(f"layers.{i}.", selector)
    for i, carry in enumerate(artifact.carries):
        tensors |= {f"carry.{i}.down": _plain(carry.down), f"carry.{i}.up": _plain(carry.up)}
    record = artifact.calibration
    metadata = {
        "format": FORMAT,
        "form": forms[0],
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
    try:
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
    except ValueError:
        raise AlvtsError(
            "default_keep, schedules, picked, calibration or a layer's eps holds a number that is "
            "not finite"
        ) from None
    return save(tensors, metadata={"alvts": text})


def load_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Read and check a file. Its tensors are copies: the file is neither mapped nor locked.

    Raises:
        AlvtsError: no such file, not safetensors, cut short, not ours, another format, missing or
            misshapen tensors, values that are not finite.
    """
    path = _path(path, "file")
    with open_regular(path, "selector file") as file:
        artifact, unknown = _read(file, path)
    if unknown:
        warnings.warn(unknown, stacklevel=2)
    return artifact


def _read(file: BinaryIO, path: Path) -> tuple[Artifact, str]:
    """The artifact of a file that is open at its start, and a warning about what in it is unknown,
    or ""; the errors of `load_artifact`."""
    header = take_header(file, path)
    metadata = header.metadata
    try:
        file.seek(0)
        tensors = load(file.read())
    # Whatever safetensors and torch raise for a header that contradicts itself.
    except Exception as error:
        raise AlvtsError(f"{path} is damaged: {_first_line(error)}") from error
    _check_finite(tensors, path)
    layers = tuple(
        unpack_layer(f"layers.{i}.", tensors, eps, metadata.form)
        for i, eps in enumerate(metadata.norm_eps)
    )
    carries = tuple(
        Carry(tensors[f"carry.{i}.down"], tensors[f"carry.{i}.up"], eps)
        for i, eps in enumerate(metadata.norm_eps if metadata.carry_rank else ())
    )
    artifact = Artifact(
        layers=layers,
        default_keep=metadata.default_keep,
        schedules=tuple(tuple(map(float, ratios)) for ratios in metadata.schedules),
        model_id=metadata.model,
        revision=metadata.revision,
        family=metadata.family,
        fingerprint=tensors["fingerprint"].float(),
        calibration=metadata.calibration,
        carries=carries,
        picked=metadata.picked,
        visual_tokens=metadata.visual_tokens,
    )
    return artifact, header.unknown_names(path) if header.unknown else ""


def pack_layer(prefix: str, selector: Selector) -> dict[str, Tensor]:
    """A layer's tensors under their names in the file."""
    return {f"{prefix}{name}": _plain(tensor) for name, tensor in selector.tensors().items()}


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
        eps=eps,
        key_norm=tensors.pop(f"{prefix}key_norm", None),
    )


def _plain(tensor: Tensor) -> Tensor:
    """As safetensors takes it: contiguous, and sharing no memory with another one."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _check_finite(tensors: dict[str, Tensor], path: Path) -> None:
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise AlvtsError(f"{path}: the tensor {name} holds values that are not finite")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
