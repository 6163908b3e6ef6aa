"""Selectors as the paper has them: their scores by hand, their fit, their place in the commands."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_tools import LAYERS, make_small, scenes
from cli_tools import alvts, refused
from test_calibration_command import small_folder
from tiny import LAYERS as TINY_LAYERS
from tiny import WIDTH, Prompt, make_inputs, make_model, make_paper_selectors, one_image
from tiny import paper_selector as random_selector

from alvts_cli import attach
from alvts_cli.artifact import load_artifact, save_artifact
from alvts_cli.engine import (
    NAMED,
    PAPER,
    Chosen,
    PaperSelector,
    Selection,
    normed,
    paper_rank,
    placing,
    prefill_flops,
    scorer,
)
from alvts_cli.engine.normed import Normed
from alvts_cli.engine.paper import paper_importance, paper_means
from alvts_cli.engine.probe import attention_importance, attention_mean, project
from alvts_cli.engine.scene import Scene
from alvts_cli.errors import AlvtsError
from alvts_cli.families import family_of
from calibration import Settings, calibrate
from calibration.align import Target
from calibration.paper import PaperFactors, initialise_paper, squared_error


def by_hand(hidden: torch.Tensor, selector: PaperSelector, kinds: str) -> list[float]:
    """`S` of every token of `hidden` `[T, D]`, number by number; kinds: v, t, or - for padding."""
    normed = [row / math.sqrt(float(row.square().mean()) + selector.eps) for row in hidden.double()]
    queries = [selector.query.double() @ row + selector.query_bias.double() for row in normed]
    keys = [selector.key.double() @ row for row in normed]
    sums = {"v": [0.0] * len(kinds), "t": [0.0] * len(kinds)}
    for j, kind in enumerate(kinds):
        if kind == "-":
            continue
        seen = [i for i in range(j + 1) if kinds[i] != "-"]
        weights = {i: math.exp(float(queries[j] @ keys[i])) for i in seen}
        for i in seen:
            sums[kind][i] += weights[i] / sum(weights.values()) / kinds.count(kind)
    return [v * t for v, t in zip(sums["v"], sums["t"], strict=True)]


@pytest.mark.parametrize("kinds", ["tvvvvttt", "--tvvvtt", "vvvtvtvt"])
def test_importance_is_the_papers_formula(kinds: str) -> None:
    hidden = torch.randn(
        1, len(kinds), WIDTH, generator=torch.Generator(torch.get_default_device()).manual_seed(5)
    )
    selector = random_selector(1)
    visual = torch.tensor([[kind == "v" for kind in kinds]])
    text = torch.tensor([[kind == "t" for kind in kinds]])
    found = paper_importance(hidden, selector, visual, text, "-" in kinds)[0]
    wanted = by_hand(hidden[0], selector, kinds)
    for i, kind in enumerate(kinds):
        if kind == "v":
            assert found[i].item() == pytest.approx(wanted[i], rel=1e-4)
        else:
            assert found[i] == -torch.inf


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(
        2, 12, WIDTH, generator=torch.Generator(torch.get_default_device()).manual_seed(5)
    )
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[:, 2:9] = True
    whole = paper_importance(hidden, random_selector(1), visual, ~visual, False)
    monkeypatch.setattr("alvts_cli.engine.paper._ROWS", 5)
    parts = paper_importance(hidden, random_selector(1), visual, ~visual, False)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("at_once", [64, 3])
@pytest.mark.parametrize("kinds", ["tvvvvttt", "--tvvvtt", "vvvtvtvt", "vvv"])
def test_the_operators_of_a_gpu_give_the_same(
    kinds: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alvts_cli.engine.paper._ROWS_AT_ONCE", at_once)
    size = len(kinds)
    generator = torch.Generator(torch.get_default_device()).manual_seed(5)
    hidden = torch.randn(1, size, WIDTH, generator=generator)
    selector = random_selector(1)
    visual = torch.tensor([[kind == "v" for kind in kinds]])
    real = torch.tensor([[kind != "-" for kind in kinds]])
    tables = torch.ones(1, size, 4)
    scene = Scene(
        visual,
        (tables, tables),
        torch.zeros(1, 1, dtype=torch.int64),
        real=real if "-" in kinds else None,
    )
    from_visual, from_text = paper_means(Normed(hidden), selector, scene)
    if "t" in kinds:
        found = (from_visual * from_text)[0].tolist()
        for i, wanted in enumerate(by_hand(hidden[0], selector, kinds)):
            if kinds[i] == "v":
                assert found[i] == pytest.approx(wanted, rel=1e-4)
    else:
        # Without text the second factor must not change the order.
        torch.testing.assert_close(from_text, from_visual)
        alone = paper_importance(hidden, selector, visual, ~visual, False)
        torch.testing.assert_close(alone, from_visual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attached_as_on_a_gpu_it_keeps_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llava", dtype=dtype)
    inputs = make_inputs(model, one_image("llava"), Prompt([1, 5, 6], [(16, 16)]))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    kept: dict[bool, list[set[tuple[int, int]]]] = {}
    for few in (False, True):
        for module in (normed, placing, scorer):
            monkeypatch.setattr(module, "fused", lambda device, few=few: few)
        told: list[Chosen] = []
        with torch.no_grad(), attach(model, make_paper_selectors(), 5) as attachment:
            attachment.watch = told.append
            model(**inputs)
        kept[few] = [
            {
                (b, int(token))
                for b, index in enumerate(one.index)
                for token in (index if one.valid is None else index[one.valid[b]])
            }
            for one in told
        ]
    assert len(kept[False]) == len(kept[True]) == TINY_LAYERS
    for plain, found in zip(kept[False], kept[True], strict=True):
        # In half precision two that are near each other may change places.
        assert len(plain ^ found) <= (0 if dtype == torch.float32 else 4)


def test_attached_it_keeps_what_it_ranks_first() -> None:
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"), one_image("llava", seed=3))
    selectors = make_paper_selectors()
    with torch.no_grad():
        dense = model(**inputs).logits
        with attach(model, selectors, 1.0):
            assert torch.equal(model(**inputs).logits, dense)
        with attach(model, selectors, 3) as attachment:
            few = model(**inputs).logits
        assert attachment.last is not None and attachment.last.layer_average == 3
        assert not torch.allclose(few, dense)
        alone = make_inputs(model, one_image("llava", seed=3))
        with attach(model, selectors, 3):
            torch.testing.assert_close(model(**alone).logits[0], few[1])


def test_moved_it_is_the_same_and_its_bias_stays_in_float32() -> None:
    selector = random_selector(1)
    here = selector.key.device
    moved = selector.to(here, torch.bfloat16)
    assert (moved.query.dtype, moved.key.dtype) == (torch.bfloat16, torch.bfloat16)
    assert moved.query_bias is not None and moved.query_bias.dtype == torch.float32
    assert torch.equal(moved.query_bias, selector.query_bias)
    assert torch.equal(moved.query, selector.query.bfloat16())
    away = selector.to(torch.device("meta"), torch.bfloat16)
    assert {held.device.type for held in away.tensors().values()} == {"meta"}
    bare = replace(selector, query_bias=None).to(here, torch.float32)
    assert bare.query_bias is None and set(bare.tensors()) == {"query", "key"}
    assert set(moved.tensors()) == {"query", "key", "query_bias"}


def test_it_compares_no_tokens() -> None:
    selectors = make_paper_selectors()
    with pytest.raises(AlvtsError, match="of the paper's form choose by importance alone"):
        attach(make_model("llava"), selectors, 3, policy=NAMED["once"])


def projections() -> Any:
    model = make_small()
    family: Any = family_of(model)
    layer = family.layers(model)[0]
    return family.query_key(layer), layer


def test_at_full_rank_the_start_is_the_joint_head_of_the_layer() -> None:
    """With one head, no positions and no text-only bias it is the layer's own attention."""
    of, _ = projections()
    factors = initialise_paper(of, min(of.w_q.shape))
    torch.testing.assert_close(factors.u_q @ factors.v_q, of.w_q.detach(), rtol=0, atol=1e-5)
    keys = of.w_k.unflatten(0, (of.num_kv_heads, -1))
    keys = keys.repeat_interleave(of.num_heads // of.num_kv_heads, dim=0).flatten(0, 1).detach()
    torch.testing.assert_close(factors.u_k @ factors.v_k, keys, rtol=0, atol=1e-5)
    hidden = torch.randn(6, of.w_q.shape[1])
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + of.norm_eps)
    normed = normed * of.norm_weight
    selector = factors.selector(of)
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + of.norm_eps)
    logits = (hidden @ selector.query.T * scale) @ (hidden @ selector.key.T * scale).T
    wanted = (normed @ of.w_q.T) @ (normed @ keys.T).T / of.head_dim**0.5 / of.num_heads
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)


