"""`attach(..., compile=...)`: one graph, the same results, few compilations, no trace after."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import tiny
import torch
from tiny import CACHE, FAMILIES, Prompt, make_inputs, one_image
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

from alvts_cli import AlvtsError, attach
from alvts_cli.engine import Solved, cache_of, keep_of
from alvts_cli.engine.compiling import usual_options
from alvts_cli.engine.scorer import SelectorScorer

# A graph of few layers is traced in less time: one that begins, and one that goes on behind it.
make_model = partial(tiny.make_model, layers=2)
make_selectors = partial(tiny.make_selectors, layers=2)

# What is compiled is the decoder, and LLaVA-NeXT's is LLaVA's.
DECODERS = [family for family in FAMILIES if family != "llava_next"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def prompt(model, family, tokens=12, seed=0):
    one = one_image(family, seed)
    one.text = (one.text * 3)[:tokens]
    return make_inputs(model, one)


@pytest.mark.parametrize("family", DECODERS)
def test_one_graph_and_the_same_bits(family):
    """fullgraph=True raises at a graph break. New lengths of a prompt compile once more, all
    together; so does decoding, behind caches of the first token's lengths and then of any."""
    model, selectors = (make(family, layers=3) for make in (make_model, make_selectors))
    prompts = [prompt(model, family, *which) for which in ((12, 0), (12, 1), (14, 2), (17, 3))]
    counter = CompileCounterWithBackend("eager")
    more = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)

    def answer(inputs, tokens):
        output = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **more)
        return output.sequences, output.logits, cache_of(output).layers

    with attach(model, selectors, [1.0, 4, 0]):
        expected = [(one, answer(one, tokens)) for tokens in (1, 6) for one in prompts]
    with attach(model, selectors, [1.0, 4, 0], compile={"backend": counter}) as attachment:
        graphs = []
        for inputs, (tokens, logits, caches) in expected:
            new = len(logits)
            *same, layers = answer(inputs, new)
            graphs.append(counter.frame_count)
            assert torch.equal(same[0], tokens) and all(map(torch.equal, same[1], logits))
            (visual,) = attachment.last.visual_tokens
            length = len(inputs["input_ids"][0]) + new - 1
            for layer, eager, (kept,) in zip(layers, caches, attachment.last.kept, strict=True):
                assert torch.equal(layer.keys, eager.keys)
                assert torch.equal(layer.values, eager.values)
                assert type(layer.seen) is int and layer.seen == length
                assert layer.plain == (kept == visual) and layer.slots == length - visual + kept
    # Prefill: of one length, of all. Decoding: the first token, all others.
    assert graphs == [1, 1, 2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize(
    ("backend", "keep", "schedules", "images", "expected_graphs"),
    [
        # A layer whose text runs alone in some prompts is another graph there.
        ("eager", 10, ((0.5, 0.0), (1.0, 0.25)), (1, 2, 4, 1, 3), [1, 2, 3, 3, 3]),
        ("aot_eager", 0.4, ((0.5, 0.25), (0.75, 0.5)), (2, 3, 4, 2, 3), [1, 2, 2, 2, 2]),
    ],
)
def test_counts_that_follow_the_image(backend, keep, schedules, images, expected_graphs):
    """Schedules solve another `k` per layer for every number of visual tokens; texts of several
    lengths around them are no reason to compile again."""
    model = make_model("llava")
    selectors = make_selectors(schedules=schedules)
    lengths = zip(images, (9, 12, 15, 9, 10), strict=True)
    prompts = [make_inputs(model, Prompt([1, *[5] * text], [(16, 16)] * n)) for n, text in lengths]
    resolved = keep_of(selectors, keep)
    assert isinstance(resolved, Solved)
    counter = CompileCounterWithBackend(backend)
    with torch.no_grad():
        with attach(model, selectors, keep) as attachment:
            expected = [(model(**inputs).logits, attachment.last) for inputs in prompts]
        with attach(model, selectors, resolved, compile={"backend": counter}) as attachment:
            graphs = []
            for inputs, (logits, kept) in zip(prompts, expected, strict=True):
                assert torch.equal(model(**inputs).logits, logits)
                assert attachment.last == kept
                graphs.append(counter.frame_count)
    assert len({kept.kept for _, kept in expected}) >= 3
    assert graphs == expected_graphs


WAITS = {"item", "tolist", "nonzero", "is_nonzero", "cpu", "masked_select", "unique"}


@pytest.mark.parametrize(
    ("more", "waits"),
    [
        (lambda hidden: 0, set()),
        (lambda hidden: hidden.sum().item(), {"item"}),
        (lambda hidden: hidden[0, :, 0].nonzero().shape[0], {"nonzero"}),
        (lambda hidden: hidden[..., 0].cpu(), {"cpu"}),
    ],
)
def test_nothing_in_the_graph_of_the_loop_waits(more, waits):
    """The layers are one graph without a read, and without a shape that follows the numbers: what a
    CUDA graph asks for. `test_bench_launches` looks for copies too."""
    model = make_model("llava")
    score, found = SelectorScorer.importance, set()

    def importance(self, layer_index, layer, hidden, plan, kwargs):
        # What nobody uses is left out of a graph.
        return score(self, layer_index, layer, hidden, plan, kwargs) + more(hidden)

    def backend(graph, example_inputs):
        found.update(getattr(node.target, "__name__", node.target) for node in graph.graph.nodes)
        return graph.forward

    inputs = prompt(model, "llava")
    with torch.no_grad(), patch.object(SelectorScorer, "importance", importance):
        options = {"backend": backend}
        with attach(model, make_selectors(), [0, 4], compile=options):
            try:
                model(**inputs)
            except TorchDynamoException:
                assert waits
                return
    assert "sort" in found and found & WAITS == waits


def test_blocks_of_rows_are_no_reason_to_compile_again():
    """Prompts of several blocks of scoring on a CPU, as many in each."""
    model = make_model("llava")
    prompts = [make_inputs(model, Prompt([1, *[5] * n], [(16, 16)])) for n in (600, 601, 650)]
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        with attach(model, make_selectors(), 4):
            expected = [model(**inputs).logits for inputs in prompts]
        with attach(model, make_selectors(), 4, compile={"backend": counter}):
            for inputs, logits in zip(prompts, expected, strict=True):
                torch.testing.assert_close(model(**inputs).logits, logits)
    assert counter.frame_count == 2


def test_a_hook_that_comes_later_keeps_what_it_sees():
    """The graph writes to the residual stream in place, unless somebody may hold on to it."""
    model, selectors = make_model("llava", layers=3), make_selectors(layers=3)
    inputs = prompt(model, "llava")
    graphs, held, copies = [], [], []

    def backend(graph, example_inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    def keep(module, args, output):
        held.append(output)
        copies.append(output.clone())

    with torch.no_grad(), attach(model, selectors, 4, compile={"backend": backend}):
        expected = model(**inputs).logits
        handle = model.model.language_model.layers[1].register_forward_hook(keep)
        assert torch.equal(model(**inputs).logits, expected)
        handle.remove()
    assert torch.equal(held[0], copies[0])
    assert [graph.count("index_put_") for graph in graphs] == [2, 1]


@pytest.mark.parametrize("more", [dict(num_beams=3), dict(return_dict_in_generate=True)])
def test_decoding_a_padded_batch(more):
    model = make_model("llava")
    size = one_image("llava").images
    inputs = make_inputs(model, one_image("llava"), Prompt([1, 5, 6], size), Prompt([1, 7, 8, 9]))
    generate = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, **more)
    counter = CompileCounterWithBackend("aot_eager")
    with attach(model, make_selectors(), 0.25):
        expected = model.generate(**inputs, **generate)
    with attach(model, make_selectors(), 0.25, compile={"backend": counter}):
        found = model.generate(**inputs, **generate)
    assert counter.frame_count == 3
    if "num_beams" in more:
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sequences, expected.sequences)
    caches = cache_of(found).layers, cache_of(expected).layers
    for got, wanted in zip(*caches, strict=True):
        # A product of one row may be computed another way in the graph.
        torch.testing.assert_close(got.keys, wanted.keys)
        assert torch.equal(got.valid, wanted.valid)
        assert (got.seen, got.plain) == (wanted.seen, wanted.plain)


