"""A layer's local map at the price of a few matrix products: the algebra behind the PyTorch path.

Up to the two per-row scalars s1_i, s2_i, everything a contribution vector goes through is one fixed
linear map of the layer, M = diag(gamma2) C diag(gamma1) C with C the centring x - mean(x). With
u^h_j = M W_O^h v^h_j,

    ||c_ij|| = || sum_h alpha^h_ij u^h_j + [i=j] M x_i || / (s1_i s2_i).

For each key j the H vectors u^h_j (and M x_j) span at most H + 1 dimensions. The triangular factor R_j of
U_j = [u^1_j .. u^H_j, M x_j] = Q_j R_j holds all their lengths and angles, so the norm is ||R_j alpha_ij||:
H(H+1)/2 multiply-adds a pair instead of H d, and n H^2 numbers instead of n^2 d. R_j comes from the Gram
matrix of U_j accumulated in float64, which keeps the rounding error that of the direct sum in float32
also where heads cancel; float64 models get it from a QR decomposition.

Everything is evaluated in blocks of query rows, so memory is linear in n.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from globenc_kernels import unavailable_reason
from torch import Tensor, nn

from . import equations
from .capture import LayerTrace
from .methods import STAGES, Method, Stage

BACKENDS = ("auto", "reference", "torch", "triton")
SCORES_PER_BLOCK = 1 << 20  # attention weights held at once, all heads together
TOKENS_PER_CHUNK = 64  # keys whose vectors u^h_j exist at once
JITTER = 16 * torch.finfo(torch.float64).eps  # times the number of vectors; keeps rank-deficient Grams factorable


class LayerMap(Protocol):
    """One layer's local map [B, n, n], given out in blocks of rows; padded rows and columns are zero."""

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, that slice of the map, [B, rows, n]) over all rows in order."""

    def rows_at(self, positions: Tensor) -> Tensor:
        """The rows of these queries, [B, m, n] for positions [B, m]."""


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 models, float32 for all others: statistics and sums are never in half precision."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def norm_scale(norm: nn.LayerNorm, norm_input: Tensor) -> Tensor:
    """s_i = sqrt(var + eps) of what entered a LayerNorm, [B, n]."""
    y = norm_input.to(working_dtype(norm_input))
    return (y.var(-1, correction=0) + norm.eps).sqrt()


def norm_weight(norm: nn.LayerNorm, like: Tensor) -> Tensor:
    """gamma, [d], in the dtype of `like`; ones where the norm has no weight."""
    if norm.weight is None:
        return torch.ones(norm.normalized_shape, dtype=like.dtype, device=like.device)
    return norm.weight.detach().to(like.dtype)


def apply_stage(x: Tensor, trace: LayerTrace, stage: Stage) -> Tensor:
    """M x for vectors on the last dimension: element-wise work and mean subtractions, O(d)."""
    for norm in (trace.modules.attention_norm, trace.modules.output_norm)[: stage.norms]:
        x = (x - x.mean(-1, keepdim=True)) * norm_weight(norm, x)
    return x


def _row_scale(trace: LayerTrace, stage: Stage) -> Tensor:
    """1 / (s1_i s2_i) as far as the stage goes, zero at padding, [B, n]."""
    scale = trace.mask.to(working_dtype(trace.query))
    if stage.norms > 0:
        scale = scale / norm_scale(trace.modules.attention_norm, trace.attention_norm_input)
    if stage.norms > 1:
        scale = scale / norm_scale(trace.modules.output_norm, trace.output_norm_input)
    return scale


_stage_weights: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()


def _stage_weight(trace: LayerTrace, stage: Stage, dtype: torch.dtype) -> Tensor:
    """(M W_O)^T, [H * d_h, d]: computed in float64 once per layer and kept while the weights stay the same.

    Version counters miss writes through `.data`, so the product with a fixed vector is compared too.
    """
    modules = trace.modules
    weight = modules.output_projection.weight.detach()
    norms = [norm.weight for norm in (modules.attention_norm, modules.output_norm)[: stage.norms]]
    norms = [gamma.detach() for gamma in norms if gamma is not None]
    probe = torch.linspace(0.5, 1.5, weight.shape[1], dtype=weight.dtype, device=weight.device)
    print_ = [weight @ probe, *norms]
    kept = _stage_weights.setdefault(modules.output_projection, {})
    old_print, product = kept.get((stage.name, dtype), (None, None))
    same = old_print is not None and all(
        a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(old_print, print_, strict=True)
    )
    if not same:
        wide = apply_stage(weight.double().T.contiguous(), trace, stage)
        product = wide.to(dtype)
        kept[stage.name, dtype] = ([print_[0], *(gamma.clone() for gamma in norms)], product)
    assert product is not None
    return product


def triangular_factor(vectors: Tensor) -> Tensor:
    """R of vectors = Q R for each token: [K, T, d] -> [T, K, K], upper triangular.

    float32 vectors: the Gram matrix is accumulated in float64, scaled to a unit diagonal, and factored after a
    jitter of a few units in the last place, so that repeated, cancelling and zero vectors are all in order; the
    jitter shifts a norm by at most 3e-7 of the vectors that cancel in it. float64 vectors: Householder QR.
    """
    count = vectors.shape[0]
    if vectors.dtype == torch.float64:
        columns = vectors.permute(1, 2, 0)
        factor = torch.linalg.qr(columns, mode="r").R
        return nn.functional.pad(factor, (0, 0, 0, count - factor.shape[1]))  # d < K: the rest is zero
    wide = vectors.transpose(0, 1).to(torch.float64, memory_format=torch.contiguous_format)
    gram = torch.bmm(wide, wide.transpose(1, 2))
    length = torch.diagonal(gram, dim1=1, dim2=2).sqrt()
    inverse = torch.where(length > 0, 1 / length, torch.zeros_like(length))
    gram = gram * inverse[:, :, None] * inverse[:, None, :]
    torch.diagonal(gram, dim1=1, dim2=2).fill_(1 + JITTER * count)
    lower, failed = torch.linalg.cholesky_ex(gram)
    factor = lower.transpose(1, 2) * length[:, None, :]
    return factor.masked_fill(failed[:, None, None] > 0, torch.nan).to(vectors.dtype)  # never a silent number


@dataclass
class _Factors:
    """What is left of a layer's vectors for one stage.

    Attributes:
        heads: factor over the heads, [H, H, B, n], upper triangular in the first two.
        own: M x in the same coordinates, [H, B, n], and what is outside them as a norm, [B, n]; None without residual.
        mixed: the same for M z, z the attention block's output without bias; None unless mixing ratios are needed.
        row_scale: 1 / (s1_i s2_i), zero at padding, [B, n].
    """

    heads: Tensor
    own: tuple[Tensor, Tensor] | None
    mixed: tuple[Tensor, Tensor] | None
    row_scale: Tensor

    @classmethod
    def of(cls, trace: LayerTrace, stage: Stage, with_mixed: bool) -> _Factors:
        dtype = working_dtype(trace.query)
        batch, heads, n, head_dim = trace.value.shape
        weight = _stage_weight(trace, stage, dtype)
        per_head = weight.view(heads, head_dim, -1)
        tokens = batch * n
        value = trace.value.to(dtype).transpose(0, 1).reshape(heads, tokens, head_dim)
        extra = []
        if stage.residual:
            extra.append(apply_stage(trace.hidden_states.to(dtype), trace, stage).flatten(0, 1))
        if with_mixed:
            extra.append(trace.context.to(dtype).flatten(0, 1) @ weight)
        count = heads + len(extra)
        factor = torch.empty(count, count, tokens, dtype=dtype, device=value.device)
        for start in range(0, tokens, TOKENS_PER_CHUNK):
            chunk = slice(start, min(start + TOKENS_PER_CHUNK, tokens))
            vectors = torch.bmm(value[:, chunk], per_head)
            if extra:
                vectors = torch.cat([vectors, *(e[None, chunk] for e in extra)])
            factor[:, :, chunk] = triangular_factor(vectors).permute(1, 2, 0)
        factor = factor.view(count, count, batch, n)
        outside = [(factor[:heads, k], factor[heads : k + 1, k].square().sum(0).sqrt()) for k in range(heads, count)]
        return cls(
            factor[:heads, :heads],
            outside.pop(0) if stage.residual else None,
            outside.pop(0) if with_mixed else None,
            _row_scale(trace, stage),
        )

    def norms(self, alpha: Tensor) -> Tensor:
        """||R_j alpha_ij|| for all pairs of a block, without residual and row scale: [B, H, q, n] -> [B, q, n]."""
        heads = alpha.shape[1]
        total = None
        for r in range(heads):
            y = alpha[:, r] * self.heads[r, r][:, None, :]
            for h in range(r + 1, heads):
                y.addcmul_(alpha[:, h], self.heads[r, h][:, None, :])
            total = y.square_() if total is None else total.addcmul_(y, y)
        assert total is not None
        return total.sqrt_()

    def diagonal(self, alpha_ii: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """||c_ii|| and ||sum_{j!=i} c_ij||, up to the row scale, [B, q], from alpha_ii [B, H, q].

        The second is None unless the factors were made with it.
        """
        heads = _take(self.heads, rows)
        inside = torch.einsum("rhbq,bhq->rbq", heads, alpha_ii)
        own = inside.square().sum(0)
        if self.own is not None:
            along, outside = (_take(part, rows) for part in self.own)
            own = (inside + along).square().sum(0) + outside.square()
        others = None
        if self.mixed is not None:
            along, outside = (_take(part, rows) for part in self.mixed)
            others = ((along - inside).square().sum(0) + outside.square()).sqrt()
        return own.sqrt(), others


class _Attention:
    """A layer's attention weights, recomputed from queries and keys in blocks of rows."""

    def __init__(self, trace: LayerTrace):
        self.query, self.key, self.scaling = trace.query, trace.key, trace.scaling
        self.mask = trace.mask if trace.padded else None
        self.dtype = working_dtype(trace.query)

    def _alpha(self, query: Tensor, key: Tensor) -> Tensor:
        scores = torch.matmul(query * self.scaling, key.transpose(-1, -2))
        if self.mask is not None:
            scores.masked_fill_(~self.mask[:, None, None, :], -torch.inf)
        return scores.softmax(-1)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, alpha [B, H, rows, n]) over all rows in order."""
        query, key = self.query.to(self.dtype), self.key.to(self.dtype)
        batch, heads, n, _ = query.shape
        size = max(1, SCORES_PER_BLOCK // (batch * heads * n))
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            yield rows, self._alpha(query[:, :, rows], key)

    def at(self, positions: Tensor) -> Tensor:
        """alpha [B, H, m, n] of the queries at positions [B, m]."""
        index = positions[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3])
        return self._alpha(self.query.gather(2, index).to(self.dtype), self.key.to(self.dtype))


def _take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """Positions of the last dimension of [..., B, n]: a slice, or a list [B, m] for each text."""
    if isinstance(rows, slice):
        return tensor[..., rows]
    return tensor.gather(-1, rows.expand(*tensor.shape[:-1], rows.shape[-1]))


def _own_column(rows: slice | Tensor, batch: int, device: torch.device) -> Tensor:
    """Where the diagonal is in each row of a block, [B, q, 1]."""
    if isinstance(rows, slice):
        rows = torch.arange(rows.start, rows.stop, device=device).expand(batch, -1)
    return rows[:, :, None]


def _own_alpha(alpha: Tensor, column: Tensor) -> Tensor:
    """alpha_ii of a block's rows, [B, H, q]."""
    return alpha.gather(-1, column[:, None].expand(-1, alpha.shape[1], -1, -1))[..., 0]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b > 0, a / b.where(b > 0, torch.ones_like(b)), torch.zeros_like(b))


