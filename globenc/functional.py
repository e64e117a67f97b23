"""Attribution of tensors by rollout: a transformers model and its own inputs in, tensors out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import LayerTrace
from .contributions.layer_map import LayerMap, normalize_rows
from .errors import refuses_target
from .forward_pass import ForwardPass, WholeLayers, require_finite
from .layer_rollouts import TopDownRollout, WholeRollout
from .methods import Method
from .model_state import precise
from .rollouts import Position, requested_rows, top_down


@dataclass(frozen=True, eq=False)
class AttributionOutput:
    """Scores of every token for the positions asked for.

    Attributes:
        scores: [batch, n] for one position, [batch, positions, n] for several; they sum to 1 over the real tokens and
            are zero at padding. float64 for float64 models, else float32.
        log2_scale: [batch] or [batch, positions], float64: the rollout's own value is scores * 2**log2_scale.
        layer_scores: the same up to every layer, [layers, ...], or None.
        layer_log2_scale: [layers, ...], or None.
        model_output: what the model returned in the same forward pass.
    """

    scores: Tensor
    log2_scale: Tensor
    layer_scores: Tensor | None
    layer_log2_scale: Tensor | None
    model_output: Any


@dataclass(frozen=True, eq=False)
class MethodsOutput:
    """One row of the rollout under several methods, layer by layer.

    Attributes:
        rollouts: by method, the row of the rollout up to every layer (12), [layers, batch, n].
        layers: by method, the row of every layer's own map, [layers, batch, n]. Both sum to 1 over the real tokens and
            are zero at padding; float64 for float64 models, else float32.
        model_output: what the model returned in the same forward pass.
    """

    rollouts: dict[str, Tensor]
    layers: dict[str, Tensor]
    model_output: Any


@refuses_target
def attribute(
    model: nn.Module,
    *,
    method: str = "N-Enc",
    position: Position = "cls",
    per_layer: bool = False,
    row_normalize: bool = False,
    backend: str = "auto",
    **model_inputs: Any,
) -> AttributionOutput:
    """Token attribution by rollout of a model's local maps, in one forward pass.

    GlobEnc (Modarressi et al., NAACL 2022) is method "N-Enc", equations (4)-(12). Memory is linear in n except for
    position "all".

    Args:
        model: a transformers encoder of a known family with any head (`globenc.supported_encoders()`); it is run in
            evaluation mode without gradients and left as it was.
        method: W, W-FixedRes, W-Res, N, N-FixedRes, N-Res, N-ResLN or N-Enc.
        position: whose output vector is attributed. "cls": each text's first token; "mean": the mean over real tokens;
            an int: a place among a text's real tokens, negative from the end; a list of them: several rows of scores;
            "all": every token, the full matrix; a tensor [n], [batch, n] or [batch, positions, n]: a weighted sum of
            tokens.
        per_layer: also the rollout up to every layer.
        row_normalize: divide the rows of every local map by their sums before rollout (the paper does not).
        backend: "auto" (Triton kernels on an NVIDIA GPU from compute capability 8.0 on, for float32, float16 and
            bfloat16 layers of up to 32 heads of size 16 to 128; PyTorch elsewhere), "torch", "triton" or "reference"
            (the equations as written, O(n^2 d) memory). An explicit choice never falls back.
        **model_inputs: what the model's forward takes: input_ids [batch, n] or inputs_embeds, attention_mask
            [batch, n] with padding on either side, token_type_ids, position_ids, ...

    Returns:
        AttributionOutput with scores [batch, n] or [batch, positions, n].

    Raises:
        TypeError, ValueError: a model, input, method, position or backend that cannot be used; the message says why.
        RuntimeError: backend "triton" cannot run here, or cannot take this model.
        FloatingPointError: the model's activations are not finite.
        torch.OutOfMemoryError: with what to lower.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.attribute(explainer.model, **inputs).scores.shape
        torch.Size([1, 5])
    """
    forward_pass = ForwardPass(model, model_inputs, backend)
    chosen = forward_pass.method(method)
    forward_pass.check_position(position)
    every_row = isinstance(position, str) and position == "all"
    rows = None if every_row else requested_rows(position, forward_pass.mask, forward_pass.dtype)

    def compute() -> tuple[Any, Tensor, Tensor]:
        rollout: WholeRollout | TopDownRollout
        if rows is None:
            rollout = WholeRollout(forward_pass, chosen, per_layer, row_normalize)
        else:
            rollout = TopDownRollout(forward_pass, chosen, rows, per_layer, row_normalize)
        return forward_pass.run(rollout), *rollout.result()

    output, mantissa, scale = forward_pass.with_fresh_weights(compute)
    forward_pass.check_residuals()
    if rows is not None and rows.single:
        mantissa, scale = mantissa[:, :, 0], scale[:, :, 0]
    total = require_finite(mantissa.sum(-1))
    scores = normalize_rows(mantissa)
    scale = torch.where(total > 0, scale + torch.log2(total.where(total > 0, torch.ones_like(total)).double()), 0)
    return AttributionOutput(
        scores=scores[-1],
        log2_scale=scale[-1],
        layer_scores=scores if per_layer else None,
        layer_log2_scale=scale if per_layer else None,
        model_output=output,
    )


@refuses_target
def compare_methods(
    model: nn.Module,
    *,
    methods: Sequence[str] | None = None,
    position: Position = "cls",
    backend: str = "auto",
    **model_inputs: Any,
) -> MethodsOutput:
    """One row of the rollout under several methods, up to every layer, and of each layer alone, in one forward pass.

    Args:
        model, backend, **model_inputs: as in `globenc.attribute`.
        methods: names; None is all that have a meaning for the model.
        position: "cls", "mean", one position as an int, or a weight tensor [n] or [batch, n].

    Returns:
        MethodsOutput.

    Raises:
        TypeError, ValueError, FloatingPointError: as `globenc.attribute`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> out = globenc.compare_methods(explainer.model, **inputs)
        >>> len(out.rollouts), out.rollouts["N-Enc"].shape[1:]
        (8, torch.Size([1, 5]))
    """
    forward_pass = ForwardPass(model, model_inputs, backend)
    if isinstance(methods, str):
        raise TypeError(f"methods must be a list of names, got the string {methods!r}")
    names = forward_pass.encoder.methods if methods is None else list(methods)
    if not names:
        raise ValueError("methods is an empty list: give at least one name")
    chosen = [forward_pass.method(name) for name in names]
    forward_pass.check_position(position)
    if isinstance(position, str) and position == "all":
        raise ValueError("position must be a single one here, got 'all'")
    rows = requested_rows(position, forward_pass.mask, forward_pass.dtype)
    if not rows.single:
        raise ValueError("position must be a single one here, got several")

    def compute() -> MethodsOutput:
        layers = _LayerMaps(forward_pass, chosen)
        output = forward_pass.run(layers)
        rollouts, alone = {}, {}
        with torch.no_grad(), precise(forward_pass.mask.device):
            for name, layer_maps in layers.maps.items():
                of_maps = [layer_map.through(rows.weights, False) for layer_map in layer_maps]
                mantissa, _ = top_down(of_maps[-1], rows, reversed(layer_maps[:-1]), False, per_layer=True)
                rollouts[name] = normalize_rows(require_finite(mantissa[:, :, 0]))
                single = torch.stack([row.to(mantissa.device)[:, 0] for row in of_maps])
                alone[name] = normalize_rows(require_finite(single))
        return MethodsOutput(rollouts, alone, output)

    output = forward_pass.with_fresh_weights(compute)
    forward_pass.check_residuals()
    return output


class _LayerMaps(WholeLayers):
    """The map of every layer under several methods, `maps` by a method's name."""

    def __init__(self, forward_pass: ForwardPass, methods: Sequence[Method]):
        super().__init__(forward_pass)
        self.methods = methods
        self.maps: dict[str, list[LayerMap]] = {method.name: [] for method in methods}

    def read(self, trace: LayerTrace) -> None:
        for method in self.methods:
            self.maps[method.name].append(self.forward_pass.backend.layer_map(trace, method))