def test_a_text_turn_of_several_tokens_runs_uncompiled():
    model = make_model("llava")
    inputs = prompt(model, "llava")
    counter = CompileCounterWithBackend("eager")
    results = []
    for compile in (False, {"backend": counter}):
        with torch.no_grad(), attach(model, make_selectors(), 4, compile=compile):
            cache = cache_of(model(**inputs))
            more = torch.tensor([[5, 6, 7]])
            results.append(model(input_ids=more, **{CACHE: cache}).logits)
            results.append(model(input_ids=more).logits)
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])
    assert counter.frame_count == 1


def test_a_padded_batch_hidden_states_and_eager_attention():
    model = make_model("llava", "eager")
    size = one_image("llava").images
    inputs = make_inputs(model, one_image("llava"), Prompt([1, 5, 6], size), Prompt([1, 7, 8, 9]))
    with torch.no_grad():
        with attach(model, make_selectors(), 0.25):
            expected = model(**inputs, output_hidden_states=True)
        # Unlike "eager", this backend takes the graph down to operators without side effects.
        with attach(model, make_selectors(), 0.25, compile={"backend": "aot_eager"}):
            output = model(**inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert len(output.hidden_states) == len(expected.hidden_states)
    for got, wanted in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert torch.equal(got[real], wanted[real])


def test_a_second_turn_with_an_image_runs_uncompiled():
    model = make_model("llava")
    inputs = prompt(model, "llava")
    counter = CompileCounterWithBackend("eager")
    results = []
    for compile in (False, {"backend": counter}):
        with torch.no_grad(), attach(model, make_selectors(), 4, compile=compile):
            cache = cache_of(model(**inputs))
            more = {name: value for name, value in inputs.items() if name != "attention_mask"}
            results.append(model(**more, **{CACHE: cache}).logits)
    assert torch.equal(*results)
    assert counter.frame_count == 1


def test_what_a_cuda_graph_leaves_behind_outlives_the_next_prefill():
    """A backend that hands out the same memory at every run, as a CUDA graph does."""
    model = make_model("llava")
    first, second = (prompt(model, "llava", 12, seed) for seed in (0, 1))
    modes = []

    def backend(graph, example_inputs, mode=None):
        modes.append(mode)
        held = {}

        def same(i, result):
            if not isinstance(result, torch.Tensor):
                return result
            return held.setdefault(i, torch.empty_like(result)).copy_(result)

        def run(*args):
            return tuple(same(i, result) for i, result in enumerate(graph(*args)))

        return run if mode is not None else graph.forward

    def answer(compile):
        with torch.no_grad(), attach(model, make_selectors(), 4, compile=compile):
            output = model.model(**first)
            logits = model(**second).logits
            step = model(input_ids=torch.tensor([[5]]), **{CACHE: cache_of(output)})
        return output.last_hidden_state, logits, step.logits

    def plain(graph, example_inputs, mode=None):
        return graph.forward

    expected = answer({"backend": plain})
    # What grows at every token is no graph.
    growing = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
    for mode, without in growing.items():
        modes.clear()
        for got, wanted in zip(answer({"backend": backend, "mode": mode}), expected, strict=True):
            assert torch.equal(got, wanted)
        assert modes == [mode, without]


@pytest.mark.parametrize(
    ("asked", "decoding"),
    [
        ({"backend": "cudagraphs"}, {"backend": "aot_eager"}),
        (
            {"options": {"triton.cudagraphs": True, "shape_padding": False}},
            {"options": {"triton.cudagraphs": False, "shape_padding": False}},
        ),
        ({"options": {"shape_padding": False}}, None),
    ],
)
def test_whatever_asks_for_cuda_graphs_is_copied_out_of_them(asked, decoding, monkeypatch):
    """And a decoded token, which would be another graph at every length, runs without."""
    model = make_model("llava")
    made, held = [], []

    def compile_nothing(function, **options):
        made.append(options)

        def run(*args):
            output = function(*args)
            held.append(output.last_hidden_state)
            return output

        return run

    monkeypatch.setattr(torch, "compile", compile_nothing)
    with torch.no_grad(), attach(model, make_selectors(), 4, compile=asked):
        output = model.model(**prompt(model, "llava"))
    assert made == [{"fullgraph": True, **one} for one in (asked, decoding or asked)]
    assert torch.equal(output.last_hidden_state, held[0])
    shared = output.last_hidden_state.data_ptr() == held[0].data_ptr()
    assert shared == (decoding is None)


def test_a_forward_that_fails_leaves_the_model_to_other_threads():
    model = make_model("llava")
    inputs = prompt(model, "llava")

    def fail(module, args):
        raise ValueError("no")

    with torch.no_grad(), attach(model, make_selectors(), 4, compile={"backend": "eager"}):
        expected = model(**inputs).logits
        handle = model.model.vision_tower.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="no"):
            model(**inputs)
        handle.remove()
        with ThreadPoolExecutor(1) as other:
            got = other.submit(torch.no_grad()(model), **inputs).result().logits
    assert torch.equal(got, expected)


