"""A layer's attention weights in blocks of queries, recomputed from queries and keys or as the model gave them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..capture import AttentionTrace, GivenWeights, ScoredAttention, in_reach
from .layer_map import Keys
from .layer_norms import working_dtype

SCORES_PER_BLOCK = 3 << 17  # attention weights held at once on a CPU, all heads together: the second-level cache
SCORES_PER_GPU_BLOCK = 1 << 26
QUERIES_PER_BLOCK = 64  # at least: fewer starve the matrix products of long texts
QUERIES_PER_TILE = 128  # of long texts, whose keys are taken in parts
TILED_FROM = 4  # a text is long from so many parts on


def attention_weights(trace: AttentionTrace) -> RecomputedWeights | StoredWeights:
    """A layer's attention weights, however they are known."""
    if isinstance(trace.attention, GivenWeights):
        return StoredWeights(trace.attention)
    return RecomputedWeights(trace.attention, trace.mask if trace.padded else None)


class RecomputedWeights:
    """A layer's attention weights in blocks of columns, recomputed from queries and keys: keys stand in rows here."""

    def __init__(self, attention: ScoredAttention, mask: Tensor | None):
        self.query, self.key, self.scaling = attention.query, attention.key, attention.scaling
        self.window, self.bias, self.log_sum_exp = attention.window, attention.bias, attention.log_sum_exp
        self.global_keys = None if attention.global_tokens is None else attention.global_tokens.where
        self.mask = mask
        self.dtype = working_dtype(attention.query)

    def _columns(self, query: Tensor, key: Tensor, rows: slice | Tensor, keys: Keys) -> Tensor:
        """alpha [H, B, keys, q] from [H, B, q, d_h] and [H, B, keys, d_h]."""
        heads, batch, n, _ = key.shape
        scores = torch.bmm(key.flatten(0, 1), (query * self.scaling).flatten(0, 1).transpose(1, 2))
        alpha = scores.view(heads, batch, n, -1)
        if self.bias is not None:
            alpha.add_(_bias_columns(self.bias, rows, keys, batch).to(self.dtype))
        # the lowest number, not -inf: a padded query may see nothing, and is multiplied by zero in the end
        lowest = torch.finfo(self.dtype).min
        if self.mask is not None:
            alpha.masked_fill_(~self.mask[:, keys, None], lowest)
        if self.window is not None:
            alpha.masked_fill_(self._unseen(self.window, rows, keys), lowest)
        # torch's softmax over a dimension that is not the last takes twice as long as its steps
        alpha.sub_(alpha.amax(2, keepdim=True)).exp_()
        return alpha.mul_(alpha.sum(2, keepdim=True).reciprocal_())

    def _unseen(self, window: int, rows: slice | Tensor, keys: Keys) -> Tensor:
        """Keys that are too far from a query, [keys, q] or [B, keys, q]."""
        tokens = torch.arange(self.key.shape[2], device=self.key.device)
        i = tokens[rows] if isinstance(rows, slice) else rows[:, None, :]
        unseen = (tokens[keys][:, None] - i).abs() > window
        return unseen if self.global_keys is None else unseen & ~self.global_keys[:, keys, None]

    def _seen(self, rows: slice) -> Keys:
        """The keys that a stretch of queries sees."""
        near = in_reach(rows, self.window, self.key.shape[2])
        if self.global_keys is None or self.window is None:
            return near
        far = self.global_keys.any(0)
        far[near] = False
        nearby = torch.arange(near.start, near.stop, device=far.device)
        return torch.cat([nearby, far.nonzero()[:, 0]]) if bool(far.any()) else near

    def _heads_first(self) -> tuple[Tensor, Tensor]:
        query, key = (t.to(self.dtype).transpose(0, 1) for t in (self.query, self.key))
        return query, key

    def blocks(self, whole_rows: bool) -> Iterator[tuple[slice, Keys, Tensor]]:
        """(queries, the keys they see, alpha [H, B, keys, q]) over all queries in order, or in tiles of some of the
        keys where that is faster."""
        if self.log_sum_exp is not None and not whole_rows:
            batch, heads, n, _ = self.query.shape
            tile = max(1, SCORES_PER_BLOCK // (batch * heads * QUERIES_PER_TILE**2)) * QUERIES_PER_TILE
            if n > TILED_FROM * tile:
                yield from self._tiles(self.log_sum_exp, tile)
                return
        query, key = self._heads_first()
        n, size = query.shape[2], _block_size(query, self.window)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            keys = self._seen(rows)
            yield rows, keys, self._columns(query[:, :, rows], key[:, :, keys], rows, keys)

    def _tiles(self, log_sum_exp: Tensor, size: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Small enough for the cache: exp(q k scaling - log-sum-exp), the subtraction inside the matrix product."""
        query, key = self._heads_first()
        heads, batch, n, _ = query.shape
        total = log_sum_exp.to(self.dtype).transpose(0, 1)[..., None]
        query = torch.cat([query * self.scaling, -total], -1).flatten(0, 1).transpose(1, 2)
        for start in range(0, n, size):
            keys = slice(start, min(start + size, n))
            part = nn.functional.pad(key[:, :, keys], (0, 1), value=1.0).flatten(0, 1)
            for first in range(0, n, QUERIES_PER_TILE):
                rows = slice(first, min(first + QUERIES_PER_TILE, n))
                alpha = torch.bmm(part, query[:, :, rows]).exp_().view(heads, batch, part.shape[1], -1)
                if self.mask is not None:
                    alpha.masked_fill_(~self.mask[:, keys, None], 0)
                yield rows, keys, alpha

    def at(self, positions: Tensor) -> Tensor:
        """alpha [H, B, n, m] of the queries at positions [B, m]."""
        query, key = self._heads_first()
        index = positions[None, :, :, None].expand(query.shape[0], -1, -1, query.shape[3])
        return self._columns(query.gather(2, index), key, positions, slice(0, key.shape[2]))


class StoredWeights:
    """The same from attention weights that the model itself has shown."""

    def __init__(self, attention: GivenWeights):
        self.weights, self.dtype = attention.weights, working_dtype(attention.value)

    def blocks(self, whole_rows: bool) -> Iterator[tuple[slice, Keys, Tensor]]:
        """As `RecomputedWeights.blocks`."""
        n, size = self.weights.shape[2], _block_size(self.weights, None)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            yield rows, slice(0, n), self.weights[:, :, rows].to(self.dtype).permute(1, 0, 3, 2).contiguous()

    def at(self, positions: Tensor) -> Tensor:
        """As `RecomputedWeights.at`."""
        index = positions[:, None, :, None].expand(-1, self.weights.shape[1], -1, self.weights.shape[3])
        return self.weights.gather(2, index).to(self.dtype).permute(1, 0, 3, 2).contiguous()


def _block_size(query: Tensor, window: int | None) -> int:
    """How many queries a block has."""
    heads, batch, n, _ = query.shape
    budget = (SCORES_PER_BLOCK if query.device.type == "cpu" else SCORES_PER_GPU_BLOCK) // (batch * heads)
    size = budget // n
    if window is not None:  # size * (size + 2 window) scores
        size = max(size, int((window**2 + budget) ** 0.5) - window)
    return max(QUERIES_PER_BLOCK, size)


def _bias_columns(bias: Tensor, rows: slice | Tensor, keys: Keys, batch: int) -> Tensor:
    """A part of what is added to the scores, [H, B, keys, q]."""
    if isinstance(rows, slice):
        return bias[:, :, rows, keys].permute(1, 0, 3, 2)
    heads, n = bias.shape[1], bias.shape[3]
    index = rows[:, None, :, None].expand(-1, heads, -1, n)
    return bias.expand(batch, -1, -1, -1).gather(2, index).permute(1, 0, 3, 2)
