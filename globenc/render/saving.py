"""Figures that show and save themselves: their text stays text, and what no installed font has is warned of once."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from ..errors import warn_caller

# TrueType fonts, which journals take and editors can edit, instead of Type 3; letters of an SVG instead of outlines
_TEXT_AS_TEXT: Any = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none"}


class ResultFigure(Figure):
    """A matplotlib figure that a notebook shows as it is, with `%matplotlib inline` or without."""

    def savefig(self, fname: Any, **options: Any) -> None:
        """As matplotlib's, with fonts embedded as TrueType in a PDF and letters as text in an SVG."""
        with matplotlib.rc_context(_TEXT_AS_TEXT):
            super().savefig(fname, **options)

    def _repr_png_(self) -> bytes:
        sink = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            self.savefig(sink, format="png", dpi=100, bbox_inches="tight")
        return sink.getvalue()


def check_ending(path: str | Path) -> None:
    """Whether matplotlib writes such files.

    Raises:
        ValueError: it does not, or the file has no ending; the message lists those it writes.
    """
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix.lower().removeprefix(".") not in known:
        raise ValueError(f"picture {str(path)!r} must end in one of .{', .'.join(known)}")


def save(drawn: Figure, path: str | Path) -> None:
    """Write the figure; characters that no installed font has are warned of once, not one by one.

    Raises:
        ValueError: as `check_ending`.
    """
    check_ending(path)
    with warnings.catch_warnings(record=True) as caught, matplotlib.rc_context(_TEXT_AS_TEXT):
        warnings.simplefilter("always")
        drawn.savefig(path, dpi=150, bbox_inches="tight")
    missing = {str(warning.message) for warning in caught if "missing from font" in str(warning.message)}
    for warning in caught:
        if str(warning.message) not in missing:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if missing:
        warn_caller(
            f"{Path(path).name} has boxes in place of {len(missing)} of the characters: no installed font has them"
        )


def check_axes(ax: Any) -> None:
    """Whether something can be drawn into.

    Raises:
        TypeError: it is no matplotlib Axes.
    """
    if not isinstance(ax, matplotlib.axes.Axes):
        raise TypeError(f"ax must be a matplotlib Axes, got {type(ax).__name__}")
