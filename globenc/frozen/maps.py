"""Signed token-to-token maps of class scores: the evidence for a label that flows from token j to i in a layer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import LayerTrace
from ..contributions.attention_weights import attention_weights
from ..contributions.layer_map import by_rows
from ..forward_pass import ForwardPass, LayerValues
from ..model_state import Loan, active_recorder


def score_maps(forward_pass: ForwardPass, gradients: Sequence[Tensor], state_scores: Sequence[Tensor]) -> Tensor:
    """S_ij = sum_h alpha^h_ij <R^h_i, W_V^h x_j> + [i=j] <q_i, x_i>, (S3) of docs/class_scores.md.

    Args:
        forward_pass: of the texts.
        gradients: of each layer's context, R, [B, n, H * d_h], or [labels, B, n, H * d_h].
        state_scores: <G_j, x_j> of what each layer reads, and of the last one's output, [B, n] or [B, labels, n]; a
            layer's columns sum to them, which gives the residual's part.

    Returns:
        [layers, B, n, n] or [layers, B, labels, n, n]; padded rows and columns are zero.
    """
    constants = _constant_values(forward_pass)
    layer = 0

    def of_layer(trace: LayerTrace) -> Tensor:
        nonlocal layer
        gradient, constant = gradients[layer], constants[layer]
        several = gradient.ndim > 3
        labels = gradient if several else gradient[None]
        scores = state_scores[layer].movedim(1, 0) if several else state_scores[layer][None]
        layer += 1
        maps = [_map(trace, constant, one, total) for one, total in zip(labels, scores, strict=True)]
        return torch.stack(maps, 1) if several else maps[0]

    layers = LayerValues(forward_pass, of_layer)
    forward_pass.run(layers)
    return torch.stack(layers.values)


def _constant_values(forward_pass: ForwardPass) -> list[tuple[Tensor, Tensor | None]]:
    """What every layer's value vectors are where the layer reads zeros, b_V and what a norm in front adds, and that of
    tokens with global attention: [B, H, 1, d_h] each."""

    thread = threading.get_ident()

    def zeros(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> Any:
        # another thread's pass may come to a hook before it is registered whole, and has no kwargs then
        if kwargs is None or active_recorder() is None or threading.get_ident() != thread:
            return None
        if args:
            return (torch.zeros_like(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": torch.zeros_like(kwargs["hidden_states"])}

    def values(trace: LayerTrace) -> Tensor:
        tokens = trace.global_tokens
        found.append((trace.value[:, :, :1], None if tokens is None else tokens.value[:, :, :1]))
        return trace.mask

    found: list[tuple[Tensor, Tensor | None]] = []
    loan = Loan()

    def run() -> list[tuple[Tensor, Tensor | None]]:
        for module in {id(layer.module): layer.module for layer in forward_pass.encoder.layers}.values():
            loan.hook(module.register_forward_pre_hook, zeros, with_kwargs=True)
        forward_pass.run(LayerValues(forward_pass, values))
        return found

    return loan.run(run)


def _map(trace: LayerTrace, constant: tuple[Tensor, Tensor | None], gradient: Tensor, total: Tensor) -> Tensor:
    batch, n = trace.mask.shape
    heads = trace.value.shape[1]
    received = gradient[:, :n].reshape(batch, n, heads, -1).transpose(1, 2).to(total.dtype)  # [B, H, n, d_h]

    def of_attention(part: LayerTrace) -> Tensor:
        constants = constant[0] if part is trace or constant[1] is None else constant[1]
        value = part.value[:, :, :n] - constants
        local = total.new_zeros(batch, n, n)
        for rows, keys, alpha in attention_weights(part).blocks(whole_rows=True):
            keys_now = value[:, :, keys].to(total.dtype)
            products = torch.einsum("bhid,bhjd->bhij", received[:, :, rows], keys_now)
            local[:, rows, keys] += (products * alpha.to(total.dtype).permute(1, 0, 3, 2)).sum(1)
        return local * part.mask[:, :, None] * part.mask[:, None]

    local = by_rows(trace, of_attention)
    local.diagonal(dim1=1, dim2=2).add_(total - local.sum(1))
    return local
