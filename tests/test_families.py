"""Every family: dense where all is kept, the plain method where less is, and true scores.

`families_table.py` makes the table of `alvts_cli/families/README.md` of this file: a test is a
column, a family a row.
"""

from contextlib import nullcontext
from functools import cache
from typing import Any

import families_table
import pytest
import torch
from reference import added_features, watch_selection
from tiny import CACHE, IMAGE, PAD, VIDEO, WIDTH, Selectors, random_selector, randomise
from transformers import AutoModelForImageTextToText
from zoo import KINDS, OLD, llava_config, make_zoo_model, text_config, zoo_inputs

from alvts_cli import attach
from alvts_cli.bench.inputs import synthetic_inputs
from alvts_cli.bench.timing import generate
from alvts_cli.engine import LayerSelector, Selection, cache_of, prefill_flops
from alvts_cli.engine.flops import Mlp, mlp_of
from alvts_cli.engine.normed import Normed
from alvts_cli.engine.probe import attention_importance, check_layers, project
from alvts_cli.engine.scene import Scene
from alvts_cli.engine.scoring import asking, importance, text_rows, text_sum
from alvts_cli.engine.selecting import positions_of
from alvts_cli.errors import AlvtsError
from alvts_cli.families import FAMILIES, family_of
from alvts_cli.families.base import CAUSAL
from alvts_cli.families.layer import parts_of
from alvts_cli.families.table import REFUSED
from alvts_cli.plan.describe import describe

ATTENTION = ("sdpa", "eager")
VIDEOS = [kind for kind, facts in KINDS.items() if facts.video]

each_kind = pytest.mark.parametrize("kind", KINDS)


@cache
def a_model(kind: str, attn: str = "sdpa") -> Any:
    return make_zoo_model(kind, attn)


def decoder(model: Any) -> Any:
    return family_of(model).text_model(model)


