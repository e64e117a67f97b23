"""How what is no straight line is held, and how it is replayed on other inputs.

A piece is made of a call in the recorded pass: its output, as the model computes it, with the derivative of its frozen
form, and `replay`, which gives the frozen form's value for other inputs. Each function here records one kind of call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .operations import Chord, HeldLinear, HeldNorm, Line, WithConstant, on_rows

UNITS_HELD = 1 << 21  # of an activation whose output is held in memory

_STRAIGHT = (
    "AddBackward0", "SubBackward0", "RsubBackward1", "MulBackward0", "NegBackward0", "WithConstantBackward",
    "CloneBackward0",
)  # fmt: skip

Recorder = Callable[..., tuple[Any, "Piece | None"]]
"""(unit, the function called, its arguments) -> its output and the piece, or None where it is a straight line."""


@dataclass(eq=False)
class Piece:
    """A piece of a recorded pass.

    Attributes:
        function: what the model called.
        replay: (arguments of the call) -> its output in the frozen network.
        node: of a linear map or an activation, its node in the recorded graph.
        rows: of a linear map; see `HeldLinear`.
        tokens: of a linear map, [B, n] of its input.
        line: of an activation.
    """

    function: object
    replay: Callable[..., Any]
    node: Any = None
    rows: list[Tensor] | None = None
    tokens: torch.Size | None = None
    line: Line | None = None


def linear(
    unit: Tensor | None, function: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Piece]:
    """W x + b; a replay leaves out those that do not reach the answer (queries and keys, whose weights are held)."""
    rows: list[Tensor] = []
    shape = input.shape[:-1]
    # tokens side by side: models divide in place what a linear map has put out, which no view of a Function's bears
    flat: Any = HeldLinear.apply(input.reshape(-1, input.shape[-1]), unit, weight, bias, shape, rows)

    def replay(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        compute = lambda tokens: function(tokens, weight, bias)  # noqa: E731
        return on_rows(input.reshape(-1, input.shape[-1]), rows, compute).view(*shape, -1)

    return flat.view(*shape, -1), Piece(function, replay, node=flat.grad_fn, rows=rows, tokens=shape)


def nothing(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Zeros in the shape of a linear map's output."""
    return input.new_zeros(*input.shape[:-1], weight.shape[0])


