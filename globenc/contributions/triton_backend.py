"""A layer's local map by the Triton kernels: what `torch_backend.py` does in PyTorch, fused, for GPUs.

The attention of the forward pass itself is theirs, so that a row's log-sum-exp costs nothing extra. What stays of a
layer until the rollout are its queries, keys, log-sum-exps and factors: memory linear in n.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace

import globenc_kernels as kernels
import torch
from torch import Tensor, nn

from ..capture import AttentionResult, AttentionTrace, ScoredAttention
from ..encoders import LayerModules, norm_eps
from ..methods import STAGES, Method, Stage
from .completeness import rounding
from .head_factors import stage_product
from .layer_map import LayerMap
from .layer_norms import norm_weight
from .torch_backend import TorchBackend, TorchHeldWeights
from .weight_cache import cached_per_weights


@dataclass(frozen=True, kw_only=True)
class KernelAttention(ScoredAttention):
    """What the attention kernel leaves of a layer, for the texts' real tokens."""

    output: kernels.AttentionOutput
    tokens: kernels.TokenRanges


class TritonBackend:
    """The kernels for one forward pass over texts with real tokens `mask` [B, n]; layers that they cannot take are
    PyTorch's, unless the kernels were asked for (`explicit`)."""

    maps_before_feed_forward = False  # one kernel reads what enters both LayerNorms

    def __init__(self, mask: Tensor, explicit: bool):
        self.torch = TorchBackend()
        self.explicit = explicit
        self._first = kernels.TokenRanges(mask)
        self._tokens = {mask.device: self._first}
        self._scales: weakref.WeakKeyDictionary[AttentionTrace, kernels.LayerScales] = weakref.WeakKeyDictionary()

    def attention(
        self, modules: LayerModules, hidden_states: Tensor, inputs: ScoredAttention
    ) -> AttentionResult | None:
        """As `Backend.attention`.

        Raises:
            RuntimeError: backend "triton" was chosen and the kernels cannot take the layer.
        """
        reason = _unsupported_reason(modules, hidden_states, inputs)
        if reason is not None and self.explicit:
            raise RuntimeError(f"backend='triton' cannot take this model: {reason}; use backend='torch' or 'auto'")
        if reason is not None:
            return None
        query, key, value = inputs.query, inputs.key, inputs.value
        if query.device not in self._tokens:
            self._tokens[query.device] = self._first.to(query.device)
        tokens = self._tokens[query.device]
        output = kernels.attention(query, key, value, tokens, inputs.scaling, inputs.window)
        return AttentionResult(output.context, KernelAttention(**vars(inputs), output=output, tokens=tokens))

    def held_weights(self, attention: ScoredAttention, mask: Tensor | None) -> KernelHeldWeights | TorchHeldWeights:
        """As `Backend.held_weights`; PyTorch's where torch's attention ran."""
        if isinstance(attention, KernelAttention):
            return KernelHeldWeights(attention)
        return self.torch.held_weights(attention, mask)

    def layer_map(self, trace: AttentionTrace, method: Method) -> LayerMap:
        """As `Backend.layer_map`."""
        layer = self._kernel_layer(trace)
        return self.torch.layer_map(trace, method) if layer is None else KernelMap(layer, method)

    def top_rows(self, trace: AttentionTrace, method: Method, positions: Tensor) -> Tensor:
        """As `Backend.top_rows`."""
        layer = self._kernel_layer(trace)
        if layer is None:
            return self.torch.top_rows(trace, method, positions)
        return KernelMap(layer, method).rows_at(positions)

    def mixing_ratios(self, trace: AttentionTrace, stage: Stage) -> Tensor:
        """As `Backend.mixing_ratios`."""
        layer = self._kernel_layer(trace)
        return self.torch.mixing_ratios(trace, stage) if layer is None else layer.mixing_ratios(stage)

    def residual_mismatch(self, trace: AttentionTrace) -> Tensor:
        """As `Backend.residual_mismatch`."""
        layer = self._kernel_layer(trace)
        if layer is None:
            return self.torch.residual_mismatch(trace)
        return layer.scales.gap.amax() / rounding(trace.context.dtype, trace.context.device)

    def _kernel_layer(self, trace: AttentionTrace) -> KernelLayer | None:
        """The layer as the kernels know it; None where torch's attention ran."""
        attention = trace.attention
        if not isinstance(attention, KernelAttention):
            return None
        if trace not in self._scales:
            self._scales[trace] = _layer_scales(trace, attention.tokens)
        return KernelLayer(trace, attention, self._scales[trace])


