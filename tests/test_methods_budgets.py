"""From a layer average to each method's own settings, and the families and batches they run on."""

import math
from dataclasses import replace

import pytest
import torch
from methods_tools import LAYERS, attached_run, deep_model, dense_run, prompts
from tiny import (
    FAMILIES,
    WIDTH,
    Prompt,
    make_inputs,
    make_model,
    make_paper_selectors,
    make_selectors,
    one_image,
)

from alvts_cli import AlvtsError
from alvts_cli.engine import spend
from alvts_cli.families import family_of
from alvts_cli.methods import METHODS, make_method
from alvts_cli.methods.base import Method
from alvts_cli.methods.downsample import Downsample, _grid, _pictures, _pooling, _shares


def selectors_for(name, family="llava"):
    return make_paper_selectors() if name == "alvts-paper" else make_selectors(family)


def schedule(name, budget, visual=576, layers=32):
    return make_method(name).schedule(visual, layers, budget)


def average(counts):
    return sum(counts) / len(counts)


@pytest.mark.parametrize(("budget", "kept"), [(192, 166), (128, 98), (64, 30)])
def test_fastv_at_the_published_budgets(budget, kept):
    assert schedule("fastv", budget) == (576,) * 2 + (kept,) * 30


@pytest.mark.parametrize(
    ("budget", "stages"), [(192, (312, 156, 78)), (128, (184, 92, 46)), (64, (56, 28, 14))]
)
def test_pyramiddrop_at_the_published_budgets(budget, stages):
    first, second, third = stages
    counts = (576,) * 2 + (first,) * 8 + (second,) * 10 + (third,) * 12
    assert schedule("pyramiddrop", budget) == counts
    assert average(counts) == budget


@pytest.mark.parametrize(
    ("budget", "per_pivot", "reached"), [(192, 20, 189.75), (128, 12, 129.75), (64, 3, 62.25)]
)
def test_dart_at_the_published_budgets(budget, per_pivot, reached):
    counts = schedule("dart", budget)
    assert counts == (576,) * 2 + (4 + 8 * per_pivot,) * 30
    assert average(counts) == reached


@pytest.mark.parametrize(("budget", "layer"), [(192, 11), (128, 7), (64, 4)])
def test_vtw_takes_the_nearest_layer(budget, layer):
    assert schedule("vtw", budget) == (576,) * layer + (0,) * (32 - layer)


@pytest.mark.parametrize("name", ["random", "random-static", "downsample", "oracle"])
def test_the_others_keep_the_same_everywhere(name):
    assert schedule(name, 64) == (64,) * 32


def test_dense_keeps_everything():
    assert schedule("dense", 64) == (576,) * 32


DEPTHS = [
    (name, layers)
    for name in METHODS
    for layers in (1, 2, 4, 16, 28, 32, 36, 40)
    # FastV and DART prune between two layers.
    if not name.startswith("alvts") and (layers > 1 or name not in ("fastv", "dart"))
]


@pytest.mark.parametrize("visual", [1, 3, 7, 24, 256, 577])
@pytest.mark.parametrize(("name", "layers"), DEPTHS)
def test_any_depth_and_any_number_of_tokens(name, layers, visual):
    before = 0.0
    for budget in sorted({1, math.ceil(visual / 3), visual}):
        counts = schedule(name, budget, visual, layers)
        assert len(counts) == layers
        assert all(0 <= count <= visual for count in counts)
        # What is dropped stays dropped, and more budget never means fewer tokens.
        assert list(counts) == sorted(counts, reverse=True)
        assert average(counts) >= before
        before = average(counts)
    assert counts == (visual,) * layers


