"""A layer's local map A, [B, n, n]: in blocks of queries, stored as a matrix, or put together of two maps.

A row of A is a query i, a column a key j; padded ones are zero. Blocks are computed with keys in front, because the
attention weights of a key, times its factor, are one matrix product:

    alpha, one number a head         columns, one number a pair        a block of A
    [H, B, keys, queries]      ->    [B, keys, queries]          ->    [B, queries, keys], a transposed view
    attention_weights.py             head_factors.py                   torch_backend.py

So the diagonal of A is where a block's queries are among its keys, and dividing a row of A by its sum divides a column
of `columns` by its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..capture import AttentionTrace

T = TypeVar("T", bound=AttentionTrace)

Keys = slice | Tensor
"""Tokens that some queries see: a stretch of them, or a list that begins with a stretch."""


class RolloutLayer(Protocol):
    """What the rollout needs of a layer."""

    def scale_rows(self, scale: Tensor) -> None:
        """Multiply the rows of the layer's map with numbers [B, n]."""

    def through(self, rows: Tensor, row_normalize: bool) -> Tensor:
        """rows @ A for rows [B, m, n] and the layer's map A; `row_normalize`: A's rows divided by their sums."""


class LayerMap(RolloutLayer, Protocol):
    """One layer's local map A, [B, n, n]; padded rows and columns are zero."""

    @property
    def tokens(self) -> int:
        """n."""

    @property
    def device(self) -> torch.device:
        """Where the map is made."""

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        """(queries, keys, that part of the map, [B, queries, keys]); together they are all of it that is not zero.

        A block belongs to the map: who receives it reads it, and writes into a copy. `whole_rows`: each block holds all
        that its rows have, and rows come in order.
        """

    def rows_at(self, positions: Tensor) -> Tensor:
        """The rows of these queries, [B, m, n] for positions [B, m]."""


class ByBlocks:
    """Rows through a layer whose map comes in blocks: each is consumed as it comes, nothing of size n x n is stored."""

    def through(self: LayerMap, rows: Tensor, row_normalize: bool) -> Tensor:
        rows = rows.to(self.device)
        result = torch.zeros_like(rows)
        for queries, keys, block in self.blocks(row_normalize):
            if row_normalize:
                block = normalize_rows(block)
            if isinstance(keys, slice):
                result[:, :, keys].baddbmm_(rows[:, :, queries], block)
            else:
                result.index_add_(2, keys, torch.bmm(rows[:, :, queries], block))
        return result


class StoredLayer(ByBlocks):
    """A layer's local map as a matrix, [B, n, n], which it takes over: `scale_rows` writes into it."""

    def __init__(self, local_map: Tensor):
        self.map, self.tokens, self.device = local_map, local_map.shape[1], local_map.device

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        every = slice(0, self.tokens)
        yield every, every, self.map

    def rows_at(self, positions: Tensor) -> Tensor:
        return self.map.gather(1, positions[:, :, None].expand(-1, -1, self.map.shape[2]))

    def scale_rows(self, scale: Tensor) -> None:
        self.map.mul_(scale[:, :, None])


class MixedLayer(ByBlocks):
    """A layer whose tokens with global attention have rows of their own, made of other queries, keys and values.

    Args:
        local: the map, right but for those rows.
        rows: the map that is right for them.
        where: True at them, [B, n].
    """

    def __init__(self, local: LayerMap, rows: LayerMap, where: Tensor):
        self.local, self.rows, self.where = local, rows, where
        self.tokens, self.device = where.shape[1], where.device
        self.most = int(where.sum(1).max())

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Of the tokens with global attention, first to last, [B, most], and which of those are there."""
        order = (~self.where).to(torch.int8).argsort(dim=1, stable=True)[:, : self.most]
        return order, self.where.gather(1, order)

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        every, local = slice(0, self.tokens), whole(self.local).clone()
        positions, there = self._positions()
        texts, k = there.nonzero(as_tuple=True)
        local[texts, positions[texts, k]] = self.rows.rows_at(positions)[texts, k]
        yield every, every, local

    def rows_at(self, positions: Tensor) -> Tensor:
        chosen = self.where.gather(1, positions)[:, :, None]
        return torch.where(chosen, self.rows.rows_at(positions), self.local.rows_at(positions))

    def scale_rows(self, scale: Tensor) -> None:
        self.local.scale_rows(scale)
        self.rows.scale_rows(scale)

    def through(self, rows: Tensor, row_normalize: bool) -> Tensor:
        positions, there = self._positions()
        global_rows = self.rows.rows_at(positions)
        global_rows = normalize_rows(global_rows) if row_normalize else global_rows
        weights = rows.gather(2, positions[:, None].expand(-1, rows.shape[1], -1)) * there[:, None]
        local = self.local.through(rows.masked_fill(self.where[:, None], 0), row_normalize)
        return torch.baddbmm(local, weights, global_rows)


def whole(layer: LayerMap) -> Tensor:
    """A local map as a matrix, [B, n, n]; read-only, as blocks are."""
    n, blocks = layer.tokens, layer.blocks()
    rows, keys, block = next(blocks)
    if block.shape[1:] == (n, n):
        return block
    local = block.new_zeros(len(block), n, n)
    local[:, rows, keys] = block
    for rows, keys, block in blocks:
        local[:, rows, keys] = block
    return local


def normalize_rows(rows: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros (padding) stays."""
    total = rows.sum(-1, keepdim=True)
    return rows / total.where(total > 0, torch.ones_like(total))


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b.where(b > 0, torch.ones_like(b)), torch.zeros_like(b))


def take_tokens(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Tokens of [B, n, ...]: a slice of them, or a list [B, m] for each text."""
    if isinstance(rows, slice):
        return tensor[:, rows]
    index = rows.view(*rows.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


def is_off_diagonal(rows: slice | Tensor, keys: Keys) -> bool:
    """Whether a block holds nothing of the diagonal."""
    if not isinstance(rows, slice) or not isinstance(keys, slice):
        return False
    return rows.stop <= keys.start or keys.stop <= rows.start


def rows_among_keys(rows: slice | Tensor, keys: Keys) -> slice | Tensor:
    """Where the rows stand among the keys."""
    start = keys.start if isinstance(keys, slice) else int(keys[0])
    return slice(rows.start - start, rows.stop - start) if isinstance(rows, slice) else rows - start


def read_diagonal(columns: Tensor, rows: slice | Tensor) -> Tensor:
    """The diagonal of a block of columns [..., B, (H,) n, q] whose queries are `rows`: [..., q]; a view for a slice."""
    if isinstance(rows, slice):
        return columns[..., rows, :].diagonal(dim1=-2, dim2=-1)
    index = rows.view(rows.shape[0], *[1] * (columns.ndim - 2), rows.shape[1])
    return columns.gather(-2, index.expand(*columns.shape[:-2], 1, -1))[..., 0, :]


def write_diagonal(columns: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """Write [B, q] values to the diagonal of a block [B, n, q]."""
    if isinstance(rows, slice):
        columns[:, rows].diagonal(dim1=1, dim2=2).copy_(values)
    else:
        columns.scatter_(1, rows[:, None], values[:, None])


def by_rows(trace: T, compute: Callable[[T], Tensor]) -> Tensor:
    """compute(trace), [B, n, ...], with the rows of tokens with global attention from the trace that holds for them."""
    result, tokens = compute(trace), trace.global_tokens
    if tokens is None:
        return result
    chosen = tokens.where.view(*tokens.where.shape, *[1] * (result.ndim - 2))
    return torch.where(chosen, compute(trace.of_rows(tokens)), result)
