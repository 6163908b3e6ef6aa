"""What a program does with an attached model: threads, copies, other dtypes, parts, old caches."""

import copy
import gc
import io
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import (
    CACHE,
    IMAGE,
    LAYERS,
    Prompt,
    make_inputs,
    make_model,
    make_selectors,
    one_image,
)
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import DynamicCache

from alvts_cli import AlvtsError, attach
from alvts_cli.engine import NAMED, Keep, Pieces, Policy, attach_scorer, cache_of, make_pieces
from alvts_cli.engine.calls import going_on

FAMILY = "qwen2_5_vl"


def prompts(model, count=4):
    """Inputs of different lengths and pictures."""
    return [
        make_inputs(model, Prompt([1, *range(8, 9 + i)], one_image(FAMILY, i + 1).images))
        for i in range(count)
    ]


def test_threads_work_as_on_the_dense_model():
    """Each on inputs of its own: the logits are those of one thread after the other."""
    model = make_model(FAMILY)
    inputs = prompts(model)
    with torch.no_grad(), attach(model, make_selectors(FAMILY), keep=0.3):
        alone = [model(**one).logits for one in inputs]
        told = [model.generate(**one, max_new_tokens=4, do_sample=False) for one in inputs]

        ready = threading.Barrier(len(inputs))

        def work(one):
            ready.wait()
            with torch.no_grad():
                logits = [model(**one).logits for _ in range(5)]
                return logits, model.generate(**one, max_new_tokens=4, do_sample=False)

        with ThreadPoolExecutor(len(inputs)) as pool:
            together = list(pool.map(work, inputs))
    for (logits, said), one, before in zip(together, alone, told, strict=True):
        assert all(torch.equal(again, one) for again in logits)
        assert torch.equal(said, before)


def test_a_forward_inside_anothers_layers_keeps_its_own_state():
    """One thread stops between two layers while another runs a whole forward."""
    model = make_model(FAMILY)
    first, second = prompts(model, 2)
    inside, done = threading.Event(), threading.Event()

    def hold(*_):
        if threading.current_thread() is holder:
            inside.set()
            assert done.wait(600)

    results = {}

    def held():
        with torch.no_grad():
            results["held"] = model(**first).logits

    with torch.no_grad(), attach(model, make_selectors(FAMILY), keep=0.3):
        expected = model(**first).logits, model(**second).logits
        holder = threading.Thread(target=held)
        handle = model.model.language_model.layers[LAYERS // 2].mlp.register_forward_hook(hold)
        try:
            holder.start()
            assert inside.wait(600)
            other = model(**second).logits
        finally:
            done.set()
            holder.join()
            handle.remove()
    assert torch.equal(other, expected[1]) and torch.equal(results["held"], expected[0])


def test_a_copy_of_an_attached_model_is_refused():
    model = make_model(FAMILY)
    inputs = make_inputs(model, one_image(FAMILY))
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, make_selectors(FAMILY), keep=0.3):
            with pytest.raises(AlvtsError, match="detach it before copying"):
                copy.deepcopy(model)
            with pytest.raises(AlvtsError, match="detach it before pickling"):
                pickle.dumps(model)
            with pytest.raises(AlvtsError, match="detach it before pickling"):
                torch.save(model, io.BytesIO())
            # What holds weights alone can be copied.
            assert copy.deepcopy(model.state_dict()).keys() == model.state_dict().keys()
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**inputs).logits, dense)
        assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, dense)


@pytest.mark.parametrize("policy", ["paper", "every-4"])
def test_selectors_follow_the_model_to_another_dtype(policy):
    from alvts_cli.engine import parse_policy

    model, selectors = make_model(FAMILY), make_selectors(FAMILY)
    if policy != "paper":
        from test_artifact import make_artifact

        selectors = make_artifact()
    chosen = parse_policy(policy)
    inputs = make_inputs(model, one_image(FAMILY))
    with torch.no_grad():
        with attach(model, selectors, keep=0.3, policy=chosen) as attachment:
            before = model(**inputs).logits
            model.to(torch.float64)
            wide = model(**inputs).logits
            assert wide.dtype == torch.float64 and attachment.last is not None
            model.to(torch.float32)
            # From the selectors as they were given: nothing was rounded on the way.
            assert torch.equal(model(**inputs).logits, before)
        model.to(torch.float64)
        with attach(model, selectors, keep=0.3, policy=chosen):
            assert torch.equal(model(**inputs).logits, wide)


