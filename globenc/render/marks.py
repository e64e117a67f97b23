"""Colours of HTML pages: stretches of text as marks, in one hue for shares, in two for what speaks for and against.
Where both are on a page, shares are grey, so that a colour says which way.

Colour is a translucent layer over whatever background there is, weak enough that dark text on light and light text on
dark both keep a contrast above 4.5: a notebook's theme cannot be asked for. Blue and orange are told apart by all kinds
of colour blindness; what is against is underlined too, for print and grey screens.
"""

from __future__ import annotations

from typing import NamedTuple

from .pieces import Piece
from .token_labels import visible

HUE = "37,99,235"
AGAINST_HUE = "213,94,0"
GREY = "128,128,128"
CELL_ALPHA = 0.95  # of cells without text
_TEXT_ALPHA = 0.6  # of the strongest word: text stays readable on it
_UNREAD_CHARACTERS = 300


class Mark(NamedTuple):
    """A stretch of text: with a colour a word, with a title alone what was cut off, else what stands between words."""

    text: str
    colour: str = ""
    title: str = ""


def mark(piece: Piece, scale: float, plain_below: float = 0.0, hue: str = HUE) -> Mark:
    """A stretch of text coloured by its share; what has less than `plain_below` of the scale stays as it is."""
    if piece.score is not None and piece.score >= plain_below * scale:
        title = f"{visible(piece.text)}: {exact(piece.score)}"
        return Mark(piece.text, colour(piece.score / scale, _TEXT_ALPHA, hue), title)
    return _uncoloured(piece)


def signed_mark(piece: Piece, scale: float, plain_below: float = 0.0) -> Mark:
    """The same for class scores."""
    if piece.score is not None and abs(piece.score) >= plain_below * scale:
        title = f"{visible(piece.text)}: {exact(piece.score, signed=True)}"
        return Mark(piece.text, word_colour(piece.score / scale), title)
    return _uncoloured(piece)


def _uncoloured(piece: Piece) -> Mark:
    if piece.score is not None or piece.read:
        return Mark(piece.text)
    return Mark(piece.short(_UNREAD_CHARACTERS), title="cut off: the model did not read this")


def word_colour(relative: float) -> str:
    """A word's style by its score, -1 to 1: below zero orange, and underlined as strongly as it is coloured."""
    if relative >= 0:
        return colour(relative, _TEXT_ALPHA)
    line = f"underline solid rgba({AGAINST_HUE},{min(-relative, 1.0):.3f}) .16em"
    below = "text-underline-offset:.2em;text-decoration-skip-ink:none"
    return f"{colour(relative, _TEXT_ALPHA)};text-decoration:{line};{below}"


def colour(relative: float, alpha: float, hue: str | None = None) -> str:
    """A background by a score, -1 to 1, as strong as `alpha` where it is 1 or beyond."""
    hue = hue or (HUE if relative >= 0 else AGAINST_HUE)
    return f"background:rgba({hue},{alpha * min(abs(float(relative)), 1.0):.3f})"


def stretch_colour(relative: float) -> str:
    """A background of class scores, -1 to 1: the upper half blue, or where it is below zero the lower half orange."""
    shade = colour(relative, CELL_ALPHA).removeprefix("background:")
    halves = f"{shade} 0 50%,transparent 50%" if relative >= 0 else f"transparent 0 50%,{shade} 50%"
    return f"background:linear-gradient({halves})"


def exact(score: float, signed: bool = False) -> str:
    """A score in full, for a title."""
    sign = "+" if signed else ""
    return f"{score:{sign}.6f}" if score == 0 or abs(score) >= 1e-4 else f"{score:{sign}.2e}"
