"""How much of the work one program takes: a table by dtype, heads, head size and GPU, such that nothing spills.

Registers and stack of every entry are in bench/results/compile.csv; bench/gpu.py --tiles times the neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .arguments import power_of_two


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
        return Tiles(64, 32, 8, 2) if head_dim <= 64 else Tiles(32, 32, 8, 2)
    return Tiles(128, 64, 8, 2) if head_dim <= 64 else Tiles(64, 64, 4, 2)


def gram_tiles(dtype: torch.dtype, head_dim: int, device: torch.device) -> Tiles:
    """Tokens x value components of the Gram matrices."""
    if dtype == torch.float32:
        return Tiles(64, 32, 4, 2) if head_dim <= 64 else Tiles(32, 32, 4, 1)
    return Tiles(128, 64, 8, 2) if head_dim > 32 else Tiles(128, 32, 8, 2)


def holds_heads(dtype: torch.dtype, heads: int, head_dim: int, device: torch.device) -> bool:
    """Whether all heads of a block of tokens stay in shared memory through a loop over the others."""
    return dtype != torch.float32 and heads <= 16 and heads * power_of_two(head_dim) <= 1024


def map_tiles(dtype: torch.dtype, heads: int, head_dim: int, alone: bool, device: torch.device) -> Tiles:
    """Queries x keys of a local map's tile; all heads of it are in registers at once.

    `alone`: what it is used for keeps at most one more tile in registers.
    """
    hopper, small = capability(device) >= (9, 0), heads * power_of_two(head_dim) <= 768
    if dtype == torch.float32:
        return Tiles(32, 32, 8, 2) if hopper and small and heads <= 12 else Tiles(16, 32, 8, 1)
    if heads > 12 or not holds_heads(dtype, heads, head_dim, device):
        return Tiles(64, 16, 8, 1)
    # products of 64 keys are the whole warp group's on Hopper
    return Tiles(32, 64, 8, 2) if hopper and small and alone else Tiles(64, 32, 8, 1)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; the interpreter counts as two, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