@pytest.mark.parametrize(
    ("name", "slack"), [("fastv", 0.5), ("pyramiddrop", 0.5), ("dart", 3.75), ("vtw", 8.0)]
)
@pytest.mark.parametrize("ratio", [1 / 3, 2 / 9, 1 / 9])
def test_a_model_of_16_layers_comes_as_near(name, slack, ratio):
    budget = math.floor(256 * ratio)
    assert abs(average(schedule(name, budget, 256, 16)) - budget) <= slack


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "dart"])
def test_two_full_layers_where_the_budget_has_room_for_them(name):
    assert schedule(name, 56, 256, 16)[:3].count(256) == 2
    assert schedule(name, 28, 256, 16)[:3].count(256) == 1
    assert schedule(name, 64, 576, 40)[:3].count(576) == 2


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "dart"])
def test_samples_of_a_batch_may_be_pruned_at_different_layers(name):
    model = make_model("llava_next")
    samples = [one_image("llava_next"), Prompt([1, 5, 9, 11, 12], [(16, 32)], seed=3)]
    method = make_method(name)
    batch = make_inputs(model, *samples)
    # As `generate` has it. The L1 norms that DART goes by change with the absolute position.
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        with method.attached(model, 40, ["a", "b"]) as attachment:
            together = model(**batch, position_ids=positions).logits[:, -1]
            first, second = zip(*attachment.last.kept, strict=True)
            assert first[1] < first[0] and second[1] == second[0] > second[2]
        for b, sample in enumerate(samples):
            with method.attached(model, 40, ["ab"[b]]):
                alone = model(**make_inputs(model, sample)).logits[0, -1]
            torch.testing.assert_close(together[b], alone, rtol=1e-4, atol=1e-4)


