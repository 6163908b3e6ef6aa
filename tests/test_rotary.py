"""How heads are turned by their positions: read off a layer, and the same wherever it is done."""

from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import pytest
import torch
from reference import decoder_inputs
from tiny import Selectors, random_selector
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import make_zoo_model, zoo_inputs

from alvts_cli import attach
from alvts_cli.engine import LayerSelector
from alvts_cli.engine.probe import check_layers, project
from alvts_cli.engine.scene import Scene
from alvts_cli.engine.scoring import _attend, _rotate_columns, rotate, text_rows
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of, layer
from alvts_cli.families.rotary import Rotary, rotary_of
from calibration.align import collate
from calibration.capture import capture
from calibration.sweep import _targets

FORMS = {"halves": Rotary(), "neighbours": Rotary(neighbours=True)}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
# Of heads of 8 numbers: all, half, and a part that does not go into them.
each_width = pytest.mark.parametrize("width", [8, 4, 6])


def tables(form: Rotary, width: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Cosines and sines `[1, T, w]`, and what they say: complex `[1, 1, T, w / 2]`."""
    angle = (
        torch.rand(
            1,
            tokens,
            width // 2,
            generator=torch.Generator(torch.get_default_device()).manual_seed(3),
        )
        * 6
    )
    both = form.join(angle, angle, -1)
    return both.cos(), both.sin(), torch.polar(torch.ones_like(angle), angle)[:, None]


def turned(states: torch.Tensor, form: Rotary, by: torch.Tensor) -> torch.Tensor:
    """`states` `[B, H, T, d]`, every two numbers as a complex one."""
    width = 2 * by.shape[-1]
    pairs = [(i, i + 1) for i in range(0, width, 2)]
    if not form.neighbours:
        pairs = [(i, i + width // 2) for i in range(width // 2)]
    made = states.clone()
    for k, (i, j) in enumerate(pairs):
        number = torch.complex(states[..., i], states[..., j]) * by[..., k]
        made[..., i], made[..., j] = number.real, number.imag
    return made


@each_form
@each_width
def test_heads_are_turned_as_complex_numbers(form, width):
    cos, sin, by = tables(form, width, 5)
    states = torch.randn(2, 3, 5, 8)
    expected = turned(states, form, by)
    torch.testing.assert_close(rotate(states, (cos, sin), form), expected)
    columns = (table.transpose(1, 2)[:, None] for table in (cos, sin))
    made = _rotate_columns(states.transpose(2, 3), *columns, form)
    torch.testing.assert_close(made.transpose(2, 3), expected)


@each_form
@each_width
def test_queries_and_keys_in_one_tensor_are_turned_alike(form, width):
    """Two heads share each of two keys; two of five tokens ask."""
    cos, sin, by = tables(form, width, 5)
    index = torch.tensor([[3, 4]])
    scene = Scene(torch.tensor([[False, True, True, False, False]]), (cos, sin), index)
    queries, keys = torch.randn(1, 2, 2, 2, 8), torch.randn(1, 2, 5, 8)
    states = torch.cat([queries.flatten(2, 3), keys], dim=2)
    got = _attend(states, scene.together(states.dtype, 2, 2, 8, form), 0.5)
    key = turned(keys, form, by)[:, :, None]
    query = turned(queries.flatten(1, 2), form, by[:, :, index[0]]).view(queries.shape)
    logits = 0.5 * query @ key.transpose(-1, -2)
    attention = logits.masked_fill(scene.unseen(), -torch.inf).softmax(-1)
    torch.testing.assert_close(got, attention.sum(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "attention", "form"),
    [
        ("llama", "LlamaAttention", "halves"),
        ("qwen3_vl", "Qwen3VLTextAttention", "halves"),
        ("glm4v", "Glm4vTextAttention", "neighbours"),
        ("glm4v_moe", "Glm4vMoeTextAttention", "halves"),
        ("glm_ocr", "GlmOcrTextAttention", "neighbours"),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeTextAttention", "neighbours"),
        # Known by another function, which wants other tables.
        ("llama4", "Llama4TextAttention", "halves"),
    ],
)
def test_the_form_is_read_off_the_attention(name, attention, form):
    module = import_module(f"transformers.models.{name}.modeling_{name}")
    kind = getattr(module, attention)
    # Also of a class that a library puts in its place.
    for made in (kind, type("Wrapped", (kind,), {})):
        assert rotary_of(made.__new__(made)) == FORMS[form]


def test_a_function_that_wants_something_else_says_nothing():
    def turn(states):
        raise AssertionError

    with patch.object(import_module(__name__), "apply_rotary_pos_emb", turn, create=True):
        assert rotary_of(type("Attention", (), {"__module__": __name__})()) == Rotary()


@pytest.mark.parametrize("kind", ["glm4v", "glm4v_moe", "glm_ocr", "llava"])
def test_a_form_that_is_not_the_layers_is_refused(kind):
    model = make_zoo_model(kind)
    first = family_of(model).layers(model)[0]
    other = Rotary(not rotary_of(first.self_attn).neighbours)
    with (
        patch.object(layer, "rotary_of", lambda attention: other),
        pytest.raises(AlvtsError, match="makes its queries in another way"),
    ):
        check_layers(model)
    check_layers(model)


def test_other_tables_than_the_models_are_told_from_them():
    """Of queries in the kernel, the numbers that no table turns are those of the projection."""
    model = make_zoo_model("glm4v")
    first = family_of(model).layers(model)[0]
    hidden, positions = decoder_inputs(model, zoo_inputs(model, "glm4v"))
    assert positions[0].shape[-1] == 8 and first.self_attn.head_dim == 16
    own = project(first, hidden, positions).query
    tokens = torch.arange(hidden.shape[1])[None]
    scene = Scene(torch.zeros_like(tokens, dtype=torch.bool), positions, tokens)
    ours = text_rows(first, hidden, scene, rotary_of(first.self_attn)).query
    torch.testing.assert_close(ours, own)
    plain = first.self_attn.q_proj(first.input_layernorm(hidden)).unflatten(-1, (-1, 16))
    torch.testing.assert_close(ours[..., 8:], plain.transpose(1, 2)[..., 8:])
    assert not torch.allclose(ours[..., :8], plain.transpose(1, 2)[..., :8])


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("kind", ["glm4v", "glm_ocr"])
def test_neighbours_in_one_graph_and_the_same_bits(kind, compiler):
    model = make_zoo_model(kind)
    # Tracing takes its time by the layer.
    decoder: Any = family_of(model).text_model(model)
    decoder.layers, decoder.config.num_hidden_layers = decoder.layers[:2], 2
    layers = decoder.layers
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    size = len(family_of(model).query_key(layers[0]).w_k)
    bias = layers[0].self_attn.k_proj.bias is not None
    selectors = Selectors([random_selector(generator, size, bias) for _ in layers])
    prompts = [zoo_inputs(model, kind, words=words) for words in ((2, 5), (2, 9), (4, 12))]
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        with attach(model, selectors, 2):
            expected = [model(**inputs).logits for inputs in prompts]
        with attach(model, selectors, 2, compile={"backend": counter}):
            made = [model(**inputs).logits for inputs in prompts]
    assert all(map(torch.equal, made, expected))
    # Once more for texts of another length, all together.
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind", ["glm4v", "glm4v_moe", "glm_ocr"])
def test_calibration_holds_selectors_against_the_layers_own_attention(kind):
    """A selector of full rank is the layer's key projection, and measures no divergence."""
    model = make_zoo_model(kind)
    family = family_of(model)
    sample = capture(model, zoo_inputs(model, kind))
    first = family.layers(model)[0]
    own = family.query_key(first)
    whole = LayerSelector(torch.diag(own.norm_weight), own.w_k, own.b_k, own.norm_eps, own.k_norm)
    (target,) = _targets(first, [sample], 0, "alvts")
    _, loss = collate([target, target], torch.get_default_device()).float().measure(whole)
    torch.testing.assert_close(loss, torch.zeros(2), atol=1e-5, rtol=0)
    halves = Rotary(not target.rows.rotary.neighbours)
    _, wrong = replace(target, rows=replace(target.rows, rotary=halves)).measure(whole)
    assert bool(wrong > 0.01)
