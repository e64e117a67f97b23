"""What gradients say of a model's answer: gradient times input, as saliency (17) and signed, and HTA x Input (18).

Equation numbers: Modarressi et al., NAACL 2022. HTA: Brunner et al., "On Identifiability in Transformers", ICLR 2020.
"""

from __future__ import annotations

import threading
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
    gradients = AnswerGradients(model, model_inputs, label, output)
    gradient, states = gradients.at()
    return gradients.tokens((gradient * states).norm(dim=-1)), gradients.logits


def gradient_times_input(
    model: nn.Module,
    *,
    label: str | Tensor = "predicted",
    output: str = "logit",
    **model_inputs: Any,
) -> Tensor:
    """<dy_c/de_i, e_i> of every token: gradient times input with its sign, at the embedding block's output.

    Where `saliency` takes the length of the product, this takes its sum: above zero for the class, below zero against
    it (Denil et al. 2014; Shrikumar et al., ICML 2017).

    Args, returns, raises:
        As `saliency`.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> globenc.metrics.gradient_times_input(explainer.model, **inputs).shape
        torch.Size([1, 5])
    """
    gradients = AnswerGradients(model, model_inputs, label, output)
    gradient, states = gradients.at()
    return gradients.tokens((gradient * states).sum(-1))


class AnswerGradients:
    """Gradients of a classifier's answer y_c by the states that enter the first layer.

    Args:
        model, label, output: as for `saliency`.
        inputs: as in `globenc.attribute`.

    Attributes:
        logits: of the texts as they are, [batch, classes]; there from the first `at` on.
    """

    logits: Tensor

    def __init__(self, model: nn.Module, inputs: dict[str, Any], label: str | Tensor, output: str):
        check_output(output)
        self.encoder, self.inputs, self.output = Encoder.of(model), inputs, output
        self.mask = check_inputs(self.encoder, inputs)
        self._label = label
        self._classes: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradients: float64 for float64 models, float32 for all others."""
        return torch.float64 if self.encoder.model.dtype == torch.float64 else torch.float32

    def at(self, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """dy_c/de where the first layer reads these states [batch, n, d], and the states; None: the model's own.

        The first call decides which classes are answered about.
        """
        eager: Any = self.encoder.model
        entered: list[Tensor] = []

        thread = threading.get_ident()

        def enter(module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
            # shared layers run again; another thread may come to a hook that is not registered whole
            if entered or kwargs is None or threading.get_ident() != thread:
                return None
            embeddings = args[0] if args else kwargs["hidden_states"]
            chosen = embeddings if states is None else states.to(embeddings.dtype)
            entered.append(chosen.detach().requires_grad_())
            if args:
                return (entered[0], *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": entered[0]}

        first = self.encoder.layers[0].module
        loan = Loan()

        def run() -> Tensor:
            loan.evaluation_mode(list(eager.modules()))
            loan.no_parameter_gradients(eager)
            loan.hook(first.register_forward_pre_hook, enter, with_kwargs=True)
            with torch.enable_grad(), returning_tuples(eager):
                logits = self._checked(logits_of(eager, eager(**by_name(eager, self.inputs))))
                if self._classes is None:
                    self.logits, self._classes = logits.detach(), classes_of(self._label, logits)
                answers = answers_of(eager, logits, self.output).gather(1, self._classes[:, None])
                return torch.autograd.grad(answers.sum(), entered[0])[0]

        gradient = loan.run(run)
        return gradient.to(self.dtype), entered[0].detach().to(self.dtype)

    def tokens(self, values: Tensor) -> Tensor:
        """A number for each token, [batch, n], zero at padding; some families' layers read padding of their own."""
        return values[:, : self.mask.shape[1]] * self.mask

    def _checked(self, logits: Tensor | None) -> Tensor:
        name = type(self.encoder.model).__name__
        if logits is None:
            raise ValueError(f"{name} has no logits: give a model that classifies")
        logits = logits[:, None] if logits.shape == self.mask.shape[:1] else logits
        if logits.ndim != 2:
            raise ValueError(
                f"{name} gives logits of shape {list(logits.shape)}: give a model that classifies "
                "whole texts, [batch, classes]"
            )
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the model's logits are not finite: its weights hold NaN or infinity")
        return logits


def check_output(output: str) -> None:
    """Raises ValueError where `output` names neither logits nor probabilities."""
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}; got {output!r}")


def answers_of(model: nn.Module, logits: Tensor, output: str) -> Tensor:
    """y of every class, [batch, classes], for logits of that shape.

    Raises:
        ValueError: a probability is asked for, and the model answers with a number.
    """
    if output == "logit":
        return logits
    kind = kind_of(model, logits.shape[1])
    if kind == "value":
        raise ValueError(
            f"output must be 'logit' for {type(model).__name__}: it answers with a number, which has no probability"
        )
    return logits.sigmoid() if kind == "labels" else logits.softmax(-1)


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

    thread = threading.get_ident()

    def enter(module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        # another thread may come to a hook that is not registered whole
        if running or kwargs is None or threading.get_ident() != thread:
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
