"""Triton's interpreter: runs a kernel on CPU tensors, slowly, so that its arithmetic can be checked without a GPU."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_running = threading.Lock()  # Triton's interpreter keeps its state in globals


def interpret(kernel: Any, grid: tuple[int, ...], args: tuple, options: dict[str, Any]) -> None:
    """Run a kernel; the interpreter knows no bfloat16 products, so those tensors go as float32."""
    given = list(args)
    for i, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.dtype == torch.bfloat16:
            memory = torch.empty(0, dtype=arg.dtype).set_(arg.untyped_storage()).float()
            given[i] = memory.as_strided(arg.shape, arg.stride(), arg.storage_offset())
    _accept_new_numpy()
    with _running, _language_prepared_once(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what is computed and not used
        kernel[grid](*given, **options)
    for arg, computed in zip(args, given, strict=True):
        if arg is not computed and not torch.equal(arg.float().view(torch.int32), computed.view(torch.int32)):
            arg.copy_(computed)


class _Prepared:
    """Stands for the record of changes to Triton's language that a launch undoes when it ends."""

    def restore(self) -> None:
        """Nothing: `_language_prepared_once` does it."""


@contextlib.contextmanager
def _language_prepared_once() -> Iterator[None]:
    """Exchanges the functions of triton.language for interpreted ones once for each module of a launch.

    Triton does it again for every call from one jit function to another, which takes most of a kernel's time.
    """
    from triton.runtime import interpreter

    prepare: Callable[[Any], Any] = interpreter._patch_lang
    changes: dict[int, Any] = {}

    def prepare_once(function: Any) -> _Prepared:
        module = id(function.__globals__)
        if module not in changes:
            changes[module] = prepare(function)
        return _Prepared()

    interpreter._patch_lang = prepare_once
    try:
        yield
    finally:
        interpreter._patch_lang = prepare
        for change in reversed(changes.values()):
            if change is not None:  # no record before Triton 3.6
                change.restore()


@functools.cache
def _accept_new_numpy() -> None:
    """Triton's interpreter before 3.7 takes arrays of one element for numbers, which NumPy 2.4 does no longer."""
    import triton
    from triton.runtime import interpreter

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 7):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def with_plain_index(tensor: Any, *scope: Any) -> None:  # a scope to undo it by: not before 3.6
        patch_tensor(tensor, *scope)
        set_attribute = scope[0].set_attr if scope else setattr
        set_attribute(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_plain_index