def test_an_attachment_is_entered_once():
    model = make_model(FAMILY)
    attachment = attach(model, make_selectors(FAMILY), keep=0.3)
    with attachment:
        pass
    with pytest.raises(AlvtsError, match="this attachment has ended; call attach again"):
        attachment.__enter__()


def test_a_part_of_a_model_is_refused():
    model = make_model("llava")
    for part in (model.model, model.model.language_model, model.lm_head, "llava"):
        with pytest.raises(AlvtsError) as error:
            attach(part, make_selectors("llava"), keep=0.3)
        assert "\n" not in str(error.value)
    why = "as from_pretrained gives it, not to a part of it or to a wrapper around it such as {}"
    with pytest.raises(AlvtsError, match=why.format("LlavaModel")):
        attach(model.model, make_selectors("llava"), keep=0.3)
    with pytest.raises(AlvtsError, match=why.format("LlavaModel")):
        attach_scorer(model.model, Says(None), 0.3)
    with pytest.raises(AlvtsError, match="as from_pretrained gives it is wanted here, not a str"):
        attach("llava", make_selectors("llava"), keep=0.3)


def test_a_wrapper_is_called_one():
    """As PEFT's, whose config is the model's and whose parts are found through it."""

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

    with pytest.raises(AlvtsError, match=r"wrapper around it such as Wrapper.*get_base_model\(\)"):
        attach(Wrapper(make_model("llava")), make_selectors("llava"), keep=0.3)


class Says:
    """A scorer of one answer."""

    def __init__(self, answer):
        self.answer = answer

    def importance(self, layer_index, layer, hidden, plan, layer_kwargs):
        return self.answer(plan) if callable(self.answer) else self.answer


ANSWERS = {
    "None": (None, "a scorer gives a tensor, not a NoneType"),
    "a list": ([0.5], "a scorer gives a tensor, not a list"),
    "an array": (torch.zeros(2, 28).numpy(), "a scorer gives a tensor, not a ndarray"),
    "integers": (lambda plan: plan.visual.long(), r"floats \[2, 28\] on cpu.*not int64 \[2, 28\]"),
    "one for all samples": (torch.zeros(28), r"floats \[2, 28\].*not float32 \[28\]"),
    "more samples": (torch.zeros(3, 28), r"floats \[2, 28\].*not float32 \[3, 28\]"),
    "fewer samples": (torch.zeros(1, 28), r"floats \[2, 28\].*not float32 \[1, 28\]"),
    "fewer tokens": (torch.zeros(2, 16), r"floats \[2, 28\].*not float32 \[2, 16\]"),
    "elsewhere": (torch.zeros(2, 28, device="meta"), r"on cpu.*not float32 \[2, 28\] on meta"),
}


@pytest.mark.parametrize(("answer", "why"), ANSWERS.values(), ids=ANSWERS)
def test_a_scorer_gives_a_float_for_every_token(answer, why):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava", 1), one_image("llava", 2))
    with torch.no_grad(), attach_scorer(model, Says(answer), 0.25):
        with pytest.raises(AlvtsError, match=why) as error:
            model(**inputs)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_words_are_kept_whatever_a_scorer_says(value):
    """Everywhere, and of the visual tokens alone; the finite ones are told from the rest."""
    model = make_model("llava")
    inputs = make_inputs(
        model, Prompt([1, 5, 9, 12, 33], one_image("llava").images), one_image("llava", 2)
    )
    assert not inputs["attention_mask"].all()

    def mixed(plan):
        scores = torch.full(plan.visual.shape, value)
        for b, visual in enumerate(plan.visual):
            scores[b, visual.nonzero()[3:6, 0]] = 1.0
        return scores

    everywhere = torch.full(inputs["input_ids"].shape, value)
    for answer in (everywhere, mixed):
        chosen = []
        with torch.no_grad(), attach_scorer(model, Says(answer), 3) as attachment:
            attachment.watch = chosen.append
            logits = model(**inputs).logits
        assert bool(logits.isfinite().all())
        words = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
        for b, one in enumerate(chosen[0].index):
            kept = one if chosen[0].valid is None else one[chosen[0].valid[b]]
            assert set(words[b].nonzero()[:, 0].tolist()) <= set(kept.tolist())
            seen = kept[inputs["input_ids"][b, kept] == IMAGE].tolist()
            first = (inputs["input_ids"][b] == IMAGE).nonzero()[:, 0].tolist()
            takes_finite = answer is mixed and value != torch.inf
            assert seen == (first[3:6] if takes_finite else first[:3])


