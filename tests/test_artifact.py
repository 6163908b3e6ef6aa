"""The selector file: what goes in comes out, and every damage has its own line."""

import json
import os
import struct
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from tiny import LAYERS, WIDTH, make_inputs, make_model, one_image

from alvts_cli import AlvtsError, attach
from alvts_cli.artifact import Artifact, fingerprint, load_artifact, quantised, save_artifact
from alvts_cli.engine import PAPER, Carry, LayerSelector, PaperSelector, Picked, Policy
from alvts_cli.engine.paper import paper_importance
from alvts_cli.files import check_writable
from alvts_cli.header import CalibrationRecord, LayerFit, Trial

RANK, KEYS = 5, 16
POLICY = Policy(every=2, quality=0.3, mass=True, carry=True)


@cache
def _fingerprint(family: str) -> torch.Tensor:
    return fingerprint(make_model(family))


def make_artifact(family: str = "qwen2_5_vl", **changes: Any) -> Artifact:
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    fields: dict[str, Any] = dict(
        layers=tuple(
            LayerSelector(
                down=random(RANK, WIDTH),
                up=random(KEYS, RANK),
                key_bias=random(KEYS),
                eps=1e-6,
            )
            for _ in range(LAYERS)
        ),
        default_keep=0.25,
        schedules=((0.25, 0.0, 0.0, 0.125), (1.0, 0.5, 0.0, 0.25)),
        carries=tuple(Carry(random(2, WIDTH), random(WIDTH, 2), eps=1e-6) for _ in range(LAYERS)),
        picked=(Picked(0.25, POLICY), Picked(0.5, PAPER)),
        visual_tokens=64,
        model_id="org/model",
        revision="abc",
        family="Qwen2.5-VL",
        fingerprint=_fingerprint(family),
        calibration=CalibrationRecord(
            data="some photographs",
            fitted=7,
            held_out=1,
            sample_ids="ff",
            settings={"rank": RANK, "seed": 3},
            versions={"torch": "2"},
            layers=tuple(LayerFit(1.0, 0.1 * i, 0.3, 0.5 + 0.1 * i) for i in range(LAYERS)),
            trials=(Trial(0.25, PAPER, 0.5, 0.75), Trial(0.25, POLICY, 0.25, 1.0)),
        ),
    )
    return Artifact(**{**fields, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    save_artifact(make_artifact(), path)
    return path


def parts(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return load(data), json.loads(header["__metadata__"]["alvts"])


def rewrite(path: Path, tensors: dict[str, torch.Tensor], metadata: Any) -> None:
    path.write_bytes(save(tensors, metadata={"alvts": json.dumps(metadata)}))


def refusal(path: Path) -> str:
    with pytest.raises(AlvtsError) as error:
        load_artifact(path)
    line = str(error.value)
    assert "\n" not in line
    assert str(path) in line
    return line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_goes_in_comes_out(dtype: torch.dtype, tmp_path: Path) -> None:
    made = make_artifact()
    layers = tuple(layer.to(torch.device("cpu"), dtype) for layer in made.layers)
    made = make_artifact(layers=layers)
    save_artifact(made, tmp_path / "a.safetensors")
    found = load_artifact(tmp_path / "a.safetensors")
    assert (found.rank, found.hidden_size) == (RANK, WIDTH)
    same = ("default_keep", "schedules", "model_id", "revision", "family", "picked")
    for name in (*same, "visual_tokens"):
        assert getattr(found, name) == getattr(made, name)
    assert found.calibration == made.calibration
    assert torch.equal(found.fingerprint, made.fingerprint)
    for carry, its_own in zip(found.carries, made.carries, strict=True):
        assert torch.equal(carry.down, its_own.down) and torch.equal(carry.up, its_own.up)
    for one, other in zip(found.layers, made.layers, strict=True):
        assert one.down.dtype == dtype
        mine, its = one.tensors(), other.tensors()
        assert mine.keys() == its.keys() == {"down", "up", "key_bias"}
        for name, tensor in mine.items():
            assert tensor.dtype == its[name].dtype and torch.equal(tensor, its[name])
        assert one.eps == other.eps


def test_without_biases_and_schedules(tmp_path: Path) -> None:
    layers = tuple(replace(layer, key_bias=None) for layer in make_artifact().layers)
    save_artifact(make_artifact(layers=layers, schedules=()), tmp_path / "a.safetensors")
    found = load_artifact(tmp_path / "a.safetensors")
    assert found.schedules == ()
    assert all(layer.key_bias is None for layer in found.layers)


def test_the_mean_is_in_the_metadata(saved: Path) -> None:
    _, metadata = parts(saved)
    assert metadata["calibration"]["mean"]["recall_after"] == pytest.approx(0.65)
    assert load_artifact(saved).calibration.mean.recall_after == pytest.approx(0.65)


def test_the_same_artifact_is_the_same_file(saved: Path, tmp_path: Path) -> None:
    save_artifact(load_artifact(saved), tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == saved.read_bytes()


def test_the_file_can_be_replaced_and_cut_while_loaded(saved: Path) -> None:
    artifact = load_artifact(saved)
    before = artifact.layers[0].down.clone()
    os.truncate(saved, 0)
    assert torch.equal(artifact.layers[0].down, before)


def test_attach_takes_it() -> None:
    model = make_model("qwen2_5_vl")
    with attach(model, make_artifact()) as attachment, torch.no_grad():
        model(**make_inputs(model, one_image("qwen2_5_vl")))
        assert attachment.last is not None
        assert len(set(attachment.last.kept)) == LAYERS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_any_precision_passes(dtype: torch.dtype) -> None:
    make_artifact().check_model(make_model("qwen2_5_vl", dtype=dtype))


def test_another_model_is_refused_by_name() -> None:
    model = make_model("qwen2_5_vl")
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.k_proj.weight.mul_(1.1)
    with pytest.raises(AlvtsError, match=r"made for org/model.*weights of mine are others"):
        make_artifact().check_model(model, "mine")
    wide = make_artifact(
        layers=tuple(replace(layer, down=torch.ones(RANK, 64)) for layer in make_artifact().layers)
    )
    with pytest.raises(AlvtsError, match=r"4 layers of width 64.*mine.*4 layers of width 32"):
        wide.check_model(make_model("qwen2_5_vl"), "mine")
    deep = make_artifact(layers=make_artifact().layers * 2)
    with pytest.raises(AlvtsError, match=r"8 layers of width 32.*4 layers of width 32"):
        deep.check_model(make_model("qwen2_5_vl"))


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    assert "there is no selector file" in refusal(tmp_path / "none.safetensors")
    assert "cannot read" in refusal(tmp_path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04" + bytes(100),
        b"a text file, with words in it",
        bytes(16),
        struct.pack("<Q", 4) + b"{]]}",
        struct.pack("<Q", 8) + b'{"a": 1}',
        struct.pack("<Q", 2) + b"{}",
    ],
)
def test_not_a_selector_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    line = refusal(path)
    words = ("is not a safetensors file", "does not hold alvts selectors", "the header of")
    assert any(one in line for one in words)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.999])
def test_cut_short(share: float, saved: Path) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    assert "is cut short" in refusal(saved)


def test_other_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save({"w": torch.ones(2)}))
    assert "does not hold alvts selectors" in refusal(path)
    path.write_bytes(save({"w": torch.ones(2)}, metadata={"format": "pt"}))
    assert "does not hold alvts selectors" in refusal(path)
    path.write_bytes(save({"w": torch.ones(2)}, metadata={"alvts": "words"}))
    assert "the metadata" in refusal(path)


