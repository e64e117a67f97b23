"""What goes wrong: whose fault an error is, one text's or that of machine and programme, and what it says in a line."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_MACHINE = (OSError, MemoryError, ImportError, Warning, torch.OutOfMemoryError)
_MEMORY = re.compile(  # as PyTorch's allocators, oneDNN and C++ say it in RuntimeErrors
    "out of memory|(can't|cannot|could not|unable to|failed to) (allocate|mmap)|DefaultCPUAllocator|bad[_ ]alloc|"
    "could not create a memory|mmap.*fail|fail.*mmap",
    re.IGNORECASE,
)
_DEVICE = re.compile("CUDA|CUBLAS|CUDNN|cuDNN|HIP error|NCCL|could not (create|execute) a primitive")
_KINDS = (FloatingPointError, TypeError, IndexError, RuntimeError)


def blames_text(error: BaseException) -> bool:
    """Whether an error may be a text's: whatever a tokenizer or a model raises, but for interrupts, exhausted memory,
    files, imports and the GPU."""
    if type(error).__name__ == "PanicException":  # of tokenizers in Rust; it is no Exception
        return True
    if not isinstance(error, Exception) or isinstance(error, _MACHINE):
        return False
    return not (isinstance(error, RuntimeError) and (_DEVICE.search(str(error)) or out_of_memory(error)))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short, the GPU's or the machine's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def in_a_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines() or [""]
    told = isinstance(error, ValueError | RuntimeError | FloatingPointError) and lines[0]
    return lines[0] if told else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def named(error: BaseException, text: str) -> Exception:
    """An error of the same kind that says which text it is about."""
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), ValueError)
    return kind(f"{text}: {in_a_line(error)}")


def warn_caller(message: str) -> None:
    """A UserWarning that names the line which called globenc, however deep inside it the cause was found.

    A command calls globenc as a program does: its own line is named, by which it knows what to show.
    """
    level = 1
    frame = sys._getframe()
    while frame.f_back is not None:
        package, _, rest = frame.f_globals.get("__name__", "").partition(".")
        if package != __package__ or rest.split(".")[0] == "cli":
            break
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def refuses_target(function: Callable[P, R]) -> Callable[P, R]:
    """A function that says to whoever passes `target=`, a class in Captum and others, which argument is meant."""

    @functools.wraps(function)
    def checked(*arguments: P.args, **options: P.kwargs) -> R:
        if "target" in options:
            target = options["target"]
            here = "" if "label" in inspect.signature(function).parameters else " of GlobEnc and globenc.class_scores"
            raise TypeError(
                f"{function.__qualname__} takes no 'target': position= says whose output vector is attributed ('cls', "
                f"'mean', 'all', a token's position), so position={target!r} where a token was meant; a class, as "
                f"elsewhere, is label={target!r}{here}, which class scores explain"
            )
        return function(*arguments, **options)

    return checked
