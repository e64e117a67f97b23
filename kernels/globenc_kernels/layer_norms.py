"""What is O(n d) of a layer: the rows' LayerNorm scales, and norms of vectors sent through the LayerNorms' linear part.

One program a token, the token's whole vector at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import DTYPES, MAX_HIDDEN_SIZE, TokenRanges, expect, launch, power_of_two


@triton.jit
def _load(ptr, row, offs, size, stride):
    return tl.load(ptr + row * stride + offs, mask=offs < size, other=0.0).to(tl.float32)


@triton.jit
def _inverse_deviation(y, inside, d, eps):
    centred = tl.where(inside, y - tl.sum(y) / d, 0.0)
    return 1.0 / tl.sqrt_rn(tl.sum(centred * centred) / d + eps)


@triton.jit
def _layer_scales_kernel(
    x_ptr,  # [batch * n, d]
    y1_ptr,  # [batch * n, d]
    y2_ptr,  # [batch * n, d]
    context_ptr,  # [batch * n, width]
    direction_ptr,  # [d]
    projected_ptr,  # [width]
    bias_ptr,  # [d], read if BIAS
    mask_ptr,  # [batch * n]
    scale1_ptr,  # out, [batch * n]
    scale2_ptr,  # out, [batch * n]
    gap_ptr,  # out, [batch * n]
    d, width, eps1, eps2,
    BIAS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Both scales and the gap of one token."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < d
    y1 = _load(y1_ptr, row, offs, d, d)
    scale1 = _inverse_deviation(y1, inside, d, eps1)
    tl.store(scale1_ptr + row, scale1)
    y2 = _load(y2_ptr, row, offs, d, d)
    tl.store(scale2_ptr + row, scale1 * _inverse_deviation(y2, inside, d, eps2))
    x = _load(x_ptr, row, offs, d, d)
    offs_w = tl.arange(0, BLOCK_W)
    context = _load(context_ptr, row, offs_w, width, width)
    direction = _load(direction_ptr, 0, offs, d, 0)
    attended = tl.sum(context * _load(projected_ptr, 0, offs_w, width, 0))
    added = x
    if BIAS:
        added += _load(bias_ptr, 0, offs, d, 0)
    gap = tl.abs(tl.sum(y1 * direction) - tl.sum(added * direction) - attended)
    size = (tl.sqrt(tl.sum(x * x)) + tl.sqrt(tl.sum(y1 * y1))) * tl.sqrt(tl.sum(direction * direction) / d)
    tl.store(gap_ptr + row, tl.where((size == 0) | (tl.load(mask_ptr + row) == 0), 0.0, gap / size))


@dataclass(frozen=True)
class LayerScales:
    """What the LayerNorms multiply every contribution to a token by, and how well the layer's parts add up.

    Attributes:
        scale1: 1 / s1_i, the factor of LayerNorm 1, [batch, n], float32.
        scale2: 1 / (s1_i s2_i), the factor of both LayerNorms, [batch, n], float32.
        gap: |p . (y1_i - (x_i + W_O c_i + b_O))| for what entered LayerNorm 1, y1, the residual x, the context c and a
            direction p, divided by (||x_i|| + ||y1_i||) ||p|| / sqrt(d), the mean size of such a product; zero at
            padding; [batch, n], float32.
    """

    scale1: Tensor
    scale2: Tensor
    gap: Tensor


def layer_scales(
    hidden_states: Tensor,
    norm_inputs: tuple[Tensor, Tensor],
    eps: tuple[float, float],
    context: Tensor,
    check_direction: tuple[Tensor, Tensor],
    bias: Tensor | None,
    tokens: TokenRanges,
) -> LayerScales:
    """1 / s_i = 1 / sqrt(var + eps) of what entered both LayerNorms, (6), (7), (11), and whether all of it is known.

    Args:
        hidden_states: the residual, [batch, n, d].
        norm_inputs: what entered LayerNorm 1 and 2, [batch, n, d] each.
        eps: the two LayerNorms' eps.
        context: what entered the output projection, [batch, n, width].
        check_direction: any direction p, [d], and p W_O, [width], float32, along which `gap` is measured.
        bias: b_O, [d], or None.
        tokens: the real tokens.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device; the message names it.

    Example:
        >>> x = torch.randn(2, 100, 768, device="cuda")
        >>> p, tokens = torch.ones(768, device="cuda"), TokenRanges(torch.ones(2, 100, dtype=torch.bool, device="cuda"))
        >>> layer_scales(x, (x, x), (1e-12, 1e-12), x, (p, p), None, tokens).gap.shape
        torch.Size([2, 100])
    """
    expect(hidden_states, "hidden_states", ("batch", "n", "d"), DTYPES)
    batch, n, d = hidden_states.shape
    device, single = hidden_states.device, (torch.float32,)
    _expect_width(d, "hidden_states")
    for name, tensor in zip(("norm_inputs[0]", "norm_inputs[1]"), norm_inputs, strict=True):
        expect(tensor, name, (batch, n, d), DTYPES, device)
    expect(context, "context", (batch, n, "width"), DTYPES, device)
    width = context.shape[2]
    _expect_width(width, "context")
    direction, projected = check_direction
    expect(direction, "check_direction[0]", (d,), single, device)
    expect(projected, "check_direction[1]", (width,), single, device)
    if bias is not None:
        expect(bias, "bias", (d,), DTYPES, device)
    if tokens.shape != (batch, n) or tokens.mask.device != device:
        raise ValueError(
            f"tokens must be those of hidden_states, [batch, n] = {[batch, n]} on {device}, got {list(tokens.shape)} "
            f"on {tokens.mask.device}"
        )
    # one by one: parts of one tensor would start where no compiled kernel expects it
    scale1, scale2, gap = (torch.empty(batch, n, dtype=torch.float32, device=device) for _ in range(3))
    y1, y2 = norm_inputs
    launch(
        _layer_scales_kernel,
        (batch * n,),
        hidden_states.contiguous(), y1.contiguous(), y2.contiguous(), context.contiguous(), direction.contiguous(),
        projected.contiguous(), direction if bias is None else bias.contiguous(), tokens.mask,
        scale1, scale2, gap, d, width, *map(float, eps), BIAS=bias is not None,
        BLOCK=power_of_two(d), BLOCK_W=power_of_two(width), num_warps=_warps(max(d, width)), num_stages=1,
    )  # fmt: skip
    return LayerScales(scale1, scale2, gap)


def _warps(width: int) -> int:
    return 4 if width <= 1024 else 8


def _expect_width(width: int, name: str) -> None:
    if width > MAX_HIDDEN_SIZE:
        raise ValueError(f"{name} must be at most {MAX_HIDDEN_SIZE} wide, got {width}; use backend='torch'")


@triton.jit
def _stage_norms_kernel(
    y_ptr,  # [batch * n, d]
    x_ptr,  # [batch * n, d], read if RESIDUAL
    gamma1_ptr,  # [d], read if NORMS >= 1
    gamma2_ptr,  # [d], read if NORMS >= 2
    scale_ptr,  # [batch * n], read if SCALED
    norm_ptr,  # out, [batch * n]
    d,
    RESIDUAL: tl.constexpr, SCALED: tl.constexpr, NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The norm of one token."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < d
    y = _load(y_ptr, row, offs, d, d)
    if RESIDUAL:
        y += _load(x_ptr, row, offs, d, d)
    if NORMS >= 1:
        y = tl.where(inside, y - tl.sum(y) / d, 0.0) * _load(gamma1_ptr, 0, offs, d, 0)
    if NORMS >= 2:
        y = tl.where(inside, y - tl.sum(y) / d, 0.0) * _load(gamma2_ptr, 0, offs, d, 0)
    largest = tl.max(tl.abs(y))
    largest = tl.where(largest == 0, 1.0, largest)  # no square leaves float32's range
    y = y / largest
    norm = tl.sqrt_rn(tl.sum(y * y)) * largest
    if SCALED:
        norm = norm * tl.load(scale_ptr + row)
    tl.store(norm_ptr + row, norm)


def stage_norms(
    vectors: Tensor, residual: Tensor | None, gammas: tuple[Tensor, ...], scale: Tensor | None = None
) -> Tensor:
    """scale_i ||M (y_i + x_i)||, M = diag(gamma2) C diag(gamma1) C as far as `gammas` go; [batch, n], float32.

    Args:
        vectors: y, [batch, n, d].
        residual: x, [batch, n, d], or None.
        gammas: LayerNorm weights to go through, none, one or two, [d] each, float32.
        scale: [batch, n], float32; None: 1.

    Raises:
        TypeError, ValueError: an argument of another shape, dtype or device; the message names it.

    Example:
        >>> stage_norms(torch.randn(2, 100, 768, device="cuda"), None, ()).shape
        torch.Size([2, 100])
    """
    expect(vectors, "vectors", ("batch", "n", "d"), DTYPES)
    batch, n, d = vectors.shape
    _expect_width(d, "vectors")
    if residual is not None:
        expect(residual, "residual", (batch, n, d), DTYPES, vectors.device)
    if len(gammas) > 2:
        raise ValueError(f"gammas must be at most two, got {len(gammas)}")
    for i, gamma in enumerate(gammas):
        expect(gamma, f"gammas[{i}]", (d,), (torch.float32,), vectors.device)
    if scale is not None:
        expect(scale, "scale", (batch, n), (torch.float32,), vectors.device)
    result = torch.empty(batch, n, dtype=torch.float32, device=vectors.device)
    vectors = vectors.contiguous()
    gamma1, gamma2 = (*(gamma.contiguous() for gamma in gammas), result, result)[:2]
    launch(
        _stage_norms_kernel,
        (batch * n,),
        vectors, vectors if residual is None else residual.contiguous(), gamma1, gamma2,
        result if scale is None else scale.contiguous(), result, d,
        RESIDUAL=residual is not None, SCALED=scale is not None, NORMS=len(gammas),
        BLOCK=power_of_two(d), num_warps=_warps(d), num_stages=1,
    )  # fmt: skip
    return result
