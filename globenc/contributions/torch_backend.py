"""A layer's local map by the factor form, in PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..capture import AttentionTrace, GivenWeights, ScoredAttention
from ..encoders import LayerModules
from ..methods import STAGES, Method, Stage
from .attention_weights import RecomputedWeights, attention_weights
from .completeness import residual_mismatch
from .head_factors import HeadFactors, HeadVectors, MixingFactors
from .layer_map import (
    ByBlocks,
    Keys,
    LayerMap,
    MixedLayer,
    StoredLayer,
    by_rows,
    divide,
    is_off_diagonal,
    read_diagonal,
    rows_among_keys,
    take_tokens,
    whole,
    write_diagonal,
)
from .layer_norms import row_scale_of

STORED_TO = 4  # tokens for each number of a head's: attention weights are at most twice what queries and keys are
DIRECT_ROWS = 2  # up to so many rows cost less by the direct sum than by a factor of every key


class TorchBackend:
    """The factor form in PyTorch, on any device."""

    maps_before_feed_forward = True

    def attention(self, modules: LayerModules, hidden_states: Tensor, inputs: ScoredAttention) -> None:
        """Left to torch."""

    def held_weights(self, attention: ScoredAttention, mask: Tensor | None) -> TorchHeldWeights:
        """As `Backend.held_weights`."""
        return TorchHeldWeights(attention, mask)

    def layer_map(self, trace: AttentionTrace, method: Method) -> LayerMap:
        """As `Backend.layer_map`. Of attention weights that the model gave, the map is made at once: it holds one
        number a pair, not one for each head."""
        layer, tokens = TorchLayer(trace, method), trace.global_tokens
        if tokens is not None:
            return MixedLayer(layer, TorchLayer(trace.of_rows(tokens), method), tokens.where)
        return StoredLayer(whole(layer)) if isinstance(trace.attention, GivenWeights) else layer

    def top_rows(self, trace: AttentionTrace, method: Method, positions: Tensor) -> Tensor:
        """As `Backend.top_rows`."""
        few = positions.shape[1] <= DIRECT_ROWS and trace.global_tokens is None
        if few and method.stage is not None and method.mix != "ratio":
            return direct_rows(trace, method, method.stage, positions)
        return self.layer_map(trace, method).rows_at(positions)

    def mixing_ratios(self, trace: AttentionTrace, stage: Stage) -> Tensor:
        """As `Backend.mixing_ratios`."""
        return by_rows(trace, lambda part: mixing_ratios(part, stage))

    def residual_mismatch(self, trace: AttentionTrace) -> Tensor:
        """As `Backend.residual_mismatch`."""
        return residual_mismatch(trace)


class TorchHeldWeights:
    """As `HeldWeights`: alpha is made anew in blocks, from queries and keys; of short texts it is stored, as it is of
    their size."""

    def __init__(self, attention: ScoredAttention, mask: Tensor | None):
        mask = None if mask is None else mask.to(attention.query.device)
        self.weights: RecomputedWeights | None = RecomputedWeights(attention, mask)
        self.dtype = self.weights.dtype
        n, size = attention.query.shape[2:]
        self.in_memory = n <= STORED_TO * size
        self._stored: list[tuple[slice, Keys, Tensor]] = []

    def _blocks(self) -> Iterable[tuple[slice, Keys, Tensor]]:
        if self.weights is None:
            return self._stored
        if not self.in_memory:
            return self.weights.blocks(whole_rows=False)
        self._stored, self.weights = list(self.weights.blocks(whole_rows=False)), None
        return self._stored

    def product(self, value: Tensor) -> Tensor:
        """As `HeldWeights.product`."""
        dtype, value = value.dtype, value.transpose(0, 1).to(self.dtype)
        heads, batch, _, d = value.shape
        result: Tensor | None = None
        for rows, keys, alpha in self._blocks():
            part = torch.bmm(alpha.flatten(0, 1).transpose(1, 2), value[:, :, keys].reshape(heads * batch, -1, d))
            part = part.view(heads, batch, -1, d)
            if result is None and part.shape == value.shape:
                result = part
                continue
            result = value.new_zeros(value.shape) if result is None else result
            result[:, :, rows] += part
        assert result is not None  # every text has a token
        return result.permute(1, 2, 0, 3).to(dtype)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """As `HeldWeights.transposed_product`."""
        dtype, gradient = gradient.dtype, gradient.permute(2, 0, 1, 3).to(self.dtype)
        heads, batch, _, d = gradient.shape
        result: Tensor | None = None
        for rows, keys, alpha in self._blocks():
            part = torch.bmm(alpha.flatten(0, 1), gradient[:, :, rows].reshape(heads * batch, -1, d))
            part = part.view(heads, batch, -1, d)
            if part.shape == gradient.shape:
                result = part if result is None else result.add_(part)
                continue
            result = gradient.new_zeros(gradient.shape) if result is None else result
            if isinstance(keys, slice):
                result[:, :, keys] += part
            else:
                result.index_add_(2, keys, part)
        assert result is not None  # every text has a token
        return result.transpose(0, 1).to(dtype)


class TorchLayer(ByBlocks):
    """A layer's local map by the factor form, or by the mean of its attention weights."""

    def __init__(self, trace: AttentionTrace, method: Method):
        self.method = method
        self.attention = attention_weights(trace)
        self.mask, self.tokens, self.device = trace.mask, trace.mask.shape[1], trace.mask.device
        self.factors = None if method.stage is None else HeadFactors(trace, method.stage)
        self.mixing = MixingFactors(trace, STAGES["N-Enc"]) if method.mix == "ratio" else None
        self.row_scale = trace.mask if self.factors is None else self.factors.row_scale

    def _rows(self, alpha: Tensor, rows: slice | Tensor, keys: Keys) -> Tensor:
        """The rows of a block alpha [H, B, keys, q], [B, q, keys]."""
        columns = alpha.mean(0) if self.factors is None else self.factors.norms(alpha, rows, keys)
        columns.mul_(take_tokens(self.row_scale, rows)[:, None])
        is_token = take_tokens(self.mask, rows).to(columns.dtype)
        if self.mixing is not None:
            mix_by_ratio(columns, rows_among_keys(rows, keys), is_token, self.mixing.ratios(alpha, rows, keys))
        else:
            diagonal = None if is_off_diagonal(rows, keys) else rows_among_keys(rows, keys)
            normalize_and_mix(columns, self.method, diagonal, is_token)
        return columns.transpose(1, 2)

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        whole_rows = whole_rows or self.method.normalize or self.mixing is not None
        for rows, keys, alpha in self.attention.blocks(whole_rows):
            yield rows, keys, self._rows(alpha, rows, keys)

    def rows_at(self, positions: Tensor) -> Tensor:
        return self._rows(self.attention.at(positions), positions, slice(0, self.tokens))

    def scale_rows(self, scale: Tensor) -> None:
        self.row_scale = self.row_scale * scale