def _finish(rows: Tensor, method: Method, column: Tensor, real: Tensor, ratio: Tensor | None = None) -> Tensor:
    """A method's last step: normalise rows [B, q, n] and mix them with the identity. Works in place."""
    real = real[..., None].to(rows.dtype)
    if method.normalize:
        rows = rows.mul_(_divide(real, rows.sum(-1, keepdim=True)))
    if method.mix == "half":
        rows = rows.mul_(0.5).scatter_add_(-1, column, 0.5 * real)
    elif method.mix == "ratio":
        assert ratio is not None
        rows.scatter_(-1, column, 0)
        total = rows.sum(-1, keepdim=True)
        # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
        ratio = torch.where(total > 0, ratio[..., None], 0)
        rows = rows.mul_(_divide(ratio * real, total)).scatter_(-1, column, (1 - ratio) * real)
    return rows


class TorchLayer:
    """A layer's local map by the factor form, in PyTorch, on any device."""

    def __init__(self, trace: LayerTrace, method: Method):
        self.method = method
        self.attention = _Attention(trace)
        self.mask = trace.mask
        stage = STAGES["N-Enc"] if method.mix == "ratio" else method.stage
        self.factors = None if stage is None else _Factors.of(trace, stage, with_mixed=method.mix == "ratio")

    def _rows(self, alpha: Tensor, rows: slice | Tensor) -> Tensor:
        column = _own_column(rows, alpha.shape[0], alpha.device)
        real = _take(self.mask, rows)
        own = others = None
        if self.factors is not None:
            own, others = self.factors.diagonal(_own_alpha(alpha, column), rows)
        if self.method.stage is None:
            out = alpha.mean(1).mul_(real[..., None])
        else:
            assert self.factors is not None and own is not None
            out = self.factors.norms(alpha).scatter_(-1, column, own[..., None])
            out *= _take(self.factors.row_scale, rows)[..., None]
        ratio = None if own is None or others is None else _divide(others, others + own)
        return _finish(out, self.method, column, real, ratio)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for rows, alpha in self.attention.blocks():
            yield rows, self._rows(alpha, rows)

    def rows_at(self, positions: Tensor) -> Tensor:
        return self._rows(self.attention.at(positions), positions)


