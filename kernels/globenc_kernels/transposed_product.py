"""Pull-back of attention with its weights held, t_j = sum_i alpha_ij g_i: each tile of alpha consumed as it exists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import TokenRanges, ceil_div, expect, expect_heads, expect_scores, heads_last, launch, power_of_two
from .attention import LOG2_E
from .contribution_norms import head_pointers, in_reach
from .layouts import BLOCK_TOKENS, head_offset, lse_offset, lse_shape
from .tiles import transposed_tiles

MAX_PROGRAMS = 65535  # of a grid's second dimension


@triton.jit(do_not_specialize=["n", "window", "labels"])
def _transposed_product_kernel(
    q_ptr,  # [batch, n, H, D]
    k_ptr,  # [batch, n, H, D]
    g_ptr,  # [batch, n, H * labels, D]
    lse_ptr,  # `lse_shape`
    mask_ptr,  # [batch, n]
    range_ptr,  # [batch, 3]
    result_ptr,  # out, [batch, n, H * labels, D]
    n, window, labels, scale,
    stride_qn, stride_kn, stride_gn, stride_lb,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK_K keys, for one label."""
    start_k = tl.program_id(0) * BLOCK_K
    column = tl.program_id(1)  # of heads and labels
    h = column // labels
    b = tl.program_id(2).to(tl.int64)
    low, high = in_reach(
        tl.load(range_ptr + 3 * b), tl.load(range_ptr + 3 * b + 1), start_k, window, BLOCK_K, BLOCK_Q, WINDOW
    )
    offs_d = tl.arange(0, BLOCK_D)
    real_d = (offs_d < D)[None, :]
    rows_k = start_k + tl.arange(0, BLOCK_K)
    mask_ptr += b * n
    q_ptr += b * n * stride_qn + h * D
    g_ptr += b * n * stride_gn + column * D
    lse_ptr += b * stride_lb + head_offset(h)
    k_pointers = head_pointers(k_ptr + b * n * stride_kn + h * D, stride_kn, start_k, n, BLOCK_D, BLOCK_K)
    k = tl.load(k_pointers, mask=real_d, other=0.0)
    acc = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start_q in tl.range(low, high, BLOCK_Q):
        rows_q = start_q + tl.arange(0, BLOCK_Q)
        real_q = (tl.load(mask_ptr + tl.minimum(rows_q, n - 1)) != 0) & (rows_q < n)
        # what stands at padding may be anything, also NaN: such a query has the scores 0 and no weight
        inside = real_q[:, None] & real_d
        q = tl.load(head_pointers(q_ptr, stride_qn, start_q, n, BLOCK_D, BLOCK_Q), mask=inside, other=0.0)
        g = tl.load(head_pointers(g_ptr, stride_gn, start_q, n, BLOCK_D, BLOCK_Q), mask=inside, other=0.0)
        lse = lse_ptr + lse_offset(tl.cast(start_q // BLOCK_TOKENS, tl.int64), 0, rows_q, H)
        top = tl.load(lse, mask=real_q, other=0.0)
        log_total = tl.load(lse + BLOCK_TOKENS, mask=real_q, other=float("inf"))
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        alpha = tl.exp2((scores - top[None, :]) * scale - log_total[None, :])
        if WINDOW:
            alpha = tl.where(tl.abs(rows_q[None, :] - rows_k[:, None]) <= window, alpha, 0.0)
        acc = tl.dot(alpha.to(g.dtype), g, acc, input_precision="ieee")
    real_k = (tl.load(mask_ptr + tl.minimum(rows_k, n - 1)) != 0) & (rows_k < n)
    acc = tl.where(real_k[:, None], acc, 0.0)
    width = H * labels * D
    target = head_pointers(result_ptr + b * n * width + column * D, width, start_k, n, BLOCK_D, BLOCK_K)
    tl.store(target, acc, mask=(rows_k < n)[:, None] & real_d)


def transposed_product(
    query: Tensor,
    key: Tensor,
    log_sum_exp: Tensor,
    gradient: Tensor,
    tokens: TokenRanges,
    scaling: float,
    window: int | None = None,
) -> Tensor:
    """sum_i alpha_ij g_i: what gradients of context vectors are of the value vectors, with attention weights held.

    alpha is made anew from queries, keys and log-sum-exps; nothing of size n x n exists. Every number is summed by one
    program in a fixed order, so that the same call gives the same bits.

    Args:
        query, key: as for `attention`.
        log_sum_exp: as `attention` gives it, [batch, ceil(n / 64), heads, 2, 64], float32.
        gradient: g, [batch, n, heads, labels * head_dim], the dtype of query, any strides; of several labels each
            label's side by side. What stands at padding is not read.
        tokens: the real tokens.
        scaling, window: as for `attention`.

    Returns:
        [batch, heads, n, labels * head_dim], the dtype of gradient, tokens first in memory; zero at padding.

    Raises:
        TypeError, ValueError: an argument of another kind, shape, dtype or device; the message names it.

    Example:
        >>> transposed_product(q, k, attention(q, k, v, tokens, 0.125).log_sum_exp, g, tokens, 0.125).shape
        torch.Size([2, 12, 100, 64])
    """
    expect_heads(query, "query", tokens)
    expect_heads(key, "key", tokens, like=query)
    expect_scores(scaling, window)
    batch, heads, n, head_dim = query.shape
    expect(log_sum_exp, "log_sum_exp", lse_shape(batch, n, heads), (torch.float32,), query.device)
    expect(gradient, "gradient", (batch, n, heads, "labels * head_dim"), (query.dtype,), query.device)
    labels, rest = divmod(gradient.shape[3], head_dim)
    if rest or not 0 < heads * labels <= MAX_PROGRAMS:
        raise ValueError(
            f"gradient must have a multiple of the {head_dim} numbers of a head, of at most {MAX_PROGRAMS // heads} "
            f"labels, got {gradient.shape[3]}"
        )
    query, key, lse = heads_last(query), heads_last(key), log_sum_exp.contiguous()
    gradient = heads_last(gradient.unflatten(3, (labels, head_dim)).flatten(2, 3).transpose(1, 2))
    result = gradient.new_empty(batch, n, heads, labels * head_dim)
    tiles = transposed_tiles(query.dtype, head_dim, query.device)
    launch(
        _transposed_product_kernel,
        (ceil_div(n, tiles.k), heads * labels, batch),
        query, key, gradient, lse, tokens.mask, tokens.ranges, result,
        n, window or 0, labels, scaling * LOG2_E,
        query.stride(1), key.stride(1), gradient.stride(1), lse.stride(0),
        H=heads, D=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_Q=tiles.q, BLOCK_K=tiles.k,
        WINDOW=window is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return result.transpose(1, 2)
