"""The attention that a captured model runs: it shows queries, keys and values to the recorder."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from ..model_state import ATTENTION, active_recorder
from .trace import AttentionResult, ScoredAttention

QUERIES_AT_ONCE = 512  # of a local layer


def _capturing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention that also shows q, k, v to the recorder of this thread.

    `attention_mask` is the 2-D padding mask [B, n] or None, as flash attention takes it; another thread's forward pass
    that met a capture half-way may bring a 4-D one. `sliding_window` is flash attention's: one more than how far a
    query sees.
    """
    recorder = active_recorder()
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask[:, None, None, :].bool()
    elif attention_mask is not None and recorder is not None:
        raise ValueError(
            f"attention_mask must have shape [batch, n], got {list(attention_mask.shape)}; GlobEnc's rows need one "
            "set of real tokens per text"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if key.shape[1] != query.shape[1]:  # grouped queries share keys and values
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    window = None if sliding_window is None or sliding_window > query.shape[2] else sliding_window - 1
    inputs = ScoredAttention(query, key, value, scaling, window, position_bias)
    if recorder is None:
        return _attention(inputs, attention_mask, dropout).transpose(1, 2).contiguous(), None
    result = recorder.computed_attention(inputs)
    if result is None:
        result = torch_attention(inputs, attention_mask, dropout)
    recorder.attended(result)
    return result.context, None


def torch_attention(inputs: ScoredAttention, mask: Tensor | None, dropout: float) -> AttentionResult:
    """torch's attention, with the log-sum-exp of the scores where it tells."""
    if inputs.query.device.type == "cpu" and inputs.window is None and inputs.bias is None:
        context, log_sum_exp = _flash_attention(inputs, mask)
    else:
        context, log_sum_exp = _attention(inputs, mask, dropout), None
    return AttentionResult(context.transpose(1, 2).contiguous(), replace(inputs, log_sum_exp=log_sum_exp))


def _flash_attention(inputs: ScoredAttention, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What `scaled_dot_product_attention` runs on a CPU, for the log-sum-exp that it keeps to itself."""
    query = inputs.query
    scores_mask = None
    if mask is not None:
        scores_mask = query.new_zeros(mask.shape).masked_fill_(~mask, -torch.inf)
    try:
        context, log_sum_exp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, inputs.key, inputs.value, 0.0, False, attn_mask=scores_mask, scale=inputs.scaling
        )
    except (RuntimeError, AttributeError):  # a shape that it does not take, or another torch
        return _attention(inputs, mask, 0.0), None
    return context, log_sum_exp


def _attention(inputs: ScoredAttention, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q k scaling + bias) v over real keys in reach, [B, H, n, d_h]; O(n window) in a local layer."""
    query, key, value, bias = inputs.query, inputs.key, inputs.value, inputs.bias

    def attend(rows: slice, keys: slice) -> Tensor:
        allowed = None if mask is None else mask[..., keys] if mask.shape[2] == 1 else mask[..., rows, keys]
        if window is not None:
            distance = distances(rows, keys, query.device)
            reach = distance <= window
            # a padded query may see no real key: it sees itself
            allowed = reach if allowed is None else allowed & reach | (distance == 0)
        if bias is not None:
            part = bias[..., rows, keys].to(query.dtype)
            allowed = part if allowed is None else part.masked_fill(~allowed, torch.finfo(query.dtype).min)
        return nn.functional.scaled_dot_product_attention(
            query[:, :, rows], key[:, :, keys], value[:, :, keys],
            attn_mask=allowed, dropout_p=dropout, scale=inputs.scaling,
        )  # fmt: skip

    n, window = query.shape[2], inputs.window
    if window is None:
        return attend(slice(None), slice(None))
    blocks = [slice(start, min(start + QUERIES_AT_ONCE, n)) for start in range(0, n, QUERIES_AT_ONCE)]
    return torch.cat([attend(rows, in_reach(rows, window, n)) for rows in blocks], 2)


def in_reach(rows: slice, window: int | None, n: int) -> slice:
    """The keys that queries of a slice see."""
    return slice(0, n) if window is None else slice(max(0, rows.start - window), min(n, rows.stop + window))


def distances(rows: slice, keys: slice, device: torch.device) -> Tensor:
    """|i - j| of queries and keys, [rows, keys]."""
    i = torch.arange(rows.start, rows.stop, device=device)
    return (i[:, None] - torch.arange(keys.start, keys.stop, device=device)).abs()


AttentionInterface.register(ATTENTION, _capturing_attention)
AttentionMaskInterface.register(ATTENTION, flash_attention_mask)