def selectors_for(model: Any) -> Selectors:
    """Random ones that fit the model's layers."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    layers: list[LayerSelector | None] = []
    for layer in decoder(model).layers:
        own = family_of(model).query_key(layer)
        norm = 0 if own.k_norm is None else own.head_dim
        bias = own.b_k is not None
        layers.append(random_selector(generator, len(own.w_k), bias, norm=norm))
    return Selectors(layers)


def more_tokens(inputs: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """The same prompt with text behind it."""
    behind = torch.tensor([ids])
    longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], behind], dim=1))
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    if "mm_token_type_ids" in inputs:
        kinds = inputs["mm_token_type_ids"]
        longer["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(ids)))
    return longer


@torch.no_grad()
def recompute(
    model: Any, inputs: dict[str, Any], prompt: int, chosen: dict[int, list[int]]
) -> torch.Tensor:
    """Logits `[S, V]` of whole layers with the skipped columns hidden, without any cache.

    Args:
        inputs: the prompt and all that followed it.
        prompt: its length.
        chosen: positions of the prompt that each selecting layer ran on.
    """
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    layers = decoder(model).layers

    def look(module: Any, args: Any, kwargs: Any) -> None:
        calls.append((args[0] if args else kwargs["hidden_states"], kwargs))

    handle = layers[0].register_forward_pre_hook(look, with_kwargs=True)
    model(**inputs, use_cache=False)
    handle.remove()
    added = added_features(model, inputs)
    ((hidden, kwargs),) = calls
    told = {name: kwargs[name] for name in ("position_embeddings", "position_ids")}
    size = hidden.shape[1]
    causal = torch.ones(size, size).tril().bool()
    for i, layer in enumerate(layers):
        runs = torch.ones(size, dtype=torch.bool)
        if i in chosen:
            runs[:prompt] = False
            runs[chosen[i]] = True
        mask = torch.zeros(size, size).masked_fill(~(causal & runs), -1e9)[None, None]
        new = layer(hidden, attention_mask=mask, **told, **{CACHE: None})
        hidden = torch.where(runs[None, :, None], new, hidden)
        if i < len(added):
            hidden = hidden + added[i]
    logits = model.lm_head(decoder(model).norm(hidden))[0]
    return logits / getattr(model.config.text_config, "logits_scaling", 1)


def check_selection(kind: str, attn: str, **prompt: Any) -> None:
    """Prefill, single tokens and a later turn of words equal the recomputation."""
    model = a_model(kind, attn)
    inputs = zoo_inputs(model, kind, **prompt)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), attach(model, selectors_for(model), 0.25) as attachment:
        with watch_selection() as chosen:
            prefill = model(**inputs, use_cache=False).logits[0]
        first = generated(model, inputs)
        (kept,) = {sum(row) for row in attachment.last.kept}
        (visual,) = attachment.last.visual_tokens
        turn = torch.cat([first.sequences, torch.tensor([[11, 12, 13]])], dim=1)
        later = {"input_ids": turn, "attention_mask": torch.ones_like(turn)}
        second = generated(model, later, **{CACHE: cache_of(first)})
    assert 0 < kept < visual
    (selected,) = chosen
    assert len({tuple(row) for row in selected.values()}) > 1
    whole = more_tokens(inputs, second.sequences[0, length:].tolist())
    expected = recompute(model, whole, length, selected)
    steps = [*first.logits, *second.logits]
    at = [*range(length - 1, length + 2), *range(length + 5, length + 8)]
    close = {"rtol": 1e-4, "atol": 2e-4}
    torch.testing.assert_close(prefill, expected[:length], **close)
    torch.testing.assert_close(torch.cat(steps), expected[at], **close)


def generated(model: Any, inputs: dict[str, Any], **more: Any) -> Any:
    words = model.config.text_config.vocab_size
    return model.generate(
        # No token that stands for a part of a picture: some models read it otherwise in a prompt.
        suppress_tokens=list(range(min(IMAGE, VIDEO), words)),
        **inputs,
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **more,
    )


@each_kind
@pytest.mark.parametrize("attn", ATTENTION)
def test_keeping_all_is_dense_bit_for_bit(kind, attn):
    model = a_model(kind, attn)
    inputs = zoo_inputs(model, kind)
    outs = []
    for within in (nullcontext(), attach(model, selectors_for(model), 1.0)):
        with torch.no_grad(), within:
            outs.append(generated(model, inputs))
    dense, same = outs
    assert torch.equal(dense.sequences, same.sequences)
    assert all(torch.equal(a, b) for a, b in zip(dense.logits, same.logits, strict=True))


@each_kind
@pytest.mark.parametrize("attn", ATTENTION)
def test_selection_and_later_text_equal_recomputing(kind, attn):
    check_selection(kind, attn)


@each_kind
def test_two_images(kind):
    check_selection(kind, "sdpa", images=2)


@pytest.mark.skipif("granite4_vision" not in KINDS, reason="transformers does not have it")
def test_granite_called_without_more_words():
    """It tells its layers to cache, and makes no cache by itself."""
    model = a_model("granite4_vision")
    inputs = zoo_inputs(model, "granite4_vision")
    with torch.no_grad():
        dense = model(**inputs).logits
        for keep in (0.3, 1.0):
            with attach(model, selectors_for(model), keep):
                got = model(**inputs).logits
                assert torch.equal(got, model(**inputs, use_cache=False).logits)
                assert torch.equal(got, dense) == (keep == 1.0)


@pytest.mark.parametrize("kind", VIDEOS)
def test_a_video(kind):
    check_selection(kind, "sdpa", images=0, video=True)


@pytest.mark.parametrize("kind", [kind for kind in VIDEOS if KINDS[kind].mixes])
def test_a_video_behind_an_image(kind):
    check_selection(kind, "sdpa", images=1, video=True)


@each_kind
def test_a_padded_batch_equals_its_samples(kind):
    model = a_model(kind)
    samples = [zoo_inputs(model, kind, words=words, seed=sum(words)) for words in ((1, 4), (5, 9))]
    longest = max(one["input_ids"].shape[1] for one in samples)
    fill = {"input_ids": PAD, "attention_mask": 0, "mm_token_type_ids": 0}
    batch = {}
    for name in samples[0]:
        rows = [one[name] for one in samples]
        if name in fill:
            rows = [
                torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=fill[name])
                for row in rows
            ]
        batch[name] = torch.cat(rows)
    with torch.no_grad(), attach(model, selectors_for(model), 0.25):
        together = generated(model, batch)
        for i, one in enumerate(samples):
            alone = generated(model, one)
            # Where the first tokens are the same, so is what was computed for the last.
            for ours, own in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(ours[i], own[0], rtol=1e-3, atol=1e-3)


@each_kind
def test_beams(kind):
    model = a_model(kind)
    inputs = zoo_inputs(model, kind)
    with torch.no_grad():
        dense = generated(model, inputs, num_beams=2)
        with attach(model, selectors_for(model), 1.0):
            same = generated(model, inputs, num_beams=2)
        with attach(model, selectors_for(model), 0.25):
            fewer = generated(model, inputs, num_beams=2)
    assert torch.equal(dense.sequences, same.sequences)
    assert fewer.sequences.shape == dense.sequences.shape


@each_kind
def test_scores_are_of_the_layers_own_attention(kind):
    """Queries as they reach the kernel; and with the layer's own keys, its attention."""
    model = a_model(kind)
    inputs = zoo_inputs(model, kind, images=2)
    ids = inputs["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    calls: list[tuple[torch.Tensor, dict[str, Any]]] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True
        )
        for layer in decoder(model).layers
    ]
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    index, _ = positions_of(asking(visual, ~visual), int(asking(visual, ~visual).sum()))
    norms = set()
    with torch.no_grad():
        for layer, (hidden, kwargs) in zip(decoder(model).layers, calls, strict=True):
            positions = kwargs["position_embeddings"]
            own = project(layer, hidden, positions)
            scene = Scene(visual, positions, index, ids=kwargs["position_ids"])
            rotary = parts_of(layer).rotary
            rows = text_rows(layer, hidden, scene, rotary)
            torch.testing.assert_close(rows.query[0], own.query[0][:, index[0]])
            assert rows.scaling == own.scaling
            about = family_of(model).query_key(layer)
            norms.add(about.k_norm is not None)
            whole = LayerSelector(
                down=torch.diag(about.norm_weight),
                up=about.w_k,
                key_bias=about.b_k,
                eps=about.norm_eps,
                key_norm=about.k_norm,
            )
            got = importance(hidden, whole, rows, scene)
            real = attention_importance(own, visual, ~visual)
            # The real mean counts text in front of the image, too.
            real = real * float((~visual).sum()) / index.shape[1]
            torch.testing.assert_close(got[visual], real[visual], rtol=1e-3, atol=1e-6)
            # With the operators of a GPU.
            normed = Normed(hidden, about.norm_weight)
            latent = normed.states(about.norm_eps)
            total, count = text_sum(layer, normed, latent, whole, scene, about.q_norm, rotary)
            torch.testing.assert_close((total / count)[visual], got[visual], rtol=1e-4, atol=1e-6)
    assert norms == {KINDS[kind].norms}


