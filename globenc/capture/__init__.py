"""One forward pass of an unmodified transformers encoder, handing over what each layer computed.

Queries, keys and values come through transformers' attention interface, the residual and the
LayerNorm inputs through forward hooks; of families with attention code of their own, the attention weights
and values through hooks as well. A layer is handed to `consume` the moment it is complete, so
that its tensors need not outlive it. The model is left exactly as found, also after an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..encoders import LayerModules
from ..model_state import Loan
from .attention import distances, in_reach
from .recorder import Recorder
from .trace import Attend, AttentionInputs, Begin, Finish, LayerTrace

__all__ = ["Attend", "AttentionInputs", "Begin", "Finish", "LayerTrace", "capture", "distances", "in_reach"]


def capture(
    model: PreTrainedModel,
    layers: Sequence[LayerModules],
    model_inputs: dict[str, Any],
    mask: Tensor,
    consume: Callable[[int, LayerTrace], None],
    attend: Attend | None = None,
    begin: Begin | None = None,
) -> Any:
    """Run `model(**model_inputs)` once, without gradients and dropout, and show every layer to `consume`.

    Args:
        model: a transformers encoder of a known family, with any head.
        layers: its layers in order of execution (`Encoder.layers`).
        model_inputs: keyword arguments of its forward.
        mask: True at real tokens, [B, n].
        consume: called with (layer index, LayerTrace) as soon as a layer is complete, in order.
        attend: an attention of our own in place of torch's.
        begin: shown each layer before its feed-forward block; one that it takes over is not shown to `consume`.

    Returns:
        The model's own output object.

    Raises:
        RuntimeError: the family's names do not fit the model.
    """
    recorder, loan = Recorder(layers, mask, consume, attend, begin), Loan()
    modules = list(model.modules())

    def run() -> Any:
        loan.evaluation_mode(modules)
        if layers[0].own is None:
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