def test_the_squared_error_is_of_shares() -> None:
    visual = torch.tensor([[False, True, True, True, True]])
    wanted = torch.tensor([[0.0, 1.0, 1.0, 1.0, 1.0]])
    found = torch.tensor([[0.0, 6.0, 2.0, 0.0, 0.0]])
    # Shares .75, .25, 0, 0 of 1, times 4, less 1 each: 2, 0, -1, -1.
    assert squared_error(found, wanted, visual).item() == pytest.approx((4 + 0 + 1 + 1) / 4)
    assert squared_error(wanted * 9, wanted, visual).item() == 0


def test_calibration_fits_it_and_adds_nothing(tmp_path: Path) -> None:
    model = make_small()
    settings = Settings.paper(rank=4, steps=30, batch=4)
    artifact = calibrate(model, _processor(), scenes(), settings)
    assert artifact.paper and artifact.carries == artifact.picked == ()
    assert artifact.calibration.trials == ()
    assert artifact.calibration.mean.loss_after < artifact.calibration.mean.loss_before
    save_artifact(artifact, tmp_path / "a.safetensors")
    again = load_artifact(tmp_path / "a.safetensors")
    assert again.paper and again.rank == 4
    for one, other in zip(again.layers, artifact.layers, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(one.tensors()[k], other.tensors()[k]) for k in one.tensors())


