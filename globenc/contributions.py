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
from .capture import LayerTrace, in_reach
from .encoders import LayerModules, norm_eps, norm_width
from .methods import STAGES, Method, Stage
from .model_state import lowers_float32

SCORES_PER_BLOCK = 3 << 17  # attention weights held at once on a CPU, all heads together: the second-level cache
SCORES_PER_GPU_BLOCK = 1 << 26
QUERIES_PER_BLOCK = 64  # at least: fewer starve the matrix products of long texts
QUERIES_PER_TILE = 128  # of long texts, whose keys are taken in parts
TILED_FROM = 4  # a text is long from so many parts on
TOKENS_PER_CHUNK = 64  # keys whose vectors u^h_j exist at once
CANCELLATION = 2.0  # of a squared sum of vectors, against independent ones: beyond it float32 products lose digits
JITTER = 16 * torch.finfo(torch.float64).eps  # times the number of vectors; keeps rank-deficient Grams factorable


Keys = slice | Tensor
"""Tokens that some queries see: a stretch of them, or a list that begins with a stretch."""


class LayerMap(Protocol):
    """One layer's local map A, [B, n, n]; padded rows and columns are zero."""

    @property
    def tokens(self) -> int:
        """n."""

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        """(rows, keys, that part of the map, [B, rows, keys]); together they are all of it that is not zero.

        `whole_rows`: each block holds all that its rows have, and rows come in order.
        """

    def rows_at(self, positions: Tensor) -> Tensor:
        """The rows of these queries, [B, m, n] for positions [B, m]."""

    def scale_rows(self, scale: Tensor) -> None:
        """Multiply the rows with numbers [B, n]."""

    def through(self, rows: Tensor, row_normalize: bool) -> Tensor:
        """rows @ A for rows [B, m, n]; `row_normalize`: A's rows divided by their sums."""


class _Blocks:
    """Rows through a layer whose map comes in blocks: each is consumed as it comes, nothing of size n x n is stored."""

    def through(self: LayerMap, rows: Tensor, row_normalize: bool) -> Tensor:
        result = None
        for block, keys, tile in self.blocks(row_normalize):
            if row_normalize:
                tile = normalize_rows(tile)
            rows = rows.to(tile.device)
            result = torch.zeros_like(rows) if result is None else result
            if isinstance(keys, slice):
                result[:, :, keys].baddbmm_(rows[:, :, block], tile)
            else:
                result.index_add_(2, keys, torch.bmm(rows[:, :, block], tile))
        assert result is not None
        return result


def whole(layer: LayerMap) -> Tensor:
    """A local map as a matrix, [B, n, n]."""
    n, local = layer.tokens, None
    for rows, keys, tile in layer.blocks():
        if tile.shape[1:] == (n, n):
            return tile
        local = tile.new_zeros(len(tile), n, n) if local is None else local
        local[:, rows, keys] = tile
    assert local is not None
    return local


