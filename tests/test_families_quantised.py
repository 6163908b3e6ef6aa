"""Quantised models, by the real packages on the CPU; skipped where one is not installed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from test_artifact import make_artifact
from test_families import selectors_for
from tiny import make_inputs, one_image, randomise
from zoo import llava_config, text_config

from alvts_cli import attach
from alvts_cli.artifact import fingerprint, quantised
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of

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


def torchao() -> Any:
    library = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(library.Int8WeightOnlyConfig())


@pytest.fixture(scope="module", params=["bitsandbytes-4", "bitsandbytes-8", "torchao-int8"])
def pair(request, tmp_path_factory):
    """A model, and the same quantised."""
    pytest.importorskip("accelerate")
    name, folder = request.param, tmp_path_factory.mktemp("model")
    config = torchao() if name == "torchao-int8" else bits_and_bytes(int(name[-1]))
    auto: Any = transformers.AutoModelForImageTextToText
    text = text_config("qwen2", hidden_size=SIZE, intermediate_size=SIZE, num_key_value_heads=4)
    torch.manual_seed(0)
    model = randomise(auto.from_config(llava_config(text)))
    model.save_pretrained(folder)
    dtype = torch.bfloat16 if name == "torchao-int8" else torch.float32
    small = auto.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map="cpu"
    ).eval()
    return model, small


def selectors(model: Any) -> Any:
    made = selectors_for(model)
    generator = torch.Generator().manual_seed(0)
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
