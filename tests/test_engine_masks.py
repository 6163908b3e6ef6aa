import pytest
import torch
from tiny import Prompt, make_inputs, make_model, make_selectors, one_image
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alvts_cli import AlvtsError, attach
from alvts_cli.engine.masks import build_mask, mask_style


def bools(text: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in row] for row in text.split()])


def test_no_mask_where_the_causal_path_is_right():
    prompt, token = torch.zeros(2, 4, 8), torch.zeros(2, 1, 8)
    assert build_mask("sdpa", prompt, 0, None) is None
    assert build_mask("flash_attention_2", prompt, 0, None) is None
    assert build_mask("flash_attention_2", prompt, 3, None) is None
    for style in ("sdpa", "eager", "flash_attention_2"):
        assert build_mask(style, token, 5, None) is None


def test_sdpa_with_a_past_is_aligned_to_the_last_key():
    mask = build_mask("sdpa", torch.zeros(1, 2, 8), 2, None)
    assert torch.equal(mask, bools("1110 1111")[None, None])


def test_fill_is_hidden_but_sees_itself():
    hidden, valid = torch.zeros(2, 3, 8), bools("01011 11111")
    mask = build_mask("sdpa", hidden, 2, valid)
    assert torch.equal(mask[0, 0], bools("01100 01010 01011"))
    assert torch.equal(mask[1, 0], bools("11100 11110 11111"))
    flash = build_mask("flash_attention_2", hidden, 2, valid)
    assert torch.equal(flash, bools("01011 11111"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_is_additive(dtype):
    mask = build_mask("eager", torch.zeros(1, 3, 8, dtype=dtype), 0, bools("011"))
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, bools("100 010 011")[None, None])
    assert bool(mask.isfinite().all())


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("style", ["sdpa", "eager"])
def test_a_bias_stands_beside_what_is_hidden(style):
    bias = torch.tensor([[0.5, 1.5, 2.5], [3.5, 4.5, 5.5]])
    mask = build_mask(style, torch.zeros(2, 2, 8), 1, None, bias)
    assert mask.dtype == torch.float32
    assert mask[:, 0].tolist() == [
        [[0.5, 1.5, LOWEST], [0.5, 1.5, 2.5]],
        [[3.5, 4.5, LOWEST], [3.5, 4.5, 5.5]],
    ]
    filled = build_mask(style, torch.zeros(2, 2, 8), 1, bools("010 111"), bias)
    assert filled[0, 0].tolist() == [[LOWEST, 1.5, LOWEST], [LOWEST, 1.5, 2.5]]
    assert torch.equal(filled[1], mask[1])


@pytest.mark.parametrize("style", ["sdpa", "eager"])
def test_a_single_row_is_given_the_bias_alone(style):
    token, bias = torch.zeros(2, 1, 8), torch.tensor([[0.5, 1.5], [2.5, 3.5]])
    assert torch.equal(build_mask(style, token, 1, None, bias), bias[:, None, None])
    filled = build_mask(style, token, 1, bools("01 11"), bias)
    assert filled[:, 0, 0].tolist() == [[LOWEST, 1.5], [2.5, 3.5]]
    assert build_mask(style, token.bfloat16(), 1, None, bias).dtype == torch.bfloat16


def test_styles():
    assert mask_style("kernels-community/flash-attn3") == "flash"
    for unknown in ("flex_attention", "paged|sdpa"):
        with pytest.raises(AlvtsError, match="attn_implementation"):
            mask_style(unknown)


def varlen(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """What FlashAttention does with a 2-D mask: drop the padding, attend causally to the end."""
    rows = query.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
        if key.shape[0] == 1 and position_ids is not None:
            assert bool((position_ids.diff() == 1).all()), "taken for packed sequences"
    assert attention_mask.shape == (key.shape[0], key.shape[2])
    out = torch.zeros_like(query).transpose(1, 2)
    for b, columns in enumerate(attention_mask.bool()):
        keys = columns.nonzero()[:, 0]
        if rows == key.shape[2]:
            mine = keys
        elif rows == 1:
            mine = torch.tensor([0])
        else:
            mine = columns[-rows:].nonzero()[:, 0]
        if not len(mine):
            continue
        mask = torch.ones(len(mine), len(keys)).tril(len(keys) - len(mine)).bool()
        q, k, v = query[b : b + 1, :, mine], key[b : b + 1, :, keys], value[b : b + 1, :, keys]
        got, _ = sdpa_attention_forward(
            module, q, k, v, mask[None, None], scaling=kwargs["scaling"]
        )
        out[b, mine] = got[0]
    return out, None


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_flash_path_equals_sdpa(family, monkeypatch):
    """Through a stand-in with its rules, for it needs a GPU."""
    name = "flash_attention_standin"
    size = one_image(family).images
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, varlen)
    monkeypatch.setitem(
        ALL_MASK_ATTENTION_FUNCTIONS._global_mapping,
        name,
        ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"],
    )
    model = make_model(family)
    options = dict(
        max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    for prompts in (
        [one_image(family)],
        [one_image(family), Prompt([1, 2, 3], size), Prompt([1, 9, 8, 7, 6])],
    ):
        inputs = make_inputs(model, *prompts)
        results = []
        for attn in ("sdpa", name):
            model.model.language_model.config._attn_implementation = attn
            with torch.no_grad(), attach(model, make_selectors(family), [1.0, 0.25, 0, 5]):
                results.append(model.generate(**inputs, **options))
        sdpa, flash = results
        assert torch.equal(sdpa.sequences, flash.sequences)
        for a, b in zip(sdpa.logits, flash.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