def normalize_rows(rows: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros (padding) stays."""
    total = rows.sum(-1, keepdim=True)
    return rows / total.where(total > 0, torch.ones_like(total))


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 models, float32 for all others: statistics and sums are never in half precision."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inverse_scale(norm: Any, norm_input: Tensor) -> Tensor:
    """1 / s_i with s_i = sqrt(var + eps) of what entered a LayerNorm, [B, n]."""
    y = norm_input.to(working_dtype(norm_input))
    return torch.native_layer_norm(y, norm_width(norm), None, None, norm_eps(norm))[2][..., 0]


def norm_weight(norm: Any, like: Tensor) -> Tensor:
    """gamma, [d], in the dtype of `like`; ones where the norm has no weight."""
    if norm.weight is None:
        return torch.ones(norm_width(norm), dtype=like.dtype, device=like.device)
    return norm.weight.detach().to(like.dtype)


def apply_stage(x: Tensor, trace: LayerTrace, stage: Stage) -> Tensor:
    """M x for vectors on the last dimension: element-wise work and mean subtractions, O(d)."""
    for norm in trace.modules.norms[: stage.norms]:
        # one fused pass: a layer norm without its division; eps 1 keeps that in range
        x, _, inverse = torch.native_layer_norm(x, norm_width(norm), norm_weight(norm, x), None, 1.0)
        x = x.div_(inverse)
    return x


def _row_scale(trace: LayerTrace, stage: Stage) -> Tensor:
    """1 / (s1_i s2_i) as far as the stage goes, zero at padding, [B, n]."""
    scale = trace.mask.to(working_dtype(trace.value))
    inputs = (trace.attention_norm_input, trace.output_norm_input)
    for norm, norm_input in list(zip(trace.modules.norms, inputs, strict=False))[: stage.norms]:
        if norm_input is not None:  # not known before the feed-forward block: see `scale_rows`
            scale = scale * inverse_scale(norm, norm_input)
    return scale


def late_scale(modules: LayerModules, method: Method, output_norm_input: Tensor | None) -> Tensor | None:
    """1 / s2_i, [B, n], where it belongs to a method's map and is not known before the feed-forward block."""
    if output_norm_input is None or method.stage is None or method.stage.norms < 2:
        return None
    return inverse_scale(modules.output_norm, output_norm_input)


_kept: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def kept(trace: LayerTrace, stage: Stage, key: Hashable, make: Callable[[], Any]) -> Any:
    """make(), kept under `key` while the layer's output projection and the stage's LayerNorm weights stay the same.

    The same means: neither a version counter nor, because writes through `.data` pass those by, the weights' product
    with a fixed vector has changed. On a GPU nobody waits for that answer: it is left in `trace.doubts`, and who finds
    it true calls `forget` and begins again.
    """
    modules = trace.modules
    weight = modules.output_projection.weight.detach()
    norms = modules.norms[: stage.norms]
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
    return apply_stage(trace.modules.output_weight.double().T.contiguous(), trace, stage)


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
        dtype = working_dtype(trace.value)
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

    def norms(self, alpha: Tensor, rows: slice | Tensor, keys: Keys) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of a block alpha [H, B, keys, q], up to the row scale: ||c_ij|| [B, keys, q], ||c_ii|| [B, q], and
        ||sum_{j!=i} c_ij|| [B, q] or None; only the first of a block apart from the diagonal.
        """
        heads, batch, n, count = alpha.shape
        factors = self.heads.view(batch, -1, heads, heads)[:, keys].reshape(batch * n, heads, heads)
        inside = torch.bmm(factors, alpha.reshape(heads, batch * n, count).transpose(0, 1))  # R_j alpha_ij
        if _apart(rows, keys):
            return inside.square_().sum(1).sqrt_().view(batch, n, count), None, None
        own_inside = _own(inside.view(batch, n, heads, count).transpose(1, 2), _within(rows, keys)).transpose(1, 2)
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


def _apart(rows: slice | Tensor, keys: Keys) -> bool:
    """Whether a block holds nothing of the diagonal."""
    if not isinstance(rows, slice) or not isinstance(keys, slice):
        return False
    return rows.stop <= keys.start or keys.stop <= rows.start


def _within(rows: slice | Tensor, keys: Keys) -> slice | Tensor:
    """Where the rows stand among the keys."""
    start = keys.start if isinstance(keys, slice) else int(keys[0])
    return slice(rows.start - start, rows.stop - start) if isinstance(rows, slice) else rows - start


def _own(columns: Tensor, rows: slice | Tensor) -> Tensor:
    """The diagonal of a block of columns [..., B, (H,) n, q] whose queries are `rows`: [..., q]; a view for a slice."""
    if isinstance(rows, slice):
        return columns[..., rows, :].diagonal(dim1=-2, dim2=-1)
    index = rows.view(rows.shape[0], *[1] * (columns.ndim - 2), rows.shape[1])
    return columns.gather(-2, index.expand(*columns.shape[:-2], 1, -1))[..., 0, :]


class _Attention:
    """A layer's attention weights in blocks of columns, recomputed from queries and keys: keys stand in rows here."""

    def __init__(self, trace: LayerTrace):
        assert trace.query is not None
        assert trace.key is not None
        self.query, self.key, self.scaling = trace.query, trace.key, trace.scaling
        self.window, self.bias, self.global_keys = trace.window, trace.bias, trace.global_keys
        self.log_sum_exp = trace.log_sum_exp
        self.mask = trace.mask if trace.padded else None
        self.dtype = working_dtype(trace.query)

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
            alpha.masked_fill_(self._unseen(rows, keys), lowest)
        # torch's softmax over a dimension that is not the last takes twice as long as its steps
        alpha.sub_(alpha.amax(2, keepdim=True)).exp_()
        return alpha.mul_(alpha.sum(2, keepdim=True).reciprocal_())

    def _unseen(self, rows: slice | Tensor, keys: Keys) -> Tensor:
        """Keys that are too far from a query, [keys, q] or [B, keys, q]."""
        assert self.window is not None
        places = torch.arange(self.key.shape[2], device=self.key.device)
        i = places[rows] if isinstance(rows, slice) else rows[:, None, :]
        unseen = (places[keys][:, None] - i).abs() > self.window
        return unseen if self.global_keys is None else unseen & ~self.global_keys[:, keys, None]

    def _seen(self, rows: slice) -> Keys:
        """The keys that a stretch of queries sees."""
        near = in_reach(rows, self.window, self.key.shape[2])
        if self.global_keys is None or self.window is None:
            return near
        far = self.global_keys.any(0)
        far[near] = False
        places = torch.arange(near.start, near.stop, device=far.device)
        return torch.cat([places, far.nonzero()[:, 0]]) if bool(far.any()) else near

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


class _GivenAttention:
    """The same from attention weights that the model itself has shown."""

    def __init__(self, trace: LayerTrace):
        assert trace.weights is not None
        self.weights, self.dtype = trace.weights, working_dtype(trace.value)

    def blocks(self, whole_rows: bool) -> Iterator[tuple[slice, Keys, Tensor]]:
        """As `_Attention.blocks`."""
        n, size = self.weights.shape[2], _block_size(self.weights, None)
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            yield rows, slice(0, n), self.weights[:, :, rows].to(self.dtype).permute(1, 0, 3, 2).contiguous()

    def at(self, positions: Tensor) -> Tensor:
        """As `_Attention.at`."""
        index = positions[:, None, :, None].expand(-1, self.weights.shape[1], -1, self.weights.shape[3])
        return self.weights.gather(2, index).to(self.dtype).permute(1, 0, 3, 2).contiguous()


def _attention(trace: LayerTrace) -> _Attention | _GivenAttention:
    return _Attention(trace) if trace.weights is None else _GivenAttention(trace)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b.where(b > 0, torch.ones_like(b)), torch.zeros_like(b))


