"""What a program does with an attached model: threads, copies, other dtypes, parts, old caches."""

import copy
import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import (
    LAYERS,
    Prompt,
    make_inputs,
    make_model,
    make_selectors,
    one_image,
)

from alvts_cli import AlvtsError, attach
from alvts_cli.engine import attach_scorer, cache_of
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
    with pytest.raises(AlvtsError, match="the whole model, not to a part of it such as LlavaModel"):
        attach(model.model, make_selectors("llava"), keep=0.3)
    with pytest.raises(AlvtsError, match="the whole model"):
        attach_scorer(model.model, None, 0.3)


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
