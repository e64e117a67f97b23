"""An Attribution as HTML: a fragment for notebooks and a page of its own. The templates hold the tags, this file what
goes into them.

Colour is a translucent layer over whatever background there is, weak enough that dark text on light and light text on
dark both keep a contrast above 4.5: a notebook's theme cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..printing import printable
from ..text_spans import Passage, Word
from .captions import circumstances, meaning, prediction, truncation
from .document import FULL_COLOURS, document, is_long, short
from .page import render_cell, render_page
from .pieces import Piece, pieces
from .protocols import TextResult
from .token_labels import token_labels, visible
from .view import MOST_TOKENS, View, heat_scale, is_whole, shown_tokens, special_tokens, views

_HUE = "37,99,235"
_GREY = "128,128,128"
_TEXT_ALPHA = 0.6  # of the highest word: text stays readable on it
_CELL_ALPHA = 0.95  # of cells without text
_TOP_WORDS = 25
_MOST_WORDS = 500
_UNREAD_CHARACTERS = 300


class Mark(NamedTuple):
    """A stretch of text: with a colour a word, with a title alone what was cut off, else what stands between words."""

    text: str
    colour: str = ""
    title: str = ""


def fragment(attribution: TextResult) -> str:
    """The attribution for a notebook's output cell: the coloured text, the rest behind a click."""
    return render_cell("text_cell.html", prediction=prediction(attribution), **_parts(attribution, views(attribution)))


def page(attribution: TextResult) -> str:
    """The attribution as one HTML file: no other file, no script, light or dark as the reader's system is."""
    shown = views(attribution)
    title = prediction(attribution) or f"Attribution to {shown[0].position}"
    return render_page("text.html", title=title, **_parts(attribution, shown))


def _parts(attribution: TextResult, shown: list[View]) -> dict[str, Any]:
    """What the templates say of an attribution."""
    about = meaning(shown[0] if len(shown) == 1 else View("the position", [], shown[0].scores, None))
    strip = _long_text if is_long(attribution) else _coloured
    return {
        "truncation": truncation(attribution),
        "strips": [strip(attribution, view) for view in shown],
        "sections": _sections(attribution, shown),
        "footnotes": [about, circumstances(attribution)],
    }


def _coloured(attribution: TextResult, view: View) -> dict[str, Any]:
    """The text, and its pair, coloured for one position, with the special tokens where they stand."""
    scale = view.full_scale()
    runs: list[list[Word]] = [[], []]
    for word in view.words:
        # a special token stands with the text in front of it; [CLS] with the first
        second = bool(runs[1]) or word.segment == 1
        runs[1 if second else 0].append(word)
    paragraphs = []
    for segment, run in enumerate(runs if attribution.text_pair is not None else runs[:1]):
        first = next((k for k, word in enumerate(run) if not word.special), len(run))
        marks = [_mark(piece, scale) for piece in pieces(attribution, view.words, segment)]
        paragraphs.append((_chips(view, run[:first]), marks, _chips(view, run[first:])))
    return {
        "long": False,
        "position": view.position if attribution.scores.ndim > 1 else None,
        "paragraphs": paragraphs,
        "note": f"Full colour is the highest word{view.aside()}, {view.percent(scale)}. All tokens add up to 100%; "
        f"special tokens have {view.percent(view.special_share())} of it.",
    }


def _long_text(attribution: TextResult, view: View) -> dict[str, Any]:
    """A long text: where in it the attribution is, its top sentences, and its paragraphs with the low ones folded."""
    sections = document(attribution, view)
    return {
        "long": True,
        "position": view.position if attribution.scores.ndim > 1 else None,
        "unread": bool(attribution.unread()),
        "stretches": [
            {
                "anchor": stretch.anchor,
                "title": f"{stretch.text}: {view.percent(stretch.score)}" if stretch.read else stretch.text,
                "read": stretch.read,
                "style": f"flex:{stretch.length} 0 0"
                + (f";{_colour(stretch.relative, _CELL_ALPHA)}" if stretch.read else ""),
            }
            for stretch in sections.strip
        ],
        "sentences": _passages(view, sections.best),
        "top_paragraphs": _passages(view, sections.top),
        "groups": [
            {
                "folded": group.folded,
                "name": f"{group.name}: {view.percent(group.score)}",
                "blocks": [
                    (block.anchor, [_mark(piece, sections.scale, plain_below=0.04) for piece in block.pieces])
                    for block in group.blocks
                ],
            }
            for group in sections.groups
        ],
        "special": _chips(view, view.words),
        "note": f"Full colour is a word with {sections.scale:.3%} or more, the {FULL_COLOURS} highest. All tokens add "
        f"up to 100%; special tokens have {view.percent(view.special_share())} of it",
    }


def _passages(view: View, passages: list[tuple[Passage, str]]) -> list[dict[str, str]]:
    """Scores, and the beginnings of passages as links to where they stand."""
    return [
        {
            "share": view.percent(passage.score),
            "exact": _exact(passage.score),
            "anchor": anchor,
            "text": short(passage.text),
        }
        for passage, anchor in passages
    ]


