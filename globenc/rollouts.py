"""Rollout (12): R_1 = A_1, R_l = A_l R_{l-1}, for chosen rows from the top down, or for whole matrices.

Un-normalised products grow as c^L, so every row of a product is carried as a mantissa times a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .contributions.layer_map import LayerMap, RolloutLayer, normalize_rows, whole

NAMED_POSITIONS = ("cls", "mean", "all")
POSITIONS = '"cls", "mean", "all", a token position, a non-empty list of positions or a weight tensor'

Position = str | int | Sequence[int] | Tensor


@dataclass(frozen=True)
class RequestedRows:
    """Which rows of R_L are asked for.

    Attributes:
        positions: columns of the batch where the tokens asked for stand, [B, m]; None for weights.
        weights: what was asked for as weighted sums of rows, [B, m, n], times a power of two.
        log2_scale: that power, to be added to the result's, [B, m].
        single: one row a text was asked for, so the result has no dimension for rows.
    """

    positions: Tensor | None
    weights: Tensor
    log2_scale: Tensor
    single: bool


def check_position(position: Position, n: int, many: bool = False) -> None:
    """Whether `position` can be asked of a text of n tokens; `many`: it is asked of several texts at once.

    Raises:
        TypeError: neither a name, nor positions, nor weights.
        ValueError: an unknown name, a position outside the text, weights of the wrong shape or value.
    """
    if isinstance(position, str):
        if position not in NAMED_POSITIONS:
            raise ValueError(f"position must be {POSITIONS}; got {position!r}")
    elif isinstance(position, Tensor):
        if many:
            raise ValueError("position weights belong to one text: give one text at a time, or positions, or a name")
        if position.ndim not in (1, 2, 3) or position.shape[-1] != n:
            raise ValueError(f"position weights must end in the text's {n} tokens, got shape {list(position.shape)}")
    else:
        for index in _positions(position):
            if not -n <= index < n:
                raise ValueError(
                    f"position must be a token position inside the text, got {index} for {n} tokens "
                    f"(positions 0 to {n - 1}, or -{n} to -1 from the end)"
                )


def plain_position(position: Position) -> Position:
    """The same with Python's integers, as results and renderings keep it."""
    if isinstance(position, str | Tensor):
        return position
    positions = _positions(position)
    return positions[0] if isinstance(position, Integral) else positions


def _positions(position: Any) -> list[int]:
    """A position or a list of them as a list."""
    listed = [position] if isinstance(position, Integral) else position
    is_list = isinstance(listed, Sequence) and not isinstance(listed, str | bytes) and len(listed) > 0
    if not is_list or not all(isinstance(t, Integral) and not isinstance(t, bool) for t in listed):
        raise TypeError(f"position must be {POSITIONS}; got {position!r}")
    return [int(position) for position in listed]


def requested_rows(position: Position, mask: Tensor, dtype: torch.dtype) -> RequestedRows:
    """What a `position` argument means for texts with real tokens `mask` [B, n]; "all" is not handled here.

    Raises:
        TypeError, ValueError: as `check_position`, for the shortest text.
    """
    if isinstance(position, Tensor):
        return _weighted(position, mask, dtype)
    check_position(position, int(mask.sum(-1).min()))
    if position == "mean":
        weights = mask.to(dtype) / mask.sum(-1, keepdim=True).to(dtype)
        return RequestedRows(None, weights[:, None], weights.new_zeros(len(mask), 1), single=True)
    wanted = torch.tensor([0] if position == "cls" else _positions(position), device=mask.device)
    wanted = wanted.expand(mask.shape[0], -1)
    wanted = torch.where(wanted < 0, wanted + mask.sum(-1, keepdim=True), wanted)
    # the k-th real token: padding may stand on either side
    real_first = (~mask).to(torch.int8).argsort(dim=-1, stable=True)
    positions = real_first.gather(-1, wanted)
    weights = torch.zeros(*positions.shape, mask.shape[1], dtype=dtype, device=mask.device)
    weights.scatter_(-1, positions[..., None], 1)
    return RequestedRows(positions, weights, weights.new_zeros(positions.shape), isinstance(position, str | Integral))


def _weighted(position: Tensor, mask: Tensor, dtype: torch.dtype) -> RequestedRows:
    batch, n = mask.shape
    weights = position.detach().to(device=mask.device, dtype=torch.float64)
    single = weights.ndim < 3
    if weights.ndim == 1:
        weights = weights[None, None]
    elif weights.ndim == 2:
        weights = weights[:, None]
    if weights.ndim != 3 or weights.shape[0] not in (1, batch) or weights.shape[2] != n or weights.shape[1] == 0:
        raise ValueError(
            f"position weights must have shape [n], [batch, n] or [batch, positions, n] with batch={batch}, n={n}; "
            f"got {list(position.shape)}"
        )
    weights = weights.expand(batch, -1, -1) * mask[:, None]
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()):
        raise ValueError("position weights must be finite and not negative")
    if not bool((weights.sum(-1) > 0).all()):
        raise ValueError("position weights must have a positive sum over the real tokens of every text")
    weights, scale = rescale(weights, torch.zeros(weights.shape[:2], dtype=torch.float64, device=mask.device))
    return RequestedRows(None, weights.to(dtype), scale, single)