def test_detaching_leaves_nothing():
    model = make_model("llava")
    decoder = model.model.language_model
    inputs = prompt(model, "llava")
    before, signature = decoder.forward, inspect.signature(decoder.forward)
    with torch.no_grad():
        dense = model(**inputs).logits
        attachment = attach(model, make_selectors(), 4, compile={"backend": "eager"})
        assert inspect.signature(decoder.forward) == signature
        assert not torch.equal(model(**inputs).logits, dense)
        attachment.detach()
        attachment.detach()
        assert "forward" not in vars(decoder) and decoder.forward == before
        assert torch.equal(model(**inputs).logits, dense)

        decoder.forward = wrapped = lambda *args, **kwargs: before(*args, **kwargs)
        with attach(model, make_selectors(), 4, compile={"backend": "eager"}):
            assert decoder.forward is not wrapped
        assert decoder.forward is wrapped


def test_options_that_torch_refuses_leave_the_model_alone():
    model = make_model("llava")
    with pytest.raises(Exception, match="nonsense"):
        attach(model, make_selectors(), 4, compile={"backend": "nonsense"})
    decoder = model.model.language_model
    assert not any("forward" in vars(part) for part in (model.model, decoder))
    assert not decoder.layers[0]._forward_hooks
    attach(model, make_selectors(), 4).detach()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("when", ["before", "while", "with ours"])
