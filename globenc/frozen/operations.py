"""Operations of the frozen network: the model's own values, and the derivatives of the straight pieces that replace
what is no straight line.

A piece keeps the output that the model computed and answers the backward pass by its frozen form: attention with its
weights held, a norm with its denominator held, an activation by the slope of a chord. The frozen network is an affine
function of the embeddings e; `unit` makes it a linear one of (e, unit): every constant (a bias, what a chord cuts off)
counts as multiplied with the number 1 of its text, so that the derivative by `unit` is the constants' share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from ..contributions.backend import HeldWeights

UNITS_AT_ONCE = 1 << 16  # of activations on a CPU: the second-level cache


def per_text(products: Tensor, texts: int) -> Tensor:
    """Numbers of a batch summed for each text, [B]; texts come first, or second where a model puts tokens first."""
    if products.ndim > 1 and products.shape[0] != texts and products.shape[1] == texts:
        products = products.transpose(0, 1)
    return products.reshape(texts, -1).sum(1)


class HeldLinear(Function):
    """x W^T + b of tokens [count, d], which were of shape `shape` before.

    `rows`: a list, with the places of the tokens that the answer reaches, where they are known to be few; the
    derivatives of the others are zero.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        unit: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        shape: torch.Size,
        rows: list[Tensor],
    ) -> Tensor:
        ctx.weight, ctx.bias, ctx.shape, ctx.rows = weight, bias, shape, rows
        ctx.texts = None if unit is None else len(unit)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        constants = None
        if ctx.texts is not None and ctx.bias is not None:
            constants = per_text((gradient @ ctx.bias).view(ctx.shape), ctx.texts)
        pulled = on_rows(gradient, ctx.rows, lambda part: part @ ctx.weight)
        return pulled, constants, None, None, None, None


def on_rows(x: Tensor, rows: list[Tensor], compute: Callable[[Tensor], Tensor]) -> Tensor:
    """compute(x) of tokens [count, d]; only at some and zero at the others where `rows` holds their places."""
    if not rows:
        return compute(x)
    part = compute(x.index_select(0, rows[0]))
    return part.new_zeros(len(x), part.shape[-1]).index_copy(0, rows[0], part)


class HeldNorm(Function):
    """(x - mean(x)) / s * gamma + beta with s held; without the mean for an RMSNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        unit: Tensor | None,
        output: Tensor,
        inverse: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centred: bool,
    ) -> Tensor:
        ctx.inverse, ctx.weight, ctx.bias, ctx.centred = inverse, weight, bias, centred
        ctx.texts = None if unit is None else len(unit)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        constants = None
        if ctx.texts is not None and ctx.bias is not None:
            constants = per_text(gradient @ ctx.bias, ctx.texts)
        scaled = gradient * ctx.inverse if ctx.weight is None else (gradient * ctx.weight).mul_(ctx.inverse)
        if ctx.centred:
            scaled.sub_(scaled.mean(-1, keepdim=True))
        return scaled, constants, None, None, None, None, None


class Chord(Function):
    """An activation as the straight line that `line` is once its slope is known."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, unit: Tensor | None, output: Tensor, line: Line) -> Tensor:
        ctx.line, ctx.texts = line, None if unit is None else len(unit)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pulled, constants = ctx.line.pull(gradient, ctx.texts is not None)
        return pulled, None if constants is None else per_text(constants, ctx.texts), None, None


