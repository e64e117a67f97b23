"""A layer's local map by the factor form, in PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..capture import AttentionTrace, GivenWeights, ScoredAttention
from ..encoders import LayerModules
from ..methods import STAGES, Method, Stage
from .attention_weights import attention_weights
from .completeness import patched
from .head_factors import HeadFactors, HeadVectors
from .layer_map import (
    Keys,
    LayerMap,
    MixedLayer,
    StoredLayer,
    _Blocks,
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

DIRECT_ROWS = 2  # up to so many rows cost less by the direct sum than by a factor of every key


class TorchBackend:
    """The factor form in PyTorch, on any device."""

    maps_before_feed_forward = True

    def attention(self, modules: LayerModules, hidden_states: Tensor, inputs: ScoredAttention) -> None:
        """torch's own."""

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
        return patched(trace)


class TorchLayer(_Blocks):
    """A layer's local map by the factor form, in PyTorch, on any device."""

    def __init__(self, trace: AttentionTrace, method: Method):
        self.method = method
        self.attention = attention_weights(trace)
        self.mask, self.tokens = trace.mask, trace.mask.shape[1]
        stage = STAGES["N-Enc"] if method.mix == "ratio" else method.stage
        self.factors = None if stage is None else HeadFactors(trace, stage, with_mixed=method.mix == "ratio")

    def _rows(self, alpha: Tensor, rows: slice | Tensor, keys: Keys) -> Tensor:
        real, place = take_tokens(self.mask, rows), None if is_off_diagonal(rows, keys) else rows_among_keys(rows, keys)
        ratio = columns = None
        if self.factors is not None:
            columns, own, others = self.factors.norms(alpha, rows, keys)
            if own is not None and place is not None:
                ratio = None if others is None else divide(others, others + own)
                write_diagonal(columns, place, own)
            columns.mul_(take_tokens(self.factors.row_scale, rows)[:, None])
        if self.method.stage is None or columns is None:
            columns = alpha.mean(0).mul_(real[:, None])
        return _finish(columns, self.method, place, real, ratio)

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        whole_rows = whole_rows or self.method.normalize or self.method.mix == "ratio"
        for rows, keys, alpha in self.attention.blocks(whole_rows):
            yield rows, keys, self._rows(alpha, rows, keys)

    def rows_at(self, positions: Tensor) -> Tensor:
        return self._rows(self.attention.at(positions), positions, slice(0, self.mask.shape[1]))

    def scale_rows(self, scale: Tensor) -> None:
        assert self.factors is not None
        self.factors.row_scale = self.factors.row_scale * scale


def _finish(columns: Tensor, method: Method, own: slice | Tensor | None, real: Tensor, ratio: Tensor | None) -> Tensor:
    """A method's last step: normalise the rows of a block [B, keys, q] (rows stand in columns here) and mix them with
    the identity; padded queries become zero. Works in place. `own`: where the queries stand among the keys, None for
    nowhere. real, ratio: [B, q]. Returns the rows, [B, q, keys].
    """
    real = real.to(columns.dtype)
    if method.normalize:
        columns.mul_(divide(real, columns.sum(1))[:, None])
    if method.mix == "half":
        columns.mul_(0.5)
        if own is not None:
            write_diagonal(columns, own, read_diagonal(columns, own) + 0.5 * real)
    elif method.mix == "ratio":
        assert ratio is not None
        assert own is not None
        write_diagonal(columns, own, torch.zeros_like(real))
        total = columns.sum(1)
        # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
        ratio = torch.where(total > 0, ratio, 0)
        columns.mul_(divide(ratio * real, total)[:, None])
        write_diagonal(columns, own, (1 - ratio) * real)
    return columns.transpose(1, 2)


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
        own = torch.arange(batch, device=alpha.device) * n + positions[:, m]
        for residual in parts.extra:
            vectors[own] += residual[own]
        norms.append(vectors.norm(dim=-1).view(batch, n))
    columns = torch.stack(norms, -1).mul_(take_tokens(row_scale_of(trace, stage) / parts.scale, positions)[:, None])
    return _finish(columns, method, positions, take_tokens(trace.mask, positions), None)


def mixing_ratios(trace: AttentionTrace, stage: Stage) -> Tensor:
    """(8), (14): r_i of a stage, [B, n]; zero at padding."""
    factors = HeadFactors(trace, stage, with_mixed=True)
    parts = []
    for rows, keys, alpha in attention_weights(trace).blocks(whole_rows=True):
        _, own, others = factors.norms(alpha, rows, keys)
        assert own is not None
        assert others is not None
        parts.append(divide(others, others + own))
    return torch.cat(parts, -1) * trace.mask
