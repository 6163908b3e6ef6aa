"""Quantised models, by the real packages on the CPU; skipped where one is not installed."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from cli_tools import alvts, refused, scene_file
from test_artifact import make_artifact
from test_families import selectors_for
from tiny import make_inputs, one_image, randomise
from zoo import llava_config, text_config

from alvts_cli import attach
from alvts_cli.artifact import fingerprint, quantised
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of
from alvts_cli.families.layer import matrix_of
from alvts_cli.families.quantised import READ, check_quantised
from alvts_cli.models import load_model
from alvts_cli.pocket import WEIGHTS
from alvts_cli.pocket.build import make_config

REST = ["lm_head", "model.multi_modal_projector", "model.vision_tower"]
"""What stays as it is."""

SIZE = 64
"""The least that bitsandbytes' 4 bits take on a CPU."""


def bits_and_bytes(bits: int) -> Any:
    pytest.importorskip("bitsandbytes")
    more = {"bnb_4bit_compute_dtype": torch.float32} if bits == 4 else {}
    return transformers.BitsAndBytesConfig(
        **{f"load_in_{bits}bit": True}, llm_int8_skip_modules=REST, **more
    )


def torchao(name: str) -> Any:
    library = pytest.importorskip("torchao.quantization")
    if name == "torchao-int8":
        made = library.Int8WeightOnlyConfig()
    elif name == "torchao-int4":
        made = library.IntxWeightOnlyConfig(torch.int4, library.PerGroup(32))
    else:
        # Packed for the CPU's own kernel, which gives no matrix away.
        packed = pytest.importorskip("torchao.prototype.quantization.int4")
        made = packed.PrototypeInt4WeightOnlyConfig(group_size=32)
    return transformers.TorchAoConfig(made, modules_to_not_convert=REST)


def config_of(name: str) -> tuple[Any, torch.dtype]:
    """How it is quantised, and what in."""
    pytest.importorskip("accelerate")
    if name.startswith("torchao"):
        return torchao(name), torch.bfloat16
    return bits_and_bytes(int(name[-1])), torch.float32


NAMES = ("bitsandbytes-4", "bitsandbytes-8", "torchao-int8", "torchao-int4", "torchao-int4-packed")


@pytest.fixture(scope="module", params=NAMES)
def pair(request, tmp_path_factory):
    """A model, and the same quantised."""
    folder = tmp_path_factory.mktemp("model")
    config, dtype = config_of(request.param)
    auto: Any = transformers.AutoModelForImageTextToText
    text = text_config("qwen2", hidden_size=SIZE, intermediate_size=SIZE, num_key_value_heads=4)
    torch.manual_seed(0)
    model = randomise(auto.from_config(llava_config(text)))
    model.save_pretrained(folder)
    small = auto.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map="cpu"
    ).eval()
    return model, small


def selectors(model: Any) -> Any:
    made = selectors_for(model)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    made.layers = [
        replace(layer, down=0.3 * torch.randn(3, SIZE, generator=generator))
        for layer in made.layers
    ]
    return made


def artifact_of(model: Any, values: torch.Tensor) -> Any:
    return make_artifact(layers=tuple(selectors(model).layers), fingerprint=values)


def test_a_quantised_model_selects_with_selectors_of_the_whole_one(pair):
    model, small = pair
    assert quantised(small) and not quantised(model)
    inputs = make_inputs(small, one_image("llava"))
    with torch.no_grad():
        dense = small(**inputs).logits
        with attach(small, selectors(model), 1.0):
            assert torch.equal(small(**inputs).logits, dense)
        with attach(small, selectors(model), 0.25) as attachment:
            assert small(**inputs).logits.isfinite().all()
            assert attachment.last.layer_average == 4