COMPARED = [name for name, policy in NAMED.items() if policy.compares]
SCORES = {
    "logs": lambda scores: scores.log(),
    "cosines": lambda scores: 2 * scores - 1,
    "negative": lambda scores: scores - 1e30,
    "float64": lambda scores: scores.double() - 3,
}


@pytest.mark.parametrize("policy", COMPARED)
@pytest.mark.parametrize("change", SCORES.values(), ids=SCORES)
def test_scores_of_any_sign_may_be_compared(change, policy):
    """They go through a power, which a negative number has none of: words were dropped."""
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava", 1), one_image("llava", 2))
    pieces = make_pieces(model, make_selectors(policy=NAMED[policy]), NAMED[policy])
    torch.manual_seed(0)
    scores = change(torch.rand(inputs["input_ids"].shape))
    for value in (None, torch.nan, torch.inf, -torch.inf):
        told, given = [], scores.clone()
        if value is not None:
            given[:, 4:20] = value
        with torch.no_grad(), attach_scorer(model, Says(given), 4, pieces) as attachment:
            attachment.watch = told.append
            assert bool(model(**inputs).logits.isfinite().all())
        visual = inputs["input_ids"] == IMAGE
        for one in told:
            assert one.valid is None
            assert visual.gather(1, one.index).sum(dim=1).tolist() == [4, 4]


def test_what_is_no_scorer_is_named():
    model = make_model("llava")
    for none, name in ((None, "NoneType"), (Says, "Says"), (len, "len")):
        with pytest.raises(AlvtsError, match=f"an object with a method importance, not {name}"):
            attach_scorer(model, none, 0.3)


def made_pieces(policy="each", **more):
    return make_pieces(make_model("llava", **more), make_selectors(policy=NAMED[policy]), policy)


PIECES = {
    "text": (lambda: "carry", "pieces come from make_pieces, not a str"),
    "of text": (lambda: Pieces("once"), "pieces come from make_pieces"),
    "without tensors": (lambda: Pieces(Policy(quality=0.3)), "hold 0 selectors for 4 layers"),
    "without updates": (lambda: Pieces(Policy(carry=True)), "hold 0 carries for 4 layers"),
    "of another model": (
        lambda: replace(made_pieces(), selectors=made_pieces().selectors[:3]),
        "hold 3 selectors for 4 layers",
    ),
    "of another dtype": (
        lambda: made_pieces(dtype=torch.bfloat16),
        "another dtype, or is on",
    ),
}


@pytest.mark.parametrize(("make", "why"), PIECES.values(), ids=PIECES)
def test_pieces_are_of_this_model(make, why):
    model = make_model("llava")
    with pytest.raises(AlvtsError, match=why) as error:
        attach_scorer(model, Says(None), 0.3, make())
    assert "\n" not in str(error.value)
    inputs = make_inputs(model, one_image("llava"))
    scores = torch.rand(inputs["input_ids"].shape)
    with torch.no_grad(), attach_scorer(model, Says(scores), 0.3, made_pieces()):
        model(**inputs)
        model.to(torch.float64)
        with pytest.raises(AlvtsError, match="detach, and make them again with make_pieces"):
            model(**inputs)


def test_pieces_are_made_of_selectors_for_a_whole_model():
    model, selectors = make_model("llava"), make_selectors(policy=NAMED["each"])
    made = make_pieces(model, selectors, "once")
    assert made.policy == NAMED["once"] and len(made.selectors) == LAYERS
    for given, why in (
        ((model.model, selectors, "once"), "not to a part of it"),
        ((model, None, "once"), "not a NoneType"),
        ((model, make_selectors(layers=3), "once"), "for 3 layers but the model has 4"),
        ((model, selectors, "twice"), "unknown policy 'twice'"),
    ):
        with pytest.raises(AlvtsError, match=why):
            make_pieces(*given)


