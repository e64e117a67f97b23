"""An Attribution as a matplotlib figure, by the object-oriented interface: no pyplot, no backend is chosen."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ..errors import warn_caller
from .captions import model_name, prediction, truncation, wrapped
from .protocols import TextResult
from .token_labels import token_labels
from .view import MOST_TOKENS, View, heat_scale, is_whole, position_names, shown_tokens, special_tokens, views

_BLUE, _GREY = to_rgba("#2563eb"), to_rgba("#9aa0a8")
_COLOURS = "Blues"
_TOKEN_WIDTH = 0.24  # inches
_HEADROOM = 1.1  # above the highest bar of the text
_MOST_POSITIONS = 6  # heat maps of layers below one another
# matplotlib's own font first; the others have what it lacks, where they are installed
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Sans JP",
    "Noto Sans SC",
    "Source Han Sans",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "WenQuanYi Zen Hei",
    "IPAGothic",
    "Arial Unicode MS",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)


def figure(attribution: TextResult) -> Figure:
    """The attribution drawn: bars for one position, a heat map for several, and the layers where they were asked for.

    A picture has at most 64 tokens: of longer texts the highest ones, in order of the text. Only the matrix of position
    "all" is drawn whole, with fewer labels. Scores are unsigned, so there is one hue; special tokens' bars are grey.
    """
    shown = views(attribution)
    tokens = shown_tokens(attribution, np.max([view.scores for view in shown], 0))
    panels: list[tuple[float, Any]] = []
    if len(shown) == 1:
        panels.append((2.6, lambda axes: _bars(axes, attribution, shown[0], tokens)))
    else:
        panels.append((_rows_height(len(shown)), lambda axes: _positions(axes, attribution, tokens)))
    if is_whole(attribution):
        side = 1.2 + _TOKEN_WIDTH * len(tokens)
        panels.append((min(side, 12.0), lambda axes: _matrix(axes, attribution)))
    drawn = [view for view in shown if view.layer_scores is not None][:_MOST_POSITIONS]
    for view in drawn:
        panels.append((_rows_height(len(view.layer_scores)), _layer_panel(attribution, view, tokens)))  # type: ignore[arg-type]
    width = min(max(2.4 + _TOKEN_WIDTH * len(tokens), 6.0), 18.0)
    made = Figure(figsize=(width, 0.7 + sum(height + 0.9 for height, _ in panels)), layout="constrained")
    grid = made.add_gridspec(len(panels), 1, height_ratios=[height for height, _ in panels])
    for k, (_, draw) in enumerate(panels):
        draw(made.add_subplot(grid[k]))
    title = "\n".join(wrapped(line, width) for line in _title(attribution, len(shown), len(drawn)))
    _plain(made.suptitle(title, fontsize=11))
    return made


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
    with warnings.catch_warnings(record=True) as caught:
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


def _title(attribution: TextResult, positions: int, drawn: int) -> list[str]:
    parts = [part for part in (prediction(attribution), attribution.method, model_name(attribution)) if part]
    lines = [" · ".join(parts)]
    if 0 < drawn < positions:
        lines.append(f"layers of the first {drawn} of {positions} positions")
    lost = truncation(attribution)
    return lines if lost is None else [*lines, lost]


def _choice(attribution: TextResult, tokens: np.ndarray) -> str:
    n = len(attribution.tokens)
    return "" if len(tokens) == n else f", the {len(tokens)} highest of {n:,} tokens in order of the text"


def _rows_height(rows: int) -> float:
    return min(max(0.28 * rows, 1.2), 9.0)


def _bars(axes: Any, attribution: TextResult, view: View, tokens: np.ndarray) -> None:
    """Bars on the scale of the text's tokens; one that goes beyond, as [CLS] may, is cut and says how far it goes."""
    special, shares = special_tokens(attribution)[tokens], view.scores[tokens]
    axes.bar(range(len(tokens)), shares, width=0.8, color=[_GREY if grey else _BLUE for grey in special])
    axes.set_xlim(-0.6, len(tokens) - 0.4)
    top = view.token_scale() * _HEADROOM
    axes.set_ylim(0, top)
    for column in np.flatnonzero(shares > top):
        axes.plot([column - 0.5, column + 0.5], [0.86 * top, 0.9 * top], color="white", linewidth=3, clip_on=False)
        axes.annotate(
            f"{shares[column]:.3g}", (column, 0.82 * top), rotation=90, ha="center", va="top", fontsize=8, color="white"
        )
    axes.set_ylabel("share")
    axes.spines[["top", "right"]].set_visible(False)
    cut = ", cut where they go beyond" if (shares > top).any() else ""
    _plain(
        axes.set_title(
            f"Share of each token in {view.position}{_choice(attribution, tokens)} (special ones grey{cut})",
            fontsize=10,
        )
    )
    _label_tokens(axes, token_labels(attribution), tokens)