@pytest.mark.parametrize(
    ("schedules", "words"),
    [
        ([0.25], "'schedules.0'"),
        (["0.25,0.25"], "'schedules.0'"),
        ([[0.5]], "layers"),
        ([[1.5, 1.5]], "keep"),
    ],
)
def test_damaged_schedules(saved: Path, schedules: Any, words: str) -> None:
    tensors, metadata = parts(saved)
    rewrite(saved, tensors, {**metadata, "schedules": schedules})
    assert words in refusal(saved)


BAD_PICKED = [
    [{"keep": 0.1}],
    [{"keep": 0.0, "policy": asdict(POLICY)}],
    [{"keep": 0.1, "policy": {**asdict(POLICY), "every": -1}}],
    [{"keep": 0.1, "policy": {**asdict(POLICY), "every": 1.5}}],
    [{"keep": 0.1, "policy": {**asdict(POLICY), "mass": 1}}],
    [{"keep": 0.1, "policy": {**asdict(POLICY), "quality": "high"}}],
    [{"keep": float("nan"), "policy": asdict(POLICY)}],
    ["once"],
]


@pytest.mark.parametrize("picked", BAD_PICKED)
def test_damaged_policies(saved: Path, picked: Any) -> None:
    tensors, metadata = parts(saved)
    rewrite(saved, tensors, {**metadata, "picked": picked})
    with pytest.raises(AlvtsError, match="metadata"):
        load_artifact(saved)