def _mark(piece: Piece, scale: float, plain_below: float = 0.0) -> Mark:
    if piece.score is not None and piece.score >= plain_below * scale:
        title = f"{visible(piece.text)}: {_exact(piece.score)}"
        return Mark(piece.text, _colour(piece.score / scale, _TEXT_ALPHA), title)
    if piece.score is not None or piece.read:
        return Mark(piece.text)
    return Mark(piece.short(_UNREAD_CHARACTERS), title="cut off: the model did not read this")


def _chips(view: View, words: list[Word]) -> list[dict[str, str]]:
    """The special tokens among some words, with their share."""
    return [
        {
            "text": f"{printable(word.text)} {view.percent(word.score)}",
            "title": f"{word.text}: {_exact(word.score)}",
        }
        for word in words
        if word.special
    ]


def _sections(attribution: TextResult, shown: list[View]) -> list[dict[str, Any]]:
    """What follows the coloured text, each with its title."""
    sections = []
    if is_whole(attribution):
        sections.append({"title": "Every token to every token", **_matrix(attribution, shown[0])})
    for view in shown:
        to = f", to {view.position}" if len(shown) > 1 else ""
        sections.append({"title": f"Words, highest first{to}", **_ranking(view)})
        if view.layer_scores is not None:
            sections.append({"title": f"Layer by layer{to}", **_layers(attribution, view, view.layer_scores)})
    return sections


def _ranking(view: View) -> dict[str, Any]:
    ranked, scale = view.ranked(), view.full_scale()
    rows = [
        {
            "rank": rank,
            "text": visible(word.text),
            "exact": _exact(word.score),
            "share": view.percent(word.score),
            "width": f"width:{min(word.score / scale, 1.0):.1%}",
        }
        for rank, word in enumerate(ranked[:_MOST_WORDS], 1)
    ]
    more = f"{len(ranked) - _TOP_WORDS:,} more words" if len(ranked) > _TOP_WORDS else ""
    if len(ranked) > _MOST_WORDS:
        more = f"{_MOST_WORDS - _TOP_WORDS:,} of {more}"
    return {"kind": "ranking", "rows": rows[:_TOP_WORDS], "hidden": rows[_TOP_WORDS:], "more": more}


def _layers(attribution: TextResult, view: View, layer_scores: np.ndarray) -> dict[str, Any]:
    """Tokens down, layers across: long texts scroll the way a page does."""
    special, labels = special_tokens(attribution), token_labels(attribution)
    top = view.token_scale()
    names = [str(layer) for layer in range(1, len(layer_scores) + 1)]
    rows = [
        _row(
            labels[token],
            layer_scores[:, token] / top,
            [f"{labels[token]}, layer {name}: {_exact(layer_scores[k, token])}" for k, name in enumerate(names)],
            [bool(special[token])] * len(names),
        )
        for token in shown_tokens(attribution, view.scores)
    ]
    note = (
        f"Share of each token in {view.position} up to every layer; the last column is the score. "
        f"Full colour is the highest token of the text{view.aside()}, {view.percent(top)}, or more; special tokens are "
        f"grey. {_choice_note(attribution)}"
    )
    return {"kind": "heat", "columns": names, "upright": False, "rows": rows, "note": note}


def _matrix(attribution: TextResult, view: View) -> dict[str, Any]:
    """Every token's share in every token."""
    special, labels = special_tokens(attribution), token_labels(attribution)
    shown = shown_tokens(attribution, attribution.scores.mean(0))
    matrix = attribution.scores[np.ix_(shown, shown)]
    top = heat_scale(attribution)
    rows = [
        _row(
            labels[to],
            matrix[k] / top,
            [f"{labels[source]} to {labels[to]}: {_exact(matrix[k, j])}" for j, source in enumerate(shown)],
            [bool(special[source]) for source in shown],
        )
        for k, to in enumerate(shown)
    ]
    note = (
        f"A row is a token that is attributed, a column one that it comes from; rows add up to 100%. "
        f"Full colour is the highest share of a token in another one, {view.percent(top)}, or more; special tokens are "
        f"grey. {_choice_note(attribution)}"
    )
    return {"kind": "heat", "columns": [labels[k] for k in shown], "upright": True, "rows": rows, "note": note}


def _row(name: str, shares: np.ndarray, titles: Sequence[str], grey: Sequence[bool]) -> dict[str, Any]:
    """A row of a heat map: its name, and the colour and the title of each cell."""
    cells = [
        (_colour(share, _CELL_ALPHA, hue=_GREY if is_grey else _HUE), title)
        for share, title, is_grey in zip(shares, titles, grey, strict=True)
    ]
    return {"name": name, "cells": cells}


def _choice_note(attribution: TextResult) -> str:
    n = len(attribution.tokens)
    return f"The {MOST_TOKENS} highest of {n:,} tokens, in order of the text." if n > MOST_TOKENS else ""


def _colour(relative: float, alpha: float, hue: str = _HUE) -> str:
    return f"background:rgba({hue},{alpha * min(max(float(relative), 0.0), 1.0):.3f})"


def _exact(score: float) -> str:
    return f"{score:.6f}" if score == 0 or score >= 1e-4 else f"{score:.2e}"