def _finish(columns: Tensor, method: Method, own: slice | Tensor | None, real: Tensor, ratio: Tensor | None) -> Tensor:
    """A method's last step: normalise the rows of a block [B, keys, q] (rows stand in columns here) and mix them with
    the identity; padded queries become zero. Works in place. `own`: where the queries stand among the keys, None for
    nowhere. real, ratio: [B, q]. Returns the rows, [B, q, keys].
    """
    real = real.to(columns.dtype)
    if method.normalize:
        columns.mul_(_divide(real, columns.sum(1))[:, None])
    if method.mix == "half":
        columns.mul_(0.5)
        if own is not None:
            _set_own(columns, own, _own(columns, own) + 0.5 * real)
    elif method.mix == "ratio":
        assert ratio is not None
        assert own is not None
        _set_own(columns, own, torch.zeros_like(real))
        total = columns.sum(1)
        # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
        ratio = torch.where(total > 0, ratio, 0)
        columns.mul_(_divide(ratio * real, total)[:, None])
        _set_own(columns, own, (1 - ratio) * real)
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
        self.attention = _attention(trace)
        self.mask, self.tokens = trace.mask, trace.mask.shape[1]
        stage = STAGES["N-Enc"] if method.mix == "ratio" else method.stage
        self.factors = None if stage is None else _Factors(trace, stage, with_mixed=method.mix == "ratio")

    def _rows(self, alpha: Tensor, rows: slice | Tensor, keys: Keys) -> Tensor:
        real, place = _at(self.mask, rows), None if _apart(rows, keys) else _within(rows, keys)
        ratio = columns = None
        if self.factors is not None:
            columns, own, others = self.factors.norms(alpha, rows, keys)
            if own is not None and place is not None:
                ratio = None if others is None else _divide(others, others + own)
                _set_own(columns, place, own)
            columns.mul_(_at(self.factors.row_scale, rows)[:, None])
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


class StoredLayer(_Blocks):
    """A layer's local map as a matrix, [B, n, n]."""

    def __init__(self, local_map: Tensor):
        self.map, self.tokens = local_map, local_map.shape[1]

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        every = slice(0, self.tokens)
        yield every, every, self.map

    def rows_at(self, positions: Tensor) -> Tensor:
        return self.map.gather(1, positions[:, :, None].expand(-1, -1, self.map.shape[2]))

    def scale_rows(self, scale: Tensor) -> None:
        self.map.mul_(scale[:, :, None])


