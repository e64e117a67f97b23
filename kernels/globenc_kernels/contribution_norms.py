"""A layer's local map, tile by tile: attention weights recomputed, transformed, scaled and normed in one pass.

    A_ij = ||R_j alpha_ij|| / (s1_i s2_i) for i != j,     A_ii given,

with alpha_ij of all heads recomputed from queries, keys and the rows' log-sum-exps, and R_j the factor of key j. Every
method of the paper has this form: where there are no factors the norm is the mean attention weight, and what a method
does to its rows is in the row scale and the diagonal.

`local_map_tile` is the one routine; the kernels below, and rollout.py, say where its tiles go. Tiles stand with keys in
rows: that halves what a thread reads of R.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import (
    TokenRanges,
    ceil_div,
    expect,
    expect_heads,
    expect_scores,
    heads_last,
    launch,
    power_of_two,
)
from .attention import LOG2_E
from .head_factors import HeadFactors
from .layouts import BLOCK_TOKENS, factor_offset, factor_shape, head_offset, lse_offset, lse_shape, pair_index
from .tiles import Tiles, holds_heads, map_tiles


@dataclass(frozen=True, eq=False)
class LocalMap:
    """What a layer's local map is made of; O(n) memory.

    Attributes:
        query, key: [batch, heads, n, head_dim], float32, float16 or bfloat16, any strides.
        scaling: factor of the scores.
        log_sum_exp: as `attention` gives it, [batch, ceil(n / 64), heads, 2, 64], float32.
        factors: as `head_factors` gives them; None for the mean attention weight over heads.
        row_scale: what row i is multiplied by off the diagonal, [batch, n], float32.
        diagonal: A_ii, [batch, n], float32.
        tokens: the real tokens; rows and columns of the others are zero.
        window: as in `attention`.

    Raises:
        TypeError, ValueError: an attribute of another kind, shape, dtype or device; the message names it.
    """

    query: Tensor
    key: Tensor
    scaling: float
    log_sum_exp: Tensor
    factors: HeadFactors | None
    row_scale: Tensor
    diagonal: Tensor
    tokens: TokenRanges
    window: int | None = None

    def __post_init__(self) -> None:
        expect_heads(self.query, "query", self.tokens)
        expect_heads(self.key, "key", self.tokens, like=self.query)
        expect_scores(self.scaling, self.window)
        batch, heads, n, _ = self.query.shape
        device, single = self.query.device, (torch.float32,)
        expect(self.log_sum_exp, "log_sum_exp", lse_shape(batch, n, heads), single, device)
        expect(self.row_scale, "row_scale", (batch, n), single, device)
        expect(self.diagonal, "diagonal", (batch, n), single, device)
        if self.factors is not None:
            expect(self.factors.factor, "factors.factor", factor_shape(batch, n, heads), single, device)
            expect(self.factors.key_scale, "factors.key_scale", (batch, n), single, device)

    def arguments(self) -> tuple:
        """What every kernel here gets first: the attributes' pointers, then sizes and strides."""
        query, key, lse = heads_last(self.query), heads_last(self.key), self.log_sum_exp.contiguous()
        row_scale, diagonal = self.row_scale.contiguous(), self.diagonal.contiguous()
        # without factors their pointers are never read
        factor = lse if self.factors is None else self.factors.factor.contiguous()
        key_scale = row_scale if self.factors is None else self.factors.key_scale.contiguous()
        return (
            query, key, lse, factor, key_scale, row_scale, diagonal, self.tokens.mask, self.tokens.ranges,
            query.shape[1], self.window or 0, 0, self.scaling * LOG2_E,
            query.stride(1), key.stride(1), lse.stride(0), factor.stride(0),
        )  # fmt: skip

    def options(self, tiles: Tiles) -> dict:
        """What every kernel here is compiled for."""
        _, heads, _, head_dim = self.query.shape
        return {
            "H": heads, "D": head_dim, "BLOCK_D": power_of_two(head_dim), "BLOCK_Q": tiles.q, "BLOCK_K": tiles.k,
            "WEIGHTS": self.factors is None, "WINDOW": self.window is not None,
            "num_warps": tiles.warps, "num_stages": tiles.stages,
        }  # fmt: skip

    def tiles(self, use: str) -> Tiles:
        """The tile size for a kernel; `use` as in `map_tiles`."""
        _, heads, _, head_dim = self.query.shape
        return map_tiles(self.query.dtype, heads, head_dim, use, self.query.device)

    def holds(self, tiles: Tiles) -> bool:
        """Whether a kernel goes through its loop with all heads of a block of keys."""
        _, heads, _, head_dim = self.query.shape
        return holds_heads(self.query.dtype, heads, head_dim, tiles.k, self.query.device)


