"""The console that everything is printed on which people read."""

from __future__ import annotations

from collections.abc import Iterable

import rich.console
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from ..printing import printable


class Console(rich.console.Console):
    """A rich console on which data steers nothing: no control characters, no markup, no emoji codes.

    Args:
        stderr: standard error instead of standard output.
    """

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it; line ends are the layout's, all else is made printable."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                text = "\n".join(printable(line) for line in segment.text.split("\n"))
                yield Segment(text, segment.style)