@pytest.mark.parametrize(
    ("kind", "visual"),
    [
        ("llava_onevision", 52 * 2 - 8 - 8),
        ("internvl", 32),
        ("idefics3", 32),
        ("smolvlm", 16),
        ("mistral3", 12),
        ("qwen2_vl", 12),
        ("qwen3_vl", 12),
        ("qwen3_vl_moe", 7),
        ("glm4v", 12),
        ("glm_ocr", 12),
    ],
)
def test_a_made_up_prompt_has_the_wanted_tokens(kind, visual):
    """As `alvts bench` runs on, without a picture or a processor."""
    model = a_model(kind)
    wanted = None if kind == "llava_onevision" else visual
    inputs = synthetic_inputs(model, 2, wanted, 8)
    found = family_of(model).visual_mask(model, inputs["input_ids"]).sum(dim=1)
    assert found.tolist() == [visual] * 2
    assert inputs["input_ids"].shape[1] == visual + 8
    with torch.no_grad(), attach(model, selectors_for(model), 0.25) as attachment:
        assert model(**inputs).logits.isfinite().all()
        assert attachment.last.visual_tokens == (visual, visual)
    if kind in ("internvl", "mistral3"):
        with pytest.raises(AlvtsError, match=r"visual[ -]tokens"):
            synthetic_inputs(model, 1, 37, 8)


def test_families_without_made_up_prompts_are_named():
    with pytest.raises(AlvtsError, match="no images for ovis2; give --image"):
        synthetic_inputs(a_model("ovis2"), 1, None, 8)


@each_kind
def test_what_an_answer_takes_is_timed(kind):
    model = a_model(kind)
    video = kind in VIDEOS
    images = int(KINDS[kind].mixes or not video)
    made = generate(model, zoo_inputs(model, kind, images, video), 2)
    assert made.vision_ms > 0 and made.prefill_ms > 0 and made.kv_bytes > 0


def test_the_arithmetic_of_experts():
    """Of 4 experts of 24 units a token goes through 2, and one number is made to choose each."""
    plain, experts = (KINDS[kind].config().text_config for kind in ("qwen3_vl", "qwen3_vl_moe"))
    tokens = [5] * 4
    counted = [prefill_flops(text, tokens, Selection(), 5).layers for text in (plain, experts)]
    mlps = 6 * WIDTH * 48, 6 * WIDTH * 2 * 24 + 2 * WIDTH * 4
    assert counted[1] - counted[0] == 4 * 5 * (mlps[1] - mlps[0])
    # Of GLM's 6, all go through one more, and the first layer has none.
    config = KINDS["glm4v_moe"].config()
    text = config.text_config
    given = {layer: mlp_of(text, layer) for layer in range(4)}
    assert given == {0: Mlp(48), **dict.fromkeys((1, 2, 3), Mlp(24, 6, 2, 1))}
    text.first_k_dense_replace = 4
    dense = prefill_flops(text, tokens, Selection(), 5).layers
    text.first_k_dense_replace = 0
    more = prefill_flops(text, tokens, Selection(), 5).layers - dense
    assert more == 4 * 5 * (6 * WIDTH * 3 * 24 + 2 * WIDTH * 6 - 6 * WIDTH * 48)
    with pytest.raises(AlvtsError, match="experts that all tokens share"):
        describe("this", config)
    experts.mlp_only_layers = [1, 2]
    assert prefill_flops(experts, tokens, Selection(), 5).layers == counted[0] + 2 * 5 * (
        mlps[1] - mlps[0]
    )


