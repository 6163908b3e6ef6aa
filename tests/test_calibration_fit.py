"""Initialisation, alignment and the sweep over layers."""

import gc
import hashlib
import json
import math
import weakref
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calibration_tools import LAYERS, RANK, WIDTH, fast, make_processor, make_small, scenes
from PIL import Image
from tiny import FAMILIES, make_inputs, make_model, make_selectors, one_image

from alvts_cli import AlvtsError, attach
from alvts_cli.artifact import Artifact, load_artifact, save_artifact
from alvts_cli.engine import Keep, default_rank, is_attached
from alvts_cli.engine.calls import POSITIONS
from alvts_cli.engine.placing import make_scorer
from alvts_cli.engine.plan import make_plan
from alvts_cli.engine.probe import attention_importance, project
from alvts_cli.families import QueryKey, family_of
from alvts_cli.prompts import build_inputs
from calibration import Checkpoint, Sample, Settings, Source, Watch, calibrate
from calibration.align import align, divergence
from calibration.capture import advance, capture
from calibration.initialise import initialise
from calibration.sweep import _targets

pytestmark = pytest.mark.usefixtures("quick_calibration")


def projections(model: Any, layer: int = 0) -> QueryKey:
    family = family_of(model)
    return family.query_key(family.layers(model)[layer])


def fit(model: Any, out: Path, resume: bool = False, **more: Any) -> Artifact:
    """Calibrate, save and clean up, as the command does."""
    watch = more.pop("watch", None)
    samples, processor = more.pop("samples", scenes()), more.pop("processor", make_processor())
    checkpoint = Checkpoint(out, resume)
    artifact = calibrate(
        model,
        processor,
        samples,
        fast(**more),
        model_id="small",
        checkpoint=checkpoint,
        watch=watch,
    )
    save_artifact(artifact, out)
    checkpoint.remove()
    return artifact


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_projection_itself(family: str) -> None:
    of = projections(make_model(family))
    hidden = torch.randn(50, of.w_k.shape[1])
    factors = initialise(of, hidden, min(of.w_k.shape))
    torch.testing.assert_close(factors.up @ factors.down, of.w_k.detach(), rtol=0, atol=1e-5)


def test_singular_values_are_truncated_and_the_latent_is_scaled() -> None:
    of = projections(make_model("llava"))
    hidden = torch.randn(50, of.w_k.shape[1]) * 7
    factors = initialise(of, hidden, 7)
    found = torch.linalg.svdvals(factors.up @ factors.down)
    expected = torch.linalg.svdvals(of.w_k.detach())
    torch.testing.assert_close(found[:7], expected[:7], rtol=1e-4, atol=1e-4)
    assert found[7:].max() < 1e-5
    # Numbers of order one, whatever the weights are.
    states = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + of.norm_eps)
    latent = states @ factors.selector(of).down.T
    torch.testing.assert_close(latent.std(dim=0), torch.ones(7))


def test_the_objective_sees_shape_not_scale() -> None:
    visual = torch.ones(2, 4, dtype=torch.bool)
    reference = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 1.0, 0.0]]) * 1e-9
    assert divergence(reference * 7, reference, visual).abs().max() < 1e-6
    other = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    # By hand: sum of p log(p / q) with p = .1 .2 .3 .4 and q its reverse; and log 4.
    by_hand = sum(p * math.log(p / (0.5 - p)) for p in (0.1, 0.2, 0.3, 0.4))
    torch.testing.assert_close(
        divergence(other, reference, visual), torch.tensor([by_hand, math.log(4)])
    )
    # What is not visual does not count.
    three = torch.tensor([[True, True, True, False]])
    torch.testing.assert_close(
        divergence(
            torch.tensor([[1.0, 2.0, 3.0, 0.0]]), torch.tensor([[2.0, 4.0, 6.0, 0.0]]), three
        ),
        torch.zeros(1),
    )
    # No visual token was seen by any text row, or all importances underflow.
    nothing = torch.zeros(2, 4)
    assert divergence(nothing, reference, visual).isfinite().all()
    assert divergence(reference, nothing, visual).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_alignment_comes_closer_to_the_reference(family: str) -> None:
    model = make_model(family)
    layer = family_of(model).layers(model)[0]
    inputs = [make_inputs(model, one_image(family, seed)) for seed in range(6)]
    targets = _targets(layer, [capture(model, one) for one in inputs], 0, "alvts")
    of = projections(model)
    start = initialise(of, torch.cat([t.hidden[t.visual] for t in targets]), 4)
    end = align(start, of, targets, Settings(steps=60, batch=4, learning_rate=0.01), seed=0)

    def loss(factors: Any) -> torch.Tensor:
        selector = factors.selector(of)
        return torch.cat([target.measure(selector)[1] for target in targets]).mean()

    with torch.no_grad():
        assert loss(end) < 0.7 * loss(start)
    assert all(weight.grad is None for weight in model.parameters())


