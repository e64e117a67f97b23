"""An ImageAttribution as a figure and as HTML: the image beside the heat map over it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..methods import get_method
from ..printing import printable
from .captions import prediction, wrapped
from .page import render_cell, render_page
from .protocols import ImageResult

_COLOURS = "inferno"
_SIDE = 3.6  # inches of a panel


def figure(attribution: ImageResult) -> Figure:
    """The image, and for each position the image in grey under its patches' scores."""
    count = 1 if attribution.scores.ndim == 1 else min(len(attribution.scores), 8)
    height, width = attribution.image.shape[:2]
    made = Figure(figsize=(_SIDE * (count + 1) + 0.8, _SIDE * height / width + 0.9), layout="constrained")
    panels = made.subplots(1, count + 1, squeeze=False)[0]
    panels[0].imshow(attribution.image)
    panels[0].set_title(wrapped(title(attribution), _SIDE), fontsize=10, parse_math=False)
    for k in range(count):
        axes = panels[k + 1]
        image, over = _overlay(axes, attribution, k)
        axes.set_title(f"to {position_name(attribution, k)}", fontsize=10, parse_math=False)
        made.colorbar(
            image,
            ax=axes,
            fraction=0.05,
            pad=0.02,
            extend="max" if over else "neither",
            label=f"share of a patch{f' (up to {over:.3g})' if over else ''}",
        )
    for axes in panels:
        axes.set_axis_off()
    return made


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


def _parts(attribution: ImageResult) -> dict[str, str]:
    """What the templates say of an attribution."""
    special = attribution.special_share()
    share = f" Special tokens have {special:.1%} of it, the patches the rest." if special else ""
    about = (
        f"A patch's score is the share of the attribution that flows from it to {position_name(attribution, 0)} "
        f"through all layers: how much, not for or against.{share} Method {attribution.method} "
        f"({get_method(attribution.method).summary}); model {attribution.model}; {attribution.grid[0]} x "
        f"{attribution.grid[1]} patches."
    )
    return {"title": title(attribution), "about": about, "png": _png(attribution)}


def _png(attribution: ImageResult) -> str:
    sink = io.BytesIO()
    figure(attribution).savefig(sink, format="png", dpi=120)
    return base64.b64encode(sink.getvalue()).decode()


def show(attribution: ImageResult, console: Console, top: int) -> None:
    """Print the prediction and the `top` highest patches."""
    predicted = prediction(attribution)
    if predicted is not None:
        console.print(Text(predicted, "bold"))
    count = 1 if attribution.scores.ndim == 1 else len(attribution.scores)
    for k in range(count):
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("row", "column", "share"):
            table.add_column(name, justify="right")
        for row, column, score in top_patches(attribution, k, top):
            table.add_row(str(row), str(column), f"{score:.2%}")
        console.print()
        console.print(Text(f"highest patches, to {position_name(attribution, k)}", "dim"))
        console.print(table)
    rows, columns = attribution.grid
    console.print()
    console.print(
        Text(
            f"{rows} x {columns} patches, rows and columns from 0 at the top left; special tokens have "
            f"{attribution.special_share():.1%}. --plot and --html show them over the image.",
            "dim",
        )
    )


def top_patches(attribution: ImageResult, row: int, count: int) -> list[tuple[int, int, float]]:
    """(row, column, score) of the highest patches."""
    patches = attribution.patches() if attribution.scores.ndim == 1 else attribution.patches()[row]
    order = np.argsort(-patches, axis=None, kind="stable")[:count]
    rows, columns = np.unravel_index(order, patches.shape)
    return [(int(r), int(c), float(patches[r, c])) for r, c in zip(rows, columns, strict=True)]
