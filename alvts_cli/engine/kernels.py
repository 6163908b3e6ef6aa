"""The importance of `scoring` as two Triton kernels, which store nothing of `T x T` size.

The first makes the log-sum-exp of every row of logits, the second goes down the columns with them
and sums the attention over visual and over text rows. Nothing is added atomically, so the same
inputs give the same bits. Needs triton, which torch's GPU builds for Linux bring with them; only
`scoring` imports this module, and only when it is about to use it.

Correctness is tested through Triton's interpreter. **The speed on a GPU, and the block sizes
below, are unmeasured.**
"""

import warnings
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_RANK = 256
# Bytes of a tile of queries or keys. A few of them fit the shared memory of any card.
TILE = 16384

_works: dict[torch.device, bool] = {}


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    projected,
    norm,
    bias,
    batch,
    rows,
    columns,
    tokens,
    width,
    eps,
    rank: tl.constexpr,
    padded_rank: tl.constexpr,
    has_bias: tl.constexpr,
):
    """Float32 `[rows, columns]`: the products of the raw projections, scaled by both RMSNorms.

    A row of `projected` is a query and behind it a key. The scales come after the product, so that
    half-precision projections go to the tensor cores as they are. Exact for float32: triton would
    take TF32 by itself.
    """
    dims = tl.arange(0, padded_rank)
    at = batch * tokens
    row_in, column_in = rows < tokens, columns < tokens
    row_mask = row_in[:, None] & (dims < rank)[None, :]
    column_mask = column_in[None, :] & (dims < rank)[:, None]
    queries = projected + (at + rows[:, None]) * (2 * rank) + dims[None, :]
    keys = projected + (at + columns[None, :]) * (2 * rank) + rank + dims[:, None]
    q = tl.load(queries, mask=row_mask, other=0.0)
    k = tl.load(keys, mask=column_mask, other=0.0)
    row_norm = tl.load(norm + at + rows, mask=row_in, other=0.0)
    column_norm = tl.load(norm + at + columns, mask=column_in, other=0.0)
    logits = (
        tl.dot(q, k, input_precision="ieee") * tl.rsqrt(row_norm * row_norm / width + eps)[:, None]
    )
    if has_bias:
        b = tl.load(bias + dims, mask=dims < rank, other=0.0)
        logits += tl.sum(b[:, None] * k.to(tl.float32), axis=0)[None, :]
    return logits * tl.rsqrt(column_norm * column_norm / width + eps)[None, :]


@triton.jit
def _real(visual, text, batch, positions, tokens):  # type: ignore[no-untyped-def]
    """Whether each position is a token: neither padding nor behind the end."""
    inside = positions < tokens
    v = tl.load(visual + batch * tokens + positions, mask=inside, other=0)
    t = tl.load(text + batch * tokens + positions, mask=inside, other=0)
    return (v | t) != 0