def test_a_model_that_its_user_compiles_selects(when):
    """Compiled before, it has a dense graph; while attached, one with our hooks in it: neither is
    run, the backbone is, as ever or as we compile it."""
    model = make_model("llava")
    inputs = prompt(model, "llava")
    whole = torch.compile(model, backend="eager")
    with torch.no_grad():
        dense = whole(**inputs).logits if when == "before" else model(**inputs).logits
        with attach(model, make_selectors(), 4):
            expected = model(**inputs).logits
        ours = {"backend": "eager"} if when == "with ours" else False
        with attach(whole, make_selectors(), 4, compile=ours):
            for cache in (False, True):
                assert torch.equal(whole(**inputs, use_cache=cache).logits, expected)
        assert torch.equal(whole(**inputs).logits, dense)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_part_that_its_user_compiles_is_refused():
    """Hooks that come after it are not in its graph."""
    model = make_model("llava")
    inputs, decoder = prompt(model, "llava"), model.model.language_model

    def refused_as(name):
        with pytest.raises(AlvtsError, match=f"torch.compile has compiled {name}, a part"):
            attach(model, make_selectors(), 4)

    with torch.no_grad():
        backbone, model.model = model.model, torch.compile(model.model, backend="eager")
        refused_as("LlavaModel")
        model.model = backbone
        backbone.language_model = torch.compile(decoder, backend="eager")
        refused_as("LlamaModel")
        backbone.language_model = decoder
        decoder.layers[1].compile(backend="eager")
        refused_as("LlamaDecoderLayer")
        decoder.layers[1]._compiled_call_impl = None
        # A forward that ran compiled, and a part that is swapped in later: their hooks do not run.
        backbone.forward = torch.compile(backbone.forward, backend="eager")
        model(**inputs)
        with (
            attach(model, make_selectors(), 4),
            pytest.raises(AlvtsError, match="the layers ran without alvts' hooks"),
        ):
            model(**inputs)
        del backbone.forward
        graph = torch.compile(decoder, backend="eager")
        backbone.language_model = graph
        dense = model(**inputs, use_cache=False).logits
        backbone.language_model = decoder
        with attach(model, make_selectors(), 4):
            backbone.language_model = graph
            with pytest.raises(AlvtsError, match=r"torch.compile has compiled LlamaModel, a part"):
                model(**inputs, use_cache=False)
            backbone.language_model = decoder
            # In place: its hooks would run, but lose what they share.
            decoder.compile(backend="eager")
            for cache in (False, True):
                with pytest.raises(AlvtsError, match=r"torch.compile has compiled LlamaModel, a"):
                    model(**inputs, use_cache=cache)
            decoder._compiled_call_impl = None
        assert torch.equal(model(**inputs, use_cache=False).logits, dense)


