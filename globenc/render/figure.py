"""An Attribution as a matplotlib figure, by the object-oriented interface: no pyplot, no backend is chosen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from matplotlib import font_manager
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from .captions import model_name, prediction, truncation, wrapped
from .evidence import MINUS, Evidence, text_evidence
from .protocols import TextResult
from .saving import ResultFigure, check_axes
from .token_labels import token_labels
from .view import MOST_TOKENS, View, heat_scale, is_whole, position_names, shown_tokens, special_tokens, views

FOR, AGAINST = to_rgba("#2563eb"), to_rgba("#e07b29")  # told apart by all kinds of colour blindness
_PALE = 0.45  # of special tokens' class scores
_TOKEN_WIDTH = 0.24  # inches
_HEADROOM = 1.1  # above the highest bar of the text
_MOST_POSITIONS = 6  # heat maps of layers below one another


class _Look(NamedTuple):
    """Colours of shares: bars of the text's tokens and of special ones, heat maps."""

    bar: Any
    special: Any
    special_name: str
    map: str


_BLUE_LOOK = _Look(FOR, to_rgba("#9aa0a8"), "grey", "Blues")
_GREY_LOOK = _Look(to_rgba("#59616d"), to_rgba("#c3c7cd"), "pale", "Greys")  # beside class scores
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


def figure(attribution: TextResult, ax: Any = None) -> Figure:
    """The attribution drawn: class scores where there are any; below them the shares, bars for one position, a heat map
    for several; and the layers where they were asked for.

    A picture has at most 64 tokens: of longer texts the highest ones, in order of the text. Only the matrix of position
    "all" is drawn whole, with fewer labels. Class scores have one hue for and one against, which is hatched too. Shares
    are unsigned, so there is one hue: blue, or grey beside class scores.

    Args:
        ax: matplotlib Axes to draw the first of these panels into; its figure is returned.
    """
    shown, explained = views(attribution), text_evidence(attribution)
    panels = _panels(attribution, shown, explained)
    if ax is not None:
        check_axes(ax)
        panels[0][1](ax)
        return ax.get_figure(root=True)
    count = min(len(attribution.tokens), MOST_TOKENS)
    width = min(max(2.4 + _TOKEN_WIDTH * count, 6.0), 18.0)
    made = ResultFigure(figsize=(width, 0.7 + sum(height + 0.9 for height, _ in panels)), layout="constrained")
    grid = made.add_gridspec(len(panels), 1, height_ratios=[height for height, _ in panels])
    for k, (_, draw) in enumerate(panels):
        draw(made.add_subplot(grid[k]))
    title = "\n".join(wrapped(line, width) for line in _title(attribution, shown, explained))
    _plain(made.suptitle(title, fontsize=11))
    return made


def _panels(attribution: TextResult, shown: list[View], explained: Evidence | None) -> list[tuple[float, Any]]:
    """Height in inches of every panel, and what draws it into axes."""
    look = _BLUE_LOOK if explained is None else _GREY_LOOK
    highest = np.max([view.scores for view in shown], 0) if explained is None else np.abs(explained.scores)
    tokens = shown_tokens(attribution, highest)
    panels: list[tuple[float, Any]] = []
    if explained is not None:
        panels.append((2.6, lambda axes: _signed_bars(axes, attribution, explained, tokens)))
    if len(shown) == 1:
        panels.append((2.6, lambda axes: _bars(axes, attribution, shown[0], tokens, look)))
    else:
        panels.append((_rows_height(len(shown)), lambda axes: _positions(axes, attribution, tokens, look)))
    if is_whole(attribution):
        side = 1.2 + _TOKEN_WIDTH * len(attribution.tokens)
        panels.append((min(side, 12.0), lambda axes: _matrix(axes, attribution, look)))
    for view in shown[:_MOST_POSITIONS]:
        if view.layer_scores is not None:
            panels.append((_rows_height(len(view.layer_scores)), _layer_panel(attribution, view, tokens, look)))
    return panels


def _title(attribution: TextResult, shown: list[View], explained: Evidence | None) -> list[str]:
    parts = [part for part in (prediction(attribution), attribution.method, model_name(attribution)) if part]
    lines = [" · ".join(parts)]
    if explained is not None:
        lines += [explained.question, explained.equation().replace("-", MINUS)]
    if attribution.layer_scores is not None and len(shown) > _MOST_POSITIONS:
        lines.append(f"layers of the first {_MOST_POSITIONS} of {len(shown)} positions")
    lost = truncation(attribution)
    return lines if lost is None else [*lines, lost]


def _choice(attribution: TextResult, tokens: np.ndarray) -> str:
    n = len(attribution.tokens)
    most = "highest" if attribution.class_scores is None else "strongest"
    return "" if len(tokens) == n else f", the {len(tokens)} {most} of {n:,} tokens in order of the text"


def _rows_height(rows: int) -> float:
    return min(max(0.28 * rows, 1.2), 9.0)


