"""Which of torch's functions are recorded as which piece.

Functions that are not listed are taken as they are: sums, products with constants and changes of shape are straight
lines, and anything else shows in the scores' sum, which is checked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations

from .head_attention import dot_product_attention, multi_head_attention
from .pieces import (
    Recorder,
    activation,
    affine,
    cast,
    cosine,
    held,
    largest,
    layer_norm,
    linear,
    log_softmax,
    normalized,
    product,
    quotient,
    rms_norm,
    total,
)

ACTIVATION_MODULES = tuple(
    kind
    for kind in vars(activations).values()
    if isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == activations.__name__
)
"""transformers' activations: one piece each, whatever they are computed from."""

_ACTIVATIONS = (
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "prelu", "relu",
    "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh", "erf", "exp",
)  # fmt: skip
_HELD = ("rsqrt", "sqrt", "reciprocal", "softmax", "norm", "std", "var", "logsumexp")
_BY_NAME: dict[str, Recorder] = {
    **dict.fromkeys(_ACTIVATIONS, activation),
    **dict.fromkeys((name + "_" for name in _ACTIVATIONS), activation),  # in place
    **dict.fromkeys(_HELD, held),
    "linear": linear,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "mul": product,
    "multiply": product,
    "div": quotient,
    "true_divide": quotient,
    "divide": quotient,
    "normalize": normalized,
    "cosine_similarity": cosine,
    "log_softmax": log_softmax,
    "max": largest,
    "amax": largest,
    "add": total,
    "sub": total,
    "rsub": total,
    "__rsub__": total,
    "conv1d": affine,
    "conv2d": affine,
    "batch_norm": affine,
    "scaled_dot_product_attention": dot_product_attention,
    "multi_head_attention_forward": multi_head_attention,
    "float": cast,
    "to": cast,
    "type": cast,
}

RECORDERS: dict[Any, Recorder] = {
    getattr(owner, name): recorder
    for name, recorder in _BY_NAME.items()
    for owner in (F, torch, Tensor, torch.special, torch.linalg)
    if hasattr(owner, name)
}
RECORDERS |= {torch.linalg.vector_norm: held, Tensor.__rdiv__: held}
"""By function, how it is recorded."""
