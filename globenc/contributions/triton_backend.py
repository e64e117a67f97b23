"""A layer's local map by the Triton kernels: what `torch_backend.py` does in PyTorch, fused, for GPUs.

The attention of the forward pass itself is theirs, so that a row's log-sum-exp costs nothing extra. What stays of a
layer until the rollout are its queries, keys, log-sum-exps and factors: memory linear in n.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import globenc_kernels as kernels
import torch
from torch import Tensor, nn

from ..capture import AttentionInputs, LayerTrace
from ..encoders import LayerModules, norm_eps
from ..methods import STAGES, Method, Stage
from .completeness import rounding
from .head_factors import stage_product
from .layer_map import LayerMap
from .layer_norms import norm_weight
from .torch_backend import TorchBackend
from .weight_cache import kept


class TritonBackend:
    """The kernels for one forward pass over texts with real tokens `mask` [B, n]; layers that they cannot take are
    PyTorch's, unless the kernels were asked for (`explicit`)."""

    maps_before_feed_forward = False

    def __init__(self, mask: Tensor, explicit: bool):
        self.torch = TorchBackend()
        self.texts = {mask.device: kernels.TokenRanges(mask)}
        self.first = self.texts[mask.device]
        self.explicit = explicit

    def attention(
        self, modules: LayerModules, hidden_states: Tensor, inputs: AttentionInputs
    ) -> tuple[Tensor, FusedAttention] | None:
        """As `Backend.attention`.

        Raises:
            RuntimeError: backend "triton" was chosen and the kernels cannot take the layer.
        """
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
        if reason is not None:
            if not self.explicit:
                return None
            raise RuntimeError(f"backend='triton' cannot take this model: {reason}; use backend='torch' or 'auto'")
        if query.device not in self.texts:
            self.texts[query.device] = self.first.to(query.device)
        texts = self.texts[query.device]
        output = kernels.attention(query, key, value, texts, scaling, inputs.window)
        return output.context, FusedAttention(output, texts)

    def layer_map(self, trace: LayerTrace, method: Method) -> LayerMap:
        """As `Backend.layer_map`."""
        return self.torch.layer_map(trace, method) if trace.attention is None else FusedLayer(trace, method)

    def top_rows(self, trace: LayerTrace, method: Method, positions: Tensor) -> Tensor:
        """As `Backend.top_rows`."""
        if trace.attention is None:
            return self.torch.top_rows(trace, method, positions)
        return FusedLayer(trace, method).rows_at(positions)

    def mixing_ratios(self, trace: LayerTrace, stage: Stage) -> Tensor:
        """As `Backend.mixing_ratios`."""
        if trace.attention is None:
            return self.torch.mixing_ratios(trace, stage)
        return trace.attention.mixing_ratios(trace, stage)

    def residual_mismatch(self, trace: LayerTrace) -> Tensor:
        """As `Backend.residual_mismatch`."""
        if trace.attention is None:
            return self.torch.residual_mismatch(trace)
        return trace.attention.patched(trace)


class FusedAttention:
    """What the attention kernel left of a layer, and what is O(n d) of its map."""

    def __init__(self, output: kernels.AttentionOutput, texts: kernels.TokenRanges):
        self.output, self.texts = output, texts
        self.scales: kernels.LayerScales | None = None

    def layer_scales(self, trace: LayerTrace) -> kernels.LayerScales:
        """1 / s1, 1 / (s1 s2) and whether all that enters LayerNorm 1 is known."""
        if self.scales is None:
            modules, y1, y2 = trace.modules, trace.attention_norm_input, trace.output_norm_input
            direction, projected = trace.probe
            eps1, eps2 = (norm_eps(norm) for norm in modules.norms) if modules.norms else (1.0, 1.0)
            self.scales = kernels.layer_scales(
                trace.hidden_states,
                (y1, y1 if y2 is None else y2),
                (eps1, eps2),
                trace.context,
                (direction.float(), projected.float()),
                modules.output_bias,
                self.texts,
            )
        return self.scales

    def patched(self, trace: LayerTrace) -> Tensor:
        """As `completeness.patched`."""
        return self.layer_scales(trace).gap.amax() / rounding(trace.context.dtype, trace.context.device)

    def row_scale(self, trace: LayerTrace, stage: Stage) -> Tensor:
        """1 / (s1_i s2_i) as far as the stage goes, [B, n]."""
        scales = self.layer_scales(trace)
        norms = min(stage.norms, len(trace.modules.norms))
        return (torch.ones_like(scales.scale1), scales.scale1, scales.scale2)[norms]

    def norms(
        self, trace: LayerTrace, stage: Stage, context: Tensor, residual: bool, scale: Tensor | None = None
    ) -> Tensor:
        """scale ||M (W_O context + x)|| of every token, [B, n]."""
        weight = trace.modules.output_weight.to(context.dtype)
        mixed = nn.functional.linear(context.flatten(2), weight)
        gammas = tuple(norm_weight(norm, trace.probe[0]).float() for norm in trace.modules.norms[: stage.norms])
        return kernels.stage_norms(mixed, trace.hidden_states if residual else None, gammas, scale)

    def mixing_ratios(self, trace: LayerTrace, stage: Stage) -> Tensor:
        """(8), (14): r_i of a stage, [B, n]; zero at padding."""
        own = self.norms(trace, stage, self.output.own_context, stage.residual)
        others = self.norms(trace, stage, self.output.context - self.output.own_context, residual=False)
        return _divide(others, others + own) * trace.mask


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0; NaN stays."""
    return torch.where(b == 0, 0, a / b)


class FusedLayer:
    """A layer's local map by the kernels."""

    def __init__(self, trace: LayerTrace, method: Method):
        attention: FusedAttention = trace.attention
        assert trace.query is not None
        assert trace.key is not None
        stage, factors = method.stage, None
        if stage is None:
            row_scale, diagonal = trace.mask.float(), attention.output.own_weight.mean(1)
        else:
            heads, dtype = trace.value.shape[1], trace.value.dtype

            def make() -> kernels.GramWeight:
                return kernels.gram_weight(stage_product(trace, stage), heads, dtype)

            weight = kept(trace, stage, (stage.name, heads, dtype, "gram"), make)
            factors = kernels.head_factors(trace.value, weight, attention.texts)
            row_scale = attention.row_scale(trace, stage)
            diagonal = attention.norms(trace, stage, attention.output.own_context, stage.residual, row_scale)
        self.map = kernels.LocalMap(
            trace.query,
            trace.key,
            trace.scaling,
            attention.output.log_sum_exp,
            factors,
            row_scale,
            diagonal,
            attention.texts,
            trace.window,
        )
        if method.normalize:
            self.map = self._normalized()
        if method.mix == "half":
            self.map = replace(self.map, row_scale=0.5 * self.map.row_scale, diagonal=0.5 * (self.map.diagonal + 1))
        elif method.mix == "ratio":
            ratio = attention.mixing_ratios(trace, STAGES["N-Enc"])
            others = kernels.row_sums(replace(self.map, diagonal=torch.zeros_like(diagonal)))
            # a row that is all diagonal has nothing to renormalise and stays 1 on the diagonal
            ratio = torch.where(others == 0, 0, ratio)
            self.map = replace(self.map, row_scale=_divide(ratio, others), diagonal=1 - ratio)

    @property
    def tokens(self) -> int:
        """n."""
        return self.map.tokens.shape[1]

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