@triton.jit(do_not_specialize=["tokens", "width"])
def _row_kernel(  # type: ignore[no-untyped-def]
    projected,
    norm,
    bias,
    visual,
    text,
    log_sums,
    tokens,
    width,
    eps,
    rank: tl.constexpr,
    padded_rank: tl.constexpr,
    has_bias: tl.constexpr,
    causal: tl.constexpr,
    block: tl.constexpr,
):
    """The log-sum-exp `[B, T]` of a block of rows, over all the columns they see."""
    start, batch = tl.program_id(0) * block, tl.program_id(1)
    rows = start + tl.arange(0, block)
    # Not -inf: a padding row may have no column at all, and would make nan of it.
    peak = tl.full([block], -1e30, tl.float32)
    total = tl.zeros([block], tl.float32)
    end = tokens
    if causal:
        end = tl.minimum(start + block, tokens)
    for first in range(0, end, block):
        columns = first + tl.arange(0, block)
        logits = _logits(
            projected, norm, bias, batch, rows, columns, tokens, width, eps,
            rank, padded_rank, has_bias,
        )  # fmt: skip
        seen = _real(visual, text, batch, columns, tokens)[None, :]
        if causal:
            seen = seen & (columns[None, :] <= rows[:, None])
        logits = tl.where(seen, logits, -1e30)
        higher = tl.maximum(peak, tl.max(logits, axis=1))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(logits - higher[:, None]), axis=1)
        peak = higher
    tl.store(log_sums + batch * tokens + rows, peak + tl.log(total), mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens", "width"])
def _column_kernel(  # type: ignore[no-untyped-def]
    projected,
    norm,
    bias,
    visual,
    text,
    log_sums,
    result,
    tokens,
    width,
    eps,
    rank: tl.constexpr,
    padded_rank: tl.constexpr,
    has_bias: tl.constexpr,
    causal: tl.constexpr,
    block: tl.constexpr,
):
    """The importance `[B, T]` of a block of columns, from all the rows that see them."""
    start, batch = tl.program_id(0) * block, tl.program_id(1)
    columns = start + tl.arange(0, block)
    at = batch * tokens
    wanted = tl.load(visual + at + columns, mask=columns < tokens, other=0) != 0
    visual_sum = tl.zeros([block], tl.float32)
    text_sum = tl.zeros([block], tl.float32)
    visual_rows = 0
    text_rows = 0
    for first in range(0, tokens, block):
        rows = first + tl.arange(0, block)
        is_visual = tl.load(visual + at + rows, mask=rows < tokens, other=0) != 0
        is_text = tl.load(text + at + rows, mask=rows < tokens, other=0) != 0
        visual_rows += tl.sum(is_visual.to(tl.int32), axis=0)
        text_rows += tl.sum(is_text.to(tl.int32), axis=0)
    begin = 0
    if causal:
        # Rows in front of these columns see none of them; blocks of both begin at multiples.
        begin = start
    for first in range(begin, tokens, block):
        rows = first + tl.arange(0, block)
        is_visual = tl.load(visual + at + rows, mask=rows < tokens, other=0) != 0
        is_text = tl.load(text + at + rows, mask=rows < tokens, other=0) != 0
        logits = _logits(
            projected, norm, bias, batch, rows, columns, tokens, width, eps,
            rank, padded_rank, has_bias,
        )  # fmt: skip
        log_sum = tl.load(log_sums + at + rows, mask=rows < tokens, other=0.0)
        seen = (is_visual | is_text)[:, None] & wanted[None, :]
        if causal:
            seen = seen & (columns[None, :] <= rows[:, None])
        attention = tl.exp(tl.where(seen, logits - log_sum[:, None], -float("inf")))
        visual_sum += tl.sum(tl.where(is_visual[:, None], attention, 0.0), axis=0)
        text_sum += tl.sum(tl.where(is_text[:, None], attention, 0.0), axis=0)
    importance = visual_sum / tl.maximum(visual_rows, 1)
    if text_rows > 0:
        importance *= text_sum / text_rows
    importance = tl.where(wanted, importance, -float("inf"))
    tl.store(result + at + columns, importance, mask=columns < tokens)


def tile(rank: int, size: int) -> tuple[int, int]:
    """Rank and rows of a tile, powers of two that a dot takes, for elements of `size` bytes."""
    padded_rank = max(16, triton.next_power_of_2(rank))
    return padded_rank, min(64, max(16, TILE // (padded_rank * size)))


def importance(
    projected: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    visual: Tensor,
    text: Tensor,
    causal: bool,
    width: int,
    eps: float,
) -> Tensor:
    """What `scoring.importance` returns, from the raw projections; not differentiable.

    Args:
        projected: `[B, T, 2R]`, queries and behind them keys, of a dtype in `DTYPES`, `R` at most
            `MAX_RANK`.
        norm: float32 `[B, T]`, the length of each hidden state.
        bias: float32 `[R]`, added to the scaled queries, or None.
        visual, text: bool `[B, T]`.
        causal: let a row see only columns up to its own.
        width: of the hidden states.
        eps: of the RMSNorm.

    Returns:
        float32 `[B, T]`, -inf where not visual.
    """
    batch, tokens, both = projected.shape
    rank = both // 2
    padded_rank, block = tile(rank, projected.element_size())
    inputs: tuple[Any, ...] = (
        projected.contiguous(),
        norm.contiguous(),
        bias,
        visual.contiguous().view(torch.uint8),
        text.contiguous().view(torch.uint8),
    )
    log_sums = torch.empty(batch, tokens, dtype=torch.float32, device=projected.device)
    result = torch.empty_like(log_sums)
    numbers = (tokens, width, eps)
    meta = (rank, padded_rank, bias is not None, causal, block)
    grid = (triton.cdiv(tokens, block), batch)
    # Triton launches on the current device, which need not be the one of this layer.
    with torch.cuda.device_of(projected):
        _row_kernel[grid](*inputs, log_sums, *numbers, *meta)
        _column_kernel[grid](*inputs, log_sums, result, *numbers, *meta)
    return result


# torch.compile takes an operator as it is. Calling it costs more than calling the function.
operator = torch.library.custom_op("alvts::importance", importance, mutates_args=())


@operator.register_fake
def _(projected: Tensor, *args: Any) -> Tensor:
    return projected.new_empty(projected.shape[:2], dtype=torch.float32)


def fit(projected: Tensor) -> bool:
    """Whether `importance` can take these projections where they are."""
    fits = projected.dtype in DTYPES and projected.shape[-1] <= 2 * MAX_RANK
    return fits and works(projected.device)


@torch.compiler.assume_constant_result
def works(device: torch.device) -> bool:
    """Whether kernels can be built and run on `device`; tried once, warns if they cannot.

    Triton needs a C compiler, which a machine that runs torch may lack.
    """
    if device not in _works:
        projected = torch.zeros(1, 16, 32, device=device)
        everything = torch.ones(1, 16, dtype=torch.bool, device=device)
        try:
            importance(projected, projected[..., 0], None, everything, everything, False, 16, 1e-6)
            _works[device] = True
        except Exception as error:  # Whatever stops Triton, PyTorch can do the work.
            warnings.warn(
                f"alvts scores with PyTorch on {device}, because its Triton kernels cannot be "
                f"run: {error}",
                stacklevel=2,
            )
            _works[device] = False
    return _works[device]
