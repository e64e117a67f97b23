"""What every kernel's launcher shares: the ranges of real tokens, argument checks, the launch itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .interpreter import interpret

BLOCK = 64  # tokens a block in the arrays of layouts.py; a map's tiles divide it
MAX_HEADS, HEAD_DIMS, MAX_TOKENS, MAX_HIDDEN_SIZE = 32, (16, 128), 131072, 4096
MAX_TEXTS = 65535  # of a batch: what a grid takes
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SLOW_COMPILATION = 2.0  # seconds after which a compilation says that it is one


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(size: int) -> int:
    """The smallest power of two from 16 on, which products of tiles need, that holds `size`."""
    return max(16, 1 << (size - 1).bit_length())


class TokenRanges:
    """The real tokens of a batch, looked at once and shared by every kernel of a forward pass.

    Attributes:
        mask: 1 at real tokens, [batch, n], int8.
        ranges: first real token, last one + 1, and whether there is padding between, [batch, 3], int32.

    Args:
        attention_mask: True at real tokens, [batch, n], bool.

    Example:
        >>> TokenRanges(torch.tensor([[True, True, False]])).ranges
        tensor([[0, 2, 0]], dtype=torch.int32)
    """

    def __init__(self, attention_mask: Tensor):
        expect(attention_mask, "attention_mask", ("batch", "n"), (torch.bool,))
        if len(attention_mask) > MAX_TEXTS:
            raise ValueError(f"attention_mask must be of at most {MAX_TEXTS} texts, got {len(attention_mask)}")
        self.mask = attention_mask.contiguous().view(torch.int8)
        n = attention_mask.shape[1]
        first = self.mask.argmax(1)
        last = n - self.mask.flip(1).argmax(1)
        holes = last - first != attention_mask.sum(1)
        self.ranges = torch.stack([first, last, holes], 1).to(torch.int32)

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, n)."""
        return self.mask.shape[0], self.mask.shape[1]

    def to(self, device: torch.device) -> TokenRanges:
        """The same on another device."""
        if device == self.mask.device:
            return self
        moved = object.__new__(TokenRanges)
        moved.mask, moved.ranges = self.mask.to(device), self.ranges.to(device)
        return moved


def expect(
    tensor: Any,
    name: str,
    shape: Sequence[int | str],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
) -> None:
    """Raises where `tensor` is not what a kernel reads; a name in `shape` stands for any size.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape or device, or none of a dimension.
    """
    alike = isinstance(tensor, Tensor) and tensor.shape == shape and tensor.dtype in dtypes
    if alike and (device is None or tensor.device == device):
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(dtype) for dtype in dtypes)}, got {tensor.dtype}")
    fits = len(shape) == tensor.ndim and all(
        size == given if isinstance(size, int) else given > 0 for size, given in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape [{', '.join(map(str, shape))}], got {list(tensor.shape)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def expect_heads(tensor: Tensor, name: str, tokens: TokenRanges, like: Tensor | None = None) -> None:
    """Raises where queries, keys or values [batch, heads, n, head_dim] cannot be read by the kernels."""
    expect(tensor, name, ("batch", "heads", "n", "head_dim"), DTYPES if like is None else (like.dtype,))
    _, heads, n, head_dim = tensor.shape
    if like is not None and tensor.shape != like.shape:
        raise ValueError(f"{name} must have the other tensors' shape {list(like.shape)}, got {list(tensor.shape)}")
    if heads > MAX_HEADS:
        raise ValueError(f"{name} must have 1 to {MAX_HEADS} heads, got {heads}; use backend='torch'")
    if not HEAD_DIMS[0] <= head_dim <= HEAD_DIMS[1]:
        raise ValueError(
            f"{name} must have heads of size {HEAD_DIMS[0]} to {HEAD_DIMS[1]}, got {head_dim}; use backend='torch'"
        )
    if n > MAX_TOKENS:
        raise ValueError(f"{name} must have at most {MAX_TOKENS} tokens, got {n}")
    if (tensor.shape[0], n) != tokens.shape:
        raise ValueError(f"{name} must have the mask's batch and tokens {list(tokens.shape)}, got {list(tensor.shape)}")
    if tensor.device != tokens.mask.device:
        raise ValueError(f"{name} must be on {tokens.mask.device} like attention_mask, got {tensor.device}")


def expect_scores(scaling: float, window: int | None) -> None:
    """Raises where a factor of scores or a window is none."""
    if not isinstance(scaling, float | int) or not 0 < scaling < float("inf"):
        raise ValueError(f"scaling must be a positive number, got {scaling!r}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
        raise ValueError(f"window must be None or a number of tokens of at least 0, got {window!r}")


def heads_last(tensor: Tensor) -> Tensor:
    """[batch, heads, n, head_dim] as [batch, n, heads, head_dim] with a token's heads side by side in memory.

    That is how a projection leaves them, so there is seldom anything to copy.
    """
    tensor = tensor.transpose(1, 2)
    batch, n, heads, head_dim = tensor.shape
    side_by_side = tensor.stride(3) == 1 and (heads == 1 or tensor.stride(2) == head_dim)
    # texts one behind the other: a batch's stride of its own would be another compilation for another length
    in_a_row = n == 1 or batch == 1 or tensor.stride(0) == n * tensor.stride(1)
    usable = side_by_side and in_a_row and n > 1 and tensor.stride(1) * BLOCK < 2**31
    return tensor if usable else tensor.contiguous()


_launched: set[tuple] = set()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel on its tensors' device; says so where a first compilation takes long."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cpu":
        interpret(kernel, grid, args, options)
        return
    dtypes = tuple(arg.dtype for arg in args if isinstance(arg, Tensor))
    case = (kernel, device, dtypes, *sorted(options.items()))
    with torch.cuda.device(device):
        if case in _launched:
            kernel[grid](*args, **options)
            return
        note = threading.Timer(SLOW_COMPILATION, _say_compiling, [kernel, options])
        note.daemon = True
        note.start()
        try:
            kernel[grid](*args, **options)
        finally:
            note.cancel()
        _launched.add(case)


def _say_compiling(kernel: Any, options: dict[str, Any]) -> None:
    shape = f" for {options['H']} heads of size {options['D']}" if "D" in options else ""
    name = getattr(kernel, "__name__", "kernel").strip("_")
    print(f"globenc: compiling {name}{shape}, once for a model shape; Triton keeps it on disk", file=sys.stderr)
