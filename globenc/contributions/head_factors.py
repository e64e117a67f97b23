"""Value vectors to one small triangular factor a token: all that a layer's contributions depend on, besides alpha."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..capture import AttentionTrace
from ..methods import Stage
from .layer_map import (
    Keys,
    divide,
    is_off_diagonal,
    read_diagonal,
    rows_among_keys,
    take_tokens,
    write_diagonal,
)
from .layer_norms import apply_stage, row_scale_of, working_dtype
from .weight_cache import cached_per_weights

TOKENS_PER_CHUNK = 64  # keys whose vectors u^h_j exist at once
CANCELLATION = 2.0  # of a squared sum of vectors, against independent ones: beyond it float32 products lose digits
JITTER = 16 * torch.finfo(torch.float64).eps  # times the number of vectors; keeps rank-deficient Grams factorable


@dataclass(frozen=True)
class Projection:
    """A vector of every token, in the coordinates of its head vectors.

    Attributes:
        along: the part in their span, [B, n, H].
        outside: the norm of what is outside it, [B, n].
    """

    along: Tensor
    outside: Tensor

    def at(self, rows: slice | Tensor) -> Projection:
        """Of some tokens; see `take_tokens`."""
        return Projection(take_tokens(self.along, rows), take_tokens(self.outside, rows))

    def norm(self) -> Tensor:
        """[B, n]."""
        return self.along.square().sum(-1).add_(self.outside.square()).sqrt_()


class HeadFactors:
    """R_j of every token for one stage: the norms of its contributions, up to the row scale.

    Attributes:
        heads: the factor over the heads, [B * n, H, H].
        residual: M x; None where the stage has no residual.
        row_scale: 1 / (s1_i s2_i), zero at padding, [B, n].
    """

    def __init__(self, trace: AttentionTrace, stage: Stage):
        vectors = HeadVectors(trace, stage)
        self.heads, projections = _factors(trace, vectors, exact=False)
        self.residual = projections[0] if stage.residual else None
        self.row_scale = row_scale_of(trace, stage) / vectors.scale

    def norms(self, alpha: Tensor, rows: slice | Tensor, keys: Keys) -> Tensor:
        """||c_ij|| of a block alpha [H, B, keys, q], up to the row scale, [B, keys, q]; c_ii is taken directly."""
        _, batch, n, count = alpha.shape
        inside = _coordinates(self.heads, alpha, keys)
        if is_off_diagonal(rows, keys):
            return inside.square_().sum(1).sqrt_().view(batch, n, count)
        diagonal = _diagonal_norms(_diagonal_of(inside, batch, rows, keys), self.residual, rows)
        columns = inside.square_().sum(1).sqrt_().view(batch, n, count)
        write_diagonal(columns, rows_among_keys(rows, keys), diagonal)
        return columns


class MixingFactors:
    """R_j of every token for one stage, with M z of the attention block's output: the stage's mixing ratios."""

    def __init__(self, trace: AttentionTrace, stage: Stage):
        self.heads, projections = _factors(trace, HeadVectors(trace, stage, with_mixed=True), exact=True)
        self.residual = projections[0] if stage.residual else None
        self.mixed = projections[-1]

    def ratios(self, alpha: Tensor, rows: slice | Tensor, keys: Keys) -> Tensor:
        """(8), (14): r_i of the queries of a block alpha [H, B, keys, q] that holds their whole rows, [B, q]."""
        diagonal = _diagonal_of(_coordinates(self.heads, alpha, keys), alpha.shape[1], rows, keys)
        alone = _diagonal_norms(diagonal, self.residual, rows)
        mixed = self.mixed.at(rows)
        others = Projection(mixed.along - diagonal, mixed.outside).norm()
        return divide(others, others + alone)


def _factors(trace: AttentionTrace, vectors: HeadVectors, exact: bool) -> tuple[Tensor, list[Projection]]:
    """The factor over the heads, [B * n, H, H], and the other vectors in the same coordinates."""
    batch, heads, n, _ = trace.value.shape
    factor = _triangular_factors(vectors, exact)
    projections = [
        Projection(
            factor[:, :heads, k].view(batch, n, heads),
            factor[:, heads : k + 1, k].square().sum(-1).sqrt_().view(batch, n),
        )
        for k in range(heads, vectors.count)
    ]
    return factor[:, :heads, :heads], projections


def _coordinates(factors: Tensor, alpha: Tensor, keys: Keys) -> Tensor:
    """R_j alpha_ij of a block alpha [H, B, keys, q], [B * keys, H, q]."""
    heads, batch, n, count = alpha.shape
    some = factors.view(batch, -1, heads, heads)[:, keys].reshape(batch * n, heads, heads)
    return torch.bmm(some, alpha.reshape(heads, batch * n, count).transpose(0, 1))


def _diagonal_of(inside: Tensor, batch: int, rows: slice | Tensor, keys: Keys) -> Tensor:
    """R_i alpha_ii of a block [B * keys, H, q], [B, q, H]."""
    columns = inside.view(batch, -1, *inside.shape[1:]).transpose(1, 2)
    return read_diagonal(columns, rows_among_keys(rows, keys)).transpose(1, 2)


def _diagonal_norms(diagonal: Tensor, residual: Projection | None, rows: slice | Tensor) -> Tensor:
    """||c_ii||, [B, q], from R_i alpha_ii, [B, q, H]."""
    if residual is None:
        return diagonal.norm(dim=-1)
    x = residual.at(rows)
    return Projection(diagonal + x.along, x.outside).norm()


class HeadVectors:
    """The vectors u^h_j and what is added to them, near 1 in size, made a few tokens at a time.

    Attributes:
        count: how many vectors a token has, K: its heads, then M x (with a residual), then M z (`with_mixed`; z is the
            attention block's output without bias).
        scale: the power of two they are multiplied with, so that no square leaves float32's range.
    """

    def __init__(self, trace: AttentionTrace, stage: Stage, with_mixed: bool = False):
        dtype = working_dtype(trace.value)
        batch, heads, n, head_dim = trace.value.shape
        self.weight, largest = stage_weight(trace, stage, dtype)
        value = trace.value.to(dtype).transpose(0, 1).reshape(heads, batch * n, head_dim)
        extra = []
        if stage.residual:
            extra.append(apply_stage(trace.hidden_states.to(dtype), trace, stage).flatten(0, 1))
        if with_mixed:
            extra.append(trace.context.to(dtype).flatten(0, 1) @ self.weight)
        largest = largest * _largest(value)
        for vectors in extra:
            largest = torch.maximum(largest, _largest(vectors))
        self.scale = torch.ldexp(torch.ones_like(largest), -torch.frexp(largest).exponent.clamp(-100, 100))
        if largest.device.type == "cpu" and 2**-30 < float(largest) < 2**30:  # as in any real model: spare the passes
            self.scale = torch.ones_like(largest)
        else:
            value, extra = value * self.scale, [vectors * self.scale for vectors in extra]
        self.value, self.extra = value, extra
        self.count, self.tokens = heads + len(extra), batch * n

    def of(self, tokens: slice | Tensor) -> Tensor:
        """[K, T, d] of some tokens."""
        value = self.value[:, tokens]
        heads, count, head_dim = value.shape
        vectors = value.new_empty(self.count, count, self.weight.shape[1])
        torch.bmm(value, self.weight.view(heads, head_dim, -1), out=vectors[:heads])
        for k, vector in enumerate(self.extra, heads):
            vectors[k] = vector[tokens]
        return vectors


def stage_product(trace: AttentionTrace, stage: Stage) -> Tensor:
    """(M W_O)^T, [H * d_h, d], float64."""
    return apply_stage(trace.modules.output_weight.double().T.contiguous(), trace, stage)


def stage_weight(trace: AttentionTrace, stage: Stage, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M W_O)^T, [H * d_h, d], computed in float64, and its largest entry."""

    def make() -> tuple[Tensor, Tensor]:
        product = stage_product(trace, stage).to(dtype)
        return product, _largest(product)

    return cached_per_weights(trace, stage, (stage.name, dtype), make)


def _largest(tensor: Tensor) -> Tensor:
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high)