def test_a_policy_that_carries_needs_something_to_carry_with(saved: Path) -> None:
    tensors, metadata = parts(saved)
    few = {name: value for name, value in tensors.items() if not name.startswith("carry.")}
    rewrite(saved, few, {**metadata, "carry_rank": 0})
    with pytest.raises(AlvtsError, match="a policy carries"):
        load_artifact(saved)
    rewrite(saved, few, metadata)
    with pytest.raises(AlvtsError, match=r"lacks the tensor 'carry\.0\.down'"):
        load_artifact(saved)


def test_another_format(saved: Path) -> None:
    tensors, _ = parts(saved)
    rewrite(saved, tensors, {"format": 6, "unheard": "of"})
    assert "has format 6, this alvts reads up to 5; upgrade" in refusal(saved)


OLD = Path(__file__).parent / "artifacts"
"""Small files written by the alvts of their time, for the tiny LLaVA."""

RANKED = [
    [3, 5, 6, 4, 1, 2, 0],
    [1, 0, 4, 3, 2, 5, 6],
    [2, 4, 1, 3, 5, 0, 6],
    [0, 2, 3, 1, 5, 4, 6],
]
"""How the alvts of formats 1 and 2 ranked the visual tokens below in every layer."""


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_file_of_an_older_format_still_loads_and_runs(number: int) -> None:
    found = load_artifact(OLD / f"format-{number}.safetensors")
    assert found.paper == (number < 3)
    assert found.calibration.fitted == 6 and found.calibration.mean.recall_after == 0.8
    assert bool(found.picked) == bool(found.carries) == (number > 3)
    assert len(found.schedules) == {1: 1, 2: 2, 3: 2, 4: 0, 5: 0}[number]
    model = make_model("llava")
    found.check_model(model)
    with torch.no_grad(), attach(model, found, 0.25) as attachment:
        model(**make_inputs(model, one_image("llava")))
    assert attachment.last is not None and attachment.last.layer_average == 4


@pytest.mark.parametrize("number", [1, 2])
def test_the_papers_selectors_of_old_files_rank_as_they_did(number: int) -> None:
    hidden = torch.randn(
        1, 12, 32, generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    )
    visual = torch.zeros(1, 12, dtype=torch.bool)
    visual[:, 2:9] = True
    for selector, ranked in zip(
        load_artifact(OLD / f"format-{number}.safetensors").layers, RANKED, strict=True
    ):
        assert isinstance(selector, PaperSelector)
        scores = paper_importance(hidden, selector, visual, ~visual, False)
        assert scores[0, 2:9].argsort(descending=True).tolist() == ranked