def _positions(axes: Any, attribution: TextResult, tokens: np.ndarray) -> None:
    """One row for each of several positions."""
    _heat_map(axes, attribution.scores[:, tokens], heat_scale(attribution))
    _label_rows(axes, position_names(attribution))
    _plain(axes.set_title(f"Share of each token in every position{_choice(attribution, tokens)}", fontsize=10))
    _label_tokens(axes, token_labels(attribution), tokens)


def _matrix(axes: Any, attribution: TextResult) -> None:
    labels = token_labels(attribution)
    _heat_map(axes, attribution.scores, heat_scale(attribution))
    _label_rows(axes, labels)
    _plain(axes.set_title("Share of each token (across) in every token (down)", fontsize=10))
    _label_tokens(axes, labels, np.arange(len(labels)))


def _layer_panel(attribution: TextResult, view: View, tokens: np.ndarray) -> Any:
    """What draws the rollout up to every layer: layers upwards, tokens across."""

    def draw(axes: Any) -> None:
        layers: np.ndarray = view.layer_scores  # type: ignore[assignment]
        _heat_map(axes, layers[:, tokens], view.token_scale(), origin="lower")
        _label_rows(axes, [str(layer) for layer in range(1, len(layers) + 1)])
        axes.set_ylabel("rollout up to layer")
        _plain(
            axes.set_title(
                f"Share of each token in {view.position}, layer by layer{_choice(attribution, tokens)}", fontsize=10
            )
        )
        _label_tokens(axes, token_labels(attribution), tokens)

    return draw


def _heat_map(axes: Any, shares: np.ndarray, top: float, origin: str = "upper") -> None:
    """Shares in one hue; the colour bar says how far those above full colour go, such as special tokens'."""
    highest = float(shares.max())
    image = axes.imshow(shares, cmap=_COLOURS, vmin=0, vmax=top, aspect="auto", origin=origin, interpolation="nearest")
    over = highest > top * 1.0001
    label = f"share (up to {highest:.3g})" if over else "share"
    axes.figure.colorbar(image, ax=axes, extend="max" if over else "neither", label=label, pad=0.01, fraction=0.05)


def _label_tokens(axes: Any, labels: list[str], tokens: np.ndarray) -> None:
    step = -(-len(tokens) // MOST_TOKENS)
    ticks = range(0, len(tokens), step)
    axes.set_xticks(ticks, [_short(labels[tokens[tick]]) for tick in ticks], rotation=90, fontsize=8)
    _fonts(axes.get_xticklabels())


def _label_rows(axes: Any, labels: list[str]) -> None:
    step = -(-len(labels) // MOST_TOKENS)
    ticks = range(0, len(labels), step)
    axes.set_yticks(ticks, [_short(labels[tick]) for tick in ticks], fontsize=8)
    _fonts(axes.get_yticklabels())


def _fonts(texts: Any) -> None:
    for text in texts:
        _plain(text)


def _plain(text: Any) -> None:
    """Dollar signs are dollar signs, and characters that DejaVu lacks come from another installed font."""
    installed = set(font_manager.get_font_names())
    text.set_parse_math(False)
    text.set_fontfamily([font for font in _FONTS if font in installed])


def _short(label: str) -> str:
    return label if len(label) <= 18 else f"{label[:17]}…"
