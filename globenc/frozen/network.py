"""The frozen network of a batch of texts: one recorded forward pass, and others that replay its pieces."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..capture import AttentionResult, ScoredAttention
from ..capture.attention import torch_attention
from ..contributions.backend import Backend
from ..encoders import Encoder
from ..model_state import Loan, active_recorder, precise
from .operations import HeldAttention, Line
from .pieces import Piece, cast, chord, nothing, unchanged
from .recorders import ACTIVATION_MODULES, RECORDERS

TOKENS_AT_ONCE = 1 << 14  # of all labels that are pulled back together
FEW = 4  # tokens are few that are less than one of so many

Answer = Callable[[Any], Tensor]
"""A model's output -> a number for each text, [B], or several, [B, labels]."""


class FrozenNetwork:
    """A model with attention weights, norms' denominators and slopes of activations as they are for these texts.

    It is an affine function of the embeddings e that enter the first layer. `record` runs the model and notes every
    piece; once each activation's line has its slope, `pull` gives what derivatives are, and `replay` runs the frozen
    network on other embeddings.

    Args:
        encoder: the model.
        inputs: of its forward pass.
        mask: the real tokens, [B, n].
        constants: whether derivatives by the constants are asked for.
        backend: computes attention, and the products of its weights.

    Attributes:
        pieces: of every call that can be a piece, in the order of calls; None where it does not depend on e.
        states: e and every layer's output, [B, n, d] each.
        contexts: what every layer's output projection reads, [B, n, H * d_h] each.
        unit: the number 1 of every text, [B], by which derivatives are the constants' share; None where that is not
            asked for.
    """

    def __init__(self, encoder: Encoder, inputs: dict[str, Any], mask: Tensor, constants: bool, backend: Backend):
        self.encoder, self.inputs, self.mask, self.backend = encoder, inputs, mask, backend
        self.padded = not bool(mask.all())
        self.unit: Tensor | None = None
        if constants:
            self.unit = torch.ones(len(mask), dtype=torch.float64, device=mask.device, requires_grad=True)
        self.pieces: list[Piece | None] = []
        self.states: list[Tensor] = []
        self.contexts: list[Tensor] = []
        self.layer_ends: list[int] = []  # how many pieces there were
        self._replayed: int | None = None  # how many pieces a replay has passed; None while recording
        self._embeddings: Tensor | None = None  # of a replay
        self._layers = 0  # that the pass has entered
        self._answering = False  # whether the model is done, so that what runs is `answer`

    @property
    def lines(self) -> list[Line]:
        """The lines of the activations, in the order of calls; those of the layers come before those of the head."""
        return _lines(self.pieces)

    def record(self, answer: Answer) -> tuple[Any, Tensor]:
        """Run the model; its output, and `answer` of it, which carries the graph that `pull` reads."""
        with torch.enable_grad():
            output, value = self._run(answer)
            if value.grad_fn is not None:
                self._skip_unreached(value)
                self._few_rows(value)
        return output, value

    def release_layers(self) -> None:
        """Let go of what layers have read and put out but for e: only their own scores and maps need it."""
        del self.states[1:], self.contexts[:]

    def record_layer_lines(self) -> list[Line]:
        """Run the model for what its layers' activations read."""
        with torch.enable_grad():
            self._run(lambda output: output)
        return _lines(self.pieces[: self.layer_ends[-1]])

    def pull(self, value: Tensor, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Tensor | None]:
        """The frozen network's derivatives of `value` [B] by tensors of the recorded pass, in their shapes, and by
        `unit`; of [B, labels] each label's, with a dimension for labels in front."""
        wanted = [*tensors, *([] if self.unit is None else [self.unit])]

        def gradients(direction: Tensor) -> tuple[Tensor, ...]:
            found = torch.autograd.grad(value, wanted, direction, retain_graph=value.ndim > 1, allow_unused=True)
            return tuple(
                torch.zeros_like(tensor) if one is None else one for tensor, one in zip(wanted, found, strict=True)
            )

        with precise(self.mask.device):
            if value.ndim == 1:
                pulled = gradients(torch.ones_like(value))
            else:
                labels = torch.eye(value.shape[1], dtype=value.dtype, device=value.device)
                at_once = max(1, TOKENS_AT_ONCE // self.mask.numel())
                pulled = torch.vmap(gradients, chunk_size=at_once)(labels[:, None].expand(-1, *value.shape))
        return list(pulled[: len(tensors)]), None if self.unit is None else pulled[-1]

    def replay(self, embeddings: Tensor, answer: Answer) -> Tensor:
        """`answer` of the frozen network's output for other embeddings [B, n, d]."""
        self._replayed, self._embeddings = 0, embeddings
        try:
            with torch.no_grad():
                return self._run(answer)[1]
        finally:
            self._replayed = self._embeddings = None

    def _run(self, answer: Answer) -> tuple[Any, Tensor]:
        model, layers = self.encoder.model, self.encoder.layers
        modules, loan = list(model.modules()), Loan()

        def run() -> tuple[Any, Tensor]:
            loan.evaluation_mode(modules)
            loan.no_parameter_gradients(model)
            if layers[0].custom_attention is None:
                loan.attention(modules)
            for layer in {id(layer.module): layer.module for layer in layers}.values():
                loan.hook(layer.register_forward_pre_hook, self._enter_layer, with_kwargs=True)
                loan.hook(layer.register_forward_hook, self._leave_layer)
            for projection in {id(layer.output_projection): layer.output_projection for layer in layers}.values():
                loan.hook(projection.register_forward_pre_hook, self._enter_output_projection)
            activations = [module for module in modules if isinstance(module, ACTIVATION_MODULES)]
            mode = _Pieces(self)
            for norm in [module for module in modules if "Norm" in type(module).__name__]:
                loan.hook(norm.register_forward_pre_hook, mode.enter_norm)
                loan.hook(norm.register_forward_hook, mode.leave_norm)
            for module in activations:
                loan.hook(module.register_forward_pre_hook, mode.enter_activation)
                # before the caller's hooks: what they do to the output is part of the model behind the activation
                loan.hook(module.register_forward_hook, mode.leave_activation, prepend=True)
            loan.recorder(self)
            with precise(self.mask.device), _written_tensors_named(), mode:
                self._layers, self._answering = 0, False
                output = model(**self.inputs)
                if self._layers != len(layers):
                    raise _other_passes(self._layers, len(layers))
                self._answering = True
                return output, answer(output)

        return loan.run(run)

    def _enter_layer(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        # another thread's pass may come to a hook before it is registered whole, and has no kwargs then
        if kwargs is None or self._elsewhere():
            return None
        states = args[0] if args else kwargs["hidden_states"]
        self._layers += 1
        if self._layers > 1:
            return None
        if self._replayed is not None:
            states = self._embeddings
        else:
            if torch.is_inference_mode_enabled():
                raise ValueError(
                    "the model runs its encoder in torch.inference_mode(), where nothing can be pulled back: let its "
                    "forward use torch.no_grad()"
                )
            torch.set_grad_enabled(True)  # heads over an encoder that is not trained run it in torch.no_grad()
            states = states.detach().requires_grad_()
            self.states.append(states)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def _leave_layer(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._elsewhere() and self._replayed is None:
            self.states.append(output[0] if isinstance(output, tuple) else output)
            self.layer_ends.append(len(self.pieces))

    def _enter_output_projection(self, module: nn.Module, args: tuple) -> None:
        if not self._elsewhere() and self._replayed is None:
            self.contexts.append(args[0])

    def _elsewhere(self) -> bool:
        """Whether a hook was called by another forward pass: another thread's, or one that `answer` makes."""
        return active_recorder() is not self or self._answering

    def computed_attention(self, inputs: ScoredAttention) -> AttentionResult | None:
        """As `capture.Recorder`: attention with its weights held."""
        if self._replayed is not None:
            piece = self.next_piece("attention")
            with torch._C.DisableTorchFunction():
                return None if piece is None else AttentionResult(piece.replay(inputs.value), inputs)
        place = len(self.pieces)
        self.pieces.append(None)
        if not inputs.value.requires_grad:
            return None
        if self._answering or self._layers > len(self.encoder.layers):
            raise _other_passes(self._layers, len(self.encoder.layers))
        with torch._C.DisableTorchFunction():
            fixed = replace(inputs, query=inputs.query.detach(), key=inputs.key.detach(), value=inputs.value.detach())
            with torch.no_grad():
                layer = self.encoder.layers[self._layers - 1]
                computed = self.backend.attention(layer, self.states[-1], fixed)
                mask = self.mask if self.padded else None
                weights = self.backend.held_weights(fixed if computed is None else computed.attention, mask)
                if computed is None and weights.in_memory:
                    computed = AttentionResult(weights.product(fixed.value), fixed)
                elif computed is None:
                    computed = torch_attention(fixed, None if mask is None else mask[:, None, None], 0.0)
                    weights = self.backend.held_weights(computed.attention, mask)
            result = HeldAttention.apply(inputs.value, computed.context, weights)
        self.pieces[place] = Piece("attention", weights.product)
        return AttentionResult(result, inputs)

    def attended(self, result: AttentionResult) -> None:
        """As `capture.Recorder`."""

    def next_piece(self, function: object) -> Piece | None:
        """The piece of the call that a replay has come to."""
        at = self._replayed or 0
        piece = self.pieces[at] if at < len(self.pieces) else None
        if at >= len(self.pieces) or (piece is not None and piece.function is not function):
            raise RuntimeError("the model computes something else when it runs again on the same texts")
        self._replayed = at + 1
        return piece

    def _skip_unreached(self, value: Tensor) -> None:
        """Leave linear maps that the answer does not reach, those of queries and keys, out of replays."""
        reached, nodes = set(), [value.grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in reached:
                reached.add(node)
                nodes.extend(parent for parent, _ in node.next_functions)
        for piece in self.pieces:
            if piece is not None and piece.node is not None:
                if piece.node not in reached:
                    piece.replay = unchanged(piece) if piece.line else nothing
                piece.node = None

    def _few_rows(self, value: Tensor) -> None:
        """Where the answer reads few tokens of the last layer, leave its other tokens out behind the attention."""
        top = self.states[-1]
        if self.encoder.family.custom_attention is not None or top.shape[:2] != self.mask.shape:
            return
        # weights of several labels that are no multiples of each other's opposites
        weights = torch.linspace(1, 2, value[0].numel(), dtype=value.dtype, device=value.device).view(value[0].shape)
        (gradient,) = torch.autograd.grad((value * weights).sum(), top, retain_graph=True, allow_unused=True)
        if gradient is None:
            return
        rows = (gradient != 0).any(-1).flatten().nonzero()[:, 0]
        if len(rows) * FEW > self.mask.numel():
            return
        for at in range(self.layer_ends[-1] - 1, -1, -1):
            piece = self.pieces[at]
            if piece is not None and piece.function == "attention":
                return
            if piece is not None and piece.rows is not None and piece.tokens == self.mask.shape:
                piece.rows.append(rows)


class _Pieces(TorchFunctionMode):
    """Sees every torch function that the model calls."""

    def __init__(self, network: FrozenNetwork):
        super().__init__()
        self.network = network
        self.inside = 0  # of activation modules, each of which is one piece
        self.norms = 0  # that are computed

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        record = None if self.inside else RECORDERS.get(function)
        if record is None or (record is cast and not self.norms):
            return function(*args, **kwargs)
        network = self.network
        if network._replayed is not None:
            piece = network.next_piece(function)
            return function(*args, **kwargs) if piece is None else piece.replay(*args, **kwargs)
        place = len(network.pieces)
        network.pieces.append(None)
        if not _depends(args) and not _depends(kwargs.values()):
            return function(*args, **kwargs)
        output, network.pieces[place] = record(network.unit, function, *args, **kwargs)
        return output

    def enter_norm(self, module: nn.Module, args: tuple) -> None:
        self.norms += active_recorder() is self.network

    def leave_norm(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.norms -= active_recorder() is self.network

    def enter_activation(self, module: nn.Module, args: tuple) -> None:
        if active_recorder() is self.network:
            self.inside += 1

    def leave_activation(self, module: nn.Module, args: tuple, output: Any) -> Any:
        network = self.network
        if active_recorder() is not network:
            return None
        self.inside -= 1
        if self.inside:
            return None
        if network._replayed is not None:
            piece = network.next_piece(type(module))
            with torch._C.DisableTorchFunction():
                return None if piece is None else piece.replay(args[0])
        place = len(network.pieces)
        network.pieces.append(None)
        if not args[0].requires_grad:
            return None
        output, network.pieces[place] = chord(network.unit, type(module), args[0], module.forward, output.detach())
        return output.clone() if len(module._forward_hooks) > 1 else output  # hooks may write into it


def _other_passes(layers: int, expected: int) -> RuntimeError:
    if layers < expected:
        return RuntimeError(
            f"the model ran {layers} of its encoder's {expected} layers: class scores need a pass through all of them"
        )
    return RuntimeError(
        "the model runs its encoder more than once: class scores explain one pass through it, not a model that reads a "
        "pair of texts in two passes (explain one of them: model.base_model with answer=)"
    )


@contextlib.contextmanager
def _written_tensors_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "is being modified inplace" not in str(error):
            raise
        raise RuntimeError(
            "the model, a hook in it or `answer` writes into what attention, a norm or an activation has put out, "
            f"which class scores hold: let it write into a clone ({str(error).split('.')[0]})"
        ) from error


def _lines(pieces: Sequence[Piece | None]) -> list[Line]:
    return [piece.line for piece in pieces if piece is not None and piece.line is not None]


def _depends(arguments: Any) -> bool:
    return any(isinstance(part, Tensor) and part.requires_grad for part in arguments)