def test_selectors_without_a_causal_mask_are_refused(tmp_path: Path) -> None:
    tensors, metadata = parts(OLD / "format-2.safetensors")
    rewrite(tmp_path / "a.safetensors", tensors, {**metadata, "causal": False})
    assert "without a causal mask; calibrate again" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", 3),
        ("rank", None),
        ("schedules", [[0.5]]),
        ("schedules", [[0.5, 0.5, 0.5, float("nan")]]),
        ("schedules", [[0.5, 0.5, 0.5, 1]]),
        ("schedules", [[0.5] * 4, [0.25] * 4]),
        ("schedules", 0.5),
        ("default_keep", 0),
        ("default_keep", 2.5),
        ("norm_eps", [1e-6]),
        ("num_layers", 0),
        ("calibration", {"data": "x"}),
    ],
)
def test_metadata_that_makes_no_sense(key: str, value: Any, saved: Path) -> None:
    tensors, metadata = parts(saved)
    rewrite(saved, tensors, {**metadata, key: value})
    assert "metadata" in refusal(saved)
    del metadata[key]
    rewrite(saved, tensors, metadata)
    assert repr(key) in refusal(saved)


def _set(metadata: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for name in parents:
        metadata = metadata[int(name) if isinstance(metadata, list) else name]
    metadata[int(last) if isinstance(metadata, list) else last] = value  # type: ignore[index]


_HUGE = 10**400

_TRIAL = {"keep": 0.5, "policy": {}, "loss": 0.1, "same": 0.5}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("norm_eps.0", value) for value in (float("nan"), float("inf"), -1e-6, 0, 1e30, _HUGE)),
        *(("norm_eps.2", value) for value in ("1e-6", None, True, [1e-6], 0.02)),
        *(("format", value) for value in (True, "4", 4.5, None, -1, _HUGE)),
        *(("default_keep", value) for value in (True, "0.5", _HUGE, -1, None, [0.5])),
        *(("num_layers", value) for value in (True, 4.0, -4, _HUGE)),
        *(("hidden_size", value) for value in (True, "32", -1, _HUGE)),
        *(("visual_tokens", value) for value in (-1, 0.5, _HUGE, None)),
        *(("carry_rank", value) for value in (-1, 1.5, _HUGE, 3)),
        *(("model", value) for value in (3, None, "a\ud800", ["a"])),
        *(("schedules", value) for value in (_HUGE, [[_HUGE] * 4], {}, [[True] * 4])),
        *(("picked.0.policy.every", value) for value in (-1, 1.5, True, "1")),
        *(("picked.0.policy.quality", value) for value in (0, -1, "x", _HUGE, float("nan"))),
        *(("picked.0.keep", value) for value in (0, -1, 1.5, _HUGE, True, "x")),
        *(("calibration.fitted", value) for value in ("7", 7.5, -1, _HUGE, None, True)),
        *(("calibration.data", value) for value in (7, None, ["x"], "\udfff")),
        *(("calibration.settings", value) for value in ([], {"a": [1]}, {"a": {}}, {"\ud800": 1})),
        *(("calibration.versions", value) for value in ({"torch": 2}, [], "torch")),
        *(("calibration.layers.0.loss_after", value) for value in ("x", None, _HUGE, [1])),
        *(("calibration.layers.1", value) for value in ({}, [], 1, None)),
        ("calibration.layers", []),
        *(("calibration.settings.keep", value) for value in ("x", None, True)),
        *(("calibration.settings.policy_samples", value) for value in (-5, 0, True, "x")),
        *(("calibration.trials.0.same", value) for value in ("x", None, _HUGE, 5.0, -1.0)),
        ("calibration.trials.0.loss", -1.0),
        ("calibration.trials", [_TRIAL, _TRIAL]),
        *(("calibration.trials", value) for value in ([[]], {}, 1, [{"keep": 1}])),
    ],
)
def test_values_of_the_wrong_kind(key: str, value: Any, saved: Path) -> None:
    tensors, metadata = parts(saved)
    _set(metadata, key, value)
    rewrite(saved, tensors, metadata)
    line = refusal(saved)
    assert ("the metadata" in line or "format" in line or "tensor" in line) and len(line) < 600


