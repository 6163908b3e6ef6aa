"""The attention mask of one layer, whose keys are not those the model built its mask for."""

import torch
from torch import Tensor

from ..errors import AlvtsError


def mask_style(implementation: str) -> str:
    """ "sdpa", "eager" or "flash" for a `config._attn_implementation`.

    Raises:
        AlvtsError: another implementation, whose mask format is not known here.
    """
    if implementation in ("sdpa", "eager"):
        return implementation
    # "flash_attention_2" and its siblings, or a kernel of the hub such as ".../flash-attn3".
    if implementation.startswith("flash_attention_") or "flash-attn" in implementation:
        return "flash"
    raise AlvtsError(
        f"alvts does not support attn_implementation={implementation!r}; "
        "load the model with sdpa, eager or flash_attention_2"
    )


def check_bias(implementation: str) -> None:
    """Refuse an attention kernel that cannot add a number to a key's logits.

    Raises:
        AlvtsError: it is FlashAttention.
    """
    if mask_style(implementation) == "flash":
        raise AlvtsError(
            f"attn_implementation={implementation!r} cannot weigh tokens by what they stand for, "
            "as these selectors want at this keep ratio; load the model with sdpa or eager"
        )


def build_mask(
    implementation: str,
    hidden: Tensor,
    past_slots: int,
    valid: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor | None:
    """The causal mask of a layer that runs on `hidden`, behind `past_slots` cached keys.

    Args:
        implementation: `config._attn_implementation`.
        hidden: `[B, Q, D]`, for the batch, the number of rows, the dtype and the device.
        past_slots: keys in the layer's cache before this forward.
        valid: bool `[B, past_slots + Q]`, False at fill; None when all are real.
        bias: `[B, past_slots + Q]`, added to the logits of every key; None for none.

    Returns:
        None wherever the implementation's own causal path is right (nothing filled, and no past
        or a single row), so that the fast kernels are used. Else for sdpa bool, for eager
        additive in the dtype of `hidden`, both `[B or 1, 1, Q, past + Q]`; for FlashAttention
        bool `[B, past + Q]`. A fill row sees itself, so no row is empty and no nan arises; of a
        single row, `valid` says so. With a bias, additive for sdpa too; FlashAttention has no place
        for one, see `check_bias`.
    """
    style = mask_style(implementation)
    rows = hidden.shape[1]
    if style == "flash":
        return valid
    # With a past, sdpa's own causal mask is aligned to the first key: it would be wrong.
    own_causal = rows == 1 or (style == "sdpa" and past_slots == 0)
    if valid is None and own_causal and bias is None:
        return None
    added = None if bias is None else bias.to(hidden)[:, None, None]
    if valid is None and rows == 1:
        return added
    if rows == 1 and valid is not None:
        if style == "sdpa" and added is None:
            return valid[:, None, None]
        hide = ~valid[:, None, None]
    else:
        key = torch.arange(past_slots + rows, device=hidden.device)
        row = key[past_slots:, None]
        hide = (key > row)[None, None]
        if valid is not None:
            hide = (hide | ~valid[:, None, None]) & (key != row)
    if style == "sdpa" and added is None:
        return ~hide
    if added is None:
        added = torch.zeros_like(hide, dtype=hidden.dtype)
    return added.masked_fill(hide, torch.finfo(hidden.dtype).min)