def _processor() -> Any:
    from calibration_tools import make_processor

    return make_processor()


def test_alignment_lowers_the_squared_error_against_real_attention() -> None:
    of, layer = projections()
    hidden = torch.randn(
        1, 20, of.w_q.shape[1], generator=torch.Generator(torch.get_default_device()).manual_seed(0)
    )
    cos, sin = torch.ones(1, 20, of.head_dim), torch.zeros(1, 20, of.head_dim)
    visual = torch.zeros(1, 20, dtype=torch.bool)
    visual[:, 3:15] = True
    from calibration.align import align

    with torch.no_grad():
        projected = project(layer, hidden, (cos, sin))
        reference = attention_importance(projected, visual, ~visual)
        reference = reference * attention_mean(projected, visual, torch.ones_like(visual))
    rows: Any = None
    target = Target(hidden, (cos, sin), visual, ~visual, rows, rows, rows, reference)
    start = initialise_paper(of, 4)
    with pytest.MonkeyPatch.context() as patched:
        # One sample needs no padding.
        patched.setattr("calibration.align.collate", lambda batch, device: batch[0])
        patched.setattr(Target, "float", lambda self: self)
        settings = Settings.paper(steps=60, learning_rate=0.01)
        end = align(start, of, [target], settings, seed=0)
    assert isinstance(end, PaperFactors)
    with torch.no_grad():
        before, after = (target.measure(f.selector(of))[1].item() for f in (start, end))
    assert after < 0.5 * before


def test_its_flops_are_the_papers() -> None:
    model = make_model("llava")
    config = model.config.text_config
    alone = prefill_flops(config, [16] * TINY_LAYERS, Selection(), 28, 12)
    scored = prefill_flops(config, [16] * TINY_LAYERS, Selection(8, PAPER, paper=True), 28, 12)
    # Queries and keys of 28 tokens; a logit and two means for each of 28 * 29 / 2 pairs.
    layer = 2 * 2 * 28 * WIDTH * 8 + (2 * 8 + 2 * 2) * 28 * 29 // 2
    assert scored.scoring == TINY_LAYERS * layer
    assert scored.layers == alone.layers


def test_the_default_rank_is_the_papers() -> None:
    assert [paper_rank(width) for width in (64, 2048, 4096)] == [16, 128, 256]


def test_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "paper.safetensors"
    common = ("--model", small_folder(), "--form", "paper", "--samples", 8, "--rank", 4)
    result = alvts("calibrate", *common, "--out", out)
    assert result.exit_code == 0, result.output
    assert "policies" not in result.stdout
    told = alvts("info", out)
    assert told.exit_code == 0 and "of the paper's form" in " ".join(told.stdout.split())
    assert len(load_artifact(out).layers) == LAYERS

    ask = ("eval", "--model", small_folder(), "--samples", 4, "--keep", "0.11")
    ask = (*ask, "--methods", "dense,alvts-paper")
    line = refused(*ask, code=2)
    assert "--paper-selectors" in line and "alvts calibrate --form paper" in line
    result = alvts(*ask, "--paper-selectors", out)
    assert result.exit_code == 0, result.output
    assert "alvts-paper" in result.stdout
    assert "unknown form 'papre'; known: alvts, paper" in refused("calibrate", "--form", "papre")
