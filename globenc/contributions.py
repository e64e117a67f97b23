"""A layer's local map at the price of a few matrix products: the algebra behind the PyTorch path.

Up to the two per-row scalars s1_i, s2_i, everything a contribution vector goes through is one fixed
linear map of the layer, M = diag(gamma2) C diag(gamma1) C with C the centring x - mean(x). With
u^h_j = M W_O^h v^h_j,

    ||c_ij|| = || sum_h alpha^h_ij u^h_j + [i=j] M x_i || / (s1_i s2_i).

For each key j the H vectors u^h_j (and M x_j) span at most H + 1 dimensions. The triangular factor R_j of
U_j = [u^1_j .. u^H_j, M x_j] = Q_j R_j holds all their lengths and angles, so the norm is ||R_j alpha_ij||:
H(H+1)/2 multiply-adds a pair instead of H d, and n H^2 numbers instead of n^2 d. R_j is the Cholesky factor
of the Gram matrix of U_j, which is accumulated in float64 where vectors cancel and so keeps the rounding
error that of the direct sum in float32; float64 models get it from a QR decomposition.

Everything is evaluated in blocks of query rows, so memory is linear in n.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import equations
from .capture import LayerTrace
from .encoders import LayerModules
from .methods import STAGES, Method, Stage

SCORES_PER_BLOCK = 3 << 17  # attention weights held at once on a CPU, all heads together: the second-level cache
SCORES_PER_GPU_BLOCK = 1 << 26
QUERIES_PER_BLOCK = 64  # at least: fewer starve the matrix products of long texts
TOKENS_PER_CHUNK = 64  # keys whose vectors u^h_j exist at once
CANCELLATION = 2.0  # of a squared sum of vectors, against independent ones: beyond it float32 products lose digits
JITTER = 16 * torch.finfo(torch.float64).eps  # times the number of vectors; keeps rank-deficient Grams factorable


class LayerMap(Protocol):
    """One layer's local map A, [B, n, n]; padded rows and columns are zero."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, that slice of the map, [B, rows, n]) over all rows in order."""

    def rows_at(self, positions: Tensor) -> Tensor:
        """The rows of these queries, [B, m, n] for positions [B, m]."""

    def through(self, rows: Tensor, row_normalize: bool) -> Tensor:
        """rows @ A for rows [B, m, n]; `row_normalize`: A's rows divided by their sums."""


class _Blocks:
    """Rows through a layer whose map comes in blocks: each is consumed as it comes, nothing of size n x n is stored."""

    def through(self: LayerMap, rows: Tensor, row_normalize: bool) -> Tensor:
        result = None
        for block, tile in self.blocks():
            if row_normalize:
                tile = normalize_rows(tile)
            rows = rows.to(tile.device)
            result = torch.zeros_like(rows) if result is None else result
            result.baddbmm_(rows[:, :, block], tile)
        assert result is not None
        return result


