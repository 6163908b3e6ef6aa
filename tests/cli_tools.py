"""Running the commands on a small saved model: the untrained pocket, with random selectors."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from alvts_cli.artifact import Artifact, fingerprint, save_artifact
from alvts_cli.bench.selectors import random_selectors
from alvts_cli.cli import app
from alvts_cli.header import CalibrationRecord, LayerFit
from alvts_cli.pocket.build import make_model, make_processor
from alvts_cli.pocket.scenes import make_scene, render, seed_of

torch.set_num_threads(1)

DEPTH = 4
"""Layers of the model, of 16 that pocket has: a command takes its time by the layer."""

# Kept for the life of the process: removed with it.
_FOLDER = tempfile.TemporaryDirectory(prefix="alvts-tests-")


def alvts(*args: object) -> Any:
    """Run a command line in this process; the result has `exit_code`, `stdout` and `stderr`."""
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(*args: object, code: int = 1) -> str:
    """The one line of a command line that must fail, and print nothing else."""
    result = alvts(*args)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


@cache
def model_folder(seed: int = 0, depth: int = DEPTH) -> Path:
    """An untrained pocket in float32 with its processor and `selectors.safetensors`, cut to so many
    layers.

    Every branch of the untrained model ends in zeros, which would make all methods answer alike:
    here they are filled.
    """
    folder = Path(_FOLDER.name) / f"model{seed}-{depth}"
    model = make_model(seed).eval()
    text: Any = model.model.language_model
    text.layers = text.layers[:depth]
    model.config.text_config.num_hidden_layers = depth
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.normal_(std=0.1)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    layers = tuple(random_selectors(model).layers)
    fit = LayerFit(loss_before=1.0, loss_after=0.5, recall_before=0.25, recall_after=0.75)
    save_artifact(
        Artifact(
            layers=layers,
            default_keep=0.25,
            schedules=(),
            model_id="tiny",
            revision=None,
            family="LLaVA",
            fingerprint=fingerprint(model),
            calibration=CalibrationRecord(
                data="nothing",
                fitted=3,
                held_out=1,
                sample_ids="abc",
                settings={"seed": 0},
                versions={"torch": "0"},
                layers=(fit,) * len(layers),
            ),
        ),
        folder / "selectors.safetensors",
    )
    return folder


@cache
def scene_file() -> Path:
    """A rendered scene."""
    path = Path(_FOLDER.name) / "scene.png"
    render(make_scene(seed_of("test", 0))).save(path)
    return path