@pytest.mark.parametrize("when", ["fewer", "otherwise", "fresh", "config"])
def test_layers_that_change_while_attached_are_refused(when):
    model = make_model("llava")
    inputs, decoder = make_inputs(model, one_image("llava")), model.model.language_model
    layers = decoder.layers
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, make_selectors(), 0.3, policy="once"):
            if when == "fewer":
                decoder.layers = layers[:2]
            elif when == "otherwise":
                decoder.layers = nn.ModuleList([layers[0], layers[2], layers[1], layers[3]])
            elif when == "fresh":
                new = make_model("llava").model.language_model.layers[1]
                decoder.layers = nn.ModuleList([layers[0], new, layers[2], layers[3]])
            else:
                decoder.config.num_hidden_layers = 2
            with pytest.raises(AlvtsError, match="are not those that alvts was attached to"):
                model(**inputs)
            decoder.layers, decoder.config.num_hidden_layers = layers, LAYERS
            model(**inputs)
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize("policy", ["paper", "once"])
@pytest.mark.parametrize("name", ["flex_attention", "paged|eager", "flash_attention_2"])
def test_another_attention_kernel_while_attached(name, policy):
    """Flex attention crashed the whole process where the kernel is to weigh tokens."""
    model = make_model("llava")
    inputs, config = make_inputs(model, one_image("llava")), model.model.language_model.config
    with torch.no_grad(), attach(model, make_selectors(policy=NAMED[policy]), 0.3):
        if name.startswith("flash") and policy == "paper":
            return
        config._attn_implementation_internal = name
        with pytest.raises(AlvtsError, match="load the model with sdpa"):
            model(**inputs)
        config._attn_implementation_internal = "eager"
        model(**inputs)


@pytest.mark.parametrize("image", [True, False])
def test_an_interrupted_turn_is_not_waited_for(image):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    word, text = torch.tensor([[5]]), torch.tensor([[1, 7, 8, 9]])

    def stop(*args):
        raise KeyboardInterrupt

    with torch.no_grad():
        cache, expected = DynamicCache(), DynamicCache()
        for each in (cache, expected):
            model(text, **{CACHE: each})
        with attach(model, make_selectors(), 0.25):
            handle = model.model.language_model.layers[0].self_attn.register_forward_pre_hook(stop)
            turn = inputs if image else {"input_ids": text}
            turn = {name: turn[name] for name in turn if name != "attention_mask"}
            with pytest.raises(KeyboardInterrupt):
                model(**turn, **{CACHE: cache})
            handle.remove()
        for _ in range(2):
            got = model(word, **{CACHE: cache}).logits
            assert torch.equal(got, model(word, **{CACHE: expected}).logits)
        assert {layer.get_seq_length() for layer in cache.layers} == {6}


def test_layers_of_two_models_and_layers_that_stand_twice():
    model, other = make_model("llava"), make_model("llava")
    other.model.language_model = model.model.language_model
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad(), attach(model, make_selectors(), 0.3):
        with pytest.raises(AlvtsError, match="or to one that shares layers with it, already"):
            attach(other, make_selectors(), 0.3)
        model(**inputs)
    attach(other, make_selectors(), 0.3).detach()
    layers = model.model.language_model.layers
    layers[2] = layers[1]
    with pytest.raises(AlvtsError, match="a layer of this model stands in several places"):
        attach(model, make_selectors(), 0.3)


def test_an_attachment_that_has_ended_keeps_no_model_alive():
    model = make_model("llava")
    with torch.no_grad(), attach(model, make_selectors(), 0.3) as attachment:
        model(**make_inputs(model, one_image("llava")))
    gone = [weakref.ref(one) for one in (model, model.model.language_model.layers[1])]
    del model
    gc.collect()
    assert [one() for one in gone] == [None, None]
    assert attachment.last.kept == ((4,) * 1,) * LAYERS
    attachment.detach()


def test_ids_are_a_tensor():
    model = make_model("llava")
    why = pytest.raises(AlvtsError, match="the input_ids are a tensor, not a list")
    with attach(model, make_selectors(), 0.3), why:
        model([[1, 2]])