def _signed_bars(axes: Any, attribution: TextResult, explained: Evidence, tokens: np.ndarray) -> None:
    """Class scores up and down from zero, on one scale; special tokens are pale, and cut where they go beyond."""
    special, scores = special_tokens(attribution)[tokens], explained.scores[tokens]
    for chosen, hue, hatch in ((scores >= 0, FOR, ""), (scores < 0, AGAINST, "////")):
        colours = [(*hue[:3], _PALE if pale else 1.0) for pale in special[chosen]]
        options = {"width": 0.8, "color": colours, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
        axes.bar(np.flatnonzero(chosen), scores[chosen], **options)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(-0.6, len(tokens) - 0.4)
    top = explained.token_scale * _HEADROOM
    axes.set_ylim(-top, top)
    _mark_cut(axes, scores, top)
    axes.set_ylabel("logits" if explained.quantity == "logit" else "value")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    named = f"Class score of each token{_choice(attribution, tokens)}"
    _plain(axes.set_title(f"{named} (blue for, orange and hatched against, special ones pale)", fontsize=10))
    _label_tokens(axes, token_labels(attribution), tokens)


def _mark_cut(axes: Any, values: np.ndarray, top: float) -> None:
    """A gap near the end of every bar that goes beyond the axes, and how far it goes."""
    for column in np.flatnonzero(np.abs(values) > top):
        sign = 1 if values[column] > 0 else -1
        ends = [sign * 0.86 * top, sign * 0.9 * top]
        axes.plot([column - 0.5, column + 0.5], ends, color="white", linewidth=3, clip_on=False)
        axes.annotate(
            f"{values[column]:.3g}".replace("-", MINUS),
            (column, sign * 0.82 * top),
            rotation=90,
            ha="center",
            va="top" if sign > 0 else "bottom",
            fontsize=8,
            color="white",
        )


def _bars(axes: Any, attribution: TextResult, view: View, tokens: np.ndarray, look: _Look) -> None:
    """Bars on the scale of the text's tokens; one that goes beyond, as [CLS] may, is cut and says how far it goes."""
    special, shares = special_tokens(attribution)[tokens], view.scores[tokens]
    axes.bar(range(len(tokens)), shares, width=0.8, color=[look.special if one else look.bar for one in special])
    axes.set_xlim(-0.6, len(tokens) - 0.4)
    top = view.token_scale() * _HEADROOM
    axes.set_ylim(0, top)
    _mark_cut(axes, shares, top)
    axes.set_ylabel("share")
    axes.spines[["top", "right"]].set_visible(False)
    cut = ", cut where they go beyond" if (shares > top).any() else ""
    named = "Share of each token in" if look is _BLUE_LOOK else "How much of each token is in"
    _plain(
        axes.set_title(
            f"{named} {view.position}{_choice(attribution, tokens)} (special ones {look.special_name}{cut})",
            fontsize=10,
        )
    )
    _label_tokens(axes, token_labels(attribution), tokens)


def _positions(axes: Any, attribution: TextResult, tokens: np.ndarray, look: _Look) -> None:
    """One row for each of several positions."""
    _heat_map(axes, attribution.scores[:, tokens], heat_scale(attribution), look)
    _label_rows(axes, position_names(attribution))
    _plain(axes.set_title(f"Share of each token in every position{_choice(attribution, tokens)}", fontsize=10))
    _label_tokens(axes, token_labels(attribution), tokens)


def _matrix(axes: Any, attribution: TextResult, look: _Look) -> None:
    labels = token_labels(attribution)
    _heat_map(axes, attribution.scores, heat_scale(attribution), look)
    _label_rows(axes, labels)
    _plain(axes.set_title("Share of each token (across) in every token (down)", fontsize=10))
    _label_tokens(axes, labels, np.arange(len(labels)))


def _layer_panel(attribution: TextResult, view: View, tokens: np.ndarray, look: _Look) -> Any:
    """What draws the rollout up to every layer: layers upwards, tokens across."""

    def draw(axes: Any) -> None:
        layers: np.ndarray = view.layer_scores  # type: ignore[assignment]
        _heat_map(axes, layers[:, tokens], view.token_scale(), look, origin="lower")
        _label_rows(axes, [str(layer) for layer in range(1, len(layers) + 1)])
        axes.set_ylabel("rollout up to layer")
        _plain(
            axes.set_title(
                f"Share of each token in {view.position}, layer by layer{_choice(attribution, tokens)}", fontsize=10
            )
        )
        _label_tokens(axes, token_labels(attribution), tokens)

    return draw


def _heat_map(axes: Any, shares: np.ndarray, top: float, look: _Look, origin: str = "upper") -> None:
    """Shares in one hue; the colour bar says how far those above full colour go, such as special tokens'."""
    highest = float(shares.max())
    image = axes.imshow(shares, cmap=look.map, vmin=0, vmax=top, aspect="auto", origin=origin, interpolation="nearest")
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