def rescale(rows: Tensor, log2_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's power of two from the numbers [..., n] into its scale [...]; exact."""
    exponent = torch.frexp(rows.amax(-1)).exponent
    return torch.ldexp(rows, -exponent[..., None]), log2_scale + exponent


def full_map(layer: LayerMap, row_normalize: bool = False) -> Tensor:
    """The whole local map, [B, n, n]."""
    local = whole(layer)
    return normalize_rows(local) if row_normalize else local


def top_down(
    top: Tensor, rows: RequestedRows, below: Iterable[RolloutLayer], row_normalize: bool, per_layer: bool
) -> tuple[Tensor, Tensor]:
    """The requested rows of R_l, from the last layer's rows `top` [B, m, n] down through the layers `below`.

    Args:
        below: the other layers, from the last but one to the first.
        per_layer: also the rollout up to every layer: the requested rows enter the same pass again at each layer.

    Returns:
        Mantissa [G, B, m, n] and log2 scale [G, B, m], float64, where G is 1 (the whole rollout) or, with `per_layer`,
        the number of layers, the first layer first.
    """
    batch, count, n = top.shape
    scale = torch.zeros(batch, count, dtype=torch.float64, device=top.device)
    block, scale = rescale(top, scale)
    for layer in below:
        if per_layer:
            block = torch.cat([rows.weights.to(block), block], 1)
            scale = torch.cat([torch.zeros(batch, count, dtype=scale.dtype, device=scale.device), scale], 1)
        block = layer.through(block, row_normalize)
        block, scale = rescale(block, scale.to(block.device))
    block = block.view(batch, -1, count, n).transpose(0, 1)
    scale = scale.view(batch, -1, count).transpose(0, 1).to(rows.log2_scale.device)
    return block.to(scale.device), scale + rows.log2_scale


def rollout(maps: Tensor, row_normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Rollout of whole maps up to every layer (12): R_1 = A_1, R_l = A_l R_{l-1}.

    No identity is added. The default normalises nothing, as the paper does.

    Args:
        maps: local maps, [layers, ..., n, n], rows are queries; floating point, not negative.
        row_normalize: divide every row of every map by its sum first.

    Returns:
        mantissa [layers, ..., n, n] and log2_scale [layers, ..., n] (float64): R_l = mantissa * 2**log2_scale
        for each row, so that no depth overflows.

    Raises:
        TypeError: `maps` is not a floating-point tensor.
        ValueError: its shape is not [layers, ..., n, n] with at least one layer.

    Example:
        >>> import torch, globenc
        >>> mantissa, log2_scale = globenc.rollout(torch.full((12, 2, 5, 5), 1e6))
        >>> mantissa.shape, log2_scale.shape
        (torch.Size([12, 2, 5, 5]), torch.Size([12, 2, 5]))
    """
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        got = f"a {maps.dtype} tensor" if isinstance(maps, Tensor) else type(maps).__name__
        raise TypeError(f"maps must be a floating-point torch tensor, got {got}")
    if maps.ndim < 3 or maps.shape[-1] != maps.shape[-2] or maps.shape[0] == 0 or maps.shape[-1] == 0:
        raise ValueError(f"maps must have shape [layers, ..., n, n], got {list(maps.shape)}")
    mantissas, scales = [], []
    mantissa, scale = None, torch.zeros(maps.shape[1:-1], dtype=torch.float64, device=maps.device)
    for local in maps:
        mantissa, scale = multiply(normalize_rows(local) if row_normalize else local, mantissa, scale)
        mantissas.append(mantissa)
        scales.append(scale)
    return torch.stack(mantissas), torch.stack(scales)


def multiply(local: Tensor, mantissa: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """A_l R_{l-1} for R_{l-1} = mantissa * 2**scale row by row; A_1 itself where there is no mantissa yet."""
    if mantissa is None:
        return rescale(local, scale)
    # rows of R_{l-1} have scales of their own: bring them to the largest before they are added up; a row of zeros
    # (padding) has none
    top = scale.masked_fill(mantissa.amax(-1) == 0, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top.isinf(), 0)
    local, scale_of_local = rescale(local, top.expand_as(scale))
    shift = (scale - top).clamp(min=-16000, max=0).to(torch.int32)
    return rescale(local @ torch.ldexp(mantissa, shift[..., None]), scale_of_local)
