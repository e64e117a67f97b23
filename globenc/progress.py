"""How far a run is: one moving line on a terminal, else a plain line now and then; on standard error, or nowhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from .printing import say
from .render.console import Console

EVERY = 10.0  # seconds between plain lines
L = TypeVar("L", bound="_Line")


class _Line:
    """What is shown of a run: a bar where standard error is a terminal, else a line every EVERY seconds."""

    def __init__(self, shown: bool):
        self._console = Console(stderr=True)
        self._shown = shown
        self._bar: Progress | None = None
        if shown and self._console.is_terminal:
            self._bar = Progress(*self._columns(), console=self._console, transient=True)
        self._start = self._printed = time.monotonic()

    def _columns(self) -> tuple[ProgressColumn, ...]:
        raise NotImplementedError

    def __enter__(self: L) -> L:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _is_due(self) -> bool:
        """Whether a plain line is to be printed now."""
        if not self._shown or self._bar is not None or time.monotonic() - self._printed < EVERY:
            return False
        self._printed = time.monotonic()
        return True


class Meter(_Line):
    """Rows, tokens a second, time left of an extraction.

    Args:
        shown: whether to print anything.
    """

    def __init__(self, shown: bool = True):
        super().__init__(shown)
        self.done = self.skipped = self.tokens = 0
        self._total: float | None = None  # rows of the whole input, by how much of it the rows so far are

    def _columns(self) -> tuple[ProgressColumn, ...]:
        spinner = SpinnerColumn("line" if self._console.options.ascii_only else "dots")
        return spinner, BarColumn(bar_width=24), TextColumn("{task.description}")

    def __enter__(self) -> Meter:
        if self._bar is not None:
            self._task = self._bar.add_task("reading", total=None)
        return super().__enter__()

    def skip(self, rows: int, end_row: int, fraction: float | None) -> None:
        """Rows that were done before."""
        self.skipped += rows
        self.reach(end_row, fraction)

    def reach(self, end_row: int, fraction: float | None) -> None:
        """The rows up to one are this much of the input."""
        if fraction:
            self._total = end_row / fraction

    def advance(self, texts: int, tokens: int) -> None:
        """A batch is done."""
        self.done += texts
        self.tokens += tokens
        if self._bar is not None:
            done = min(self.skipped + self.done, self._total or 0)
            self._bar.update(self._task, description=self.line(), total=self._total, completed=done)
        elif self._is_due():
            say(f"globenc: {self.line()}")

    def line(self) -> str:
        """Where the run is, in words."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        before = f" ({self.skipped:,} done before)" if self.skipped else ""
        parts = [
            f"{self.done:,} rows{before}",
            f"{self.tokens / seconds:,.0f} tokens/s",
            f"{self.done / seconds:,.0f} rows/s",
        ]
        if self._total is not None and self.done:
            left = int(max(self._total - self.skipped - self.done, 0) * seconds / self.done)
            parts.append(f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}")
        return ", ".join(parts)


class Steps(_Line):
    """The steps of an evaluation, each with so many things to do.

    Args:
        shown: whether to print anything.
    """

    def __init__(self, shown: bool = True):
        super().__init__(shown)
        self._step, self._done, self._total = "", 0, 0

    def _columns(self) -> tuple[ProgressColumn, ...]:
        description = TextColumn("{task.description}")
        return description, BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()

    def begin(self, step: str, total: int) -> None:
        """The next step has so many things to do."""
        self._step, self._done, self._total = step, 0, total
        if self._bar is not None:
            self._task = self._bar.add_task(step, total=total)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._is_due():
            say(f"globenc: {self._step} {self._done:,} of {self._total:,}")