def layer_norm(
    unit: Tensor | None,
    function: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> tuple[Tensor, Piece]:
    """LayerNorm with its denominator held."""
    with torch.no_grad():
        output, _mean, inverse = torch.native_layer_norm(input, list(normalized_shape), weight, bias, eps)
    inverse = inverse.to(input.dtype)

    def replay(input: Tensor, *_: Any, **__: Any) -> Tensor:
        scaled = (input - input.mean(-1, keepdim=True)) * inverse
        scaled = scaled if weight is None else scaled * weight
        return scaled if bias is None else scaled + bias

    return HeldNorm.apply(input, unit, output, inverse, weight, bias, True), Piece(function, replay)


def rms_norm(
    unit: Tensor | None,
    function: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> tuple[Tensor, Piece]:
    """RMSNorm with its denominator held."""
    with torch.no_grad():
        output = function(input, normalized_shape, weight, eps)
        floor = torch.finfo(input.dtype).eps if eps is None else eps
        inverse = torch.rsqrt(input.square().mean(-1, keepdim=True) + floor)

    def replay(input: Tensor, *_: Any, **__: Any) -> Tensor:
        return input * inverse if weight is None else input * inverse * weight

    return HeldNorm.apply(input, unit, output, inverse, weight, None, False), Piece(function, replay)


def activation(unit: Tensor | None, function: Any, input: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Piece]:
    """phi(h) by the chord of a reference; also where it is written in the place of h."""
    name = getattr(function, "__name__", "")
    if not (named.get("inplace") or any(option is True for option in options) or name.endswith("_")):
        return chord(unit, function, input, lambda h: function(h, *options, **named))
    result, piece = chord(unit, function, input.clone(), lambda h: function(h.clone(), *options, **named))
    straight = piece.replay
    piece.replay = lambda input, *_, **__: input.copy_(straight(input.clone()))
    return input.copy_(result), piece


def chord(
    unit: Tensor | None, function: object, h: Tensor, compute: Callable[[Tensor], Tensor], output: Tensor | None = None
) -> tuple[Tensor, Piece]:
    """The same for any function of single numbers."""
    h_now = h.detach()
    output = compute(h_now) if output is None else output
    # where constants are asked for it is needed again; else one more phi, in parts, is cheaper than so much memory
    line = Line(h_now, output if unit is not None or output.numel() < UNITS_HELD else None, compute)
    result: Any = Chord.apply(h, unit, output, line)

    def replay(h: Tensor, *_: Any, **__: Any) -> Tensor:
        value = line.replay(h)
        if unit is None:
            line.release_point()
        return value

    return result, Piece(function, replay, node=result.grad_fn, line=line)


def unchanged(piece: Piece) -> Callable[..., Tensor]:
    """The replay of an activation that the answer does not reach, since it is held as a gate: whatever it reads."""
    assert piece.line is not None
    piece.line.used = False
    return lambda h, *_, **__: h


def held(unit: Tensor | None, function: Any, *arguments: Any, **named: Any) -> tuple[Any, Piece]:
    """A value that is held: attention weights, a denominator."""
    with torch.no_grad():
        output = function(*arguments, **named)
    return output, Piece(function, lambda *_, **__: output)


def product(unit: Tensor | None, function: Any, input: Any, other: Any, **named: Any) -> tuple[Tensor, Piece | None]:
    """A gate: of two factors that depend on the text, the activation's output is held."""
    if not (_depends(input) and _depends(other)) or not (_activated(input) or _activated(other)):
        return function(input, other, **named), None
    first = _activated(input)
    gate = (input if first else other).detach()

    def replay(input: Tensor, other: Tensor, **named: Any) -> Tensor:
        return function(gate, other, **named) if first else function(input, gate, **named)

    return function(gate, other, **named) if first else function(input, gate, **named), Piece(function, replay)


def quotient(unit: Tensor | None, function: Any, input: Any, other: Any, **named: Any) -> tuple[Tensor, Piece | None]:
    """A quotient with its denominator held."""
    if not _depends(other):
        return function(input, other, **named), None
    denominator = other.detach()
    return function(input, denominator, **named), Piece(
        function, lambda input, other, **named: function(input, denominator, **named)
    )


def normalized(
    unit: Tensor | None, function: Any, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: Any
) -> tuple[Tensor, Piece]:
    """x / ||x|| with the length held."""
    length = input.detach().norm(p, dim, keepdim=True).clamp_min(eps)
    return input / length, Piece(function, lambda input, *_, **__: input / length)


def cosine(
    unit: Tensor | None, function: Any, x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8
) -> tuple[Tensor, Piece]:
    """<x1, x2> / (||x1|| ||x2||) with both lengths held."""
    lengths = x1.detach().norm(dim=dim).clamp_min(eps) * x2.detach().norm(dim=dim).clamp_min(eps)

    def replay(x1: Tensor, x2: Tensor, *_: Any, **__: Any) -> Tensor:
        return (x1 * x2).sum(dim) / lengths

    return replay(x1, x2), Piece(function, replay)


def log_softmax(unit: Tensor | None, function: Any, input: Tensor, dim: Any = None, *_: Any, **named: Any) -> Any:
    """x - log sum exp(x) with the sum held."""
    total = torch.logsumexp(input.detach(), -1 if dim is None else dim, keepdim=True)
    return input - total, Piece(function, lambda input, *_, **__: input - total)


def largest(unit: Tensor | None, function: Any, input: Tensor, dim: Any = None, keepdim: bool = False) -> Any:
    """The largest numbers along a dimension, with their positions held."""
    if not isinstance(dim, int):
        return function(input, dim, keepdim) if dim is not None else function(input), None
    _, indices = torch.max(input.detach(), dim, keepdim=True)
    pairs = function in (torch.max, Tensor.max)

    def replay(input: Tensor, *_: Any, **__: Any) -> Any:
        taken = input.gather(dim, indices)
        taken = taken if keepdim else taken.squeeze(dim)
        return torch.return_types.max((taken, indices if keepdim else indices.squeeze(dim))) if pairs else taken

    return replay(input), Piece(function, replay)


def total(unit: Tensor | None, function: Any, input: Any, other: Any, **named: Any) -> tuple[Tensor, Piece | None]:
    """A sum or a difference of which one part is a constant, where the constants' share is asked for."""
    output = function(input, other, **named)
    if unit is None or (_depends(input) and _depends(other)):
        return output, None
    with torch.no_grad():
        zero = torch.zeros_like(input) if _depends(input) else input
        other_zero = torch.zeros_like(other) if _depends(other) else other
        constant = function(zero, other_zero, **named).expand(output.shape)
    return WithConstant.apply(output, unit, constant), None


def affine(
    unit: Tensor | None, function: Any, input: Tensor, *arguments: Any, **named: Any
) -> tuple[Any, Piece | None]:
    """A straight line with a constant of its own, as a convolution."""
    output = function(input, *arguments, **named)
    if unit is None:
        return output, None
    with torch.no_grad():
        constant = function(torch.zeros_like(input), *arguments, **named)
    return WithConstant.apply(output, unit, constant), None


def _depends(part: Any) -> bool:
    return isinstance(part, Tensor) and part.requires_grad


def _activated(part: Tensor) -> bool:
    """Whether a tensor is an activation's output, or that times or plus constants."""
    node: Any = part.grad_fn
    while type(node).__name__ in _STRAIGHT:
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return type(node).__name__ == "ChordBackward"


def cast(unit: Tensor | None, function: Any, input: Tensor, *arguments: Any, **named: Any) -> tuple[Any, Piece | None]:
    """A float64 model stays in float64 where a family's norms would round to float32."""
    output = function(input, *arguments, **named)
    if input.dtype != torch.float64 or output.dtype != torch.float32:
        return output, None
    return input, Piece(function, lambda input, *_, **__: input)