@pytest.mark.parametrize(
    "options",
    [{"bogus": 1}, {"fullgraph": False}, {"mode": "nonsense"}, {"backend": "nonsense"}],
    ids=str,
)
def test_options_that_torch_compile_does_not_take(options):
    model = make_model("llava")
    with pytest.raises(AlvtsError, match=r"torch.compile does not take compile=") as error:
        attach(model, make_selectors(), 0.3, compile=options)
    assert "\n" not in str(error.value)
    attach(model, make_selectors(), 0.3).detach()


@pytest.mark.parametrize("shape", [(0, 4), (1, 0), (4,)])
def test_no_tokens_are_refused(shape):
    model = make_model("llava")
    ids = torch.zeros(shape, dtype=torch.int64)
    with (
        torch.no_grad(),
        attach(model, make_selectors(), 0.3),
        pytest.raises(AlvtsError, match="give one or more tokens of one or more samples"),
    ):
        model(ids)


def test_a_selective_cache_after_leaving_is_refused():
    model = make_model(FAMILY)
    inputs = make_inputs(model, one_image(FAMILY))
    word = torch.tensor([[5]])
    with torch.no_grad():
        with attach(model, make_selectors(FAMILY), keep=0.3):
            output = model(**inputs, use_cache=True)
            model(input_ids=word, use_cache=True, **going_on(output))
        with pytest.raises(AlvtsError, match="filled while alvts was attached"):
            model(input_ids=word, use_cache=True, **going_on(output))
        assert cache_of(output).get_seq_length() == inputs["input_ids"].shape[1] + 1
        # One that holds everything goes on.
        with attach(model, make_selectors(FAMILY), keep=1.0):
            output = model(**inputs, use_cache=True)
        model(input_ids=word, use_cache=True, **going_on(output))


def test_two_pictures_behind_the_same_words_share_nothing():
    """Batched with another picture behind the same ids, and after it: what each layer holds and
    says is that of the picture alone."""
    model = make_model(FAMILY)
    pair = [one_image(FAMILY, seed) for seed in (1, 2)]
    with torch.no_grad(), attach(model, make_selectors(FAMILY), keep=0.3):
        alone = [model(**make_inputs(model, one), use_cache=True) for one in pair]
        assert not torch.equal(alone[0].logits, alone[1].logits)
        both = model(**make_inputs(model, *pair), use_cache=True)
        again = model(**make_inputs(model, pair[0]), use_cache=True)
    assert torch.equal(again.logits, alone[0].logits)
    for i, one in enumerate(alone):
        assert torch.allclose(both.logits[i : i + 1], one.logits, atol=1e-5)
        for a, b in zip(cache_of(one).layers, cache_of(both).layers, strict=True):
            assert torch.allclose(a.keys, b.keys[i : i + 1], atol=1e-5)


def test_a_path_may_be_attached(tmp_path: Path):
    from test_artifact import make_artifact

    from alvts_cli.artifact import save_artifact

    model = make_model(FAMILY)
    save_artifact(make_artifact(), tmp_path / "a.safetensors")
    inputs = make_inputs(model, one_image(FAMILY))
    with torch.no_grad():
        with attach(model, make_artifact(), keep=0.3):
            expected = model(**inputs).logits
        for path in (tmp_path / "a.safetensors", str(tmp_path / "a.safetensors")):
            with attach(model, path, keep=0.3):
                assert torch.equal(model(**inputs).logits, expected)
    other = make_model("llava")
    with pytest.raises(AlvtsError, match="made for org/model"):
        attach(other, tmp_path / "a.safetensors")
    with pytest.raises(AlvtsError, match="there is no selector file"):
        attach(model, tmp_path / "none.safetensors")


