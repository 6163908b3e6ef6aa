"""The Triton kernels against the PyTorch version: through Triton's interpreter (see `conftest`),
or on the GPU where there is one.
"""

import importlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny import WIDTH, make_inputs, make_model, make_selectors, one_image

from alvts_cli import attach
from alvts_cli.engine import LayerSelector, importance, scoring

triton = pytest.importorskip(
    "triton", minversion="3.7", reason="triton is not installed; on Linux the dev extra brings it"
)
kernels = importlib.import_module("alvts_cli.engine.kernels")

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def make_masks(*layouts: list[tuple[str, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """From runs of v (visual), t (text) and . (padding)."""
    rows = ["".join(kind * n for kind, n in layout) for layout in layouts]
    return tuple(torch.tensor([[c == kind for c in row] for row in rows]) for kind in "vt")


def make_selector(rank: int, width: int, bias: bool) -> LayerSelector:
    generator = torch.Generator().manual_seed(rank)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    strength = (rank * width) ** -0.25 * 1.5
    return LayerSelector(
        random(rank, width) * strength / width**0.25,
        random(rank, width) * strength / width**0.25,
        random(rank) if bias else None,
        1e-5,
    )


@pytest.fixture
def both(monkeypatch):
    """`importance` by the kernels and by PyTorch."""

    def run(hidden, selector, visual, text, causal):
        selector = selector.to(DEVICE, hidden.dtype)
        results = []
        for device in (DEVICE.type, "none"):
            monkeypatch.setattr(scoring, "_KERNEL_DEVICE", device)
            inputs = [t.to(DEVICE) for t in (hidden, visual, text)]
            results.append(importance(inputs[0], selector, *inputs[1:], causal).cpu())
        got, expected = results
        assert got.dtype == torch.float32 and got.shape == visual.shape
        assert bool((got[~visual] == -torch.inf).all())
        return got, expected

    return run


def assert_close(got, expected, rtol=1e-4):
    """Importances are far below the absolute tolerance of torch."""
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-10)


LAYOUTS = {
    "one short sample": [[("t", 2), ("v", 5), ("t", 3)]],
    "text around, over several blocks": [[("t", 9), ("v", 150), ("t", 21)]],
    "two images, left padding": [
        [("t", 3), ("v", 40), ("t", 5), ("v", 40), ("t", 12)],
        [(".", 37), ("t", 2), ("v", 50), ("t", 11)],
    ],
    "padding behind and a whole block of it in front": [
        [(".", 70), ("v", 8), ("t", 2), (".", 5)],
        [("t", 2), ("v", 60), ("t", 23)],
    ],
    "no text, and no image": [[(".", 3), ("v", 67)], [("t", 70)]],
    "as many as a block": [[("v", 32), ("t", 32)]],
    "one token": [[("v", 1)]],
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, causal, both):
    torch.manual_seed(0)
    visual, text = make_masks(*LAYOUTS[layout])
    hidden = torch.randn(*visual.shape, 48) * 3
    got, expected = both(hidden, make_selector(16, 48, True), visual, text, causal)
    assert_close(got, expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 8, 12, 16, 64, 100, 256])
def test_every_rank(rank, bias, both):
    torch.manual_seed(0)
    visual, text = make_masks([("t", 4), ("v", 50), ("t", 6)])
    hidden = torch.randn(*visual.shape, 256)
    for causal in (False, True):
        got, expected = both(hidden, make_selector(rank, 256, bias), visual, text, causal)
        assert_close(got, expected)
        assert torch.equal(
            got.argsort(descending=True, stable=True)[:, :12],
            expected.argsort(descending=True, stable=True)[:, :12],
        )


@pytest.fixture
def interpret_bfloat16(monkeypatch):
    """Triton's interpreter (seen in 3.7.1) multiplies the bits of bfloat16 matrices as integers."""
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def exact(tile):
        if tile.dtype.scalar != triton.language.bfloat16:
            return tile
        bits = tile.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), triton.language.float32)

    def create_dot(self, a, b, *more):
        return plain(self, exact(a), exact(b), *more)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.usefixtures("interpret_bfloat16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision(dtype, causal, both):
    """Both start from the same rounded projections, and both go on in float32."""
    torch.manual_seed(0)
    visual, text = make_masks([("t", 4), ("v", 90), ("t", 6)], [(".", 20), ("v", 70), ("t", 10)])
    hidden = (torch.randn(*visual.shape, 64) * 20).to(dtype)
    selector = make_selector(24, 64, True)
    got, expected = both(hidden, selector, visual, text, causal)
    assert_close(got, expected)


def test_equal_tokens_tie(both):
    torch.manual_seed(0)
    visual, text = make_masks([("t", 4), ("v", 80), ("t", 6)])
    hidden = torch.randn(*visual.shape, 64)
    hidden[:, 4:84] = hidden[:, 4:14].repeat(1, 8, 1)
    got, expected = both(hidden, make_selector(16, 64, True), visual, text, False)
    assert_close(got, expected)
    groups = got[0, 4:84].view(8, 10)
    assert bool((groups == groups[0]).all())


def test_large_logits_stay_finite(both):
    torch.manual_seed(0)
    visual, text = make_masks([(".", 3), ("v", 40), ("t", 6)])
    selector = make_selector(16, 64, True)
    loud = LayerSelector(selector.query * 100, selector.key * 100, selector.query_bias, 1e-5)
    got, expected = both(torch.randn(*visual.shape, 64), loud, visual, text, True)
    assert bool(got[visual].isfinite().all())
    assert_close(got, expected, rtol=1e-2)


def test_the_same_bits_every_time(both):
    torch.manual_seed(0)
    visual, text = make_masks([("t", 4), ("v", 90), ("t", 6)])
    hidden, selector = torch.randn(*visual.shape, 64), make_selector(16, 64, True)
    first, second = (both(hidden, selector, visual, text, True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the tiny model is on the CPU")
def test_a_model_selects_the_same_with_them(monkeypatch):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    calls = []
    original = kernels.importance

    def spy(*args):
        calls.append(args)
        return original(*args)

    with torch.no_grad(), attach(model, make_selectors(causal=True), 0.25):
        expected = model(**inputs).logits
        assert kernels.fit(expected[..., :32])  # Before the count begins.
        monkeypatch.setattr(kernels, "importance", spy)
        monkeypatch.setattr(scoring, "_KERNEL_DEVICE", "cpu")
        torch.testing.assert_close(model(**inputs).logits, expected)
    assert len(calls) == 4


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the tiny model is on the CPU")
def test_a_compiled_model_selects_the_same_with_them(monkeypatch):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    monkeypatch.setattr(kernels, "_works", {})
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    with torch.no_grad():
        with attach(model, make_selectors(causal=True), 0.25):
            expected = model(**inputs).logits
        monkeypatch.setattr(scoring, "_KERNEL_DEVICE", "cpu")
        with attach(model, make_selectors(causal=True), 0.25, compile={"backend": backend}):
            torch.testing.assert_close(model(**inputs).logits, expected)
    assert [sum("alvts.importance" in target for target in graph) for graph in graphs] == [4]


def test_when_they_are_used(monkeypatch):
    def fits(*tensors):
        return scoring._kernels_fit(*tensors)

    def projection(rank=16, dtype=torch.float32, requires_grad=False):
        shape = (1, 8, 2 * rank)
        return torch.zeros(shape, dtype=dtype, device=DEVICE, requires_grad=requires_grad)

    plain, wants = projection(), projection(requires_grad=True)
    assert not fits(plain.cpu(), None)
    monkeypatch.setattr(scoring, "_KERNEL_DEVICE", DEVICE.type)
    assert fits(plain, None)
    assert fits(projection(256), None)
    assert not fits(projection(257), None)
    assert not fits(projection(dtype=torch.float64), None)
    assert not fits(wants, None)
    assert not fits(plain, wants)
    with torch.no_grad():
        assert fits(wants, wants)
    monkeypatch.setattr(scoring, "_HAS_TRITON", False)
    assert not fits(plain, None)


def test_kernels_that_cannot_run_are_said_once_and_left(monkeypatch):
    def broken(*args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "importance", broken)
    monkeypatch.setattr(kernels, "_works", {})
    monkeypatch.setattr(scoring, "_KERNEL_DEVICE", DEVICE.type)
    hidden = torch.randn(1, 8, WIDTH, device=DEVICE)
    visual, text = (mask.to(DEVICE) for mask in make_masks([("v", 6), ("t", 2)]))
    selector = make_selectors().layers[0].to(DEVICE, torch.float32)
    with pytest.warns(UserWarning, match="Failed to find C compiler"):
        first = importance(hidden, selector, visual, text, True)
    assert torch.equal(importance(hidden, selector, visual, text, True), first)


def test_a_selector_of_the_models_own_width(both):
    visual, text = make_masks([("t", 2), ("v", 16), ("t", 4)])
    selector = make_selectors().layers[0]
    got, expected = both(torch.randn(1, 22, WIDTH), selector, visual, text, False)
    assert_close(got, expected)


COMPILE = """
import re, triton
from triton.backends.compiler import GPUTarget
from alvts_cli.engine import kernels

types = dict(norm="*fp32", bias="*fp32", visual="*u8", text="*u8", log_sums="*fp32")
types |= dict(result="*fp32", tokens="i32", width="i32", eps="fp32")
for arch, dtype, rank, causal in ((75, "fp32", 256, True), (90, "bf16", 100, False)):
    size = 4 if dtype == "fp32" else 2
    padded_rank, block = kernels.tile(rank, size)
    meta = dict(rank=rank, padded_rank=padded_rank, has_bias=True, causal=causal, block=block)
    for kernel in (kernels._row_kernel, kernels._column_kernel):
        signature = {
            name: "*" + dtype if name == "projected" else types.get(name, "constexpr")
            for name in kernel.arg_names
        }
        source = triton.compiler.ASTSource(kernel, signature, meta)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
        assert compiled.metadata.shared <= 65536, compiled.metadata.shared
        assert not re.search(r"\\b(atom|red)\\.", compiled.asm["ptx"])
        assert ("mma" in compiled.asm["ptx"]) == (dtype == "bf16")
"""


def test_they_compile_for_cards_that_are_not_here(tmp_path):
    """The interpreter takes Python that the compiler does not. Without atomics, in 64 KB."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True)
