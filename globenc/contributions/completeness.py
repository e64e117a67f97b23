"""Whether a layer's parts add up to what it really put out."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capture import AttentionTrace, LayerTrace
from ..methods import STAGES
from ..model_state import lowers_float32
from .attention_weights import attention_weights
from .head_factors import stage_weight
from .layer_map import divide
from .layer_norms import apply_stage, inverse_scale, norm_weight, working_dtype

ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


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
    for _, keys, alpha in attention_weights(trace).blocks(whole_rows=True):
        parts.append(torch.matmul(alpha.permute(1, 0, 3, 2), value[:, :, keys]))
    context = torch.cat(parts, 2).transpose(1, 2).flatten(2)
    hidden_states = trace.hidden_states.to(dtype)
    mixed = context @ stage_weight(trace, stage, dtype)[0] + apply_stage(hidden_states, trace, stage)

    def detached(bias: Tensor | None) -> Tensor:
        return hidden_states.new_zeros(hidden_states.shape[-1]) if bias is None else bias.detach().to(dtype)

    b_o = detached(modules.output_bias)
    if not trace.norm_inputs:
        return relative_gap(mixed + b_o, trace.attention_norm_input, trace.mask)
    y1, y2 = (y.to(dtype) for y in trace.norm_inputs)
    scale1, scale2 = (1 / inverse_scale(norm, y)[..., None] for norm, y in zip(modules.norms, (y1, y2), strict=True))
    beta1, beta2 = (detached(norm.bias) for norm in modules.norms)
    gamma1, gamma2 = (norm_weight(norm, y1) for norm in modules.norms)
    tokens = mixed / (scale1 * scale2)
    middle = (y1 - y1.mean(-1, keepdim=True)) * gamma1 / scale1 + beta1
    unattributed = apply_stage(b_o, trace, stage) / (scale1 * scale2)
    after = beta1 + (y2 - middle)  # beta1 and the feed-forward vector, through the second LayerNorm alone
    unattributed = unattributed + (after - after.mean(-1, keepdim=True)) * gamma2 / scale2 + beta2
    return relative_gap(tokens + unattributed, trace.output, trace.mask)


def relative_gap(vectors: Tensor, expected: Tensor, mask: Tensor) -> Tensor:
    """||vectors - expected|| / ||expected|| token by token, [B, n]; zero at padding."""
    dtype = working_dtype(expected)
    vectors, expected = vectors.to(dtype), expected.to(dtype)
    return divide((vectors - expected).norm(dim=-1), expected.norm(dim=-1)) * mask


def rounding(dtype: torch.dtype, device: torch.device) -> float:
    """What the model's own projection may be off by, relative: by its dtype, or by the products it is told to use."""
    lowered = dtype == torch.float32 and lowers_float32(device)
    return ROUNDING[torch.bfloat16 if lowered else dtype]


def residual_mismatch(trace: AttentionTrace) -> Tensor:
    """By how much what enters the first norm is not x + W_O context + b_O, a scalar tensor; rounding stays below 1.

    Both sides are compared along one direction, at the price of three dot products a token. A vector off by a share of
    its length is off by a sqrt(d)-th of that along it.
    """
    dtype, bias = working_dtype(trace.value), trace.modules.output_bias
    direction, projected = (part.to(dtype) for part in trace.weight_fingerprint)
    residual, norm_input = trace.hidden_states.to(dtype), trace.attention_norm_input.to(dtype)
    expected = trace.context.to(dtype) @ projected + residual @ direction
    if bias is not None:
        expected = expected + bias.to(dtype) @ direction
    size = norm_input.norm(dim=-1) + residual.norm(dim=-1)
    allowed = rounding(trace.context.dtype, trace.context.device) * size * direction.norm() / len(direction) ** 0.5
    return (divide((norm_input @ direction - expected).abs(), allowed) * trace.mask).amax()