class Line:
    """The straight line that stands for an activation phi: through the model's point (h, phi(h)), with a slope.

    Attributes:
        h: the model's point, any shape.
        output: phi(h); None where it is made anew when it is needed.
        compute: phi.
        slope: of the line, the same shape; None until it has one.
        through_origin: the line passes through 0, and its slope is made when it is used.
        used: whether the answer reaches it.
    """

    def __init__(self, h: Tensor, output: Tensor | None, compute: Callable[[Tensor], Tensor]):
        self.h, self.output, self.compute = h, output, compute
        self.slope: Tensor | None = None
        self.through_origin = False
        self.used = True

    def from_origin(self) -> None:
        """Make the line the chord from the origin, for an activation that is 0 at 0: its slope is phi(h) / h."""
        self.through_origin = True

    def chord_from(self, start: Tensor, values: Tensor | None = None) -> None:
        """Make the line the chord from (start, phi(start)), [..., units]; `values` gets its values there.

        Where that is shorter than rounding allows, the chord is lengthened to that, close to the tangent.
        """
        shortest = _shortest(self.h.dtype)
        slope = torch.empty_like(self.h)
        h, slopes, starts = _rows_of(self.h, slope, start.expand(self.h.shape))
        reached = None if values is None else values.view(-1, values.shape[-1])
        known = None if self.output is None else _rows_of(self.output)[0]
        for rows in _parts(h):
            output = self.compute(h[rows]) if known is None else known[rows]
            run = h[rows] - starts[rows]
            longer = run.abs().clamp_min_(shortest).copysign_(run)
            torch.div(output - self.compute(h[rows] - longer), longer, out=slopes[rows])
            if reached is not None:
                torch.addcmul(output, slopes[rows], run, value=-1, out=reached[rows])
        self.slope = slope

    def chord_from_constants(self, start: Tensor) -> None:
        """The same from constants, [units], and the tangent there where that is shorter than rounding allows."""
        shortest = _shortest(self.h.dtype)
        value, half = self.compute(start), shortest / 2
        tangent = (self.compute(start + half) - self.compute(start - half)) / shortest
        slope = torch.empty_like(self.h)
        h, output, slopes = _rows_of(self.h, self._value(), slope)
        for rows in _parts(h):
            run = h[rows] - start
            chord = (output[rows] - value).div_(run)
            torch.where(run.abs() < shortest, tangent, chord, out=slopes[rows])
        self.slope = slope

    def pull(self, gradient: Tensor, with_constants: bool) -> tuple[Tensor, Tensor | None]:
        """The derivative by h, and what the line's constant is multiplied with, summed over units [...]."""
        if self.through_origin:
            return self._pull_through_origin(gradient), None
        if self.slope is None:
            return gradient, None
        if torch._C._functorch.is_batchedtensor(gradient):
            pulled = gradient * self.slope
            return pulled, ((gradient * self._value() - pulled * self.h).sum(-1) if with_constants else None)
        pulled, constants = self.slope, None
        if with_constants:
            constants = gradient.new_empty(gradient.shape[:-1])
            sums = constants.view(-1)
        gradients, pulls = _rows_of(gradient, pulled)
        h, output = _rows_of(self.h, self._value()) if with_constants else (pulls, pulls)
        for rows in _parts(pulls):
            pulls[rows].mul_(gradients[rows])
            if with_constants:
                torch.sum((gradients[rows] * output[rows]).sub_(pulls[rows] * h[rows]), -1, out=sums[rows])
        self.slope = None
        return pulled, constants

    def release_point(self) -> None:
        """Let go of the model's point, when the line has its slope: only constants and replays need it."""
        self.h, self.output = self.h.new_empty(0, self.h.shape[-1]), None

    def _value(self) -> Tensor:
        return self.compute(self.h) if self.output is None else self.output

    def _pull_through_origin(self, gradient: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(gradient):
            return gradient * (self._value() / self.h).nan_to_num_(0.5)
        pulled = torch.empty_like(gradient)
        gradients, h, output, pulls = _rows_of(gradient, self.h, self._value(), pulled)
        for rows in _parts(h):
            torch.div(output[rows], h[rows], out=pulls[rows]).nan_to_num_(0.5).mul_(gradients[rows])
        return pulled

    def replay(self, h: Tensor) -> Tensor:
        """The line's value at other points; the first of them are its chord's start where it has no slope yet."""
        if self.slope is None:
            values = torch.empty_like(self.h)
            self.chord_from(h, values)
            return values
        return self._value() + self.slope * (h - self.h)


def _rows_of(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.reshape(-1, tensor.shape[-1]) for tensor in tensors)


def _parts(rows: Tensor) -> Iterator[slice]:
    """Slices of rows that fit into a CPU's cache, or all of them."""
    size = max(1, UNITS_AT_ONCE // rows.shape[1]) if rows.device.type == "cpu" else len(rows)
    return (slice(first, first + size) for first in range(0, len(rows), size))


def _shortest(dtype: torch.dtype) -> float:
    """The length below which rounding spoils a chord's slope more than a tangent's curvature does."""
    return {torch.float64: 1e-5, torch.float32: 1e-2}.get(dtype, 0.1)


class WithConstant(Function):
    """A sum of which one part c is a constant, c * unit."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, unit: Tensor, constant: Tensor) -> Tensor:
        ctx.constant, ctx.texts = constant, len(unit)
        return output.clone()  # models add in place to what they have just added

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, per_text(gradient * ctx.constant, ctx.texts), None


class HeldAttention(Function):
    """sum_j alpha_ij v_j with alpha held: values [B, H, n, d_h] to the context [B, n, H, d_h]."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, context: Tensor, weights: HeldWeights) -> Tensor:
        ctx.weights = weights
        return context.view_as(context)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _Transposed.apply(gradient, ctx.weights), None, None


class _Transposed(Function):
    """sum_i alpha_ij g_i: from [B, n, H, d_h] to [B, H, n, d_h]; several labels' at once side by side."""

    @staticmethod
    def forward(gradient: Tensor, weights: HeldWeights) -> Tensor:
        return weights.transposed_product(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        """Nothing is differentiated twice."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, gradient: Tensor, weights: HeldWeights) -> tuple[Tensor, int]:
        labels, size = info.batch_size, gradient.shape[-1]
        side_by_side = gradient.movedim(in_dims[0], -2).flatten(-2)  # [B, n, H, labels * d_h]
        pulled = weights.transposed_product(side_by_side)
        return pulled.unflatten(-1, (labels, size)).movedim(-2, 0), 0