class MixedLayer(_Blocks):
    """A layer whose tokens with global attention have rows of their own, made of other queries, keys and values.

    Args:
        local: the map, right but for those rows.
        rows: the map that is right for them.
        where: True at them, [B, n].
    """

    def __init__(self, local: LayerMap, rows: LayerMap, where: Tensor):
        self.local, self.rows, self.where, self.tokens = local, rows, where, where.shape[1]
        self.most = int(where.sum(1).max())

    def _positions(self) -> tuple[Tensor, Tensor]:
        """Of the tokens with global attention, first to last, [B, most], and which of those are there."""
        order = (~self.where).to(torch.int8).argsort(dim=1, stable=True)[:, : self.most]
        return order, self.where.gather(1, order)

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, Keys, Tensor]]:
        every, local = slice(0, self.tokens), whole(self.local)
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
        own = self.rows.rows_at(positions)
        own = normalize_rows(own) if row_normalize else own
        weights = rows.gather(2, positions[:, None].expand(-1, rows.shape[1], -1)) * there[:, None]
        local = self.local.through(rows.masked_fill(self.where[:, None], 0), row_normalize)
        return torch.baddbmm(local, weights, own)


def torch_layer(trace: LayerTrace, method: Method) -> LayerMap:
    """A layer's local map, in PyTorch. Where the model's own attention weights were seen, the map is made at once: one
    number a pair is kept of them, not one for each head."""
    layer = TorchLayer(trace, method)
    if trace.global_rows is not None and trace.global_keys is not None:
        return MixedLayer(layer, TorchLayer(trace.global_rows, method), trace.global_keys)
    return layer if trace.weights is None else StoredLayer(whole(layer))


MakeLayer = Callable[[LayerTrace, Method], LayerMap]
DIRECT_ROWS = 2  # up to so many rows cost less by the direct sum than by a factor of every key


def top_rows(trace: LayerTrace, method: Method, positions: Tensor, make_layer: MakeLayer) -> Tensor:
    """Rows of the last layer's map at positions [B, m], the cheapest way the backend has, [B, m, n]."""
    by_torch = make_layer is not reference_layer and trace.attention is None and trace.global_rows is None
    if by_torch and positions.shape[1] <= DIRECT_ROWS and method.stage and method.mix != "ratio":
        return direct_rows(trace, method, method.stage, positions)
    return make_layer(trace, method).rows_at(positions)


def direct_rows(trace: LayerTrace, method: Method, stage: Stage, positions: Tensor) -> Tensor:
    """Rows of a layer's map at positions [B, m] straight from (4)-(11): one matrix product a row, no factor.

    The cheaper way for a row or two, which is all that a position asks of the last layer.
    """
    alpha = _attention(trace).at(positions)  # [H, B, n, m]
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
    for rows, keys, alpha in _attention(trace).blocks(whole_rows=True):
        _, own, others = factors.norms(alpha, rows, keys)
        assert own is not None
        assert others is not None
        parts.append(_divide(others, others + own))
    return torch.cat(parts, -1) * trace.mask


def completeness_gap(trace: LayerTrace) -> Tensor:
    """How far the parts c_ij, summed over j, are from the layer's real output, [B, n], relative; zero at padding.

    sum_j c_ij = M (W_O sum_j alpha_ij v_j + x_i) / (s1_i s2_i) from the captured queries, keys (or attention weights),
    values and residual is compared with the layer's output less what belongs to no token: the biases b_O, beta1, beta2
    and the feed-forward block's vector. In a pre-LN layer it is compared with the residual stream behind the attention
    block, less b_O. A wrong weight, residual or norm in the family's description shows here.
    """
    dtype = working_dtype(trace.value)
    modules, stage = trace.modules, STAGES["N-Enc"]
    parts = []
    value = trace.value.to(dtype)
    for _, keys, alpha in _attention(trace).blocks(whole_rows=True):
        parts.append(torch.matmul(alpha.permute(1, 0, 3, 2), value[:, :, keys]))
    context = torch.cat(parts, 2).transpose(1, 2).flatten(2)
    hidden_states = trace.hidden_states.to(dtype)
    mixed = context @ _stage_weight(trace, stage, dtype)[0] + apply_stage(hidden_states, trace, stage)

    def detached(bias: Tensor | None) -> Tensor:
        return hidden_states.new_zeros(hidden_states.shape[-1]) if bias is None else bias.detach().to(dtype)

    b_o, y1 = detached(modules.output_bias), trace.attention_norm_input.to(dtype)
    if trace.output_norm_input is None:
        return relative_gap(mixed + b_o, y1, trace.mask)
    y2 = trace.output_norm_input.to(dtype)
    scale1, scale2 = (1 / inverse_scale(norm, y)[..., None] for norm, y in zip(modules.norms, (y1, y2), strict=True))
    beta1, beta2 = (detached(norm.bias) for norm in modules.norms)
    gamma1, gamma2 = (norm_weight(norm, y1) for norm in modules.norms)
    tokens = mixed / (scale1 * scale2)
    middle = (y1 - y1.mean(-1, keepdim=True)) * gamma1 / scale1 + beta1
    nobody = apply_stage(b_o, trace, stage) / (scale1 * scale2)
    after = beta1 + (y2 - middle)  # beta1 and the feed-forward vector, through the second LayerNorm alone
    nobody = nobody + (after - after.mean(-1, keepdim=True)) * gamma2 / scale2 + beta2
    assert trace.output is not None
    return relative_gap(tokens + nobody, trace.output, trace.mask)


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """What the model's own projection may be off by, relative: by its dtype, or by the products it is told to use."""
    lowered = dtype == torch.float32 and lowers_float32(device)
    return ROUNDING[torch.bfloat16 if lowered else dtype]