def test_a_ratio_is_solved_for_every_sample():
    for name in ("fastv", "pyramiddrop", "dart"):
        for held, prompt in zip(attached_run(name, 0.375, prompts()), prompts(), strict=True):
            alone = attached_run(name, 24, [prompt])[0]
            assert alone.ran == held.ran


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_equals_singles(family, name):
    model = make_model(family)
    samples = [one_image(family), Prompt([1, 5, 9], one_image(family, 3).images, seed=3)]
    method = make_method(name, selectors_for(name, family))
    options = dict(
        max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        with method.attached(model, 0.4, ["a", "b"]):
            together = model.generate(**make_inputs(model, *samples), **options)
        for b, sample in enumerate(samples):
            with method.attached(model, 0.4, ["ab"[b]]):
                alone = model.generate(**make_inputs(model, sample), **options)
            for a, c in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[b], c[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_all_leave_the_model_as_it_was(name):
    model = make_model("llava")
    inputs = make_inputs(model, one_image("llava"))

    def hooks():
        return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    before = hooks()
    with torch.no_grad():
        dense = model(**inputs).logits
        with make_method(name, selectors_for(name)).attached(model, 0.4, ["a"]):
            changed = model(**inputs).logits
        assert hooks() == before
        assert torch.equal(model(**inputs).logits, dense)
    assert torch.equal(changed, dense) == (name == "dense")


@pytest.mark.parametrize("name", METHODS)
def test_eager_attention_is_not_needed_and_changes_nothing(name):
    logits = []
    for attn in ("sdpa", "eager"):
        model = make_model("llava", attn)
        with torch.no_grad(), make_method(name, selectors_for(name)).attached(model, 0.4, ["a"]):
            logits.append(model(**make_inputs(model, one_image("llava"))).logits)
        assert model.config.text_config._attn_implementation == attn
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_is_alvts_with_a_perfect_selector(family, monkeypatch):
    """A selector of full rank can hold the layer's own keys."""
    model = make_model(family).requires_grad_(False)
    description = family_of(model)
    selectors = make_selectors(family, rank=WIDTH)
    for i, layer in enumerate(description.layers(model)):
        own = description.query_key(layer)
        selectors.layers[i] = replace(
            selectors.layers[i],
            down=torch.diag(own.norm_weight),
            up=own.w_k,
            key_bias=own.b_k,
            eps=own.norm_eps,
            key_norm=own.k_norm,
        )
    samples = [one_image(family), Prompt([1, 5, 9], one_image(family, 3).images, seed=3)]
    inputs = make_inputs(model, *samples)

    def run(name):
        with torch.no_grad(), make_method(name, selectors).attached(model, 7, ["a", "b"]):
            return model(**inputs).logits

    fitted = run("alvts")
    torch.testing.assert_close(fitted, run("oracle"), rtol=1e-4, atol=1e-4)


SCHEDULES = ((0.25, 0.0, 0.0, 0.0), (1.0, 0.5, 0.0, 0.5))


@pytest.mark.parametrize("name", ["alvts", "random-policy", "oracle"])
@pytest.mark.parametrize("budget", [16, 0.25])
def test_schedules_are_followed(name, budget):
    """Between 1/16 and 1/2 on average: every layer goes in step from one schedule to the other."""
    model = make_model("llava_next")
    selectors = make_selectors(schedules=SCHEDULES)
    visual = make_prompt_tokens(model)
    with (
        torch.no_grad(),
        make_method(name, selectors).attached(model, budget, ["a"]) as attachment,
    ):
        model(**make_inputs(model, one_image("llava_next")))
    kept = tuple(count for (count,) in attachment.last.kept)
    average = budget if isinstance(budget, int) else math.floor(budget * visual)
    assert kept == spend(SCHEDULES, average, visual)
    assert sum(kept) == 4 * average
    assert len(set(kept)) > 2


def test_uniform_means_the_same_in_every_layer():
    model = make_model("llava_next")
    selectors = make_selectors(schedules=SCHEDULES)
    for budget, expected in ((7, 7), (0.25, math.floor(make_prompt_tokens(model) / 4))):
        with (
            torch.no_grad(),
            make_method("alvts-plain", selectors).attached(model, budget, ["a"]) as attachment,
        ):
            model(**make_inputs(model, one_image("llava_next")))
        assert attachment.last.kept == ((expected,),) * 4


def make_prompt_tokens(model):
    """Visual tokens of the prompt with one image."""
    inputs = make_inputs(model, one_image("llava_next"))
    return int(family_of(model).visual_mask(model, inputs["input_ids"]).sum())


def test_shares_of_several_pictures_add_up():
    assert _shares(10, [4, 4]) == [5, 5]
    assert sum(_shares(7, [4, 9, 2])) == 7


@pytest.mark.parametrize(
    ("count", "aspect", "grid"),
    [(64, 1, (8, 8)), (128, 1, (12, 11)), (50, 2, (10, 5)), (1, 1, (1, 1)), (2, 0.5, (1, 2))],
)
def test_grids_come_near_count_and_shape(count, aspect, grid):
    assert _grid(count, aspect) == grid


@pytest.mark.parametrize("count", [1, 2, 3, 7, 28, 56, 84, 255, 256])
def test_cells_cover_the_picture_once(count):
    average, middles = _pooling((False,) * 256, 16, count)
    assert average.shape == (count, 256)
    assert ((average > 0).sum(dim=0) == 1).all()
    torch.testing.assert_close(average.sum(dim=1), torch.ones(count))
    assert len(set(middles.tolist())) == count
    assert (average[torch.arange(count), middles] > 0).all()


def test_tiles_come_after_the_whole_picture():
    # A view of 2 x 2, then tiles of 2 rows of 3, each row with its end.
    row = (False, False, False, True)
    breaks = (False,) * 4 + row + row
    ((whole, tiles),) = _pictures(breaks, 2)
    assert (whole.start, whole.rows, whole.columns) == (0, 2, 2)
    assert (tiles.start, tiles.rows, tiles.columns, tiles.stride) == (4, 2, 3, 4)
    # Three cells are two above, one below.
    assert _pooling(breaks, 2, 3)[1].tolist() == [0, 1, 3]
    # Four tokens of the whole picture, the fifth is the mean of all tiles.
    average, middles = _pooling(breaks, 2, 5)
    assert average[4].nonzero()[:, 0].tolist() == [4, 5, 6, 8, 9, 10]
    assert middles[:4].tolist() == [0, 1, 2, 3]
    with pytest.raises(AlvtsError, match="make pictures"):
        _pictures((False,) * 5, 2)


def test_qwen_gets_a_smaller_picture():
    from PIL import Image

    class Processor:
        class image_processor:
            @staticmethod
            def get_number_of_image_patches(height, width, options):
                return (height // 4) * (width // 4)

    model = make_model("qwen2_5_vl")
    picture = Image.new("RGB", (64, 128))
    (smaller,) = Downsample().images(model, Processor, [picture], 0.25)
    # 16 x 8 merged cells become 8 x 4, of 8 pixels each.
    assert smaller.size == (32, 64)
    assert Downsample().images(make_model("llava"), Processor, [picture], 0.25) == [picture]


def test_a_new_method_is_one_class_with_one_method():
    class First(Method):
        def importance(self, layer_index, layer, hidden, plan, layer_kwargs):
            positions = torch.arange(plan.tokens).float().expand(hidden.shape[:2])
            return (-positions).masked_fill(~plan.visual, -torch.inf)

    model = deep_model()
    inputs = make_inputs(model, *prompts())
    with torch.no_grad(), First().attached(model, 5, ["a", "b"]) as attachment:
        model(**inputs)
    assert attachment.last.kept == ((5, 5),) * LAYERS
    assert dense_run(prompts()[0]).visual[0] == 2


def test_bad_names_and_missing_selectors():
    with pytest.raises(AlvtsError, match="unknown method 'fast'"):
        make_method("fast")
    with pytest.raises(AlvtsError, match="needs selectors"):
        make_method("alvts")
