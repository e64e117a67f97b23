"""An ImageAttribution as a figure and as HTML: the image beside class scores and the heat map over it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..methods import get_method
from ..printing import printable
from . import evidence_html
from .captions import prediction, wrapped
from .evidence import MINUS, Evidence, class_patches, image_evidence
from .page import render_cell, render_page
from .protocols import ImageResult
from .saving import ResultFigure, check_axes

_COLOURS = "inferno"
_AGAINST_TO_FOR = LinearSegmentedColormap.from_list("against_to_for", ["#d55e00", "#f7f7f7", "#2563eb"])
_SIDE = 3.6  # inches of a panel
_SIGNED = 0.3  # of the strongest patch; from here on patches carry their sign
_MOST_SIGNS = 60


def figure(attribution: ImageResult, ax: Any = None) -> Figure:
    """The image; where a label is explained, the image in grey under its patches' class scores; and for each position
    under its patches' scores.

    Args:
        ax: matplotlib Axes to draw the first of these maps into; its figure is returned.
    """
    count = 1 if attribution.scores.ndim == 1 else min(len(attribution.scores), 8)
    explained = image_evidence(attribution)
    maps: list[Any] = [lambda axes, k=k: _shares(axes, attribution, k) for k in range(count)]
    if explained is not None:
        maps.insert(0, lambda axes: _class_scores(axes, attribution, explained))
    if ax is not None:
        check_axes(ax)
        maps[0](ax)
        return ax.get_figure(root=True)
    height, width = attribution.image.shape[:2]
    size = (_SIDE * (len(maps) + 1) + 0.8, _SIDE * height / width + (0.9 if explained is None else 1.2))
    made = ResultFigure(figsize=size, layout="constrained")
    panels = made.subplots(1, len(maps) + 1, squeeze=False)[0]
    panels[0].imshow(attribution.image)
    panels[0].set_title(wrapped(title(attribution), _SIDE), fontsize=10, parse_math=False)
    panels[0].set_axis_off()
    for axes, draw in zip(panels[1:], maps, strict=True):
        draw(axes)
    if explained is not None:
        answer = f"{explained.question}\n{explained.equation().replace('-', MINUS)}"
        made.suptitle(answer, fontsize=10, parse_math=False)
    return made


def _shares(axes: Any, attribution: ImageResult, k: int) -> None:
    """The heat map of one position with its scale."""
    image, over = _overlay(axes, attribution, k)
    axes.set_title(f"to {position_name(attribution, k)}", fontsize=10, parse_math=False)
    label = f"share of a patch{f' (up to {over:.3g})' if over else ''}"
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, extend="max" if over else "neither", label=label)
    axes.set_axis_off()


def _class_scores(axes: Any, attribution: ImageResult, explained: Evidence) -> None:
    """Class scores of patches in two hues from zero; strong ones carry their sign, for print and grey screens."""
    patches = class_patches(attribution, explained.scores)
    top = explained.scale
    (rows, columns), (high, wide) = attribution.grid, attribution.patch
    height, width = attribution.image.shape[:2]
    heat = np.full((height, width), np.nan)  # where no patch is
    heat[: rows * high, : columns * wide] = patches.repeat(high, 0).repeat(wide, 1)[:height, :width]
    axes.imshow(attribution.image.mean(-1) / 255, cmap="gray", vmin=0, vmax=1)
    image = axes.imshow(heat, cmap=_AGAINST_TO_FOR, alpha=0.7, vmin=-top, vmax=top, interpolation="nearest")
    strongest = np.argsort(-np.abs(patches), axis=None, kind="stable")[:_MOST_SIGNS]
    for row, column in zip(*np.unravel_index(strongest, patches.shape), strict=True):
        if abs(patches[row, column]) >= _SIGNED * top:
            sign = "+" if patches[row, column] > 0 else MINUS
            middle = ((column + 0.5) * wide - 0.5, (row + 0.5) * high - 0.5)
            axes.annotate(sign, middle, ha="center", va="center", fontsize=8, color="black")
    named = "class scores, + for and − against"
    axes.set_title(named, fontsize=10, parse_math=False)
    unit = "logits" if explained.quantity == "logit" else "value"
    axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, label=f"{unit} of a patch")
    axes.set_axis_off()


def _overlay(axes: Any, attribution: ImageResult, row: int) -> tuple[Any, float]:
    """The heat map, and the highest share where it lies above full colour: what a patch keeps for itself may."""
    grey = attribution.image.mean(-1) / 255
    heat = attribution.heat_map(row)
    patches = (attribution.patches() if attribution.scores.ndim == 1 else attribution.patches()[row]).ravel()
    patch = _position(attribution, row)
    others = patches if patch is None else np.delete(patches, patch)
    top = float(others.max(initial=0)) or float(patches.max()) or 1.0
    highest = float(patches.max())
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
    image = axes.imshow(heat, cmap=_COLOURS, alpha=0.65, vmin=0, vmax=top, interpolation="nearest")
    return image, highest if highest > top * 1.0001 else 0.0


def _position(attribution: ImageResult, k: int) -> int | None:
    """The patch that a position is; None where it is another token or several."""
    position, n = attribution.position, len(attribution.tokens)
    positions = list(range(n)) if isinstance(position, str) and position == "all" else position
    positions = [positions] if isinstance(positions, int) else positions
    patch = positions[k] % n - (n - attribution.grid[0] * attribution.grid[1]) if isinstance(positions, list) else -1
    return patch if patch >= 0 else None


def title(attribution: ImageResult) -> str:
    """What the model predicts, else the model."""
    return prediction(attribution) or printable(attribution.model)


def position_name(attribution: ImageResult, k: int) -> str:
    """A position in words."""
    position = attribution.position
    if isinstance(position, str):
        return {"cls": attribution.tokens[0], "mean": "the mean of all tokens"}.get(position, attribution.tokens[k])
    positions = [position] if isinstance(position, int) else position
    if isinstance(positions, list):
        return attribution.tokens[positions[k]]
    return "the weighted tokens"


def fragment(attribution: ImageResult) -> str:
    """For a notebook's output cell."""
    return render_cell("image_cell.html", **_parts(attribution))


