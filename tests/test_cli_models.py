import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from cli_tools import alvts, model_folder, refused, scene_file

from alvts_cli import AlvtsError, models
from alvts_cli.models import load_model


def run_with(model, *more):
    return ("run", "--image", scene_file(), "--prompt", "color?", "--model", model, *more)


def test_models_lists_names_hub_ids_and_families():
    result = alvts("models")
    assert result.exit_code == 0
    for name, known in models.KNOWN.items():
        assert name in result.stdout and known.hub_id in result.stdout
    assert "Qwen2.5-VL" in result.stdout


def test_info_prints_an_artifact():
    result = alvts("info", model_folder() / "selectors.safetensors")
    assert result.exit_code == 0
    for word in ("tiny", "4 layers, rank 24", "0.25", "3 fitted, 1 held out", "mean", "0.750"):
        assert word in result.stdout


def test_info_of_something_else_is_one_line(tmp_path):
    refused("info", tmp_path / "nothing")
    refused("info", tmp_path)
    refused("info", model_folder() / "model.safetensors")


@pytest.mark.parametrize("name", ["llava-1.5-8b", "./nowhere", "a/b/c", "/", ""])
def test_an_unknown_model_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(*run_with(name))
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_line_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise socket.gaierror("no network")

    monkeypatch.setattr(models, "cached_folder", lambda hub_id: None)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    line = refused(*run_with("llava-1.5-7b"))
    assert "llava-hf/llava-1.5-7b-hf" in line and "HF_HOME" in line and "--model" in line


def _no_config(folder: Path):
    (folder / "config.json").unlink()


def _broken_config(folder: Path):
    (folder / "config.json").write_text("{")


def _other_architecture(folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))


def _invented_architecture(folder: Path):
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))


def _no_weights(folder: Path):
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def _no_processor(folder: Path):
    (folder / "processor_config.json").unlink()


def _fewer_weights(folder: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.3" in name)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [
        _no_config,
        _broken_config,
        _other_architecture,
        _invented_architecture,
        _no_weights,
        _cut_weights,
        _no_processor,
        _fewer_weights,
    ],
)
def test_a_damaged_model_folder_is_one_line(damage, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    damage(folder)
    refused(*run_with(folder, "--dense"))


def test_a_file_as_a_model_is_one_line():
    assert "is a file" in refused(*run_with(scene_file()))


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "abacus", "meta"])
def test_a_device_that_is_not_there_is_one_line(device):
    if device.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "cannot be used" in refused(*run_with(model_folder(), "--device", device))


def test_a_small_model_is_loaded_in_float32_unless_asked():
    assert load_model(str(model_folder())).dtype == torch.float32
    assert load_model(str(model_folder()), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(AlvtsError, match="dtype must be one of"):
        load_model(str(model_folder()), dtype="int8")


def test_a_model_that_does_not_fit_is_one_line(monkeypatch):
    monkeypatch.setattr("alvts_cli.memory.memory_free", lambda device: 1000)
    assert "needs about" in refused(*run_with(model_folder()))
