"""What gradients say of a model's answer: gradient-times-input saliency (17) and HTA x Input (18).

Equation numbers: Modarressi et al., NAACL 2022. HTA: Brunner et al., "On Identifiability in Transformers", ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..encoders import Encoder
from ..inputs import check_inputs
from ..model_state import Loan
from ..predictions import by_name, kind_of, logits_of, returning_tuples
from ..rollouts import multiply

OUTPUTS = ("logit", "probability")
JACOBIAN_ROWS = 64  # rows of a Jacobian at once


def saliency(
    model: nn.Module,
    *,
    label: str | Tensor = "predicted",
    output: str = "logit",
    **model_inputs: Any,
) -> Tensor:
    """||dy_c/de_i * e_i||_2 of every token: gradient times input at the embedding block's output, (17).

    Texts of a batch do not touch each other, so a batch gives each text's own gradient.

    Args:
        model: a text or image classifier of a known family; run in evaluation mode and left as it was.
        label: c: "predicted" for the class the model gives the highest logit, or classes [batch], the gold ones for
            instance.
        output: y_c: "logit" (default) or "probability". A probability near 1 has a gradient near 0, which rounds away
            in float32 where the logit's does not; and it mixes in the other classes' logits.
        **model_inputs: as in `globenc.attribute`.

    Returns:
        [batch, n], zero at padding; float64 for float64 models, else float32.

    Raises:
        TypeError, ValueError: a model without class logits, an unknown option, labels of another shape or beyond the
            classes, inputs as `globenc.attribute` refuses them.
        FloatingPointError: the logits are not finite.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.metrics.saliency(explainer.model, **inputs).shape
        torch.Size([1, 5])
    """
    return saliency_and_logits(model, label=label, output=output, **model_inputs)[0]


def saliency_and_logits(
    model: nn.Module,
    *,
    label: str | Tensor = "predicted",
    output: str = "logit",
    **model_inputs: Any,
) -> tuple[Tensor, Tensor]:
    """As `saliency`, and the logits [batch, classes] of the same forward pass."""
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}; got {output!r}")
    encoder = Encoder.of(model)
    eager: Any = encoder.model
    mask = check_inputs(encoder, model_inputs)
    entered: list[Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if entered:  # shared layers run again
            return None
        states = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        entered.append(states)
        if args:
            return (states, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": states}

    first = encoder.layers[0].module
    loan = Loan()

    def run() -> tuple[Tensor, Tensor]:
        loan.evaluation_mode(list(eager.modules()))
        loan.no_parameter_gradients(eager)
        loan.hook(first.register_forward_pre_hook, enter, with_kwargs=True)
        with torch.enable_grad(), returning_tuples(eager):
            logits = logits_of(eager, eager(**by_name(eager, model_inputs)))
            if logits is None:
                raise ValueError(f"{type(eager).__name__} has no logits: give a model that classifies")
            logits = logits[:, None] if logits.shape == mask.shape[:1] else logits
            if logits.ndim != 2:
                raise ValueError(
                    f"{type(eager).__name__} gives logits of shape {list(logits.shape)}: give a model that classifies "
                    "whole texts, [batch, classes]"
                )
            if not bool(torch.isfinite(logits).all()):
                raise FloatingPointError("the model's logits are not finite: its weights hold NaN or infinity")
            kind = kind_of(eager, logits.shape[1])
            if kind == "value" and output == "probability":
                raise ValueError(
                    f"output must be 'logit' for {type(eager).__name__}: it answers with a number, which has no "
                    "probability"
                )
            predictions = logits
            if output == "probability":
                predictions = logits.sigmoid() if kind == "labels" else logits.softmax(-1)
            chosen = predictions.gather(1, classes_of(label, logits)[:, None])
            return torch.autograd.grad(chosen.sum(), entered[0])[0], logits.detach()

    gradient, logits = loan.run(run)
    dtype = torch.float64 if eager.dtype == torch.float64 else torch.float32
    times_input = (gradient.to(dtype) * entered[0].detach().to(dtype)).norm(dim=-1)
    return times_input[:, : mask.shape[1]] * mask, logits


def classes_of(label: str | Tensor, logits: Tensor) -> Tensor:
    """Classes [batch] that a `label` argument means for logits [batch, classes]."""
    if isinstance(label, str):
        if label != "predicted":
            raise ValueError(f'label must be "predicted" or a tensor of classes [batch], got {label!r}')
        return logits.argmax(-1)
    batch, classes = logits.shape
    if not isinstance(label, Tensor) or label.shape != (batch,) or label.is_floating_point():
        got = f"{label.dtype} {list(label.shape)}" if isinstance(label, Tensor) else type(label).__name__
        raise ValueError(f"label must be integers of shape [batch] = [{batch}], got {got}")
    if bool((label < 0).any()) or bool((label >= classes).any()):
        raise ValueError(f"label must be in 0..{classes - 1}, got {label.tolist()}")
    return label.to(logits.device)


def hta_maps(model: nn.Module, *, times_input: bool = True, **model_inputs: Any) -> Tensor:
    """Hidden token attribution of every layer: ||de_i^l / de_j^(l-1) * e_j^(l-1)||_F, (18); without the input if asked.

    Exact, by batched vector-Jacobian products of each layer: n * d of them a layer, so it is for short texts, and few.
    This is the paper's upper bound for what a local map can say.

    Args:
        model: an encoder of a known family, in any head.
        times_input: HTA x Input; False is plain HTA, the Frobenius norms of the Jacobians alone.
        **model_inputs: as in `globenc.attribute`.

    Returns:
        [layers, batch, n, n], rows are the receiving tokens; padded rows and columns are zero.

    Raises:
        TypeError, ValueError: as `globenc.attribute`.
    """
    encoder = Encoder.of(model)
    eager: Any = encoder.model
    mask = check_inputs(encoder, model_inputs)
    maps: list[Tensor] = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if running:
            return
        states = args[0] if args else kwargs["hidden_states"]

        def layer(states: Tensor) -> Tensor:
            running.append(True)
            try:
                given = (states, *args[1:]) if args else args
                out = module(*given, **(kwargs if args else {**kwargs, "hidden_states": states}))
            finally:
                running.pop()
            return out[0] if isinstance(out, tuple) else out

        maps.append(_jacobian_norms(layer, states, mask, times_input))

    running: list[bool] = []
    loan = Loan()

    def run() -> None:
        loan.evaluation_mode(list(eager.modules()))
        loan.no_parameter_gradients(eager)
        loan.change(lambda: None, _leave_vmap)
        for shared in {id(layer.module): layer.module for layer in encoder.layers}.values():
            loan.hook(shared.register_forward_pre_hook, enter, with_kwargs=True)
        with torch.no_grad():
            eager(**model_inputs)

    loan.run(run)
    return torch.stack(maps)


def _leave_vmap() -> None:
    """Batched gradients run inside of torch's vmap, which an interrupt can leave open: random numbers fail then."""
    enter = getattr(torch._C, "_vmapmode_increment_nesting", None)
    if enter is None:
        return
    while enter() > 1:
        torch._C._vmapmode_decrement_nesting()
        torch._C._vmapmode_decrement_nesting()
    torch._C._vmapmode_decrement_nesting()