@torch._dynamo.config.patch(recompile_limit=1)
def test_attaching_again_and_again_does_not_reach_the_limit():
    model = make_model("llava")
    inputs = prompt(model, "llava")
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        for keep in (2, 3):
            with attach(model, make_selectors(), keep, compile={"backend": counter}):
                model(**inputs)
    assert counter.frame_count == 2


@torch._dynamo.config.patch(recompile_limit=1)
def test_past_the_limit_it_runs_uncompiled():
    model = make_model("llava")
    inputs = [prompt(model, "llava", tokens) for tokens in (12, 14)]
    with torch.no_grad():
        with attach(model, make_selectors(), 4):
            expected = model(**inputs[1]).logits
        with attach(model, make_selectors(), 4, compile={"backend": "eager"}):
            model(**inputs[0])
            with pytest.warns(UserWarning, match="uncompiled"):
                assert torch.equal(model(**inputs[1]).logits, expected)


def test_what_torch_is_told_where_nothing_is_asked_for(monkeypatch):
    """A graph on a GPU, where launching takes longer than computing."""
    told = []

    def compile_nothing(text_model, plan, set_plan, options):
        told.append(options)
        return lambda: None

    monkeypatch.setattr("alvts_cli.engine.attachment.compile_decoder", compile_nothing)
    for asked in (True, {"backend": "eager"}):
        attach(make_model("llava"), make_selectors(), 4, compile=asked).detach()
    assert told == [usual_options(torch.device("cpu")), {"backend": "eager"}]
    assert [dict(usual_options(torch.device(kind))) for kind in ("cpu", "cuda")] == [
        {},
        {"mode": "reduce-overhead"},
    ]


def test_phases_are_timed_uncompiled():
    model = make_model("llava")
    counter = CompileCounterWithBackend("eager")
    names = []
    with torch.no_grad(), attach(model, make_selectors(), 4, compile={"backend": counter}) as a:
        a.phase = lambda name: names.append(name) or nullcontext()
        model(**prompt(model, "llava"))
    assert "merge" in names and counter.frame_count == 0