def page(attribution: ImageResult) -> str:
    """One HTML file without any other."""
    return render_page("image.html", **_parts(attribution))


def _parts(attribution: ImageResult) -> dict[str, Any]:
    """What the templates say of an attribution."""
    special = attribution.special_share()
    share = f" Special tokens have {special:.1%} of it, the patches the rest." if special else ""
    named = "A patch's score is the share"
    explained = image_evidence(attribution)
    if explained is not None:
        named = f"{explained.meaning()} A patch's share is the part"
    about = (
        f"{named} of the attribution that flows from it to {position_name(attribution, 0)} "
        f"through all layers: how much, not for or against.{share} Method {attribution.method} "
        f"({get_method(attribution.method).summary}); model {attribution.model}; {attribution.grid[0]} x "
        f"{attribution.grid[1]} patches."
    )
    answer = evidence_html.answer(explained)
    return {"title": title(attribution), "about": about, "png": _png(attribution), "answer": answer}


def _png(attribution: ImageResult) -> str:
    sink = io.BytesIO()
    figure(attribution).savefig(sink, format="png", dpi=120)
    return base64.b64encode(sink.getvalue()).decode()


def show(attribution: ImageResult, console: Console, top: int) -> None:
    """Print the prediction, what was asked of it and the sum that answers, and the `top` strongest patches."""
    predicted, explained = prediction(attribution), image_evidence(attribution)
    if predicted is not None:
        console.print(Text(predicted, "bold"))
    count = 1 if attribution.scores.ndim == 1 else len(attribution.scores)
    if explained is not None:
        console.print(Text(f"{explained.question}\n{explained.equation()}"))
        _print_class_scores(attribution, explained, console, top)
    for k in range(count):
        highest = [(str(row), str(column), f"{score:.2%}") for row, column, score in top_patches(attribution, k, top)]
        _print_patches(f"highest patches, to {position_name(attribution, k)}", "share", highest, console)
    rows, columns = attribution.grid
    console.print()
    console.print(
        Text(
            f"{rows} x {columns} patches, rows and columns from 0 at the top left; special tokens have "
            f"{attribution.special_share():.1%}. --plot and --html show them over the image.",
            "dim",
        )
    )
    if explained is not None:
        console.print(Text(explained.meaning(), "dim"))


def _print_class_scores(attribution: ImageResult, explained: Evidence, console: Console, top: int) -> None:
    patches = class_patches(attribution, explained.scores)
    order = np.argsort(-np.abs(patches), axis=None, kind="stable")[:top]
    places = zip(*np.unravel_index(order, patches.shape), strict=True)
    rows = [(str(row), str(column), explained.signed(float(patches[row, column]))) for row, column in places]
    _print_patches("strongest patches, + for and - against", explained.quantity, rows, console)


def _print_patches(name: str, number: str, rows: list[tuple[str, str, str]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("row", "column", number):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(Text(name, "dim"))
    console.print(table)


def top_patches(attribution: ImageResult, row: int, count: int) -> list[tuple[int, int, float]]:
    """(row, column, score) of the highest patches."""
    patches = attribution.patches() if attribution.scores.ndim == 1 else attribution.patches()[row]
    order = np.argsort(-patches, axis=None, kind="stable")[:count]
    rows, columns = np.unravel_index(order, patches.shape)
    return [(int(r), int(c), float(patches[r, c])) for r, c in zip(rows, columns, strict=True)]