def _with_header(path: Path, change: Any) -> None:
    """The file with the text of its header changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = change(data[8 : 8 + length])
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _again(header: bytes) -> bytes:
    """The first tensor stands there twice."""
    entries = json.loads(header)
    name = next(key for key in entries if key != "__metadata__")
    return header.rstrip()[:-1] + f",{json.dumps(name)}:{json.dumps(entries[name])}}}".encode()


def _offsets(*values: Any) -> Any:
    def change(header: bytes) -> bytes:
        entries = json.loads(header)
        entries["fingerprint"]["data_offsets"] = list(values)
        return json.dumps(entries).encode()

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_again, "a name stands twice"),
        (lambda header: b'{"a":' * 100_000, "nests too deep"),
        (lambda header: b"[" * 100_000, "is not a safetensors file"),
        (lambda header: b'{"a": 1' + b"0" * 5000 + b"}", "is not a safetensors file"),
        (lambda header: b'{"__metadata__": {"alvts": 3}}', "the header"),
        (lambda header: b'{"__metadata__": {"\\ud800": "x"}}', "not Unicode"),
        (lambda header: header.replace(b'"F32"', b'"F99"', 1), "is damaged"),
        (lambda header: header.replace(b'"F32"', b'"\\ud800"', 1), "not Unicode"),
        (_offsets("0", "512"), "'fingerprint.data_offsets.0'"),
        (_offsets("a", "b"), "'fingerprint.data_offsets.0'"),
        (_offsets(-4, 508), "'fingerprint.data_offsets.0'"),
        (_offsets(0, 10**30), "'fingerprint.data_offsets.1'"),
        (_offsets(0, 2**50), "cut short"),
        (_offsets(0), "'fingerprint.data_offsets.1'"),
        (_offsets(512, 0), "is damaged"),
        (_offsets(None, True), "'fingerprint.data_offsets.0'"),
    ],
)
def test_headers_that_make_no_sense(change: Any, words: str, saved: Path) -> None:
    _with_header(saved, change)
    assert words in refusal(saved)


def _metadata_text(text: str) -> Any:
    def change(header: bytes) -> bytes:
        return json.dumps({**json.loads(header), "__metadata__": {"alvts": text}}).encode()

    return change


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "4",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"format": 4, "format": 4}',
        '{"format": NaN}',
        '{"format": 4, "deep": ' + "[" * 990 + "]" * 990 + "}",
    ],
)
def test_metadata_that_is_no_object(text: str, saved: Path) -> None:
    _with_header(saved, _metadata_text(text))
    assert "the metadata" in refusal(saved)


def test_a_file_that_never_ends_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(2**40)
    assert "is not a safetensors file" in refusal(path)
    assert "it is a device or a pipe" in refusal(Path("/dev/zero"))


def test_a_path_may_be_text(saved: Path) -> None:
    assert load_artifact(str(saved)).model_id == "org/model"
    save_artifact(make_artifact(model_id="other"), str(saved))
    assert load_artifact(saved).model_id == "other"


def test_missing_and_misshapen_tensors(saved: Path) -> None:
    tensors, metadata = parts(saved)
    for name in ("layers.2.down", "layers.0.up"):
        rewrite(saved, {k: v for k, v in tensors.items() if k != name}, metadata)
        assert f"lacks the tensor '{name}'" in refusal(saved)
    rewrite(saved, {k: v for k, v in tensors.items() if k != "fingerprint"}, metadata)
    assert "fingerprint" in refusal(saved)
    rewrite(saved, {**tensors, "layers.1.down": torch.ones(RANK, WIDTH + 1)}, metadata)
    assert "layers.1.down is float32 [5, 33], not floats [5, 32]" in refusal(saved)
    for odd in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        rewrite(saved, {**tensors, "layers.1.down": torch.ones(RANK, WIDTH).to(odd)}, metadata)
        assert "layers.1.down" in refusal(saved)
    for name, shape in {
        "up": (KEYS, RANK + 1),
        "key_bias": (KEYS + 1,),
    }.items():
        rewrite(saved, {**tensors, f"layers.1.{name}": torch.ones(shape)}, metadata)
        assert f"layers.1.{name} is float32 {list(shape)}, not" in refusal(saved)


@pytest.mark.parametrize("name", ["layers.3.down", "layers.0.key_bias", "fingerprint"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(name: str, value: float, saved: Path) -> None:
    tensors, metadata = parts(saved)
    tensors[name].view(-1)[1] = value
    rewrite(saved, tensors, metadata)
    assert f"the tensor {name} holds values that are not finite" in refusal(saved)


def test_what_is_newer_but_harmless_is_a_warning(saved: Path) -> None:
    tensors, metadata = parts(saved)
    metadata["calibration"]["mood"] = "good"
    rewrite(saved, {**tensors, "extra": torch.ones(1)}, {**metadata, "colour": "blue"})
    with pytest.warns(UserWarning) as warned:
        found = load_artifact(saved)
    assert found.calibration == make_artifact().calibration
    told = " ".join(str(warning.message) for warning in warned)
    assert "colour" in told and "extra" in told
    assert all(warning.filename == __file__ for warning in warned)


def test_values_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    bad = make_artifact(fingerprint=torch.full((LAYERS, 2, 16), float("nan")))
    with pytest.raises(AlvtsError, match="not finite"):
        save_artifact(bad, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def _with(**changes: Any) -> Any:
    return lambda made: replace(made, **changes)


def _layers(change: Any) -> Any:
    return lambda made: replace(made, layers=tuple(change(made.layers)))


def _second(**changes: Any) -> Any:
    """Of the artifact's layers, the second is another."""
    return _layers(lambda layers: (layers[0], replace(layers[1], **changes), *layers[2:]))