DIRECT_ROWS = 2  # up to so many rows cost less by the direct sum than by a factor of every key


def top_rows(
    trace: LayerTrace, method: Method, positions: Tensor, make_layer: Callable[[LayerTrace, Method], LayerMap]
) -> Tensor:
    """Rows of the last layer's map at positions [B, m], the cheapest way the backend has, [B, m, n]."""
    if make_layer is TorchLayer and positions.shape[1] <= DIRECT_ROWS and method.mix != "ratio":
        return direct_rows(trace, method, positions)
    return make_layer(trace, method).rows_at(positions)


def direct_rows(trace: LayerTrace, method: Method, positions: Tensor) -> Tensor:
    """Rows of a layer's map at positions [B, m] straight from (4)-(11): one matrix product a row, no factor.

    The cheaper way for a row or two, which is all that a target asks of the last layer.
    """
    attention = _Attention(trace)
    alpha = attention.at(positions)
    batch, heads, count, n = alpha.shape
    column = _own_column(positions, batch, alpha.device)
    real = _take(trace.mask, positions)
    if method.stage is None:
        return _finish(alpha.mean(1).mul_(real[..., None]), method, column, real)
    stage = method.stage
    weight = _stage_weight(trace, stage, alpha.dtype)
    value = trace.value.to(alpha.dtype).transpose(1, 2)  # [B, n, H, d_h]
    own_part = apply_stage(trace.hidden_states.to(alpha.dtype), trace, stage) if stage.residual else None
    rows = []
    for m in range(count):
        vectors = (value * alpha[:, :, m].transpose(1, 2)[..., None]).flatten(2) @ weight  # [B, n, d]
        if own_part is not None:
            index = positions[:, m, None, None].expand(-1, 1, vectors.shape[-1])
            vectors.scatter_add_(1, index, own_part.gather(1, index))
        rows.append(vectors.norm(dim=-1))
    out = torch.stack(rows, 1) * _take(_row_scale(trace, stage), positions)[..., None]
    return _finish(out, method, column, real)