class KernelHeldWeights:
    """As `HeldWeights`: alpha is made anew from queries, keys and log-sum-exps, tile by tile.

    The product of other value vectors is the forward pass's own attention, so that it has the same rounding.
    """

    in_memory = False

    def __init__(self, attention: KernelAttention):
        self.query, self.key, self.log_sum_exp = attention.query, attention.key, attention.output.log_sum_exp
        self.tokens, self.scaling, self.window = attention.tokens, attention.scaling, attention.window

    def product(self, value: Tensor) -> Tensor:
        """As `HeldWeights.product`."""
        return kernels.attention(self.query, self.key, value, self.tokens, self.scaling, self.window).context

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """As `HeldWeights.transposed_product`."""
        return kernels.transposed_product(
            self.query, self.key, self.log_sum_exp, gradient, self.tokens, self.scaling, self.window
        )


def _unsupported_reason(modules: LayerModules, hidden_states: Tensor, inputs: ScoredAttention) -> str | None:
    """Why the kernels cannot take a layer; None where they can."""
    query, key, value, scaling = inputs.query, inputs.key, inputs.value, inputs.scaling
    _, heads, n, head_dim = query.shape
    hidden_size = modules.output_projection.weight.shape[0]
    reason = kernels.unsupported_reason(value.dtype, heads, n, head_dim, hidden_size, scaling)
    if reason is None and inputs.bias is not None:
        reason = "positions add to its scores"
    if reason is None and not query.shape == key.shape == value.shape:
        reason = f"queries, keys and values differ in shape: {[list(t.shape) for t in (query, key, value)]}"
    if reason is None and not query.dtype == key.dtype == value.dtype:
        reason = f"queries, keys and values are {query.dtype}, {key.dtype}, {value.dtype}"
    parameters = [modules.output_projection.weight, *(norm.weight for norm in modules.norms)]
    if reason is None and any(t is not None and t.dtype == torch.float64 for t in (hidden_states, *parameters)):
        reason = "a part of the layer is torch.float64"
    return reason


def _layer_scales(trace: AttentionTrace, tokens: kernels.TokenRanges) -> kernels.LayerScales:
    """1 / s1, 1 / (s1 s2) and whether all that enters LayerNorm 1 is known."""
    modules = trace.modules
    y1, y2 = trace.norm_inputs or (trace.attention_norm_input, trace.attention_norm_input)
    direction, projected = trace.weight_fingerprint
    eps1, eps2 = (norm_eps(norm) for norm in modules.norms) if modules.norms else (1.0, 1.0)
    return kernels.layer_scales(
        trace.hidden_states,
        (y1, y2),
        (eps1, eps2),
        trace.context,
        (direction.float(), projected.float()),
        modules.output_bias,
        tokens,
    )


