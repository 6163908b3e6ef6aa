"""The layer loop never waits for the device: nothing in it reads a tensor on the host."""

from contextlib import contextmanager

import pytest
import torch
from tiny import CACHE, FAMILIES, Prompt, make_inputs, make_model, make_selectors, one_image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alvts_cli import attach
from alvts_cli.engine import attach_scorer, cache_of

READS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal")


class NoReads(TorchDispatchMode):
    """Refuses operators that wait for the device."""

    ours = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.ours:
            return func(*args, **(kwargs or {}))
        if func.name().split(".")[0] in READS:
            raise AssertionError(f"{func.name()} in the layer loop")
        # A bool mask as an index needs the number of its True values on the host.
        if func.name().startswith("aten::index.Tensor") and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        ):
            raise AssertionError("a bool index in the layer loop")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_reads_in_layers(model):
    """Watch from the first layer's first hook to the last layer's last. What Qwen3-VL adds between
    layers looks for visual tokens, with alvts or without."""
    watch = NoReads()
    decoder = model.model.language_model
    adds = getattr(decoder, "_deepstack_process", None)

    def unwatched(*args):
        watch.ours = False
        result = adds(*args)
        watch.ours = True
        return result

    if adds is not None:
        decoder._deepstack_process = unwatched
    first, last = model.model.language_model.layers[0], model.model.language_model.layers[-1]
    handles = [
        first.register_forward_pre_hook(lambda *_: watch.__enter__() and None, prepend=True),
        last.register_forward_hook(lambda *_: watch.__exit__(None, None, None)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_reads_in_prefill_and_decode(family, attn):
    model = make_model(family, attn)
    size = one_image(family).images
    for inputs in (
        make_inputs(model, one_image(family)),
        make_inputs(model, one_image(family), Prompt([1, 5, 6], size), Prompt([1, 7, 8, 9])),
    ):
        with (
            attach(model, make_selectors(family), [1.0, 0.25, 0, 5]),
            no_reads_in_layers(model),
        ):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)


class Reads(TorchFunctionMode):
    """Counts what brings numbers of a tensor to the host, as a program writes it."""

    NAMES = (
        *("item", "tolist", "numpy", "cpu", "nonzero", "equal", "masked_select", "unique"),
        *("__bool__", "__int__", "__float__", "__index__", "__contains__"),
    )
    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        bool_index = getattr(func, "__name__", "") in ("__getitem__", "__setitem__") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        self.count += bool_index or getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_reads_exactly_once_in_a_prefill(family):
    model = make_model(family)
    inputs = make_inputs(model, one_image(family))

    def reads():
        with torch.no_grad(), Reads() as watch:
            model(**inputs)
        return watch.count

    # What transformers itself reads, such as the sizes of images, is there either way.
    dense = reads()
    with attach(model, make_selectors(family), [1.0, 0.25, 0, 5]):
        assert reads() == dense + 1


def test_the_watch_sees_a_read():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))

    class Reading:
        def importance(self, layer_index, layer, hidden, plan, layer_kwargs):
            return hidden.sum(-1) * hidden.sum().item()

    caught = pytest.raises(AssertionError, match="_local_scalar_dense")
    with torch.no_grad(), attach_scorer(model, Reading(), 0.25), no_reads_in_layers(model):
        with caught:
            model(**inputs)
        # The last layer's hook, which ends the watch, was not reached.
        torch.utils._python_dispatch._pop_mode()


def test_decode_of_one_sample_reads_nothing_at_all():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad(), attach(model, make_selectors(), 0.25):
        cache = cache_of(model(**inputs))
        # With an attention_mask transformers itself looks whether anything is padded.
        with NoReads():
            model(
                input_ids=torch.tensor([[7]]),
                position_ids=torch.tensor([[28]]),
                **{CACHE: cache},
            )


def test_another_method_is_one_class_with_one_method():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    seen = []

    class LastTokens:
        """Keeps the visual tokens nearest to the question."""

        def importance(self, layer_index, layer, hidden, plan, layer_kwargs):
            seen.append((layer_index, id(plan), hidden.shape))
            positions = torch.arange(hidden.shape[1]).float().expand_as(plan.visual)
            return positions.masked_fill(~plan.visual, -torch.inf)

    taken = []
    with torch.no_grad(), attach_scorer(model, LastTokens(), [1.0, 4, 0, 4]) as attachment:
        handle = model.model.language_model.layers[1].register_forward_pre_hook(
            lambda m, args: taken.append(args[0])
        )
        model(**inputs)
        handle.remove()
        assert attachment.last.kept == ((16,), (4,), (0,), (4,))
    assert [layer for layer, _, _ in seen] == [1, 3]
    assert len({plan for _, plan, _ in seen}) == 1
    assert taken[0].shape[1] == 12 + 4


def test_phases_are_entered_in_order():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    names = []

    @contextmanager
    def phase(name):
        names.append(name)
        yield

    with torch.no_grad(), attach(model, make_selectors(), [1.0, 0.25, 0, 1.0]) as attachment:
        attachment.phase = phase
        cache = cache_of(model(**inputs))
        ran = [n for i, n in enumerate(names) if i == 0 or n != names[i - 1]]
        whole, best, text = ["layer"], ["score", "select", "layer", "merge"], ["select", "layer"]
        assert ran == [*whole, *best, *text, "merge", *whole]
        names.clear()
        model(input_ids=torch.tensor([[7]]), **{CACHE: cache})
        assert names == []


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_5_vl"])
def test_a_default_device_that_is_not_the_models(family):
    """`torch.set_default_device("cuda")`, without one. Qwen2.5-VL itself does not run so."""
    model, inputs = make_model(family), make_inputs(make_model(family), one_image(family))
    selectors = make_selectors(family)
    with torch.no_grad(), attach(model, selectors, 4):
        expected = model(**inputs).logits
    other = make_model(family)
    with torch.no_grad(), torch.device("meta"), attach(other, selectors, 4):
        assert torch.equal(other(**inputs).logits, expected)
