"""Models whose weights are kept elsewhere, or shared out among processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_artifact import make_artifact
from test_families import generated, selectors_for
from zoo import make_zoo_model, zoo_inputs

from alvts_cli import AlvtsError, attach
from alvts_cli.artifact import fingerprint
from alvts_cli.families.placing import check_placing, input_device

accelerate = pytest.importorskip("accelerate")

CPU = torch.device("cpu")
KIND = "qwen3_vl"
"""With norms of queries and keys, and features added behind layers."""


def saved(folder: Path) -> Path:
    make_zoo_model(KIND).save_pretrained(folder)
    return folder


def load(folder: Path, **more: Any) -> Any:
    auto: Any = transformers.AutoModelForImageTextToText
    return auto.from_pretrained(folder, **more).eval()


def answers(model: Any, selectors: Any, keep: float) -> list[torch.Tensor]:
    inputs = zoo_inputs(make_zoo_model(KIND), KIND)
    with torch.no_grad(), attach(model, selectors, keep):
        return list(generated(model, inputs).logits)


@pytest.mark.parametrize("keep", [1.0, 0.25])
def test_a_model_offloaded_to_memory_answers_as_ever(keep):
    plain = make_zoo_model(KIND)
    selectors = selectors_for(plain)
    moved = accelerate.cpu_offload(make_zoo_model(KIND), execution_device=CPU)
    assert all(weight.is_meta for weight in moved.model.language_model.parameters())
    for ours, own in zip(
        answers(moved, selectors, keep), answers(plain, selectors, keep), strict=True
    ):
        assert torch.equal(ours, own)
    assert torch.equal(fingerprint(moved), fingerprint(plain))
    artifact = make_artifact(layers=tuple(selectors.layers), fingerprint=fingerprint(plain))
    assert not artifact.check_model(moved).other_weights
    assert input_device(moved) == CPU
    # Fetched weights are gone again.
    assert all(weight.is_meta for weight in moved.model.language_model.parameters())
    with pytest.raises(AlvtsError, match="attach without compile"):
        attach(moved, selectors, keep, compile=True)


def test_a_device_map_of_its_own_choice(tmp_path):
    model = load(saved(tmp_path), device_map="auto")
    plain = make_zoo_model(KIND)
    selectors = selectors_for(plain)
    for ours, own in zip(
        answers(model, selectors, 0.25), answers(plain, selectors, 0.25), strict=True
    ):
        torch.testing.assert_close(ours, own)


def test_a_model_on_a_disk_is_refused(tmp_path):
    moved = accelerate.disk_offload(make_zoo_model(KIND), tmp_path, execution_device=CPU)
    with pytest.raises(AlvtsError, match="offloaded to a disk"):
        attach(moved, selectors_for(make_zoo_model(KIND)), 0.25)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = make_zoo_model(KIND)
    with pytest.raises(AlvtsError, match="no weights"):
        check_placing(model)


SCRIPT = """
import os, sys
from pathlib import Path
import torch, transformers
from alvts_cli import AlvtsError, attach
from alvts_cli.bench.selectors import random_selectors

torch.distributed.init_process_group("gloo")
auto = transformers.AutoModelForImageTextToText
selectors = random_selectors(auto.from_pretrained(sys.argv[1]))
model = auto.from_pretrained(sys.argv[1], tp_plan="auto")
try:
    attach(model, selectors, 0.25)
    said = "attached"
except AlvtsError as error:
    said = str(error)
Path(sys.argv[2], os.environ["RANK"]).write_text(said)
torch.distributed.destroy_process_group()
"""


def test_a_model_shared_out_among_two_processes_is_refused_by_both(tmp_path):
    folder, said, script = saved(tmp_path / "model"), tmp_path / "said", tmp_path / "script.py"
    said.mkdir()
    script.write_text(SCRIPT)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [sys.executable, *launch, str(script), str(folder), str(said)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    lines = [path.read_text() for path in said.iterdir()]
    assert len(lines) == 2
    assert all(line.startswith("tensor parallelism (tp_plan)") for line in lines), lines