def _triangular_factors(vectors: HeadVectors, exact: bool) -> Tensor:
    """R of vectors = Q R for each token, [T, K, K], upper triangular.

    float64: Householder QR. float32: Cholesky factor, in float64, of the Gram matrix. A Gram matrix squares the
    condition, so it is accumulated in float64 where vectors cancel. On a GPU, or if `exact`, that is always; on a CPU a
    float32 one serves where no sum of the vectors with positive weights can lose more of its length than `CANCELLATION`
    allows: with C the matrix of their cosines, (sum of lengths / length of sum)^2 is at most 1^T C^-1 1.
    """
    tokens, count = vectors.tokens, vectors.count
    dtype, device = vectors.value.dtype, vectors.value.device
    chunks = [slice(i, min(i + TOKENS_PER_CHUNK, tokens)) for i in range(0, tokens, TOKENS_PER_CHUNK)]
    if dtype == torch.float64:
        factors = [torch.linalg.qr(vectors.of(chunk).permute(1, 2, 0), mode="r").R for chunk in chunks]
        factor = torch.cat(factors)
        return nn.functional.pad(factor, (0, 0, 0, count - factor.shape[1]))  # d < K: the rest is zero
    exact = exact or device.type != "cpu"  # to wait for the answer below costs more than float64 there
    gram = torch.empty(tokens, count, count, dtype=torch.float64, device=device)
    for chunk in chunks:
        gram[chunk] = _gram64(vectors.of(chunk)) if exact else _gram32(vectors.of(chunk))
    factor, loss = _cholesky(gram)
    if not exact:
        cancelling = (~(loss <= CANCELLATION * count)).nonzero()[:, 0]
        for some in cancelling.split(TOKENS_PER_CHUNK):
            factor[some] = _cholesky(_gram64(vectors.of(some)))[0]
    return factor.to(dtype)