def test_matrices_are_read_as_the_library_dequantises_them(pair):
    model, small = pair
    whole, read = (
        [family_of(m).query_key(layer) for layer in family_of(m).layers(m)] for m in (model, small)
    )
    for own, other in zip(whole, read, strict=True):
        for a, b in ((own.w_q, other.w_q), (own.w_k, other.w_k)):
            assert a.shape == b.shape
            off = (a - b.float()).norm() / a.norm()
            assert 0 < off < 0.3


def test_the_base_is_known_and_another_is_not(pair):
    model, small = pair
    artifact = artifact_of(model, fingerprint(model))
    assert not artifact.check_model(small).other_weights
    other = artifact_of(model, artifact.fingerprint.flip(0))
    with pytest.raises(AlvtsError, match="are others"):
        other.check_model(small)


@pytest.mark.parametrize("name", ["bitsandbytes-4", "torchao-int8", "torchao-int4"])
def test_pocket_quantised_and_saved_answers_with_its_own_selectors(name, tmp_path):
    """The way of a user: a quantised folder, by its name, on the command line."""
    config, dtype = config_of(name)
    auto: Any = transformers.AutoModelForImageTextToText
    small = auto.from_pretrained(WEIGHTS, quantization_config=config, dtype=dtype, device_map="cpu")
    small.save_pretrained(tmp_path)
    transformers.AutoProcessor.from_pretrained(WEIGHTS).save_pretrained(tmp_path)
    asked = (
        "--image",
        WEIGHTS.parent / "example.png",
        "--prompt",
        "what digit is on the teal cross?",
    )
    selectors = ("--selectors", WEIGHTS / "selectors.safetensors", "--keep", "0.11")
    result = alvts("run", "--model", tmp_path, *asked, *selectors)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("9\n")
    assert "is quantised" in result.stderr


def test_compressed_tensors_are_dequantised(tmp_path):
    """And are weights like any others."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    model = load_model("pocket").model
    packed = "pack-quantized"
    rest = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
    four_bits = library.QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    scheme = library.QuantizationScheme(targets=["Linear"], weights=four_bits)
    library.apply_quantization_config(
        model,
        library.QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=rest,
            format=packed,
            quantization_status="compressed",
        ),
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            largest = module.weight.data.unflatten(-1, (-1, 32)).abs().amax(-1)
            module.weight_scale.data.copy_(largest / 7.5)
    maker = compressors.ModelCompressor.from_pretrained_model(model, quantization_format=packed)
    maker.compress_model(model)
    with pytest.raises(AlvtsError, match="dequantize=True"):
        matrix_of(family_of(model).layers(model)[0].self_attn.k_proj)
    model.save_pretrained(tmp_path)
    maker.update_config(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    # It names modules by other names than those they are loaded under.
    told["quantization_config"]["ignore"] = rest
    (tmp_path / "config.json").write_text(json.dumps(told))
    transformers.AutoProcessor.from_pretrained(WEIGHTS).save_pretrained(tmp_path)

    whole, read = (fingerprint(one) for one in (load_model("pocket").model, again(tmp_path)))
    assert 0 < (whole - read).norm() / whole.norm() < 0.3


def again(folder: Any) -> Any:
    return load_model(str(folder)).model


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "hqq"])
def test_other_libraries_are_refused_by_name(method, tmp_path):
    """By the command and from Python, before a weight is read."""
    config = make_config()
    config.quantization_config = {"quant_method": method, "bits": 4}
    config.save_pretrained(tmp_path)
    line = refused("run", "--model", tmp_path, "--image", scene_file(), "--prompt", "x")
    assert f"quantised by {method}, whose weights alvts cannot read" in line
    assert all(known in line for known in READ)
    model = type("Model", (), {"config": config})()
    with pytest.raises(AlvtsError, match=f"quantised by {method}"):
        family_of(model).check(model)


def test_weights_that_can_be_read_are_not_refused():
    config = make_config()
    check_quantised(config)
    config.quantization_config = {"quant_method": "bitsandbytes"}
    check_quantised(config)