OTHERS = {
    "phi3": "no q_proj",
    "olmo2": "no input_layernorm",
    "cohere": "it is no RMSNorm",
    "glm4": "makes its queries",
    # Its norms stand behind the rotary positions, under another name.
    "hunyuan_v1_dense": "makes its queries",
}


@pytest.mark.parametrize(("text", "why"), OTHERS.items(), ids=OTHERS)
def test_a_text_model_that_scores_otherwise_is_refused(text, why):
    """Known as LLaVA, and another decoder behind it."""
    auto: Any = AutoModelForImageTextToText
    model = randomise(auto.from_config(llava_config(text_config(text))))
    with pytest.raises(AlvtsError, match=why):
        check_layers(model)
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    selectors = Selectors([random_selector(generator, 16) for _ in range(4)])
    with pytest.raises(AlvtsError):
        attach(model, selectors, 0.5)


def test_the_arithmetic_of_experts_in_every_second_layer():
    text = KINDS["qwen3_vl_moe"].config().text_config
    in_each, in_none, in_some = (
        prefill_flops(one, [5] * 4, Selection(), 5).layers
        for one in (
            text,
            KINDS["qwen3_vl"].config().text_config,
            text.from_dict({**text.to_dict(), "decoder_sparse_step": 2}),
        )
    )
    assert in_each != in_none and 2 * in_some == in_each + in_none


@pytest.mark.parametrize("size", [1, 0.01])
def test_a_scale_by_position_that_is_not_known_is_seen(size, monkeypatch):
    """Though it begins behind thousands of tokens, as a trained model's does; and though weights
    are small, for what is alike but for rounding is so by the size of the numbers."""
    # A model that was found to be as scoring has it is not looked at again.
    model, other = (make_zoo_model("mistral3-ministral3") for _ in range(2))
    for layer in (*decoder(model).layers, *decoder(other).layers):
        layer.self_attn.config.rope_parameters["original_max_position_embeddings"] = 16384
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data *= size
    check_layers(model)
    monkeypatch.setattr("alvts_cli.engine.scoring.scaled_by_position", lambda layer: None)
    with pytest.raises(AlvtsError, match="makes its queries"):
        check_layers(other)


def test_a_decoder_without_rotary_positions_in_some_layers_is_refused():
    auto: Any = AutoModelForImageTextToText
    text = text_config("smollm3", no_rope_layers=[1, 1, 1, 0], sliding_window=None)
    with pytest.raises(AlvtsError, match="layer 3 of this model, a SmolLM3DecoderLayer, makes its"):
        check_layers(randomise(auto.from_config(llava_config(text))))


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_not_reached_is_refused_with_the_reason(model_type):
    config = type("Config", (), {"model_type": model_type})()
    with pytest.raises(AlvtsError, match=f"does not support {model_type}: "):
        family_of(config)


def test_masks_that_are_not_causal_are_refused():
    others = [family for family in FAMILIES if family.mask != CAUSAL]
    assert others
    for family in others:
        config = type("Config", (), {"model_type": family.model_types[0]})()
        with pytest.raises(AlvtsError, match=family.mask):
            family_of(config)


@pytest.mark.skipif(OLD, reason="some tiny models are for newer releases of transformers")
def test_every_row_of_the_table_is_tested():
    tested = {KINDS[kind].config().model_type for kind in KINDS}
    known = {t for family in FAMILIES if family.mask == CAUSAL for t in family.model_types}
    assert tested == known


def test_the_readme_has_a_row_for_every_family():
    text = families_table.README.read_text()
    table = text.split(families_table.BEGIN)[1].split(families_table.END)[0]
    assert [row for row in KINDS if f"| `{row}` |" not in table] == []
    assert "no" not in [cell.strip() for cell in table.split("|")]
    for test in families_table.COLUMNS.values():
        assert test in globals()
