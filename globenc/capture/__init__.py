"""One forward pass of an unmodified transformers encoder, handing over what each layer computes.

Queries, keys and values come through transformers' attention interface, the residual and the
LayerNorm inputs through forward hooks; of families with attention code of their own, the attention weights
and values through hooks as well. A layer is handed over the moment it is there, so
that its tensors need not outlive it. The model is left exactly as found, also after an exception.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..encoders import Encoder
from ..model_state import Loan
from .attention import distances, in_reach
from .recorder import Recorder, wrong_norm
from .trace import (
    AttentionResult,
    AttentionTrace,
    GivenWeights,
    GlobalTokens,
    LayerAttention,
    LayerConsumer,
    LayerEnd,
    LayerTrace,
    ScoredAttention,
)

__all__ = [
    "AttentionResult",
    "AttentionTrace",
    "GivenWeights",
    "GlobalTokens",
    "LayerAttention",
    "LayerConsumer",
    "LayerEnd",
    "LayerTrace",
    "ScoredAttention",
    "capture",
    "distances",
    "in_reach",
    "wrong_norm",
]


def capture(
    encoder: Encoder,
    model_inputs: dict[str, Any],
    mask: Tensor,
    consumer: LayerConsumer,
    attention: LayerAttention | None = None,
) -> Any:
    """Run the model once, without gradients and dropout, and show every layer to `consumer`.

    Args:
        encoder: a transformers encoder with any head.
        model_inputs: keyword arguments of its forward.
        mask: True at real tokens, [B, n].
        consumer: shown each layer after its attention and at its end, in order.
        attention: one to run in place of torch's.

    Returns:
        The model's own output object.

    Raises:
        RuntimeError: the family's names do not fit the model.
    """
    model, layers = encoder.model, encoder.layers
    recorder, loan = Recorder(layers, mask, consumer, attention), Loan()
    modules = list(model.modules())

    def run() -> Any:
        loan.evaluation_mode(modules)
        if layers[0].custom_attention is None:
            loan.attention(modules)
        for register, hook, options in recorder.hooks():
            loan.hook(register, hook, **options)
        loan.recorder(recorder)
        with torch.no_grad():
            return model(**model_inputs)

    output = loan.run(run)
    if recorder.done != len(layers):
        raise RuntimeError(
            f"{type(model).__name__} ran {recorder.done} of its {len(layers)} encoder layers through the attention "
            "interface; its encoder family's names do not fit it, correct them with globenc.register_encoder"
        )
    return output
