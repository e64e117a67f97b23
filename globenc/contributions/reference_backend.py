"""A layer's local map by `equations.py`: the direct sum, for checking and teaching."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import equations
from ..capture import LayerTrace
from ..methods import Method
from .layer_map import LayerMap, StoredLayer
from .layer_norms import norm_scale, norm_weight, working_dtype


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
