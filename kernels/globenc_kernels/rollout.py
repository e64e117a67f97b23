"""Rollout of chosen rows through a layer, r <- r A, each tile of A consumed the moment it exists."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import ceil_div, expect, launch, power_of_two
from .contribution_norms import LocalMap, head_pointers, in_reach, load_heads, local_map_tile
from .tiles import multiprocessors

ROWS = 32  # at most so many target rows share a pass over the tiles


@triton.jit(do_not_specialize=["n", "window", "zero", "m", "splits", "stride_rb", "stride_rm", "stride_ob"])
def _rollout_rows_kernel(
    q_ptr, k_ptr, lse_ptr, factor_ptr, key_scale_ptr, row_scale_ptr, diagonal_ptr, mask_ptr, range_ptr,
    n, window, zero, scale, stride_qn, stride_kn, stride_lb, stride_fb,
    rows_ptr, used_ptr, result_ptr, m, splits, stride_rb, stride_rm, stride_ob,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, HELD: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What one block of keys gets from one part of the queries."""
    start_k = tl.program_id(0) * BLOCK_K
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    low, high = in_reach(
        tl.load(range_ptr + 3 * b), tl.load(range_ptr + 3 * b + 1), start_k, window, BLOCK_K, BLOCK_Q, WINDOW
    )
    low = tl.maximum(low, tl.load(used_ptr + 2 * b) // BLOCK_Q * BLOCK_Q)
    high = tl.minimum(high, tl.load(used_ptr + 2 * b + 1))
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_Q), splits) * BLOCK_Q
    low += part * share
    high = tl.minimum(high, low + share)
    k_pointers = head_pointers(k_ptr + b * n * stride_kn, stride_kn, start_k, n, BLOCK_D, BLOCK_K)
    held = load_heads(k_pointers, HELD, H, D, BLOCK_D)
    offs_m = tl.arange(0, BLOCK_M)
    if BLOCK_M == 1:
        acc = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    else:
        acc = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for start_q in tl.range(low, high, BLOCK_Q):
        q_pointers = head_pointers(q_ptr + b * n * stride_qn, stride_qn, start_q, n, BLOCK_D, BLOCK_Q)
        tile = local_map_tile(
            held, q_pointers, k_pointers, start_q, start_k,
            lse_ptr + b * stride_lb, factor_ptr + b * stride_fb, key_scale_ptr + b * n,
            row_scale_ptr + b * n, diagonal_ptr + b * n, mask_ptr + b * n, n, window, zero, scale,
            H, D, BLOCK_D, BLOCK_Q, BLOCK_K, WEIGHTS, WINDOW,
        )  # fmt: skip
        rows_q = start_q + tl.arange(0, BLOCK_Q)
        source = rows_ptr + b * stride_rb + rows_q
        # what stands at padding may be anything
        real_q = (rows_q < n) & (tl.load(mask_ptr + b * n + tl.minimum(rows_q, n - 1)) != 0)
        if BLOCK_M == 1:
            acc += tile * tl.load(source, mask=real_q, other=0.0)[None, :]
        else:
            inside = real_q[:, None] & (offs_m < m)[None, :]
            rows = tl.load(source[:, None] + offs_m[None, :] * stride_rm, mask=inside, other=0.0)
            acc = tl.dot(tile, rows, acc, input_precision="ieee")
    rows_k = start_k + tl.arange(0, BLOCK_K)
    target = result_ptr + part * (tl.num_programs(2) * stride_ob) + b * stride_ob + rows_k
    if BLOCK_M == 1:
        tl.store(target, tl.sum(acc, axis=1), mask=rows_k < n)
    else:
        inside = (rows_k < n)[:, None] & (offs_m < m)[None, :]
        tl.store(target[:, None] + offs_m[None, :] * n, acc, mask=inside)


def rollout_rows(rows: Tensor, local_map: LocalMap, used: Tensor | None = None) -> Tensor:
    """rows @ A without A: (12) for chosen rows, from the top down.

    Nothing of size n x n exists; the sum is in a fixed order, so that the same call gives the same bits.

    Args:
        rows: m rows a text, [batch, m, n], float32; they need not be zero at padding.
        local_map: the layer's A.
        used: where rows are not zero, first token and last + 1, [batch, 2], int32; None: anywhere. Tiles elsewhere are
            skipped.

    Returns:
        [batch, m, n], float32; zero at padding.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device; the message names it.

    Example:
        >>> rollout_rows(torch.rand(2, 3, 100, device="cuda"), local_map).shape
        torch.Size([2, 3, 100])
    """
    batch, n = local_map.tokens.shape
    device = local_map.query.device
    expect(rows, "rows", (batch, "m", n), (torch.float32,), device)
    if used is None:
        used = local_map.tokens.ranges[:, :2]
    expect(used, "used", (batch, 2), (torch.int32,), device)
    rows, used = rows.contiguous(), used.contiguous()
    arguments = local_map.arguments()
    results = []
    for some in rows.split(ROWS, 1):
        m = some.shape[1]
        block_m = 1 if m == 1 else power_of_two(m)
        tiles = local_map.tiles("row" if m == 1 else "rows")
        columns = ceil_div(n, tiles.k)
        # few texts of few tokens: let several programs share a column, and add up their parts in order
        splits = max(1, min(ceil_div(n, tiles.q), 2 * multiprocessors(device) // (columns * batch)))
        parts = torch.empty(splits, batch, m, n, dtype=torch.float32, device=device)
        launch(
            _rollout_rows_kernel,
            (columns, splits, batch),
            *arguments, some, used, parts, m, splits, some.stride(0), some.stride(1), parts.stride(1),
            HELD=local_map.holds(tiles), BLOCK_M=block_m, **local_map.options(tiles),
        )  # fmt: skip
        results.append(parts[0] if splits == 1 else parts.sum(0))
    return results[0] if len(results) == 1 else torch.cat(results, 1)