def _jacobian_norms(layer: Callable[[Tensor], Tensor], states: Tensor, mask: Tensor, times_input: bool) -> Tensor:
    """||d layer(states)_i / d states_j (* states_j)||_F, [B, n, n]."""
    batch, n, d = states.shape
    squares = states.new_zeros(batch, n, n)
    with torch.enable_grad():
        entered = states.detach().requires_grad_()
        left = layer(entered)
        for start in range(0, n * d, JACOBIAN_ROWS):
            stop = min(start + JACOBIAN_ROWS, n * d)
            rows = torch.arange(start, stop, device=states.device)
            picks = torch.zeros(stop - start, batch, n * d, dtype=states.dtype, device=states.device)
            picks[torch.arange(stop - start), :, rows] = 1
            (jacobian,) = torch.autograd.grad(
                left, entered, picks.view(-1, batch, n, d), retain_graph=True, is_grads_batched=True
            )
            part = jacobian * states if times_input else jacobian
            squares.index_add_(1, rows // d, part.square().sum(-1).transpose(0, 1))
    tokens = mask.shape[1]  # Longformer and BigBird may read some padding behind them
    return squares[:, :tokens, :tokens].sqrt() * (mask[:, :, None] & mask[:, None, :])


def hta(model: nn.Module, *, times_input: bool = True, **model_inputs: Any) -> tuple[Tensor, Tensor]:
    """The rollout of `hta_maps` up to every layer, as the other methods are rolled out, (12).

    Returns:
        mantissa [layers, batch, n, n] and log2_scale [layers, batch, n]: the products are mantissa * 2**log2_scale.
    """
    products: list[tuple[Tensor, Tensor]] = []
    for local in hta_maps(model, times_input=times_input, **model_inputs):
        nothing = (None, local.new_zeros(local.shape[:2], dtype=torch.float64))
        products.append(multiply(local, *(products[-1] if products else nothing)))
    mantissas, scales = zip(*products, strict=True)
    return torch.stack(mantissas), torch.stack(scales)
