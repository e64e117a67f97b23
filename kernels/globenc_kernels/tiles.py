"""How much of the work one program takes: a table by dtype, heads, head size and GPU, such that nothing spills.

Registers and stack of every entry are in bench/results/compile.csv; bench/gpu.py --tiles times the neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .arguments import power_of_two

LARGE_SHARED = {(8, 0), (8, 7), (9, 0), (10, 0), (10, 1), (10, 3)}  # 163 KB and more a program; the others have 99 KB


class Tiles(NamedTuple):
    """Rows and columns of a tile, warps of its program and stages of its pipeline."""

    q: int
    k: int
    warps: int
    stages: int


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; the interpreter counts as 9.0."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def attention_tiles(dtype: torch.dtype, head_dim: int, device: torch.device) -> Tiles:
    """Queries x keys of the attention forward."""
    if dtype == torch.float32:
        return Tiles(64, 32, 8, 2) if head_dim <= 64 else Tiles(16, 32, 4, 2)
    return Tiles(128, 64, 8, 2) if head_dim <= 64 else Tiles(64, 64, 4, 2)


def transposed_tiles(dtype: torch.dtype, head_dim: int, device: torch.device) -> Tiles:
    """Queries x keys of the transposed product."""
    if dtype == torch.float32:
        return Tiles(32, 64, 8, 2) if head_dim <= 64 else Tiles(32, 32, 8, 2)
    return Tiles(64, 64, 4, 2)  # two programs a multiprocessor


def gram_tiles(dtype: torch.dtype, head_dim: int, device: torch.device) -> Tiles:
    """Tokens x value components of the Gram matrices."""
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 2) if head_dim <= 64 else Tiles(32, 32, 8, 1)
    return Tiles(128, 64, 8, 2) if head_dim > 32 else Tiles(128, 32, 8, 2)


def holds_heads(dtype: torch.dtype, heads: int, head_dim: int, tokens: int, device: torch.device) -> bool:
    """Whether all heads of a block of keys stay in shared memory through a loop over queries."""
    if dtype == torch.float32 or heads > (16 if _hopper(device) else 12):
        return False
    held = heads * power_of_two(head_dim) * 2 * tokens
    return held <= (136 if capability(device) in LARGE_SHARED else 80) * 1024


def map_tiles(dtype: torch.dtype, heads: int, head_dim: int, use: str, device: torch.device) -> Tiles:
    """Queries x keys of a local map's tile; all heads of it are in registers at once.

    `use`: "row" for one target's row, "rows" for several, "map", or "sums" of rows.
    """
    width, hopper = heads * power_of_two(head_dim), _hopper(device)
    if dtype == torch.float32:
        if hopper and width <= 768 and heads <= 12:
            return Tiles(32, 32, 8, 2)
        if hopper and use in ("row", "rows"):
            return Tiles(16, 32, 8, 1)
        return Tiles(32, 16, 8, 1) if heads <= 12 and use in ("row", "map") else Tiles(16, 16, 8, 1)
    if heads > 12 or width > 1024:
        return Tiles(32, 16, 4, 1) if use == "sums" else Tiles(64, 16, 8, 1)
    # products of 64 keys are the whole warp group's on Hopper
    return Tiles(32, 64, 8, 2) if hopper and use == "row" and head_dim > 32 and width <= 768 else Tiles(64, 32, 8, 1)


def _hopper(device: torch.device) -> bool:
    """Data-centre GPUs from Hopper on: products by warp groups, and 227 KB of shared memory."""
    return capability(device)[0] in (9, 10)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; the interpreter counts as two, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