def test_calibration_raises_recall_on_samples_not_fitted(tmp_path: Path) -> None:
    model = make_small()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    artifact = calibrate(model, make_processor(), scenes(32), fast(steps=60, batch=8))
    mean = artifact.calibration.mean
    assert mean.loss_after < 0.8 * mean.loss_before
    assert mean.recall_after > mean.recall_before + 0.03
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())

    record = artifact.calibration
    assert (record.fitted, record.held_out) == (24, 8)
    assert record.settings["rank"] == artifact.rank == RANK
    assert record.data == "pocket scenes"
    assert record.versions["torch"] == torch.__version__
    assert artifact.hidden_size == WIDTH and len(record.layers) == LAYERS
    assert artifact.default_keep == pytest.approx(1 / 9)

    save_artifact(artifact, tmp_path / "a.safetensors")
    found = load_artifact(tmp_path / "a.safetensors")
    found.check_model(model)
    assert found.calibration == record
    sample = next(iter(scenes(1)))
    inputs = build_inputs(make_processor(), sample.images, sample.prompt)
    with attach(model, found) as attachment, torch.no_grad():
        model(**inputs)
    assert attachment.last is not None and attachment.last.kept == ((28,),) * LAYERS


def test_what_is_measured_is_what_runs() -> None:
    """The stored selector gives, through the engine, the recall in the record."""
    model = make_small().bfloat16()
    model.model.language_model.norm.float()
    settings = fast(steps=5)
    artifact = calibrate(model.bfloat16(), make_processor(), scenes(), settings)
    assert artifact.layers[0].down.dtype == torch.bfloat16
    layer = family_of(model).layers(model)[0]
    scorer = make_scorer(artifact.layers, family_of(model).layers(model))
    recalls = []
    for scene in list(scenes())[:: round(1 / settings.held_out)]:
        inputs = build_inputs(make_processor(), scene.images, scene.prompt)
        sample = capture(model, inputs.to("cpu", torch.bfloat16))
        visual = sample.visual
        plan = make_plan(inputs["input_ids"], visual, None, Keep((0.1,) * LAYERS))
        found = scorer.importance(0, layer, sample.hidden, plan, {POSITIONS: sample.positions})
        wanted = attention_importance(
            project(layer, sample.hidden, sample.positions), visual, ~visual
        )
        best = [set(s[visual].topk(28).indices.tolist()) for s in (found, wanted)]
        recalls.append(len(best[0] & best[1]) / 28)
    assert len(recalls) == artifact.calibration.held_out
    mean = sum(recalls) / len(recalls)
    assert artifact.calibration.layers[0].recall_after == pytest.approx(mean, abs=1e-6)


def test_the_same_seed_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fit(make_small(), tmp_path / name)
    fit(make_small(), tmp_path / "c", seed=1)
    one, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert one == again
    assert one != other
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


class Crash(BaseException):
    """As sudden as Ctrl-C."""