def _gram32(vectors: Tensor) -> Tensor:
    """Inner products of each token's vectors, [K, T, d] -> [T, K, K]."""
    count, tokens, d = vectors.shape
    halves = 2 if d % 2 == 0 else 1  # shorter sums, half the rounding
    parts = vectors.view(count, tokens * halves, d // halves).transpose(0, 1)
    return torch.bmm(parts, parts.transpose(1, 2)).view(tokens, halves, count, count).sum(1, dtype=torch.float64)


def _gram64(vectors: Tensor) -> Tensor:
    """The same, accumulated in float64."""
    columns = vectors.permute(1, 2, 0).to(torch.float64, memory_format=torch.contiguous_format)
    return torch.bmm(columns.transpose(1, 2), columns)


def _cholesky(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = gram, [T, K, K], and 1^T C^-1 1 of the cosines C, [T]; float64.

    The matrix is scaled to a unit diagonal and gets a jitter of a few units in the last place, so that repeated,
    cancelling and zero vectors are all in order; it shifts a norm by at most 3e-7 of the vectors that cancel in it.
    What still cannot be factored is NaN, never a silent number.
    """
    tokens, count, _ = gram.shape
    length = torch.diagonal(gram, dim1=1, dim2=2).sqrt()
    inverse = torch.where(length > 0, 1 / length, 0)
    bordered = gram.new_ones(tokens, count + 1, count + 1)  # the border's factor is L^-1 1
    cosines = bordered[:, :count, :count]
    torch.mul(gram, inverse[:, :, None], out=cosines).mul_(inverse[:, None, :])
    diagonal = torch.diagonal(bordered, dim1=1, dim2=2)
    diagonal.fill_(1 + JITTER * count)
    diagonal[:, count] = 1e30
    lower, failed = torch.linalg.cholesky_ex(bordered)
    lower.masked_fill_((failed > 0)[:, None, None], torch.nan)
    factor = lower[:, :count, :count].transpose(1, 2) * length[:, None, :]
    return factor, lower[:, count, :count].square().sum(-1)
