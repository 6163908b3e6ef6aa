"""Finished layers on disk, so that an interrupted run loses at most the layer it was in.

What comes after the last layer, the carried updates and the trials of policies, begins anew.

A folder beside the output holds `run.json`, the settings and data that the layers were made with,
and one safetensors file a layer. Hidden states are not saved: running the finished layers again
takes a small part of the time that fitting them took, and would fill gigabytes on disk.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from alvts_cli.artifact import pack_layer, unpack_layer
from alvts_cli.engine import PaperSelector, Selector
from alvts_cli.errors import AlvtsError
from alvts_cli.files import read_text, write_whole
from alvts_cli.header import LayerFit
from alvts_cli.schema import parse_json


@dataclass(frozen=True)
class LayerResult:
    """A fitted layer: the selector on the CPU as it goes into the artifact, and how good it is."""

    selector: Selector
    fit: LayerFit


class Checkpoint:
    """The folder `<output>.partial`. It is made with the first finished layer.

    Attributes:
        found: whether there was something to go on with.
        taken: layers that were taken from before, so far.
    """

    def __init__(self, output: Path, resume: bool) -> None:
        """
        Raises:
            AlvtsError: an earlier run was interrupted, and is not to be resumed.
        """
        self.folder = output.with_name(f"{output.name}.partial")
        self._run: dict[str, Any] = {}
        if self.folder.exists() and not resume:
            raise AlvtsError(
                f"{self.folder} holds an unfinished run; go on with --resume, or delete the folder"
            )
        self.found = self.folder.exists()
        self.taken = 0

    def begin(self, run: dict[str, Any]) -> None:
        """Say what this run is made of.

        Raises:
            AlvtsError: the layers on disk are of another run.
        """
        self._run = json.loads(json.dumps(run))
        if not self.folder.exists():
            return
        try:
            before = parse_json(read_text(self.folder / "run.json"))
        except (AlvtsError, ValueError):
            before = None
        if not isinstance(before, dict):
            raise AlvtsError(f"{self.folder} is not an unfinished run; delete it")
        differing = [key for key in self._run if before.get(key) != self._run[key]]
        if differing:
            raise AlvtsError(
                f"cannot resume {self.folder}: it was made with other {', '.join(differing)}; "
                "run with the same options, or delete the folder"
            )

    def load(self, layer: int) -> LayerResult | None:
        """A layer that was finished before, or None.

        Raises:
            AlvtsError: its file is damaged.
        """
        path = self._path(layer)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                told = parse_json(file.metadata()["layer"])
                names = file.keys()
                # Clones: the file is deleted while they are in use.
                tensors = {name: file.get_tensor(name).clone() for name in names}
            result = LayerResult(
                unpack_layer("", tensors, told["eps"], told["form"]),
                LayerFit(**told["fit"]),
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            raise AlvtsError(f"{path} is damaged; delete it to fit that layer again") from None
        self.taken += 1
        return result

    def save(self, layer: int, result: LayerResult) -> None:
        """Keep a finished layer.

        Raises:
            AlvtsError: the folder cannot be written.
        """
        if not (self.folder / "run.json").exists():
            try:
                # Another process may be making it.
                self.folder.mkdir(exist_ok=True)
            except OSError as error:
                raise AlvtsError(f"cannot make {self.folder}: {error.strerror}") from error
            write_whole(self.folder / "run.json", json.dumps(self._run).encode())
        told = json.dumps(
            {
                "eps": result.selector.eps,
                "form": "paper" if isinstance(result.selector, PaperSelector) else "alvts",
                "fit": asdict(result.fit),
            }
        )
        data = save(pack_layer("", result.selector), metadata={"layer": told})
        write_whole(self._path(layer), data)

    def remove(self) -> None:
        """The output is written; the layers are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:03}.safetensors"