@dataclass(frozen=True)
class KernelLayer:
    """A layer whose attention the kernel ran, and what is O(n d) of its map."""

    trace: AttentionTrace
    attention: KernelAttention
    scales: kernels.LayerScales

    def row_scale(self, stage: Stage) -> Tensor:
        """1 / (s1_i s2_i) as far as the stage goes, [B, n]."""
        norms = min(stage.norms, len(self.trace.modules.norms))
        return (torch.ones_like(self.scales.scale1), self.scales.scale1, self.scales.scale2)[norms]

    def norms(self, stage: Stage, context: Tensor, residual: bool, scale: Tensor | None = None) -> Tensor:
        """scale ||M (W_O context + x)|| of every token, [B, n]."""
        modules = self.trace.modules
        mixed = nn.functional.linear(context.flatten(2), modules.output_weight.to(context.dtype))
        like = self.trace.weight_fingerprint[0]
        gammas = tuple(norm_weight(norm, like).float() for norm in modules.norms[: stage.norms])
        return kernels.stage_norms(mixed, self.trace.hidden_states if residual else None, gammas, scale)

    def mixing_ratios(self, stage: Stage) -> Tensor:
        """(8), (14): r_i of a stage, [B, n]; zero at padding."""
        output = self.attention.output
        diagonal = self.norms(stage, output.diagonal_context, stage.residual)
        others = self.norms(stage, output.context - output.diagonal_context, residual=False)
        return _divide(others, others + diagonal) * self.trace.mask


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0; NaN stays."""
    return torch.where(b == 0, 0, a / b)


class KernelMap:
    """A layer's local map by the kernels."""

    def __init__(self, layer: KernelLayer, method: Method):
        trace, attention, stage, factors = layer.trace, layer.attention, method.stage, None
        output, tokens = attention.output, attention.tokens
        if stage is None:
            row_scale, diagonal = trace.mask.float(), output.diagonal_weight.mean(1)
        else:
            heads, dtype = trace.value.shape[1], trace.value.dtype

            def make() -> kernels.GramWeight:
                return kernels.gram_weight(stage_product(trace, stage), heads, dtype)

            weight = cached_per_weights(trace, stage, (stage.name, heads, dtype, "gram"), make)
            factors = kernels.head_factors(trace.value, weight, tokens)
            row_scale = layer.row_scale(stage)
            diagonal = layer.norms(stage, output.diagonal_context, stage.residual, row_scale)
        self.map = kernels.LocalMap(
            attention.query,
            attention.key,
            attention.scaling,
            output.log_sum_exp,
            factors,
            row_scale,
            diagonal,
            tokens,
            attention.window,
        )
        if method.normalize:
            self.map = self._normalized()
        if method.mix == "half":
            self.map = replace(self.map, row_scale=0.5 * self.map.row_scale, diagonal=0.5 * (self.map.diagonal + 1))
        elif method.mix == "ratio":
            ratio = layer.mixing_ratios(STAGES["N-Enc"])
            others = kernels.row_sums(replace(self.map, diagonal=torch.zeros_like(diagonal)))
            # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
            ratio = torch.where(others == 0, 0, ratio)
            self.map = replace(self.map, row_scale=_divide(ratio, others), diagonal=1 - ratio)

    @property
    def tokens(self) -> int:
        """n."""
        return self.map.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        """As `LayerMap.device`."""
        return self.map.query.device

    def _normalized(self) -> kernels.LocalMap:
        """The map with its rows divided by their sums."""
        total = kernels.row_sums(self.map)
        return replace(
            self.map, row_scale=_divide(self.map.row_scale, total), diagonal=_divide(self.map.diagonal, total)
        )

    def blocks(self, whole_rows: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
        every = slice(0, self.tokens)
        yield every, every, kernels.contribution_norms(self.map)

    def rows_at(self, positions: Tensor) -> Tensor:
        n = self.map.tokens.shape[1]
        rows = torch.zeros(*positions.shape, n, device=positions.device).scatter_(-1, positions[..., None], 1)
        used = torch.stack([positions.amin(1), positions.amax(1) + 1], 1).to(torch.int32)
        device = self.map.query.device
        return kernels.rollout_rows(rows.to(device), self.map, used.to(device))

    def scale_rows(self, scale: Tensor) -> None:
        self.map = replace(self.map, row_scale=self.map.row_scale * scale, diagonal=self.map.diagonal * scale)

    def through(self, rows: Tensor, row_normalize: bool) -> Tensor:
        local_map = self._normalized() if row_normalize else self.map
        return kernels.rollout_rows(rows.to(local_map.query.device, torch.float32), local_map).to(rows.dtype)