def test_threads_on_a_compiled_model_are_refused_by_that_name():
    """The forward that runs ends as ever, and then another thread may have its turn."""
    model = make_model(FAMILY)
    inputs = make_inputs(model, one_image(FAMILY))
    refused = []

    def other(*_):
        if refused:
            return

        def call():
            with pytest.raises(AlvtsError) as error, torch.no_grad():
                model(**inputs)
            refused.append(str(error.value))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with torch.no_grad():
        with attach(model, make_selectors(FAMILY), keep=0.3):
            expected = model(**inputs).logits
        # The backend that compiles nothing.
        with attach(model, make_selectors(FAMILY), keep=0.3, compile={"backend": "eager"}):
            handle = model.model.visual.register_forward_hook(other)
            got = model(**inputs).logits
            handle.remove()
            with ThreadPoolExecutor(1) as pool:
                later = pool.submit(torch.no_grad()(lambda: model(**inputs).logits)).result()
    assert len(refused) == 1 and "several threads" in refused[0]
    assert torch.equal(got, expected) and torch.equal(later, expected)


@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}])
def test_an_interrupt_leaves_nothing_behind(compiled):
    """Torch calls no hooks behind what is no Exception."""
    model = make_model(FAMILY)
    inputs = make_inputs(model, one_image(FAMILY))

    def interrupt(*_):
        raise KeyboardInterrupt

    with torch.no_grad(), attach(model, make_selectors(FAMILY), keep=0.3, compile=compiled):
        expected = model(**inputs).logits
        handle = model.model.visual.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**inputs)
        handle.remove()
        tokens = inputs["input_ids"].shape[1]
        width = model.config.text_config.hidden_size
        with pytest.raises(AlvtsError, match="tokens that alvts did not see"):
            model.model.language_model(inputs_embeds=torch.zeros(1, tokens, width))
        with ThreadPoolExecutor(1) as pool:
            later = pool.submit(torch.no_grad()(lambda: model(**inputs).logits)).result()
        assert torch.equal(later, expected)


@pytest.mark.parametrize("part", ["vision_tower", "language_model.layers.1", "language_model"])
def test_a_forward_that_is_detached_in_its_middle_is_refused(part):
    """By a hook of its own, as by another thread: what comes of it is half of this, half dense."""
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad():
        dense = model(**inputs).logits
        attachment = attach(model, make_selectors(), keep=0.3)
        handle = model.model.get_submodule(part).register_forward_hook(
            lambda *_: attachment.detach()
        )
        with pytest.raises(AlvtsError, match="detached while the model ran"):
            model(**inputs)
        handle.remove()
        assert torch.equal(model(**inputs).logits, dense)


@pytest.mark.parametrize(
    ("part", "compiled"),
    [
        ("visual", False),
        ("language_model.layers.1.mlp", False),
        # In front of the layers alone: the rest is one graph.
        ("visual", {"backend": "eager"}),
    ],
)
def test_a_forward_inside_of_another_leaves_that_as_it_was(part, compiled):
    """By a hook of the user."""
    model = make_model(FAMILY)
    first, second = prompts(model, 2)
    inner = []

    def hook(*_):
        if not inner:
            inner.append(None)
            inner[0] = model(**second).logits

    with torch.no_grad(), attach(model, make_selectors(FAMILY), keep=0.3, compile=compiled):
        expected = [model(**one).logits for one in (first, second)]
        handle = model.model.get_submodule(part).register_forward_hook(hook)
        outer = model(**first).logits
        handle.remove()
        assert torch.equal(outer, expected[0]) and torch.equal(inner[0], expected[1])


def test_a_shallow_copy_is_refused():
    """It has hooks, and a wrapper that would run the original's weights."""
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad(), attach(model, make_selectors(), keep=0.3):
        for twin in (copy.copy(model.model), model.model._replicate_for_data_parallel()):
            with pytest.raises(AlvtsError, match="a copy of a model that alvts is attached to"):
                twin(**inputs)
        model(**inputs)


@pytest.mark.parametrize("compiled", [False, {"backend": "eager"}])
def test_what_is_wrapped_around_it_meanwhile_stays(compiled):
    """As accelerate wraps modules; and as it unwraps one that was wrapped before."""
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    parts = model.model, model.model.language_model

    def wrap(part):
        before = part.forward
        part.forward = made = lambda *args, **kwargs: before(*args, **kwargs)
        return made

    with torch.no_grad():
        dense = model(**inputs).logits
        attachment = attach(model, make_selectors(), keep=0.3, compile=compiled)
        expected = model(**inputs).logits
        made = [wrap(part) for part in parts]
        assert torch.equal(model(**inputs).logits, expected)
        attachment.detach()
        assert [part.forward for part in parts] == made
        assert torch.equal(model(**inputs).logits, dense)
        attachment = attach(model, make_selectors(), keep=0.3, compile=compiled)
        for part in parts:
            del part.forward
        attachment.detach()
        assert not any("forward" in vars(part) for part in parts)
        assert torch.equal(model(**inputs).logits, dense)


