"""How much of the work one program takes: a table by dtype, heads, head size and GPU, such that nothing spills.

Registers and stack of every entry are in bench/results/compile.csv; bench/gpu.py --tiles times the neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


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
        return Tiles(64, 32, 4, 2) if head_dim <= 64 else Tiles(32, 32, 4, 2)
    return Tiles(128, 64, 8, 2) if head_dim <= 64 else Tiles(64, 64, 4, 2)


def gram_tiles(dtype: torch.dtype, head_dim: int, device: torch.device) -> Tiles:
    """Tokens x value components of the Gram matrices."""
    if dtype == torch.float32:
        return Tiles(32, 32, 4, 1)
    return Tiles(64, 64, 4, 2) if head_dim > 32 else Tiles(64, 32, 4, 2)


def map_tiles(dtype: torch.dtype, heads: int, head_dim: int, targets: int, device: torch.device) -> Tiles:
    """Queries x keys of a local map's tile; all heads of it are in registers at once."""
    if capability(device) >= (9, 0):
        return Tiles(32, 64, 8, 2)
    return Tiles(64, 32, 8, 2)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once at least; the interpreter counts as two, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