def patched(trace: LayerTrace) -> Tensor:
    """How much of the sum behind the attention block is not x + W_O context + b_O, a number; 1 and more is no rounding.

    Both sides are compared along one direction, at the price of three dot products a token. A vector off by a share of
    its length is off by a sqrt(d)-th of that along it.
    """
    dtype, bias = working_dtype(trace.value), trace.modules.output_bias
    direction, projected = (part.to(dtype) for part in trace.probe)
    own, real = trace.hidden_states.to(dtype), trace.attention_norm_input.to(dtype)
    expected = trace.context.to(dtype) @ projected + own @ direction
    if bias is not None:
        expected = expected + bias.to(dtype) @ direction
    size = real.norm(dim=-1) + own.norm(dim=-1)
    allowed = rounding(trace.context.dtype, trace.context.device) * size * direction.norm() / len(direction) ** 0.5
    return (_divide((real @ direction - expected).abs(), allowed) * trace.mask).amax()


ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def relative_gap(found: Tensor, expected: Tensor, mask: Tensor) -> Tensor:
    """||found - expected|| / ||expected|| token by token, [B, n]; zero at padding."""
    dtype = working_dtype(expected)
    found, expected = found.to(dtype), expected.to(dtype)
    return _divide((found - expected).norm(dim=-1), expected.norm(dim=-1)) * mask


def reference_layer(trace: LayerTrace, method: Method) -> LayerMap:
    """A layer's local map by `equations.py`: the direct sum, for checking and teaching."""
    return StoredLayer(by_rows(trace, lambda part: equations.local_map(equation_layer(part), method.name)))


def by_rows(trace: LayerTrace, compute: Callable[[LayerTrace], Tensor]) -> Tensor:
    """compute(trace), [B, n, ...], with the rows of tokens with global attention from the trace that holds for them."""
    result = compute(trace)
    if trace.global_rows is None or trace.global_keys is None:
        return result
    chosen = trace.global_keys.view(*trace.global_keys.shape, *[1] * (result.ndim - 2))
    return torch.where(chosen, compute(trace.global_rows), result)


def norm_scale(norm: Any, norm_input: Tensor) -> Tensor:
    """s_i = sqrt(var + eps) of what entered a LayerNorm, as the equations say it, [B, n]."""
    y = norm_input.to(working_dtype(norm_input))
    return (y.var(-1, correction=0) + norm_eps(norm)).sqrt()


def equation_layer(trace: LayerTrace) -> equations.EncoderLayer:
    """A captured layer in the letters of `equations.py`."""
    dtype, modules = working_dtype(trace.value), trace.modules
    value = trace.value.to(dtype)
    if trace.weights is not None:
        alpha = trace.weights.to(dtype)
    else:
        assert trace.query is not None
        assert trace.key is not None
        query, key = trace.query.to(dtype), trace.key.to(dtype)
        bias = None if trace.bias is None else trace.bias.to(dtype)
        alpha = equations.attention_weights(
            query, key, trace.scaling, trace.mask, trace.window, bias, trace.global_keys
        )
    gammas = [norm_weight(norm, value) for norm in modules.norms]
    inputs = (trace.attention_norm_input, trace.output_norm_input)
    scales = [norm_scale(norm, y) for norm, y in zip(modules.norms, inputs, strict=False) if y is not None]
    return equations.EncoderLayer(
        alpha=alpha,
        value=value,
        output_weight=modules.output_weight.to(dtype),
        hidden_states=trace.hidden_states.to(dtype),
        gamma1=gammas[0] if gammas else None,
        s1=scales[0] if scales else None,
        gamma2=gammas[1] if gammas else None,
        s2=scales[1] if scales else None,
        mask=trace.mask,
    )