def test_arguments_without_names_are_those_with():
    """Of the whole model and of its backbone: ids, pixels, mask."""
    model = make_model("llava")
    batch = make_inputs(model, one_image("llava", 1), Prompt([1, 5, 6], [(16, 16)], seed=2))
    ids, mask, pixels = (batch[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    assert not mask.all()
    with torch.no_grad(), attach(model, make_selectors(), keep=0.3):
        expected = model(**batch)
        assert torch.equal(model(ids, pixels, mask).logits, expected.logits)
        states = model.model(**batch).last_hidden_state
        assert torch.equal(model.model(ids, pixels, mask).last_hidden_state, states)
        with pytest.raises(AlvtsError, match="pass the 2-D attention_mask"):
            model.model(ids, pixels, mask[:, None, None].bool())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", NAMED)
def test_under_autocast(policy, dtype):
    """Everything kept is dense bit for bit; a choice keeps as many as without, and is near it."""
    model = make_model("llava")
    selectors = make_selectors(policy=NAMED[policy])
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad():
        with attach(model, selectors, 0.25, policy=policy) as attachment:
            full, kept = model(**inputs).logits, attachment.last
        with torch.autocast("cpu", dtype):
            dense = model(**inputs).logits
            with attach(model, selectors, 1.0, policy=policy):
                assert torch.equal(model(**inputs).logits, dense)
            with attach(model, selectors, 0.25, policy=policy) as attachment:
                got = model(**inputs).logits
                assert attachment.last == kept and got.dtype == dtype
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
    # In bfloat16 another token may be chosen.
    if dtype == torch.float16:
        torch.testing.assert_close(got.float(), full, rtol=0.05, atol=0.05)


def test_layers_without_selectors_and_a_prompt_without_text():
    """Something has to run there: the first visual token."""
    model = make_model("llava")
    selectors = make_selectors(policy=NAMED["once"])
    selectors.layers[2] = None
    image = make_inputs(model, one_image("llava"))
    ids = image["input_ids"][image["input_ids"] == IMAGE][None]
    for policy in ("paper", "once"):
        with (
            torch.no_grad(),
            attach(model, selectors, [1.0, 0.25, 0, 5], policy=policy) as attachment,
        ):
            chosen = []
            attachment.watch = chosen.append
            model(ids, pixel_values=image["pixel_values"])
        assert attachment.last.kept[2] == (1,)
        if policy == "paper":
            assert chosen[1].layer == 2 and chosen[1].index.tolist() == [[0]]


RIDDLES = {
    "policy": (dict(policy="twice"), "unknown policy 'twice'"),
    "policy of another kind": (dict(policy=4), "policy is a Policy or one of paper, once"),
    "compile": (dict(compile="yes"), "compile is True, False or options"),
    "no selectors": (dict(selectors=None), "selectors are an Artifact.*not a NoneType"),
    "selectors of another kind": (dict(selectors={}), "selectors are an Artifact.*not a dict"),
    "keep": (dict(keep=Keep((0.5,))), "keep has 1 values but the model has 4 layers"),
}


@pytest.mark.parametrize(("more", "why"), RIDDLES.values(), ids=RIDDLES)
def test_arguments_of_another_kind_are_named(more, why):
    given = dict(selectors=make_selectors(), keep=0.3) | more
    model = make_model("llava")
    with pytest.raises(AlvtsError, match=why) as error:
        attach(model, **given)
    assert "\n" not in str(error.value)
    attach(model, make_selectors(), keep=0.3, policy="once").detach()


def test_a_mask_of_another_size_is_named():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    with torch.no_grad(), attach(model, make_selectors(), keep=0.3):
        for mask in (inputs["attention_mask"][:, 1:], inputs["attention_mask"].expand(2, -1)):
            with pytest.raises(AlvtsError, match="but the input_ids are 1 x 28 behind 0"):
                model(**{**inputs, "attention_mask": mask})
        # Dense would take the first columns for the first tokens, whichever it has.
        for columns in (2, 10, 31):
            said = going_on(model(**inputs, use_cache=True))
            with pytest.raises(AlvtsError, match=f"1 x {columns}, but the input_ids are 1 x 2 be"):
                model(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, columns), **said)
        # A cache made anew of what a selecting one holds has lost what was seen.
        held = cache_of(model(**inputs, use_cache=True))
        made = DynamicCache([(layer.keys, layer.values) for layer in held.layers])
        with pytest.raises(AlvtsError, match="1 x 1 behind 16 in the KV cache"):
            model(torch.tensor([[5]]), attention_mask=torch.ones(1, 29), **{CACHE: made})


@pytest.mark.parametrize("keep", [1.0, 0.3])
@pytest.mark.parametrize("masked", [True, False])
def test_a_cache_of_another_batch_is_named(masked, keep):
    model = make_model("llava")
    inputs = make_inputs(
        model, Prompt([1, 5, 6, 7], one_image("llava").images), one_image("llava", 2)
    )
    with torch.no_grad(), attach(model, make_selectors(), keep):
        for batch in (1, 3):
            said = going_on(model(**inputs, use_cache=True))
            tokens = inputs["input_ids"].shape[1]
            mask = torch.ones(batch, tokens + 1, dtype=torch.int64) if masked else None
            with pytest.raises(
                AlvtsError, match=f"holds 2 samples, but the input_ids are of {batch}"
            ):
                model(torch.full((batch, 1), 5), attention_mask=mask, **said)


def test_a_projection_without_a_size_is_named():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, states):
            return self.inner(states)

    model = make_model("llava")
    attention = model.model.language_model.layers[1].self_attn
    attention.k_proj = Wrapper(attention.k_proj)
    with pytest.raises(AlvtsError, match="k_proj of layer 1 is a Wrapper"):
        attach(model, make_selectors(), keep=0.3)