def normalize_and_mix(columns: Tensor, method: Method, diagonal: slice | Tensor | None, is_token: Tensor) -> None:
    """Divide the rows of a block [B, keys, q] by their sums and mix them half and half with the identity (13), (16), if
    the method says so; in place.

    `diagonal`: where the queries are among the keys; None for a block off the diagonal. is_token: 0 at padded queries,
    [B, q].
    """
    if method.normalize:
        columns.mul_(divide(is_token, columns.sum(1))[:, None])
    if method.mix == "half":
        columns.mul_(0.5)
        if diagonal is not None:
            write_diagonal(columns, diagonal, read_diagonal(columns, diagonal) + 0.5 * is_token)


def mix_by_ratio(columns: Tensor, diagonal: slice | Tensor, is_token: Tensor, ratio: Tensor) -> None:
    """Mix the rows of a block [B, keys, q], which holds them whole, with the identity by their ratio [B, q] (15); in
    place."""
    write_diagonal(columns, diagonal, torch.zeros_like(is_token))
    total = columns.sum(1)
    # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
    ratio = torch.where(total > 0, ratio, 0)
    columns.mul_(divide(ratio * is_token, total)[:, None])
    write_diagonal(columns, diagonal, (1 - ratio) * is_token)


def direct_rows(trace: AttentionTrace, method: Method, stage: Stage, positions: Tensor) -> Tensor:
    """Rows of a layer's map at positions [B, m] straight from (4)-(11): one matrix product a row, no factor.

    The cheaper way for a row or two, which is all that a position asks of the last layer.
    """
    alpha = attention_weights(trace).at(positions)  # [H, B, n, m]
    heads, batch, n, count = alpha.shape
    parts = HeadVectors(trace, stage)
    norms = []
    for m in range(count):
        weights = alpha[..., m].reshape(heads, batch * n).T[..., None]
        vectors = (parts.value.transpose(0, 1) * weights).flatten(1) @ parts.weight  # [B * n, d]
        diagonal = torch.arange(batch, device=alpha.device) * n + positions[:, m]
        for residual in parts.extra:
            vectors[diagonal] += residual[diagonal]
        norms.append(vectors.norm(dim=-1).view(batch, n))
    columns = torch.stack(norms, -1)
    columns.mul_(take_tokens(row_scale_of(trace, stage) / parts.scale, positions)[:, None])
    normalize_and_mix(columns, method, positions, take_tokens(trace.mask, positions).to(columns.dtype))
    return columns.transpose(1, 2)


def mixing_ratios(trace: AttentionTrace, stage: Stage) -> Tensor:
    """(8), (14): r_i of a stage, [B, n]; zero at padding."""
    factors, blocks = MixingFactors(trace, stage), attention_weights(trace).blocks(whole_rows=True)
    return torch.cat([factors.ratios(alpha, rows, keys) for rows, keys, alpha in blocks], -1) * trace.mask
