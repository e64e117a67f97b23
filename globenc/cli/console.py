"""What a command prints besides its result, and how errors and warnings become one sentence each."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import typer
from rich.text import Text

from .. import printing
from ..printing import escaped, printable
from ..render.console import Console

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
_PACKAGE = str(Path(__file__).parents[1])
# The class of every wrong use. Typer 0.29 carries its own click and has no public name for that one's UsageError;
# click.UsageError is another class, which would catch nothing.
UsageError: type[Any] = typer.BadParameter.__mro__[1]


@contextlib.contextmanager
def errors_in_a_line() -> Iterator[None]:
    """Errors that can be foreseen become one sentence and exit code 1."""
    try:
        yield
    except (BrokenPipeError, UsageError):
        raise
    except MemoryError:
        say("error", "out of memory: try a shorter --max-length")
        raise typer.Exit(FAILED) from None
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        say("error", _sentence(error))
        raise typer.Exit(FAILED) from None


def _sentence(error: Exception) -> str:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the GPU: try --device cpu, a shorter --max-length or --dtype float16"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """globenc's own warnings as one line each; those of other packages are not for the user of a command."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename.startswith(_PACKAGE):
            say("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def status(doing: str) -> Iterator[None]:
    """A moving line on a terminal's standard error while something takes its time."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(printable(doing)), spinner="line" if console.options.ascii_only else "dots"):
        yield


def say(kind: str, sentence: str) -> None:
    printing.say(f"globenc: {kind}: {sentence}" if kind != "wrote" else f"globenc: wrote {sentence}")


def print_json(line: str) -> None:
    """JSON is UTF-8 whatever the terminal is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(f"{escaped(line)}\n".encode())
    sys.stdout.buffer.flush()


def quiet() -> None:
    """Other packages' progress bars and remarks are not for the user of a command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def check_device(device: str) -> None:
    """Refuse a device that torch does not know (wrong usage) or that this machine lacks (RuntimeError)."""
    import torch

    try:
        torch_device = torch.device(device)
    except RuntimeError:
        raise UsageError(f"unknown device {device!r}: use cpu, cuda or cuda:0") from None
    try:
        torch.empty(1, device=torch_device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RuntimeError(f"no device {device!r} here: {_first_line(error)}") from None