def normalize_rows(rows: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros (padding) stays."""
    total = rows.sum(-1, keepdim=True)
    return rows / total.where(total > 0, torch.ones_like(total))


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 models, float32 for all others: statistics and sums are never in half precision."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inverse_scale(norm: nn.LayerNorm, norm_input: Tensor) -> Tensor:
    """1 / s_i with s_i = sqrt(var + eps) of what entered a LayerNorm, [B, n]."""
    y = norm_input.to(working_dtype(norm_input))
    return torch.native_layer_norm(y, norm.normalized_shape, None, None, norm.eps)[2][..., 0]


def norm_weight(norm: nn.LayerNorm, like: Tensor) -> Tensor:
    """gamma, [d], in the dtype of `like`; ones where the norm has no weight."""
    if norm.weight is None:
        return torch.ones(norm.normalized_shape, dtype=like.dtype, device=like.device)
    return norm.weight.detach().to(like.dtype)


def apply_stage(x: Tensor, trace: LayerTrace, stage: Stage) -> Tensor:
    """M x for vectors on the last dimension: element-wise work and mean subtractions, O(d)."""
    for norm in (trace.modules.attention_norm, trace.modules.output_norm)[: stage.norms]:
        # one fused pass: a layer norm without its division; eps 1 keeps that in range
        x, _, inverse = torch.native_layer_norm(x, norm.normalized_shape, norm_weight(norm, x), None, 1.0)
        x = x.div_(inverse)
    return x


def _row_scale(trace: LayerTrace, stage: Stage) -> Tensor:
    """1 / (s1_i s2_i) as far as the stage goes, zero at padding, [B, n]."""
    scale = trace.mask.to(working_dtype(trace.query))
    if stage.norms > 0:
        scale = scale * inverse_scale(trace.modules.attention_norm, trace.attention_norm_input)
    if stage.norms > 1:
        scale = scale * inverse_scale(trace.modules.output_norm, trace.output_norm_input)
    return scale


_kept: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def kept(trace: LayerTrace, stage: Stage, key: Hashable, make: Callable[[], Any]) -> Any:
    """make(), kept under `key` while the layer's output projection and the stage's LayerNorm weights stay the same.

    The same means: neither a version counter nor, because writes through `.data` pass those by, the weights' product
    with a fixed vector has changed. On a GPU nobody waits for that answer: it is left in `trace.doubts`, and who finds
    it true calls `forget` and begins again.
    """
    modules = trace.modules
    weight = modules.output_projection.weight.detach()
    norms = (modules.attention_norm, modules.output_norm)[: stage.norms]
    key = (key, *map(id, norms))  # layers may share a projection, with norms of their own
    version = None if weight.is_inference() else weight._version
    seen = torch.cat([trace.probe[1], *(norm_weight(norm, trace.probe[1]) for norm in norms)])
    things = _kept.setdefault(modules.output_projection, {})
    if key in things:
        old_version, old_seen, thing = things[key]
        like = (seen.device, seen.dtype, seen.shape)
        if version == old_version and like == (old_seen.device, old_seen.dtype, old_seen.shape):
            differ = (seen != old_seen).any()
            if seen.device.type == "cpu":
                if not bool(differ):
                    return thing
            else:
                trace.doubts.append(differ)
                return thing
    thing = make()
    things[key] = version, seen, thing
    return thing


def forget(modules: LayerModules) -> None:
    """Drop what is kept of a layer's weights."""
    _kept.pop(modules.output_projection, None)


def stage_product(trace: LayerTrace, stage: Stage) -> Tensor:
    """(M W_O)^T, [H * d_h, d], float64."""
    weight = trace.modules.output_projection.weight.detach()
    return apply_stage(weight.double().T.contiguous(), trace, stage)


def _stage_weight(trace: LayerTrace, stage: Stage, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(M W_O)^T, [H * d_h, d], computed in float64, and its largest entry."""

    def make() -> tuple[Tensor, Tensor]:
        product = stage_product(trace, stage).to(dtype)
        return product, _largest(product)

    return kept(trace, stage, (stage.name, dtype), make)


def _largest(tensor: Tensor) -> Tensor:
    low, high = torch.aminmax(tensor)
    return torch.maximum(-low, high)


class _Vectors:
    """The vectors u^h_j and what is added to them, near 1 in size, made a few tokens at a time.

    Attributes:
        count: how many vectors a token has, K: its heads, then M x (with a residual), then M z (`with_mixed`; z is the
            attention block's output without bias).
        scale: the power of two they are multiplied with, so that no square leaves float32's range.
    """

    def __init__(self, trace: LayerTrace, stage: Stage, with_mixed: bool = False):
        dtype = working_dtype(trace.query)
        batch, heads, n, head_dim = trace.value.shape
        self.weight, largest = _stage_weight(trace, stage, dtype)
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


def _triangular_factors(vectors: _Vectors, exact: bool) -> Tensor:
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


class _Factors:
    """What is left of a layer's vectors for one stage.

    Attributes:
        heads: the factor over the heads, [B * n, H, H].
        extra: M x (with a residual) and M z (`with_mixed`) in the same coordinates, [B, n, H] each, with the norm of
            what is outside them, [B, n].
        row_scale: 1 / (s1_i s2_i), zero at padding, [B, n].
    """

    def __init__(self, trace: LayerTrace, stage: Stage, with_mixed: bool):
        batch, heads, n, _ = trace.value.shape
        vectors = _Vectors(trace, stage, with_mixed)
        factor = _triangular_factors(vectors, exact=with_mixed)
        self.heads = factor[:, :heads, :heads]
        self.extra = [
            (
                factor[:, :heads, k].view(batch, n, heads),
                factor[:, heads : k + 1, k].square().sum(-1).sqrt_().view(batch, n),
            )
            for k in range(heads, vectors.count)
        ]
        self.row_scale = _row_scale(trace, stage) / vectors.scale
        self.residual = stage.residual

    def norms(self, alpha: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of a block alpha [H, B, n, q], up to the row scale: ||c_ij|| [B, n, q], ||c_ii|| [B, q], and
        ||sum_{j!=i} c_ij|| [B, q] or None.
        """
        heads, batch, n, count = alpha.shape
        inside = torch.bmm(self.heads, alpha.view(heads, batch * n, count).transpose(0, 1))  # R_j alpha_ij
        own_inside = _own(inside.view(batch, n, heads, count).transpose(1, 2), rows).transpose(1, 2)  # [B, q, H]
        extra = [(_at(along, rows), _at(outside, rows)) for along, outside in self.extra]
        if self.residual:
            along, outside = extra[0]
            own = (own_inside + along).square_().sum(-1).add_(outside.square()).sqrt_()
        else:
            own = own_inside.norm(dim=-1)
        others = None
        if len(extra) > self.residual:
            along, outside = extra[-1]
            others = (along - own_inside).square_().sum(-1).add_(outside.square()).sqrt_()
        return inside.square_().sum(1).sqrt_().view(batch, n, count), own, others


def _at(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Tokens of [B, n, ...]: a slice of them, or a list [B, m] for each text."""
    if isinstance(rows, slice):
        return tensor[:, rows]
    index = rows.view(*rows.shape, *[1] * (tensor.ndim - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))


def _own(columns: Tensor, rows: slice | Tensor) -> Tensor:
    """The diagonal of a block of columns [..., B, (H,) n, q] whose queries are `rows`: [..., q]; a view for a slice."""
    if isinstance(rows, slice):
        return columns[..., rows, :].diagonal(dim1=-2, dim2=-1)
    index = rows.view(rows.shape[0], *[1] * (columns.ndim - 2), rows.shape[1])
    return columns.gather(-2, index.expand(*columns.shape[:-2], 1, -1))[..., 0, :]


class _Attention:
    """A layer's attention weights, recomputed from queries and keys in blocks of columns: keys stand in rows here."""

    def __init__(self, trace: LayerTrace):
        self.query, self.key, self.scaling = trace.query, trace.key, trace.scaling
        self.mask = trace.mask if trace.padded else None
        self.dtype = working_dtype(trace.query)

    def _columns(self, query: Tensor, key: Tensor) -> Tensor:
        """alpha [H, B, n, q] from [H, B, q, d_h] and [H, B, n, d_h]."""
        heads, batch, n, _ = key.shape
        scores = torch.bmm(key.flatten(0, 1), (query * self.scaling).flatten(0, 1).transpose(1, 2))
        alpha = scores.view(heads, batch, n, -1)
        if self.mask is not None:
            alpha.masked_fill_(~self.mask[:, :, None], -torch.inf)
        # torch's softmax over a dimension that is not the last takes twice as long as its steps
        alpha.sub_(alpha.amax(2, keepdim=True)).exp_()
        return alpha.mul_(alpha.sum(2, keepdim=True).reciprocal_())

    def _heads_first(self) -> tuple[Tensor, Tensor]:
        query, key = (t.to(self.dtype).transpose(0, 1) for t in (self.query, self.key))
        return query, key

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(queries, alpha [H, B, n, q]) over all queries in order."""
        query, key = self._heads_first()
        heads, batch, n, _ = query.shape
        budget = SCORES_PER_BLOCK if query.device.type == "cpu" else SCORES_PER_GPU_BLOCK
        size = max(QUERIES_PER_BLOCK, budget // (batch * heads * n))
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            yield rows, self._columns(query[:, :, rows], key)

    def at(self, positions: Tensor) -> Tensor:
        """alpha [H, B, n, m] of the queries at positions [B, m]."""
        query, key = self._heads_first()
        index = positions[None, :, :, None].expand(query.shape[0], -1, -1, query.shape[3])
        return self._columns(query.gather(2, index), key)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b.where(b > 0, torch.ones_like(b)), torch.zeros_like(b))


def _finish(columns: Tensor, method: Method, rows: slice | Tensor, real: Tensor, ratio: Tensor | None) -> Tensor:
    """A method's last step: normalise the rows of a block [B, n, q] (rows stand in columns here) and mix them with the
    identity; padded queries become zero. Works in place. real, ratio: [B, q]. Returns the rows, [B, q, n].
    """
    real = real.to(columns.dtype)
    if method.normalize:
        columns.mul_(_divide(real, columns.sum(1))[:, None])
    if method.mix == "half":
        columns.mul_(0.5)
        _set_own(columns, rows, _own(columns, rows) + 0.5 * real)
    elif method.mix == "ratio":
        assert ratio is not None
        _set_own(columns, rows, torch.zeros_like(real))
        total = columns.sum(1)
        # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
        ratio = torch.where(total > 0, ratio, 0)
        columns.mul_(_divide(ratio * real, total)[:, None])
        _set_own(columns, rows, (1 - ratio) * real)
    return columns.transpose(1, 2)


def _set_own(columns: Tensor, rows: slice | Tensor, values: Tensor) -> None:
    """Write [B, q] values to the diagonal of a block [B, n, q]."""
    if isinstance(rows, slice):
        columns[:, rows].diagonal(dim1=1, dim2=2).copy_(values)
    else:
        columns.scatter_(1, rows[:, None], values[:, None])


class TorchLayer(_Blocks):
    """A layer's local map by the factor form, in PyTorch, on any device."""

    def __init__(self, trace: LayerTrace, method: Method):
        self.method = method
        self.attention = _Attention(trace)
        self.mask = trace.mask
        stage = STAGES["N-Enc"] if method.mix == "ratio" else method.stage
        self.factors = None if stage is None else _Factors(trace, stage, with_mixed=method.mix == "ratio")

    def _rows(self, alpha: Tensor, rows: slice | Tensor) -> Tensor:
        real = _at(self.mask, rows)
        ratio = columns = None
        if self.factors is not None:
            columns, own, others = self.factors.norms(alpha, rows)
            ratio = None if others is None else _divide(others, others + own)
            _set_own(columns, rows, own)
            columns.mul_(_at(self.factors.row_scale, rows)[:, None])
        if self.method.stage is None or columns is None:
            columns = alpha.mean(0).mul_(real[:, None])
        return _finish(columns, self.method, rows, real, ratio)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, alpha in self.attention.blocks():
            yield rows, self._rows(alpha, rows)

    def rows_at(self, positions: Tensor) -> Tensor:
        return self._rows(self.attention.at(positions), positions)


MakeLayer = Callable[[LayerTrace, Method], LayerMap]
DIRECT_ROWS = 2  # up to so many rows cost less by the direct sum than by a factor of every key


def top_rows(trace: LayerTrace, method: Method, positions: Tensor, make_layer: MakeLayer) -> Tensor:
    """Rows of the last layer's map at positions [B, m], the cheapest way the backend has, [B, m, n]."""
    by_torch = make_layer is not ReferenceLayer and trace.attention is None
    if by_torch and positions.shape[1] <= DIRECT_ROWS and method.stage and method.mix != "ratio":
        return direct_rows(trace, method, method.stage, positions)
    return make_layer(trace, method).rows_at(positions)


def direct_rows(trace: LayerTrace, method: Method, stage: Stage, positions: Tensor) -> Tensor:
    """Rows of a layer's map at positions [B, m] straight from (4)-(11): one matrix product a row, no factor.

    The cheaper way for a row or two, which is all that a target asks of the last layer.
    """
    alpha = _Attention(trace).at(positions)  # [H, B, n, m]
    heads, batch, n, count = alpha.shape
    parts = _Vectors(trace, stage)
    norms = []
    for m in range(count):
        weights = alpha[..., m].reshape(heads, batch * n).T[..., None]
        vectors = (parts.value.transpose(0, 1) * weights).flatten(1) @ parts.weight  # [B * n, d]
        own = torch.arange(batch, device=alpha.device) * n + positions[:, m]
        for residual in parts.extra:
            vectors[own] += residual[own]
        norms.append(vectors.norm(dim=-1).view(batch, n))
    columns = torch.stack(norms, -1).mul_(_at(_row_scale(trace, stage) / parts.scale, positions)[:, None])
    return _finish(columns, method, positions, _at(trace.mask, positions), None)


def mixing_ratios(trace: LayerTrace, stage: Stage) -> Tensor:
    """(8), (14): r_i of a stage, [B, n]; zero at padding."""
    factors = _Factors(trace, stage, with_mixed=True)
    parts = []
    for rows, alpha in _Attention(trace).blocks():
        _, own, others = factors.norms(alpha, rows)
        assert others is not None
        parts.append(_divide(others, others + own))
    return torch.cat(parts, -1) * trace.mask


def completeness_gap(trace: LayerTrace) -> Tensor:
    """How far the parts c_ij, summed over j, are from the layer's real output, [B, n], relative; zero at padding.

    sum_j c_ij = M (W_O sum_j alpha_ij v_j + x_i) / (s1_i s2_i) from the captured queries, keys, values and residual
    is compared with the layer's output less what belongs to no token: the biases b_O, beta1, beta2 and the
    feed-forward block's vector. A wrong weight, residual or norm in the family's description shows here.
    """
    dtype = working_dtype(trace.query)
    modules, stage = trace.modules, STAGES["N-Enc"]
    parts = []
    value = trace.value.to(dtype)
    for _, alpha in _Attention(trace).blocks():
        parts.append(torch.matmul(alpha.permute(1, 0, 3, 2), value))
    context = torch.cat(parts, 2).transpose(1, 2).flatten(2)
    scale1 = 1 / inverse_scale(modules.attention_norm, trace.attention_norm_input)[..., None]
    scale2 = 1 / inverse_scale(modules.output_norm, trace.output_norm_input)[..., None]
    hidden_states = trace.hidden_states.to(dtype)
    mixed = context @ _stage_weight(trace, stage, dtype)[0] + apply_stage(hidden_states, trace, stage)
    tokens = mixed / (scale1 * scale2)

    def bias(module: nn.Module) -> Tensor:
        kept = getattr(module, "bias", None)
        return hidden_states.new_zeros(hidden_states.shape[-1]) if kept is None else kept.detach().to(dtype)

    b_o, beta1, beta2 = (bias(m) for m in (modules.output_projection, modules.attention_norm, modules.output_norm))
    y1, y2 = trace.attention_norm_input.to(dtype), trace.output_norm_input.to(dtype)
    gamma1, gamma2 = (norm_weight(norm, y1) for norm in (modules.attention_norm, modules.output_norm))
    middle = (y1 - y1.mean(-1, keepdim=True)) * gamma1 / scale1 + beta1
    nobody = apply_stage(b_o, trace, stage) / (scale1 * scale2)
    after = beta1 + (y2 - middle)  # beta1 and the feed-forward vector, through the second LayerNorm alone
    nobody = nobody + (after - after.mean(-1, keepdim=True)) * gamma2 / scale2 + beta2
    return relative_gap(tokens + nobody, trace.output, trace.mask)


def rounding(dtype: torch.dtype) -> float:
    """What the model's own projection may be off by, relative: by its dtype, or by the products it is told to use."""
    matmul = torch.backends.cuda.matmul
    lowered = torch.get_float32_matmul_precision() != "highest"
    lowered = lowered or getattr(matmul, "fp32_precision", "ieee") not in ("ieee", "none")
    return ROUNDING[torch.bfloat16 if lowered and dtype == torch.float32 else dtype]


def patched(trace: LayerTrace) -> Tensor:
    """How much of what enters LayerNorm 1 is not x + W_O context + b_O, a number; 1 and more is no rounding.

    Both sides are compared along one direction, at the price of three dot products a token. A vector off by a share of
    its length is off by a sqrt(d)-th of that along it.
    """
    dtype, bias = working_dtype(trace.query), trace.modules.output_projection.bias
    direction, projected = (part.to(dtype) for part in trace.probe)
    own, real = trace.hidden_states.to(dtype), trace.attention_norm_input.to(dtype)
    expected = trace.context.to(dtype) @ projected + own @ direction
    if bias is not None:
        expected = expected + bias.detach().to(dtype) @ direction
    size = real.norm(dim=-1) + own.norm(dim=-1)
    allowed = rounding(trace.context.dtype) * size * direction.norm() / len(direction) ** 0.5
    return (_divide((real @ direction - expected).abs(), allowed) * trace.mask).amax()


ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative_gap(found: Tensor, expected: Tensor, mask: Tensor) -> Tensor:
    """||found - expected|| / ||expected|| token by token, [B, n]; zero at padding."""
    dtype = working_dtype(expected)
    found, expected = found.to(dtype), expected.to(dtype)
    return _divide((found - expected).norm(dim=-1), expected.norm(dim=-1)) * mask


class ReferenceLayer(_Blocks):
    """A layer's local map by `equations.py`: the direct sum, for checking and teaching."""

    def __init__(self, trace: LayerTrace, method: Method):
        self.map = equations.local_map(equation_layer(trace), method.name)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.map.shape[1]), self.map

    def rows_at(self, positions: Tensor) -> Tensor:
        return self.map.gather(1, positions[:, :, None].expand(-1, -1, self.map.shape[2]))


def norm_scale(norm: nn.LayerNorm, norm_input: Tensor) -> Tensor:
    """s_i = sqrt(var + eps) of what entered a LayerNorm, as the equations say it, [B, n]."""
    y = norm_input.to(working_dtype(norm_input))
    return (y.var(-1, correction=0) + norm.eps).sqrt()


def equation_layer(trace: LayerTrace) -> equations.EncoderLayer:
    """A captured layer in the letters of `equations.py`."""
    dtype, modules = working_dtype(trace.query), trace.modules
    query, key, value = (t.to(dtype) for t in (trace.query, trace.key, trace.value))
    return equations.EncoderLayer(
        alpha=equations.attention_weights(query, key, trace.scaling, trace.mask),
        value=value,
        output_weight=modules.output_projection.weight.detach().to(dtype),
        hidden_states=trace.hidden_states.to(dtype),
        gamma1=norm_weight(modules.attention_norm, value),
        s1=norm_scale(modules.attention_norm, trace.attention_norm_input),
        gamma2=norm_weight(modules.output_norm, value),
        s2=norm_scale(modules.output_norm, trace.output_norm_input),
        mask=trace.mask,
    )
