"""How the arrays that one kernel writes and another reads lie in memory: in blocks of BLOCK tokens.

    log-sum-exps  [batch, ceil(n / BLOCK), heads, 2, BLOCK]                  largest score, then log2 of the sum
    factors       [batch, ceil(n / BLOCK), heads * (heads + 1) / 2, BLOCK]   entries (0, 0), (0, 1), ..., (1, 1), ...

The same number of neighbouring tokens stands side by side, so that a tile's loads are contiguous. Launchers allocate
and check by the two shapes. Kernels find elements by the offsets from block 0; these add `shift`, one number for the
whole tile, before what differs between tokens, so that it costs no vector of registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arguments import BLOCK, ceil_div

BLOCK_TOKENS = tl.constexpr(BLOCK)


def lse_shape(batch: int, n: int, heads: int) -> tuple[int, int, int, int, int]:
    """Shape of the log-sum-exps."""
    return batch, ceil_div(n, BLOCK), heads, 2, BLOCK


def factor_shape(batch: int, n: int, heads: int) -> tuple[int, int, int, int]:
    """Shape of the factors, and of the Gram matrices they are made from."""
    return batch, ceil_div(n, BLOCK), heads * (heads + 1) // 2, BLOCK


@triton.jit
def head_offset(h):
    """Offset of head h's log-sum-exps from head 0's, in one block."""
    return h * (2 * BLOCK_TOKENS)


@triton.jit
def lse_offset(block, shift, tokens, H: tl.constexpr):
    """Offset of tokens' largest scores for head 0, plus `shift`; log2 of the sums stands BLOCK_TOKENS behind."""
    return block * (H * 2 * BLOCK_TOKENS) + shift + tokens % BLOCK_TOKENS


@triton.jit
def factor_offset(block, shift, tokens, H: tl.constexpr):
    """Offset of tokens' entries (0, 0), plus `shift`; entry (h, k) stands pair_index(h, k) * BLOCK_TOKENS behind."""
    return block * (H * (H + 1) // 2 * BLOCK_TOKENS) + shift + tokens % BLOCK_TOKENS


@triton.jit
def pair_index(h, k, H: tl.constexpr):
    """Which entry of a triangle (h, k), h <= k, is: the h rows before it have H, H - 1, ... entries."""
    return h * H - h * (h - 1) // 2 + k - h