def mixing_ratios(trace: LayerTrace, stage: Stage) -> Tensor:
    """(8), (14): r_i of a stage, [B, n]; zero at padding."""
    attention, factors = _Attention(trace), _Factors.of(trace, stage, with_mixed=True)
    parts = []
    for rows, alpha in attention.blocks():
        own, others = factors.diagonal(_own_alpha(alpha, _own_column(rows, alpha.shape[0], alpha.device)), rows)
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
        parts.append(torch.matmul(alpha, value))
    context = torch.cat(parts, 2).transpose(1, 2).flatten(2)
    scale1 = norm_scale(modules.attention_norm, trace.attention_norm_input)[..., None]
    scale2 = norm_scale(modules.output_norm, trace.output_norm_input)[..., None]
    hidden_states = trace.hidden_states.to(dtype)
    mixed = context @ _stage_weight(trace, stage, dtype) + apply_stage(hidden_states, trace, stage)
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
    output = trace.output.to(dtype)
    gap = (tokens + nobody - output).norm(dim=-1)
    return _divide(gap, output.norm(dim=-1)) * trace.mask


class ReferenceLayer:
    """A layer's local map by `equations.py`: the direct sum, for checking and teaching."""

    def __init__(self, trace: LayerTrace, method: Method):
        self.map = equations.local_map(equation_layer(trace), method.name)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.map.shape[1]), self.map

    def rows_at(self, positions: Tensor) -> Tensor:
        return self.map.gather(1, positions[:, :, None].expand(-1, -1, self.map.shape[2]))


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


def layer_maps(backend: str, device: torch.device) -> Callable[[LayerTrace, Method], LayerMap]:
    """What makes a layer's map on this device: trace, method -> LayerMap. An explicit choice never falls back.

    Raises:
        ValueError: no such backend.
        RuntimeError: backend "triton" cannot run here; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "triton":
        raise RuntimeError(f"backend='triton' cannot run here: {unavailable_reason(device)}; use backend='torch'")
    return ReferenceLayer if backend == "reference" else TorchLayer