@pytest.mark.parametrize("last", range(LAYERS))
def test_a_resumed_run_gives_the_uninterrupted_file(last: int, tmp_path: Path) -> None:
    model = make_small()
    fit(model, tmp_path / "whole")

    def crash(index: int, count: int, fit: object) -> None:
        if index == last:
            raise Crash

    with pytest.raises(Crash):
        fit(model, tmp_path / "resumed", watch=Watch(layer=crash))
    folder = tmp_path / "resumed.partial"
    assert len(list(folder.glob("layer-*"))) == last + 1
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(AlvtsError, match="--resume, or delete"):
        fit(model, tmp_path / "resumed")
    # Nothing that is finished is done again.
    done_again: list[str] = []

    def counting(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            done_again.append(real.__name__)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.sweep.align", counting(align))
        fit(model, tmp_path / "resumed", resume=True)
    assert done_again == ["align"] * (LAYERS - 1 - last)
    assert (tmp_path / "resumed").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not folder.exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    def crash(*_: object) -> None:
        raise Crash

    out = tmp_path / "out"
    with pytest.raises(Crash):
        fit(make_small(), out, watch=Watch(layer=crash))
    with pytest.raises(AlvtsError, match="made with other settings"):
        fit(make_small(), out, resume=True, seed=1)
    with pytest.raises(AlvtsError, match="made with other weights"):
        fit(make_small(1), out, resume=True)
    layer = out.with_name("out.partial") / "layer-000.safetensors"
    layer.write_bytes(layer.read_bytes()[:50])
    with pytest.raises(AlvtsError, match="is damaged"):
        fit(make_small(), out, resume=True)
    (layer.parent / "run.json").unlink()
    with pytest.raises(AlvtsError, match="is not an unfinished run"):
        fit(make_small(), out, resume=True)


def test_layers_of_other_samples_under_the_same_ids_are_not_gone_on_with(tmp_path: Path) -> None:
    def crash(*_: object) -> None:
        raise Crash

    first, *rest = scenes()
    out = tmp_path / "out"
    with pytest.raises(Crash):
        fit(make_small(), out, samples=[first, *rest], watch=Watch(layer=crash))
    pictures = [Image.new("RGB", first.images[0].size, "grey")]
    for other in (replace(first, images=pictures), replace(first, prompt="is it red?")):
        with pytest.raises(AlvtsError, match="it was made with other samples;"):
            fit(make_small(), out, resume=True, samples=[other, *rest])
    processor = make_processor()
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    with pytest.raises(AlvtsError, match="it was made with other processor;"):
        fit(make_small(), out, resume=True, samples=[first, *rest], processor=processor)
    told = json.loads((out.with_name("out.partial") / "run.json").read_text())
    assert told.pop("processor")
    # As versions before this one wrote it.
    told["samples"] = hashlib.sha256("\n".join(s.id for s in scenes()).encode()).hexdigest()
    (out.with_name("out.partial") / "run.json").write_text(json.dumps(told))
    with pytest.raises(AlvtsError, match="it was made with other samples, processor;"):
        fit(make_small(), out, resume=True, samples=[first, *rest])


def test_resuming_without_a_checkpoint_starts_from_the_first_layer(tmp_path: Path) -> None:
    fit(make_small(), tmp_path / "out", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_memory_is_flat_in_the_number_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all hidden states ever made, only those of one layer are alive at any time."""
    alive: list[weakref.ref[Any]] = []
    counts: list[int] = []

    def count() -> None:
        counts.append(sum(ref() is not None for ref in alive))

    def watched_align(factors: Any, of: Any, targets: Any, *rest: Any, **more: Any) -> Any:
        gc.collect()
        count()
        return align(factors, of, targets, *rest, **more)

    def watched_advance(layer: Any, index: int, implementation: str, samples: Any) -> None:
        advance(layer, index, implementation, samples)
        alive.extend(weakref.ref(sample.hidden) for sample in samples)
        count()

    monkeypatch.setattr("calibration.sweep.align", watched_align)
    monkeypatch.setattr("calibration.sweep.advance", watched_advance)
    record = calibrate(make_small(), make_processor(), scenes(), fast()).calibration
    samples = record.fitted + record.held_out
    assert len(alive) == (LAYERS - 1) * samples
    assert max(counts) == samples


def test_samples_that_cannot_be_used_are_skipped_and_told() -> None:
    samples = list(scenes(8))
    bad = Sample("bad", samples[0].images, "<image> and <image>")
    long = Sample("long", samples[0].images, "is " * 5000)
    told: list[str] = []
    artifact = calibrate(
        make_small(),
        make_processor(),
        [bad, *samples, long],
        fast(),
        watch=Watch(skipped=told.append),
    )
    assert artifact.calibration.fitted + artifact.calibration.held_out == 8
    assert [line.split(":")[0] for line in told] == ["bad", "long"]
    assert artifact.calibration.data == "samples given in memory"
    with pytest.raises(AlvtsError, match=r"only 2 usable samples, at least 3.*1 were.*bad:"):
        calibrate(make_small(), make_processor(), [bad, *samples[:2]], fast())
    with pytest.raises(AlvtsError, match="only 0 usable samples"):
        calibrate(make_small(), make_processor(), [], fast())


def test_the_smallest_run_has_two_to_fit_and_one_to_measure() -> None:
    record = calibrate(make_small(), make_processor(), scenes(3), fast()).calibration
    assert (record.fitted, record.held_out) == (2, 1)


def test_numbers_that_overflow_are_one_line() -> None:
    model = make_small()
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(AlvtsError, match=r"layer 2 overflow in torch\.float32"):
        calibrate(model, make_processor(), scenes(), fast())


def test_a_rank_above_the_models_is_refused_before_any_work() -> None:
    with pytest.raises(AlvtsError, match="rank 17 is more than this model allows; at most 16"):
        calibrate(make_small(), None, [], Settings(rank=17))


def test_a_quarter_of_the_papers_ranks() -> None:
    assert [default_rank(width) for width in (4096, 2048, 192)] == [64, 32, 24]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"keep": 0},
        {"keep": 1.5},
        {"keep": float("nan")},
        {"held_out": 0},
        {"held_out": 1},
        {"steps": 0},
        {"batch": 0},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"seed": -1},
        {"carry_samples": 0},
        {"policy_samples": 0},
        {"answer_tokens": 0},
        {"rank": "4"},
        {"rank": 4.5},
        {"rank": True},
        {"rank": 2**60},
        {"steps": 2.5},
        {"steps": None},
        {"batch": float("nan")},
        {"seed": None},
        {"seed": 2**60},
        {"keep": "a"},
        {"keep": True},
        {"keep": 1},
        {"keep": None},
        {"held_out": float("nan")},
        {"held_out": "1/4"},
        {"learning_rate": float("inf")},
        {"learning_rate": None},
        {"form": None},
        {"form": ["alvts"]},
    ],
)
def test_settings_without_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(AlvtsError) as error:
        Settings(**wrong)
    (name,) = wrong
    assert f"the setting {name!r}" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TypeError):
        Settings(**{"colour": "blue"})


def test_settings_may_be_numbers_of_numpy_and_torch() -> None:
    """And are Python's own in what is written of them."""
    settings = Settings(keep=np.float32(0.5), held_out=torch.tensor(0.25), learning_rate=1)
    assert asdict(settings) == asdict(Settings(keep=0.5, learning_rate=1.0))
    assert all(type(value) in (str, int, float, type(None)) for value in asdict(settings).values())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"settings": {"rank": 4}}, "settings must be of type Settings, not dict"),
        ({"watch": print}, "watch must be of type Watch, not builtin"),
        ({"group": 2}, "group must be of type Group, not int"),
        ({"checkpoint": "s.partial"}, "checkpoint must be of type Checkpoint, not str"),
    ],
)
def test_arguments_of_another_kind(more: dict[str, Any], words: str) -> None:
    with pytest.raises(AlvtsError, match=words):
        calibrate(make_small(), make_processor(), scenes(), **more)


