"""How far an evaluation is."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..printing import say
from ..render.console import Console

_EVERY = 10.0  # seconds between plain lines of progress


class Steps:
    """How far an evaluation is: a bar on a terminal, a plain line now and then elsewhere; on standard error."""

    def __init__(self, shown: bool):
        console = Console(stderr=True)
        self._shown = shown
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True) if shown and console.is_terminal else None
        self._task: Any = None
        self._doing, self._done, self._total, self._printed = "", 0, 0, time.monotonic()

    def __enter__(self) -> Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, doing: str, total: int) -> None:
        """The next step has so many things to do."""
        self._doing, self._done, self._total = doing, 0, total
        if self._bar is not None:
            self._task = self._bar.add_task(doing, total=total)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._shown and time.monotonic() - self._printed >= _EVERY:
            self._printed = time.monotonic()
            say(f"globenc: {self._doing} {self._done:,} of {self._total:,}")
