"""What one encoder layer computed in one forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..encoders import LayerModules


@dataclass
class LayerTrace:
    """What one encoder layer computed in one forward pass, in the model's own dtype.

    Attributes:
        modules: the layer's modules (weights are read from them).
        query, key: as they enter the attention scores, [B, H, n, d_h]; None where there are `weights`.
        value: [B, H, n, d_h].
        scaling: factor of the scores.
        context: what the attention returns, heads side by side, [B, n, H * d_h].
        mask: True at real tokens, [B, n].
        padded: whether any position is padding.
        hidden_states: the residual x that is added to the attention block's output, [B, n, d].
        attention_norm_input: y1, the sum of both, [B, n, d].
        output_norm_input: y2, what enters LayerNorm 2, [B, n, d]; None in a pre-LN layer, and to `begin`.
        output: the layer's output, [B, n, d]; None to `begin`.
        window: a query sees keys at most this far from it; None sees all.
        bias: what is added to the scores, [B or 1, H, n, n]; None for nothing.
        global_keys: True at tokens that every query sees, however far, [B, n]; None for none.
        global_rows: the trace that holds for the rows of those tokens: other queries, keys and values, no window.
        log_sum_exp: of each query's scores, [B, H, n]; None where torch does not tell.
        weights: the attention weights themselves, [B, H, n, n], of families that compute them in code of their own.
        attention: what the attention kernel left beside the context; None where torch's attention ran.
        doubts: scalar tensors, true where something kept from earlier calls has turned out to be of other weights.
    """

    modules: LayerModules
    query: Tensor | None
    key: Tensor | None
    value: Tensor
    scaling: float
    context: Tensor
    mask: Tensor
    padded: bool
    hidden_states: Tensor
    attention_norm_input: Tensor
    output_norm_input: Tensor | None
    output: Tensor | None
    window: int | None = None
    bias: Tensor | None = None
    global_keys: Tensor | None = None
    global_rows: LayerTrace | None = None
    log_sum_exp: Tensor | None = None
    weights: Tensor | None = None
    attention: Any = None
    doubts: list[Tensor] = field(default_factory=list)

    @functools.cached_property
    def probe(self) -> tuple[Tensor, Tensor]:
        """A fixed direction p of the hidden space, [d], and p W_O, [H * d_h]: a fingerprint of what W_O does."""
        weight = self.modules.output_weight
        weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        direction = _direction(len(weight), weight.dtype, weight.device)
        return direction, direction @ weight


@functools.lru_cache(maxsize=64)
def _direction(d: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        direction = torch.linspace(1.0, 2.0, d, dtype=dtype, device=device)
        direction[1::2] *= -1
        return direction


@dataclass(frozen=True)
class AttentionInputs:
    """What the attention interface is called with; attributes as in `LayerTrace`, keys and values of all heads."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    window: int | None
    bias: Tensor | None


Attend = Callable[[LayerModules, Tensor, AttentionInputs], tuple[Tensor, Any] | None]
"""An attention of our own: the layer's modules and residual, and its inputs -> context [B, n, H, d_h] and what it
leaves for the layer's trace; None where it leaves the layer to torch."""
Finish = Callable[[Tensor | None, Tensor], None]
"""Told the end of a layer that was begun: what entered LayerNorm 2, None in a pre-LN layer, and the layer's output."""
Begin = Callable[[int, LayerTrace], Finish | None]
"""Shown a layer between its attention and its feed-forward block; who returns a `Finish` needs it no longer."""
