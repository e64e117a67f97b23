"""Attention forward that keeps what contribution maps need, in the one pass over the scores that the model pays for.

Beside the context it writes every row's log-sum-exp, from which later kernels recompute attention weights tile by
tile, and alpha_ii v_i, what each token gives to itself: the diagonal of the map before the output projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import TokenRanges, ceil_div, expect_heads, expect_scores, heads_last, launch, power_of_two
from .layouts import BLOCK_TOKENS, head_offset, lse_offset, lse_shape
from .tiles import attention_tiles

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class AttentionOutput:
    """What one attention call leaves.

    Attributes:
        context: sum_j alpha_ij v_j, [batch, n, heads, head_dim], the dtype of value.
        diagonal_context: alpha_ii v_i, the same shape and dtype; zero at padding.
        diagonal_weight: alpha_ii, [batch, heads, n], float32; zero at padding.
        log_sum_exp: of a row's scores in two parts, its largest score s before scaling and log2 of the sum of
            2**((score - s) * scaling * log2(e)), so that large scores lose no digits; float32, in
            blocks of 64 queries (layouts.py): [batch, ceil(n / 64), heads, 2, 64]; not defined behind the last query.
    """

    context: Tensor
    diagonal_context: Tensor
    diagonal_weight: Tensor
    log_sum_exp: Tensor


@triton.jit
def _attend_keys(
    q, acc, total, top, k_ptr, v_ptr, mask_ptr, stride_kn, stride_vn, scale, rows_q, start, n, window,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, MASKED: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running softmax: acc, its total and its largest score."""
    rows_k = start + tl.arange(0, BLOCK_K)
    safe_k = tl.minimum(rows_k, n - 1)
    offs_d = tl.arange(0, BLOCK_D)
    real_d = (offs_d < D)[None, :]
    k = tl.load(k_ptr + safe_k[:, None].to(tl.int64) * stride_kn + offs_d[None, :], mask=real_d, other=0.0)
    v = tl.load(v_ptr + safe_k[:, None].to(tl.int64) * stride_vn + offs_d[None, :], mask=real_d, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if MASKED:
        seen = ((tl.load(mask_ptr + safe_k) != 0) & (rows_k < n))[None, :]
        v = tl.where(tl.trans(seen), v, tl.zeros_like(v))  # what stands at padding may be anything, also NaN
        if WINDOW:
            seen = seen & (tl.abs(rows_q[:, None] - rows_k[None, :]) <= window)
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen so far
    weights = tl.exp2((scores - shift[:, None]) * scale)
    fade = tl.exp2((top - shift) * scale)
    total = total * fade + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, total, new_top


@triton.jit(do_not_specialize=["n", "window"])
def _attention_kernel(
    q_ptr,  # [batch, n, H, D]
    k_ptr,  # [batch, n, H, D]
    v_ptr,  # [batch, n, H, D]
    mask_ptr,  # [batch, n]
    range_ptr,  # [batch, 3]
    context_ptr,  # out, [batch, n, H, D]
    diagonal_ptr,  # out, [batch, n, H, D]
    weight_ptr,  # out, [batch, H, n]
    lse_ptr,  # out, `lse_shape`
    n, window, scale,
    stride_qn, stride_kn, stride_vn,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK_Q queries."""
    start_q = tl.program_id(0) * BLOCK_Q
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(range_ptr + 3 * b)
    last = tl.load(range_ptr + 3 * b + 1)
    holes = tl.load(range_ptr + 3 * b + 2)
    rows_q = start_q + tl.arange(0, BLOCK_Q)
    safe_q = tl.minimum(rows_q, n - 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    real_d = (offs_d < D)[None, :]
    text = b * n  # its first row
    q = tl.load(
        q_ptr + text * stride_qn + h * D + safe_q[:, None] * stride_qn + offs_d[None, :], mask=real_d, other=0.0
    )
    k_ptr += text * stride_kn + h * D
    v_ptr += text * stride_vn + h * D
    mask_ptr += text

    low, high = first, last
    if WINDOW:
        low = tl.maximum(first, start_q - window)
        high = tl.minimum(last, start_q + BLOCK_Q + window)
    if (start_q >= last) | (start_q + BLOCK_Q <= first):  # nothing but padding
        low, high = last, last
    high = tl.maximum(low, high)
    middle = low + (high - low) // BLOCK_K * BLOCK_K
    if WINDOW or holes != 0:
        middle = low
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for start in range(low, middle, BLOCK_K):
        acc, total, top = _attend_keys(
            q, acc, total, top, k_ptr, v_ptr, mask_ptr, stride_kn, stride_vn, scale, rows_q, start, n, window,
            D, BLOCK_D, BLOCK_K, False, WINDOW,
        )  # fmt: skip
    for start in range(middle, high, BLOCK_K):
        acc, total, top = _attend_keys(
            q, acc, total, top, k_ptr, v_ptr, mask_ptr, stride_kn, stride_vn, scale, rows_q, start, n, window,
            D, BLOCK_D, BLOCK_K, True, WINDOW,
        )  # fmt: skip
    real_q = (tl.load(mask_ptr + safe_q) != 0) & (rows_q < n)
    # no key at all: a context of zero at padding; a real query sees itself, and its scores are all -inf
    total = tl.where(total == 0, tl.where(real_q, float("nan"), 1.0), total)
    top = tl.where(top == float("-inf"), 0.0, top)
    log_total = tl.log2(total)

    k_diagonal = tl.load(k_ptr + safe_q[:, None] * stride_kn + offs_d[None, :], mask=real_d, other=0.0)
    v_diagonal = tl.load(v_ptr + safe_q[:, None] * stride_vn + offs_d[None, :], mask=real_d, other=0.0)
    diagonal = tl.sum(q.to(tl.float32) * k_diagonal.to(tl.float32), axis=1)
    diagonal = tl.where(real_q, tl.exp2((diagonal - top) * scale - log_total), 0.0)
    v_diagonal = tl.where(real_q[:, None], v_diagonal.to(tl.float32), 0.0)

    inside = (rows_q < n)[:, None] & real_d
    offsets = (text + safe_q[:, None]) * (H * D) + h * D + offs_d[None, :]
    tl.store(context_ptr + offsets, acc / total[:, None], mask=inside)
    tl.store(diagonal_ptr + offsets, diagonal[:, None] * v_diagonal, mask=inside)
    tl.store(weight_ptr + (b * H + h) * n + safe_q, diagonal, mask=rows_q < n)
    block = b * tl.cdiv(n, BLOCK_TOKENS) + rows_q // BLOCK_TOKENS
    lse_ptr += lse_offset(block, head_offset(h), rows_q, H)
    tl.store(lse_ptr, top, mask=rows_q < n)
    tl.store(lse_ptr + BLOCK_TOKENS, log_total, mask=rows_q < n)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tokens: TokenRanges,
    scaling: float,
    window: int | None = None,
) -> AttentionOutput:
    """Scaled dot-product attention over the real tokens of every text.

    Args:
        query, key, value: [batch, heads, n, head_dim], float32, float16 or bfloat16, any strides; 1 to 32 heads of size
            16 to 128.
        tokens: the real tokens, `TokenRanges(attention_mask)`; padding on either side or between.
        scaling: factor of the scores, positive.
        window: a query sees keys at most this far from it; None sees all.

    Raises:
        TypeError, ValueError: an argument of another kind, shape, dtype or device; the message names it.

    Example:
        >>> q = k = v = torch.randn(2, 12, 100, 64, device="cuda", dtype=torch.bfloat16)
        >>> tokens = TokenRanges(torch.ones(2, 100, dtype=torch.bool, device="cuda"))
        >>> attention(q, k, v, tokens, 0.125).context.shape
        torch.Size([2, 100, 12, 64])
    """
    expect_heads(query, "query", tokens)
    expect_heads(key, "key", tokens, like=query)
    expect_heads(value, "value", tokens, like=query)
    expect_scores(scaling, window)
    batch, heads, n, head_dim = query.shape
    query, key, value = heads_last(query), heads_last(key), heads_last(value)
    context = value.new_empty(batch, n, heads, head_dim)
    diagonal_context = torch.empty_like(context)
    diagonal_weight = value.new_empty(batch, heads, n, dtype=torch.float32)
    lse = value.new_empty(lse_shape(batch, n, heads), dtype=torch.float32)
    tiles = attention_tiles(query.dtype, head_dim, query.device)
    launch(
        _attention_kernel,
        (ceil_div(n, tiles.q), heads, batch),
        query, key, value, tokens.mask, tokens.ranges, context, diagonal_context, diagonal_weight, lse,
        n, window or 0, scaling * LOG2_E,
        query.stride(1), key.stride(1), value.stride(1),
        H=heads, D=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=tiles.q, BLOCK_K=tiles.k,
        WINDOW=window is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return AttentionOutput(context, diagonal_context, diagonal_weight, lse)
