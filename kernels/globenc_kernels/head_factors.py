"""Value vectors to one small triangular factor a token: all that a layer's contributions depend on, besides alpha.

With u^h_j = M W_O^h v^h_j, the norm of sum_h alpha^h u^h_j is ||R_j alpha|| where R_j^T R_j = G_j and
G_j[h,k] = <u^h_j, u^k_j> = (v^h_j)^T P[h,k] v^k_j, P = W_O^T M^T M W_O. P belongs to the model: it is made once, in
float64, and u^h_j is never built.

A Gram matrix squares the condition of the vectors it is made of, so its products must be better than the result has to
be: P meets the values in float64 where these are float32, and as a sum of two or three half-precision matrices
(together as good as float32) where they are half precision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import TokenRanges, ceil_div, expect, expect_heads, heads_last, launch, power_of_two
from .layouts import BLOCK_TOKENS, factor_offset, factor_shape, pair_index
from .tiles import gram_tiles

PARTS = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}  # so many matrices of PART_DTYPE add up to P
SMALLEST_PIVOT = {
    torch.float64: 2.0**-44,
    torch.float32: 2.0**-22,
}  # of a unit diagonal; below it there is but rounding


@dataclass(frozen=True)
class GramWeight:
    """A layer's P = W_O^T M^T M W_O, ready for the kernel.

    Attributes:
        parts: matrices that add up to P, every head scaled to a largest entry near 1,
            [parts, heads, heads, head_dim, head_dim].
        head_scale: what the heads were divided by, powers of two, [heads], float32.
    """

    parts: Tensor
    head_scale: Tensor


@dataclass(frozen=True)
class HeadFactors:
    """The factors of all tokens.

    Attributes:
        factor: the upper triangles of R_j / key_scale_j row by row, float32, in blocks of 64 tokens
            (layouts.py): [batch, ceil(n / 64), heads * (heads + 1) / 2, 64]; not defined at padding.
        key_scale: powers of two near the length of the longest head, [batch, n], float32.
    """

    factor: Tensor
    key_scale: Tensor


def gram_weight(product: Tensor, heads: int, dtype: torch.dtype) -> GramWeight:
    """P from the layer's constant matrix M W_O.

    Args:
        product: (M W_O)^T, [heads * head_dim, hidden_size], float64.
        heads: how many heads its rows are shared by.
        dtype: of the value vectors that P will meet: float32, float16 or bfloat16.

    Raises:
        TypeError, ValueError: an argument that does not fit.

    Example:
        >>> gram_weight(torch.randn(768, 768, dtype=torch.float64), 12, torch.bfloat16).parts.shape
        torch.Size([3, 12, 12, 64, 64])
    """
    expect(product, "product", ("heads * head_dim", "hidden_size"), (torch.float64,))
    if dtype not in PARTS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, PARTS))}; got {dtype}")
    if heads < 1 or product.shape[0] % heads:
        raise ValueError(f"product's {product.shape[0]} rows must be a multiple of heads, got {heads}")
    per_head = product.view(heads, -1, product.shape[1])
    size = per_head.flatten(1).norm(dim=1) / per_head.shape[1] ** 0.5  # a column's usual length
    scale = torch.exp2(torch.floor(torch.log2(size.where(size > 0, torch.ones_like(size)))))
    flat = (per_head / scale[:, None, None]).flatten(0, 1)
    rest = (flat @ flat.T).view(heads, per_head.shape[1], heads, per_head.shape[1]).permute(0, 2, 1, 3)
    parts = []
    for _ in range(PARTS[dtype]):
        part = rest.to(torch.float64 if dtype == torch.float32 else dtype)
        parts.append(part)
        rest = rest - part.double()
    return GramWeight(torch.stack(parts).contiguous(), scale.float())


@triton.jit(do_not_specialize=["n"])
def _gram_kernel(
    v_ptr,  # [batch, n, H, D]
    weight_ptr,  # [PARTS, H, H, D, D]
    range_ptr,  # [batch, 3]
    gram_ptr,  # out, `factor_shape`
    n, stride_vn, stride_gb,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Row h of the Gram matrices of BLOCK_T tokens, from the diagonal on."""
    start = tl.program_id(0) * BLOCK_T
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    first = tl.load(range_ptr + 3 * b)
    last = tl.load(range_ptr + 3 * b + 1)
    tokens = start + tl.arange(0, BLOCK_T)
    safe = tl.minimum(tokens, n - 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_c = tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = gram_ptr.dtype.element_ty
    v_ptr += b * n * stride_vn
    rows = v_ptr + safe[:, None] * stride_vn
    v_h = tl.load(rows + h * D + offs_d[None, :], mask=(offs_d < D)[None, :], other=0.0)
    v_h = v_h.to(weight_ptr.dtype.element_ty)
    diagonal = gram_ptr + factor_offset(tokens // BLOCK_TOKENS, b * stride_gb, tokens, H)
    diagonal += pair_index(h, h, H) * BLOCK_TOKENS
    stop = tl.where((start >= last) | (start + BLOCK_T <= first), h, H)  # nothing but padding: no work
    chunks: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    gram = tl.zeros([BLOCK_T], dtype)
    for step in tl.range(0, (stop - h) * chunks):  # one loop over heads and chunks of them, so that it is pipelined
        k = h + step // chunks
        columns = step % chunks * BLOCK_C + offs_c
        inside = (offs_d < D)[:, None] & (columns < D)[None, :]
        block = weight_ptr + (h * H + k) * (D * D) + offs_d[:, None] * D + columns[None, :]
        image = tl.zeros([BLOCK_T, BLOCK_C], dtype)
        for part in tl.static_range(PARTS):
            weight = tl.load(block + part * (H * H * D * D), mask=inside, other=0.0)
            image = tl.dot(v_h, weight, image, input_precision="ieee", out_dtype=dtype)
        v_k = tl.load(rows + k * D + columns[None, :], mask=(columns < D)[None, :], other=0.0)
        gram = tl.where(step % chunks == 0, 0.0, gram) + tl.sum(image * v_k.to(dtype), axis=1)
        tl.store(diagonal + (k - h) * BLOCK_TOKENS, gram, mask=tokens < n)  # the last chunk's is the whole


@triton.jit(do_not_specialize=["n"])
def _cholesky_kernel(
    gram_ptr,  # `factor_shape`
    head_scale_ptr,  # [H]
    range_ptr,  # [batch, 3]
    factor_ptr,  # out, `factor_shape`
    key_scale_ptr,  # out, [batch, n]
    n, stride_gb, smallest_pivot,
    H: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """R of BLOCK_T tokens; a vector in the span of those before it adds a row of zeros."""
    start = tl.program_id(0) * BLOCK_T
    b = tl.program_id(1).to(tl.int64)
    first = tl.load(range_ptr + 3 * b)
    last = tl.load(range_ptr + 3 * b + 1)
    if (start < last) & (start + BLOCK_T > first):
        tokens = start + tl.arange(0, BLOCK_T)
        heads = tl.arange(0, BLOCK_H)
        low = tl.minimum(heads[:, None], heads[None, :])
        high = tl.maximum(heads[:, None], heads[None, :])
        triangle = factor_offset(tokens // BLOCK_TOKENS, b * stride_gb, tokens, H)
        inside = (high < H)[None, :, :] & (tokens < n)[:, None, None]
        pairs = gram_ptr + triangle[:, None, None] + pair_index(low, high, H)[None, :, :] * BLOCK_TOKENS
        gram = tl.load(pairs, mask=inside, other=0.0)

        # to a unit diagonal: heads of very different length are equally good
        on_diagonal = (heads[:, None] == heads[None, :])[None, :, :]
        square = tl.sum(tl.where(on_diagonal, gram, 0.0), axis=2)
        length = tl.sqrt(tl.where(square < 0, 0.0, square))
        inverse = tl.where(square <= 0, 0.0, 1.0 / length)
        cosines = gram * inverse[:, :, None] * inverse[:, None, :]

        scaled = (length * tl.load(head_scale_ptr + heads, mask=heads < H, other=0.0)[None, :]).to(tl.float32)
        longest = tl.max(scaled, axis=1)
        key_scale = (longest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        key_scale = tl.where(key_scale == 0, 1.0, key_scale)
        scaled = scaled / key_scale[:, None]
        tl.store(key_scale_ptr + b * n + tokens, key_scale, mask=tokens < n)

        rest = tl.where(square <= 0, 0.0, 1.0).to(gram.dtype)  # of the diagonal
        for k in range(H):
            row = tl.sum(tl.where((heads == k)[None, :, None], cosines, 0.0), axis=1)
            pivot = tl.sum(tl.where((heads == k)[None, :], row, 0.0), axis=1)
            root = tl.sqrt(tl.where(pivot < smallest_pivot, 1.0, pivot))
            row = row / root[:, None]
            # NaN is not smaller than anything, and stays
            row = tl.where((pivot < smallest_pivot)[:, None] | (heads < k)[None, :], 0.0, row)
            # behind a small pivot there is much rounding: no entry is longer than what is left of its vector
            most = tl.sqrt(rest)
            row = tl.where(row > most, most, tl.where(row < -most, -most, row))
            rest -= row * row
            rest = tl.where(rest < 0, 0.0, rest)
            cosines -= row[:, :, None] * row[:, None, :]
            column = tl.where(heads >= k, pair_index(k, heads, H), 0)
            tl.store(
                factor_ptr + triangle[:, None] + column[None, :] * BLOCK_TOKENS,
                row.to(tl.float32) * scaled,
                mask=((heads >= k) & (heads < H))[None, :] & (tokens < n)[:, None],
            )


def head_factors(value: Tensor, weight: GramWeight, tokens: TokenRanges) -> HeadFactors:
    """Triangular factors of the Gram matrices of every token's transformed value vectors (docs/design.md, factor form).

    Args:
        value: v^h_j, [batch, heads, n, head_dim], float32, float16 or bfloat16, any strides.
        weight: the layer's P, from `gram_weight` for the same dtype.
        tokens: the real tokens.

    Raises:
        TypeError, ValueError: an argument of another kind, shape, dtype or device; the message names it.

    Example:
        >>> value, tokens = torch.randn(2, 12, 100, 64).cuda(), TokenRanges(torch.ones(2, 100, dtype=torch.bool).cuda())
        >>> weight = gram_weight(torch.randn(768, 768, dtype=torch.float64).cuda(), 12, value.dtype)
        >>> head_factors(value, weight, tokens).factor.shape
        torch.Size([2, 2, 78, 64])
    """
    expect_heads(value, "value", tokens)
    batch, heads, n, head_dim = value.shape
    part_dtype = torch.float64 if value.dtype == torch.float32 else value.dtype
    expect(
        weight.parts,
        "weight.parts",
        (PARTS[value.dtype], heads, heads, head_dim, head_dim),
        (part_dtype,),
        value.device,
    )
    expect(weight.head_scale, "weight.head_scale", (heads,), (torch.float32,), value.device)
    value = heads_last(value)
    dtype = torch.float64 if value.dtype == torch.float32 else torch.float32
    gram = value.new_empty(factor_shape(batch, n, heads), dtype=dtype)
    factor = torch.empty_like(gram, dtype=torch.float32)
    key_scale = value.new_empty(batch, n, dtype=torch.float32)
    tiles = gram_tiles(value.dtype, head_dim, value.device)
    launch(
        _gram_kernel,
        (ceil_div(n, tiles.q), heads, batch),
        value, weight.parts, tokens.ranges, gram, n, value.stride(1), gram.stride(0),
        H=heads, D=head_dim, BLOCK_D=power_of_two(head_dim), BLOCK_C=tiles.k, BLOCK_T=tiles.q,
        PARTS=PARTS[value.dtype], num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    block_h = power_of_two(heads)
    block_t = max(1, min(16, 2048 // block_h**2))
    launch(
        _cholesky_kernel,
        (ceil_div(n, block_t), batch),
        gram, weight.head_scale, tokens.ranges, factor, key_scale, n, gram.stride(0), SMALLEST_PIVOT[dtype],
        H=heads, BLOCK_H=block_h, BLOCK_T=block_t, num_warps=4, num_stages=1,
    )  # fmt: skip
    return HeadFactors(factor, key_scale)
