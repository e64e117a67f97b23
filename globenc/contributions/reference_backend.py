"""A layer's local map by `equations.py`: the direct sum, for checking and teaching."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .. import equations
from ..capture import AttentionTrace, GivenWeights, ScoredAttention
from ..encoders import LayerModules
from ..methods import Method, Stage
from .completeness import residual_mismatch
from .layer_map import LayerMap, StoredLayer, by_rows
from .layer_norms import norm_scale, norm_weight, working_dtype


class ReferenceBackend:
    """The direct sum (4)-(16) in memory O(n^2 d)."""

    maps_before_feed_forward = False

    def attention(self, modules: LayerModules, hidden_states: Tensor, inputs: ScoredAttention) -> None:
        """Left to torch."""

    def held_weights(self, attention: ScoredAttention, mask: Tensor | None) -> ReferenceHeldWeights:
        """As `Backend.held_weights`."""
        return ReferenceHeldWeights(attention, mask)

    def layer_map(self, trace: AttentionTrace, method: Method) -> LayerMap:
        """As `Backend.layer_map`."""
        return StoredLayer(by_rows(trace, lambda part: equations.local_map(equation_layer(part), method.name)))

    def top_rows(self, trace: AttentionTrace, method: Method, positions: Tensor) -> Tensor:
        """As `Backend.top_rows`."""
        return self.layer_map(trace, method).rows_at(positions)

    def mixing_ratios(self, trace: AttentionTrace, stage: Stage) -> Tensor:
        """As `Backend.mixing_ratios`."""
        return by_rows(trace, lambda part: equations.mixing_ratio(equation_layer(part), stage.name))

    def residual_mismatch(self, trace: AttentionTrace) -> Tensor:
        """As `Backend.residual_mismatch`."""
        return residual_mismatch(trace)


class ReferenceHeldWeights:
    """As `HeldWeights`, by the equations: alpha as a whole matrix, made anew for every product."""

    in_memory = False

    def __init__(self, attention: ScoredAttention, mask: Tensor | None):
        # not the value vectors: they would stay in memory for nothing
        self.attention = replace(attention, value=attention.value[:, :, :0])
        self.mask = attention.query.new_ones(attention.query.shape[::2], dtype=torch.bool) if mask is None else mask

    def _alpha(self) -> Tensor:
        return scored_weights(self.attention, self.mask, working_dtype(self.attention.query))

    def product(self, value: Tensor) -> Tensor:
        """As `HeldWeights.product`."""
        alpha = self._alpha()
        return torch.einsum("bhij,bhjd->bihd", alpha, value.to(alpha.dtype)).to(value.dtype)

    def transposed_product(self, gradient: Tensor) -> Tensor:
        """As `HeldWeights.transposed_product`."""
        alpha = self._alpha()
        return torch.einsum("bhij,bihd->bhjd", alpha, gradient.to(alpha.dtype)).to(gradient.dtype)


def scored_weights(attention: ScoredAttention, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention weights by the equations, [B, H, n, n]."""
    return equations.attention_weights(
        attention.query.to(dtype),
        attention.key.to(dtype),
        attention.scaling,
        mask.to(attention.query.device),
        attention.window,
        None if attention.bias is None else attention.bias.to(dtype),
        None if attention.global_tokens is None else attention.global_tokens.where,
    )


def equation_layer(trace: AttentionTrace) -> equations.EncoderLayer:
    """A captured layer in the letters of `equations.py`."""
    dtype, modules = working_dtype(trace.value), trace.modules
    value = trace.value.to(dtype)
    attention = trace.attention
    if isinstance(attention, GivenWeights):
        alpha = attention.weights.to(dtype)
    else:
        alpha = scored_weights(attention, trace.mask, dtype)
    gammas = [norm_weight(norm, value) for norm in modules.norms]
    scales = [norm_scale(norm, y) for norm, y in zip(modules.norms, trace.norm_inputs, strict=True)]
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