@triton.jit
def head_pointers(ptr, stride_n, start, n, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """To the first head of BLOCK tokens, [BLOCK, BLOCK_D]; behind the last token to that one again."""
    rows = tl.minimum(tl.arange(0, BLOCK), n - 1 - start)
    return ptr + tl.cast(start, tl.int64) * stride_n + rows[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def load_head(pointers, h: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A head's tile, [BLOCK, BLOCK_D]."""
    if BLOCK_D == D:
        return tl.load(pointers + h * D)
    else:
        return tl.load(pointers + h * D, mask=(tl.arange(0, BLOCK_D) < D)[None, :], other=0.0)


@triton.jit
def load_heads(pointers, HELD: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tiles of all heads, to be held through a loop; none where they would not fit into shared memory."""
    tiles = ()
    if HELD:
        for h in tl.static_range(H):
            tiles = tiles + (load_head(pointers, h, D, BLOCK_D),)
    return tiles


@triton.jit
def local_map_tile(
    held,  # k of all heads from `load_heads`, or ()
    q_pointers,  # [BLOCK_Q, BLOCK_D], from `head_pointers`
    k_pointers,  # [BLOCK_K, BLOCK_D], from `head_pointers`
    start_q, start_k,
    lse_ptr,  # a text's, `lse_shape` without the batch
    factor_ptr,  # a text's, `factor_shape` without the batch; read if not WEIGHTS
    key_scale_ptr,  # [n], read if not WEIGHTS
    row_scale_ptr,  # [n]
    diagonal_ptr,  # [n]
    mask_ptr,  # [n]
    n, window, zero, scale,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """A_ij of a tile, [BLOCK_K, BLOCK_Q], zero outside the text; keys from `held`, or else from memory.

    `zero` is 0, and unknown to the compiler: it keeps loads in the loop they stand in, where hoisted they would need
    more registers than there are.
    """
    rows_q = start_q + tl.arange(0, BLOCK_Q)
    rows_k = start_k + tl.arange(0, BLOCK_K)
    safe_q = tl.minimum(rows_q, n - 1)
    safe_k = tl.minimum(rows_k, n - 1)
    lse_ptr += lse_offset(tl.cast(start_q // BLOCK_TOKENS, tl.int64), start_k * zero, rows_q, H)
    q_pointers += start_k * zero
    k_pointers += start_q * zero
    alpha = ()
    for h in tl.static_range(H):
        q = load_head(q_pointers, h, D, BLOCK_D)
        k = held[h] if len(held) == H else load_head(k_pointers, h, D, BLOCK_D)
        scores = tl.dot(k, tl.trans(q), input_precision="ieee")
        top = tl.load(lse_ptr + head_offset(h))
        log_total = tl.load(lse_ptr + head_offset(h) + BLOCK_TOKENS)
        alpha = alpha + (tl.exp2((scores - top[None, :]) * scale - log_total[None, :]),)
    tile = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    if WEIGHTS:
        for h in tl.static_range(H):
            tile += alpha[h]
        tile = tile * (1.0 / H)
    else:
        factor_ptr += factor_offset(tl.cast(start_k // BLOCK_TOKENS, tl.int64), start_q * zero, rows_k, H)
        if H <= 16:
            for a in tl.static_range(H):
                part = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
                for h in tl.static_range(a, H):
                    part += tl.load(factor_ptr + pair_index(a, h, H) * BLOCK_TOKENS)[:, None] * alpha[h]
                tile += part * part
        else:  # so many unrolled rows would take minutes to compile
            for a in tl.range(0, H):
                part = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
                row = factor_ptr + pair_index(a, 0, H) * BLOCK_TOKENS
                for h in tl.static_range(H):
                    entry = tl.load(row + h * BLOCK_TOKENS, mask=(rows_k >= 0) & (h >= a), other=0.0)
                    part += entry[:, None] * alpha[h]
                tile += part * part
        tile = tl.sqrt(tile) * tl.load(key_scale_ptr + safe_k)[:, None]
    tile = tile * tl.load(row_scale_ptr + safe_q)[None, :]
    if WINDOW:
        tile = tl.where(tl.abs(rows_q[None, :] - rows_k[:, None]) <= window, tile, 0.0)
    tile = tl.where(rows_q[None, :] == rows_k[:, None], tl.load(diagonal_ptr + safe_q)[None, :], tile)
    real_q = (tl.load(mask_ptr + safe_q) != 0) & (rows_q < n)
    real_k = (tl.load(mask_ptr + safe_k) != 0) & (rows_k < n)
    return tl.where(real_q[None, :] & real_k[:, None], tile, 0.0)


@triton.jit
def in_reach(low, high, start, window, BLOCK: tl.constexpr, OTHER: tl.constexpr, WINDOW: tl.constexpr):
    """Where the blocks of OTHER tokens begin and end that a block of tokens from `start` on meets; from == to: none."""
    empty = (start >= high) | (start + BLOCK <= low)
    if WINDOW:
        low = tl.maximum(low, start - window)
        high = tl.minimum(high, start + BLOCK + window)
    low = low // OTHER * OTHER
    return low, tl.where(empty, low, tl.maximum(low, high))


@triton.jit(do_not_specialize=["n", "window", "zero"])
def _contribution_norms_kernel(
    q_ptr, k_ptr, lse_ptr, factor_ptr, key_scale_ptr, row_scale_ptr, diagonal_ptr, mask_ptr, range_ptr,
    n, window, zero, scale, stride_qn, stride_kn, stride_lb, stride_fb,
    map_ptr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHTS: tl.constexpr, WINDOW: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """One column of tiles of the map."""
    start_k = tl.program_id(0) * BLOCK_K
    b = tl.program_id(1).to(tl.int64)
    low, high = in_reach(
        tl.load(range_ptr + 3 * b), tl.load(range_ptr + 3 * b + 1), start_k, window, BLOCK_K, BLOCK_Q, WINDOW
    )
    k_pointers = head_pointers(k_ptr + b * n * stride_kn, stride_kn, start_k, n, BLOCK_D, BLOCK_K)
    held = load_heads(k_pointers, HELD, H, D, BLOCK_D)
    rows_k = start_k + tl.arange(0, BLOCK_K)
    offs_q = tl.arange(0, BLOCK_Q)
    for start_q in tl.range(low, high, BLOCK_Q):
        q_pointers = head_pointers(q_ptr + b * n * stride_qn, stride_qn, start_q, n, BLOCK_D, BLOCK_Q)
        tile = local_map_tile(
            held, q_pointers, k_pointers, start_q, start_k,
            lse_ptr + b * stride_lb, factor_ptr + b * stride_fb, key_scale_ptr + b * n,
            row_scale_ptr + b * n, diagonal_ptr + b * n, mask_ptr + b * n, n, window, zero, scale,
            H, D, BLOCK_D, BLOCK_Q, BLOCK_K, WEIGHTS, WINDOW,
        )  # fmt: skip
        corner = map_ptr + (b * n + start_q) * n + start_k
        inside = (rows_k < n)[:, None] & (start_q + offs_q < n)[None, :]
        tl.store(corner + offs_q[None, :] * n + (rows_k - start_k)[:, None], tile, mask=inside)


@triton.jit(do_not_specialize=["n", "window", "zero"])
def _row_sums_kernel(
    q_ptr, k_ptr, lse_ptr, factor_ptr, key_scale_ptr, row_scale_ptr, diagonal_ptr, mask_ptr, range_ptr,
    n, window, zero, scale, stride_qn, stride_kn, stride_lb, stride_fb,
    sum_ptr,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    WEIGHTS: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Sums of BLOCK_Q rows of the map."""
    start_q = tl.program_id(0) * BLOCK_Q
    b = tl.program_id(1).to(tl.int64)
    low, high = in_reach(
        tl.load(range_ptr + 3 * b), tl.load(range_ptr + 3 * b + 1), start_q, window, BLOCK_Q, BLOCK_K, WINDOW
    )
    q_pointers = head_pointers(q_ptr + b * n * stride_qn, stride_qn, start_q, n, BLOCK_D, BLOCK_Q)
    total = tl.zeros([BLOCK_K, BLOCK_Q], tl.float32)
    for start_k in tl.range(low, high, BLOCK_K):
        k_pointers = head_pointers(k_ptr + b * n * stride_kn, stride_kn, start_k, n, BLOCK_D, BLOCK_K)
        total += local_map_tile(
            (), q_pointers, k_pointers, start_q, start_k,
            lse_ptr + b * stride_lb, factor_ptr + b * stride_fb, key_scale_ptr + b * n,
            row_scale_ptr + b * n, diagonal_ptr + b * n, mask_ptr + b * n, n, window, zero, scale,
            H, D, BLOCK_D, BLOCK_Q, BLOCK_K, WEIGHTS, WINDOW,
        )  # fmt: skip
    rows_q = start_q + tl.arange(0, BLOCK_Q)
    tl.store(sum_ptr + b * n + rows_q, tl.sum(total, axis=0), mask=rows_q < n)


def contribution_norms(local_map: LocalMap) -> Tensor:
    """The whole map, [batch, n, n], float32, rows are queries: (4)-(11) of Modarressi et al., or mean weights.

    The only function here whose memory is not linear in n.

    Example:
        >>> contribution_norms(local_map).shape
        torch.Size([2, 100, 100])
    """
    batch, n = local_map.tokens.shape
    result = torch.zeros(batch, n, n, dtype=torch.float32, device=local_map.query.device)
    tiles = local_map.tiles("map")
    grid = (ceil_div(n, tiles.k), batch)
    launch(
        _contribution_norms_kernel,
        grid,
        *local_map.arguments(),
        result,
        HELD=local_map.holds(tiles),
        **local_map.options(tiles),
    )
    return result


def row_sums(local_map: LocalMap) -> Tensor:
    """Sums of the map's rows, [batch, n], float32; zero at padding. What methods that normalise rows need first.

    Example:
        >>> row_sums(local_map).shape
        torch.Size([2, 100])
    """
    batch, n = local_map.tokens.shape
    result = local_map.row_scale.new_empty(batch, n)
    tiles = local_map.tiles("sums")
    grid = (ceil_div(n, tiles.q), batch)
    launch(_row_sums_kernel, grid, *local_map.arguments(), result, **local_map.options(tiles))
    return result