def test_dropout_beside_a_projection_is_no_other_way_of_scoring():
    """A LoRA while it is trained."""

    class WithDropout(nn.Linear):
        def forward(self, states):
            return super().forward(nn.functional.dropout(states, 0.9, self.training))

    model = make_model("llava").train()
    for layer in model.model.language_model.layers:
        old = layer.self_attn.q_proj
        new = WithDropout(old.in_features, old.out_features, bias=False)
        new.weight = old.weight
        layer.self_attn.q_proj = new
    before = [module.training for module in model.modules()]
    attach(model, make_selectors(), keep=0.3).detach()
    assert [module.training for module in model.modules()] == before


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_trace_of_torch_jit_is_refused():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    given = inputs["input_ids"], inputs["pixel_values"]

    class Logits(nn.Module):
        def forward(self, ids, pixels):
            return model(ids, pixels, use_cache=False).logits

    with (
        torch.no_grad(),
        attach(model, make_selectors(), keep=0.3),
        pytest.raises(AlvtsError, match="trace the model without alvts"),
    ):
        torch.jit.trace(Logits(), given, check_trace=False)


def test_an_export_is_refused():
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))
    given = inputs["input_ids"], inputs["pixel_values"]

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids, pixels):
            return self.inner(ids, pixels, use_cache=False).logits

    with torch.no_grad(), attach(model, make_selectors(), keep=0.3):
        for export in (
            lambda: torch.export.export(Logits(), given, strict=False),
            lambda: make_fx(Logits())(*given),
        ):
            with pytest.raises(AlvtsError, match="export the model without alvts"):
                export()


def test_placed_in_inference_mode_and_trained_outside():
    model = make_model("llava")
    inputs, selectors = make_inputs(model, one_image("llava")), make_selectors(policy=NAMED["each"])
    # Of another precision than the model, so that they are copied.
    selectors.layers = [one.to(torch.device("cpu"), torch.float64) for one in selectors.layers]
    with torch.inference_mode():
        attachment = attach(model, selectors, keep=0.3, policy="each")
    with attachment:
        model(**inputs).logits.sum().backward()
    grad = model.model.language_model.layers[0].self_attn.q_proj.weight.grad
    assert grad is not None and bool(grad.any())
