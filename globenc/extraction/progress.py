"""How far an extraction is: one moving line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from ..printing import say
from ..render.console import Console

EVERY = 10.0  # seconds between plain lines


class Meter:
    """Rows, tokens a second, time left; on standard error, or nowhere.

    Args:
        shown: whether to print anything.
    """

    def __init__(self, shown: bool = True):
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._shown = shown
        self._start = self._printed = time.monotonic()
        self.done = self.skipped = self.tokens = 0
        self._total: float | None = None  # rows of the whole input, by how much of it the rows so far are

    def __enter__(self) -> Meter:
        if self._shown and self._console.is_terminal:
            spinner = SpinnerColumn("line" if self._console.options.ascii_only else "dots")
            columns = (spinner, BarColumn(bar_width=24), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task("reading", total=None)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

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
        if not self._shown:
            return
        if self._bar is not None:
            done = min(self.skipped + self.done, self._total or 0)
            self._bar.update(self._task, description=self.line(), total=self._total, completed=done)
        elif time.monotonic() - self._printed >= EVERY:
            self._printed = time.monotonic()
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
