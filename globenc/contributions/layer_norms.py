"""A layer's LayerNorms as the fixed linear map M and the scale of every row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..capture import AttentionTrace, LayerEnd
from ..encoders import LayerModules, norm_eps, norm_width
from ..methods import Method, Stage


def working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 models, float32 for all others: statistics and sums are never in half precision."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def inverse_scale(norm: Any, norm_input: Tensor) -> Tensor:
    """1 / s_i with s_i = sqrt(var + eps) of what entered a LayerNorm, [B, n]."""
    y = norm_input.to(working_dtype(norm_input))
    return torch.native_layer_norm(y, norm_width(norm), None, None, norm_eps(norm))[2][..., 0]


def norm_scale(norm: Any, norm_input: Tensor) -> Tensor:
    """s_i = sqrt(var + eps) of what entered a LayerNorm, as the equations say it, [B, n]."""
    y = norm_input.to(working_dtype(norm_input))
    return (y.var(-1, correction=0) + norm_eps(norm)).sqrt()


def norm_weight(norm: Any, like: Tensor) -> Tensor:
    """gamma, [d], in the dtype of `like`; ones where the norm has no weight."""
    if norm.weight is None:
        return torch.ones(norm_width(norm), dtype=like.dtype, device=like.device)
    return norm.weight.detach().to(like.dtype)


def apply_stage(x: Tensor, trace: AttentionTrace, stage: Stage) -> Tensor:
    """M x for vectors on the last dimension: element-wise work and mean subtractions, O(d)."""
    for norm in trace.modules.norms[: stage.norms]:
        # one fused pass: a layer norm without its division; eps 1 keeps that in range
        x, _, inverse = torch.native_layer_norm(x, norm_width(norm), norm_weight(norm, x), None, 1.0)
        x = x.div_(inverse)
    return x


def row_scale_of(trace: AttentionTrace, stage: Stage) -> Tensor:
    """1 / (s1_i s2_i) as far as the stage goes, zero at padding, [B, n]."""
    scale = trace.mask.to(working_dtype(trace.value))
    # s2 is not known before the feed-forward block: see `late_scale`
    for norm, norm_input in list(zip(trace.modules.norms, trace.norm_inputs, strict=False))[: stage.norms]:
        scale = scale * inverse_scale(norm, norm_input)
    return scale


def late_scale(modules: LayerModules, method: Method, end: LayerEnd) -> Tensor | None:
    """1 / s2_i, [B, n], where it belongs to a method's map and is not known before the feed-forward block."""
    if method.stage is None or method.stage.norms < 2 or not end.norm_inputs:
        return None
    (norm_input,) = end.norm_inputs
    return inverse_scale(modules.output_norm, norm_input)
