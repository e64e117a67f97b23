"""Each layer's map by itself, without rollout: token-to-token maps, mixing ratios, the gap in completeness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .capture import LayerTrace
from .contributions import completeness
from .contributions.layer_map import by_rows
from .errors import refuses_target
from .forward_pass import ForwardPass, LayerValues, WholeLayers, require_finite
from .rollouts import full_map


@refuses_target
def contribution_maps(model: nn.Module, *, method: str = "N-Enc", backend: str = "auto", **model_inputs: Any) -> Tensor:
    """Every layer's token-to-token map under one method: how much of token j is in token i's output, unnormalised.

    Args:
        model, method, backend, **model_inputs: as in `globenc.attribute`.

    Returns:
        [layers, batch, n, n], rows are the receiving tokens (queries); padded rows and columns are zero. float64 for
        float64 models, else float32.

    Raises:
        TypeError, ValueError, FloatingPointError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.contribution_maps(explainer.model, **inputs).shape[1:]
        torch.Size([1, 5, 5])
    """
    forward_pass = ForwardPass(model, model_inputs, backend)
    chosen = forward_pass.method(method)
    return _layer_by_layer(forward_pass, lambda trace: full_map(forward_pass.backend.layer_map(trace, chosen)))


@refuses_target
def mixing_ratios(model: nn.Module, *, method: str = "N-Enc", backend: str = "auto", **model_inputs: Any) -> Tensor:
    """How much of a token's output comes from other tokens, (8) and (14), layer by layer.

    r_i = ||sum_{j!=i} c_ij|| / (||sum_{j!=i} c_ij|| + ||c_ii||): 0 keeps to itself, 1 is made of its context.

    Args:
        model, backend, **model_inputs: as in `globenc.attribute`.
        method: the stage whose vectors are mixed: N, N-Res, N-ResLN or N-Enc.

    Returns:
        [layers, batch, n] in 0..1, zero at padding.

    Raises:
        TypeError, ValueError, FloatingPointError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.mixing_ratios(explainer.model, **inputs).shape[1:]
        torch.Size([1, 5])
    """
    forward_pass = ForwardPass(model, model_inputs, backend)
    stage = forward_pass.stage(method)
    return _layer_by_layer(forward_pass, lambda trace: forward_pass.backend.mixing_ratios(trace, stage))


def _layer_by_layer(forward_pass: ForwardPass, value_of: Callable[[LayerTrace], Tensor]) -> Tensor:
    """value_of(trace) of every layer, checked and stacked."""

    def compute() -> Tensor:
        layers = LayerValues(forward_pass, value_of)
        forward_pass.run(layers)
        return torch.stack(layers.values)

    stacked = forward_pass.with_fresh_weights(compute)
    forward_pass.check_residuals()
    return require_finite(stacked)


@refuses_target
def completeness_gap(model: nn.Module, **model_inputs: Any) -> Tensor:
    """How far the contributions are from adding up to what each layer really put out: the method's own proof.

    In every layer sum_j c_ij, recomputed from the captured queries, keys, values and residual, plus what belongs to no
    token (the biases b_O, beta1, beta2 and the feed-forward block's vector) is compared with the layer's output, and
    the output with what the next layer reads. The gap is rounding: below 1e-12 for float64 models, about 1e-6 for
    float32, 1e-2 for bfloat16. More means that an encoder was registered with wrong names, or that a hook changes what
    flows between the parts.

    Args:
        model, **model_inputs: as in `globenc.attribute`.

    Returns:
        ||parts - output|| / ||output||, or ||next layer's input - output|| / ||output|| where that is more,
        [layers, batch, n]; zero at padding.

    Raises:
        TypeError, ValueError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> bool(globenc.completeness_gap(explainer.model, **inputs).max() < 1e-5)
        True
    """
    forward_pass = ForwardPass(model, model_inputs)

    def compute() -> Tensor:
        layers = _CompletenessGaps(forward_pass)
        forward_pass.run(layers)
        return torch.stack(layers.gaps)

    return forward_pass.with_fresh_weights(compute)


class _CompletenessGaps(WholeLayers):
    """The gap of every layer, or that between its output and what the next layer reads where that is more."""

    def __init__(self, forward_pass: ForwardPass):
        super().__init__(forward_pass)
        self.gaps: list[Tensor] = []
        self.last_output: Tensor | None = None

    def read(self, trace: LayerTrace) -> None:
        if self.last_output is not None:
            gap = completeness.relative_gap(trace.hidden_states, self.last_output, trace.mask)
            self.gaps[-1] = torch.maximum(self.gaps[-1], gap)
        self.gaps.append(by_rows(trace, completeness.completeness_gap))
        self.last_output = trace.output
