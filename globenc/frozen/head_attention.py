"""Attention in a model's head, with its weights held; the layers' own comes through transformers' interface."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from .operations import HeldLinear
from .pieces import Piece


def dot_product_attention(
    unit: Tensor | None,
    function: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *others: Any,
    **named: Any,
) -> tuple[Tensor, Piece]:
    """Attention of a head of the model's, with its weights held; the layers' own goes through the interface."""
    with torch.no_grad():  # weights are what comes of values that are unit vectors
        keys = torch.eye(key.shape[-2], dtype=value.dtype, device=value.device)
        alpha = function(query, key, keys.expand(*key.shape[:-1], -1), attn_mask, *others, **named)

    def replay(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return alpha @ value

    return alpha @ value, Piece(function, replay)


def multi_head_attention(
    unit: Tensor | None, function: Any, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **named: Any
) -> tuple[Any, Piece]:
    """nn.MultiheadAttention in a head of the model's, with its weights held."""
    given = inspect.signature(function).bind(query, key, value, *arguments, **named)
    given.apply_defaults()
    asked = given.arguments
    width, heads = asked["embed_dim_to_check"], asked["num_heads"]
    if asked["bias_k"] is not None or asked["add_zero_attn"] or query.ndim != 3:
        return function(query, key, value, *arguments, **named), Piece(function, function)
    with torch.no_grad():
        weighing = {**asked, "need_weights": True, "average_attn_weights": False}
        alpha = function(**weighing)[1]  # [B, H, queries, keys]
    weight = asked["v_proj_weight"] if asked["use_separate_proj_weight"] else asked["in_proj_weight"][2 * width :]
    bias = None if asked["in_proj_bias"] is None else asked["in_proj_bias"][2 * width :]
    mean = alpha.mean(1) if asked["average_attn_weights"] else alpha

    def attend(value: Tensor, unit: Tensor | None) -> Tensor:
        values = _linear(value.transpose(0, 1), weight, bias, unit)  # [B, keys, d]
        parts = values.unflatten(-1, (heads, -1)).transpose(1, 2)
        context = (alpha @ parts).transpose(1, 2).flatten(2)
        return _linear(context, asked["out_proj_weight"], asked["out_proj_bias"], unit).transpose(0, 1)

    def replay(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        return attend(value, None), mean if asked["need_weights"] else None

    return (attend(value, unit), mean if asked["need_weights"] else None), Piece(function, replay)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, unit: Tensor | None) -> Tensor:
    flat: Any = HeldLinear.apply(x.reshape(-1, x.shape[-1]), unit, weight, bias, x.shape[:-1], [])
    return flat.view(*x.shape[:-1], -1)