def test_what_is_told_how_far_a_run_is_can_be_called() -> None:
    with pytest.raises(AlvtsError, match="sample of a Watch is a function, not None"):
        Watch(sample=None)  # type: ignore[arg-type]


def _good() -> Sample:
    return next(iter(scenes(1)))


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (lambda: None, "samples must be what read_data gives.* their type is NoneType"),
        (lambda: Source("pocket"), "their type is Source"),
        (lambda: "photos", r"samples\[0\] must be a Sample; its type is str"),
        (lambda: [_good(), {"input_ids": [1]}], r"samples\[1\] must be a Sample; its type is dict"),
        (lambda: [replace(_good(), id=7)], r"samples\[0\].id must be text; its type is int"),
        (lambda: [replace(_good(), prompt=None)], r"samples\[0\].prompt must be text"),
        (
            lambda: [replace(_good(), images=_good().images[0])],
            r"samples\[0\].images must be a list of pictures; its type is Image",
        ),
        (lambda: [replace(_good(), images=[None])] * 3, "only 0 usable samples.*3 were skipped"),
    ],
)
def test_what_is_no_sample(samples: Any, words: str) -> None:
    with pytest.raises(AlvtsError, match=words):
        calibrate(make_small(), make_processor(), samples(), fast())


@pytest.mark.parametrize("part", ["model", "model.language_model", "lm_head", None, "pocket"])
def test_only_a_whole_model_is_calibrated(part: str | None) -> None:
    inside = part in ("model", "model.language_model", "lm_head")
    given = make_small().get_submodule(part) if inside else part
    with pytest.raises(AlvtsError) as attaching:
        attach(given, fast, 0.5)
    with pytest.raises(AlvtsError) as error:
        calibrate(given, make_processor(), scenes(), fast())
    assert str(error.value) == str(attaching.value)


def test_an_attached_model_is_to_be_detached_first() -> None:
    model = make_small()
    with attach(model, make_selectors(layers=LAYERS), 0.5):
        assert is_attached(model)
        with pytest.raises(AlvtsError, match="attached to this model; detach it before calibrat"):
            calibrate(model, make_processor(), scenes(), fast())
    assert not is_attached(model)