_PAPERS = PaperSelector(torch.ones(RANK, WIDTH), torch.ones(RANK, WIDTH), None, 1e-6)
_NO_PART = "a part is not what Artifact says of it"

UNSAVEABLE: list[tuple[Any, str]] = [
    (_with(default_keep=2.5), "keep=2.5 is neither a ratio up to 1.0 nor a whole number"),
    (_with(default_keep="a"), "'default_keep"),
    (_with(default_keep=float("nan")), "default_keep, schedules, picked, calib"),
    (_with(model_id=None), "'model'"),
    (_with(model_id="a\ud800"), "not Unicode"),
    (_with(family=3), "'family'"),
    (_with(visual_tokens=-3), "'visual_tokens'"),
    (_with(schedules=((0.5,),)), "has 1 values but the model has 4 layers"),
    (_with(schedules=(("a",) * LAYERS,)), "'schedules"),
    (_with(schedules=((1.5,) * LAYERS,)), "keep=1.5"),
    (_with(schedules=0.5), "'schedules'"),
    (_with(picked=("once",)), _NO_PART),
    (_with(calibration=None), _NO_PART),
    (_with(fingerprint=None), _NO_PART),
    (_with(fingerprint=torch.ones(LAYERS, 16)), "fingerprint is float32 [4, 16]"),
    (_with(fingerprint=torch.ones(LAYERS, 2, 16, device="meta")), "meta tensor"),
    (lambda made: made.to(torch.device("meta"), torch.float32), "meta tensor"),
    (lambda made: replace(made, carries=made.carries[:3]), "lacks the tensor 'carry.3.down'"),
    (lambda made: replace(made, carries=made.carries * 2), "does not know: carry.4.down"),
    (lambda made: None, _NO_PART),
    (_with(layers=None), _NO_PART),
    (_layers(lambda layers: [replace(one, down=torch.ones(RANK)) for one in layers]), _NO_PART),
    (_with(layers=()), "at least one layer"),
    (_layers(lambda layers: [None] * LAYERS), "every layer needs a selector"),
    (_layers(lambda layers: [*layers[:3], None]), "every layer needs a selector"),
    (_layers(lambda layers: [*layers[:3], _PAPERS]), "all LayerSelector or all PaperSelector"),
    (_layers(lambda layers: layers[:3]), "has 4 for 3 layers"),
    (_second(down=torch.ones(3, WIDTH)), "layers.1.down is float32 [3, 32], not"),
    (_second(down=torch.ones(RANK, 8)), "layers.1.down is float32 [5, 8], not"),
    (_second(up=torch.ones(KEYS, RANK, dtype=torch.int32)), "layers.1.up is I32 [16, 5], not"),
    (_second(up=None), "lacks the tensor 'layers.1.up'"),
    (_second(eps=0.0), "'norm_eps.1'"),
]


