"""How the arrays that one kernel writes and another reads lie in memory: in blocks of BLOCK tokens.

    log-sum-exps  [batch, ceil(n / BLOCK), heads, 2, BLOCK]                  largest score, then log2 of the sum
    factors       [batch, ceil(n / BLOCK), heads * (heads + 1) / 2, BLOCK]   entries (0, 0), (0, 1), ..., (1, 1), ...

The same number of neighbouring tokens stands side by side, so that a tile's loads are contiguous. Launchers allocate
and check by the two shapes; kernels find elements by the three offsets, which count from the first block.
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
def lse_offset(block, tokens, h, H: tl.constexpr):
    """Offset of head h's largest score of tokens in a block; log2 of the sum stands BLOCK_TOKENS behind."""
    return block * (H * 2 * BLOCK_TOKENS) + h * (2 * BLOCK_TOKENS) + tokens % BLOCK_TOKENS


@triton.jit
def factor_offset(block, tokens, H: tl.constexpr):
    """Offset of entry (0, 0) of tokens in a block."""
    return block * (H * (H + 1) // 2 * BLOCK_TOKENS) + tokens % BLOCK_TOKENS


@triton.jit
def pair_offset(h, k, H: tl.constexpr):
    """Offset of entry (h, k), h <= k, from entry (0, 0): the h rows before it have H, H - 1, ... entries."""
    return (h * H - h * (h - 1) // 2 + k - h) * BLOCK_TOKENS