@pytest.mark.parametrize(("change", "words"), UNSAVEABLE, ids=range(len(UNSAVEABLE)))
def test_what_could_not_be_read_is_not_written(change: Any, words: str, tmp_path: Path) -> None:
    bad = change(make_artifact())
    with pytest.raises(AlvtsError) as error:
        save_artifact(bad, tmp_path / "a.safetensors")
    line = str(error.value)
    assert line.startswith("these selectors cannot be saved: ") and words in line
    assert "\n" not in line and len(line) < 600
    with pytest.raises(AlvtsError, match="these selectors cannot be saved"):
        Artifact.save_pretrained(bad, tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def test_layers_may_share_their_tensors(tmp_path: Path) -> None:
    """And tensors may be laid out otherwise than in the file."""
    made = make_artifact()
    carry = replace(made.carries[0], up=made.carries[0].up.T.contiguous().T)
    made = replace(made, layers=made.layers[:1] * LAYERS, carries=(carry,) * LAYERS)
    save_artifact(made, tmp_path / "a.safetensors")
    found = load_artifact(tmp_path / "a.safetensors")
    assert all(torch.equal(layer.down, made.layers[0].down) for layer in found.layers)
    assert all(torch.equal(one.up, carry.up) for one in found.carries)


@pytest.mark.parametrize("folder", ["", None, 3, b"x"])
def test_a_folder_to_save_in_has_a_name(
    folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AlvtsError, match="name a folder of selectors, not"):
        make_artifact().save_pretrained(folder)
    with pytest.raises(AlvtsError, match="name a file of selectors, not"):
        save_artifact(make_artifact(), folder)
    with pytest.raises(AlvtsError, match="name a file of selectors, not"):
        load_artifact(folder)
    with pytest.raises(AlvtsError, match="cannot make the folder"):
        make_artifact().save_pretrained("a\0b")
    assert list(tmp_path.iterdir()) == []
    make_artifact().save_pretrained(".")
    assert [path.name for path in tmp_path.iterdir()] == ["selectors.safetensors"]


@pytest.mark.parametrize("part", ["model", "model.language_model", "lm_head", None, "llava"])
def test_selectors_are_checked_against_a_whole_model(part: str | None) -> None:
    inside = part in ("model", "model.language_model", "lm_head")
    given = make_model("llava").get_submodule(part) if inside else part
    with pytest.raises(AlvtsError) as attaching:
        attach(given, make_artifact())
    for use in (make_artifact().check_model, fingerprint, quantised):
        with pytest.raises(AlvtsError) as error:
            use(given)
        assert str(error.value) == str(attaching.value)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.safetensors", tmp_path / "none" / "a.safetensors"):
        with pytest.raises(AlvtsError, match="cannot write"):
            check_writable(path)
        with pytest.raises(AlvtsError, match="cannot write"):
            save_artifact(make_artifact(), path)
    with pytest.raises(AlvtsError, match="it is a folder"):
        check_writable(tmp_path)
    check_writable(tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AlvtsError, match="No space left"):
        save_artifact(make_artifact(default_keep=0.5), saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert saved.read_bytes() == before


def test_other_weights_of_the_same_shape_pass_when_asked() -> None:
    artifact, model = make_artifact(), make_model("qwen2_5_vl")
    assert not artifact.check_model(model, other_weights=True).other_weights
    with torch.no_grad():
        model.model.language_model.layers[2].self_attn.k_proj.weight.mul_(1.1)
    used = artifact.check_model(model, other_weights=True)
    assert used.other_weights and used.layers is artifact.layers
    with pytest.raises(AlvtsError, match="layers of width"):
        make_artifact(layers=artifact.layers * 2).check_model(model, other_weights=True)
