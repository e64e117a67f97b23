"""An Attribution as HTML: a fragment for notebooks and a page of its own. The templates hold the tags, this file what
goes into them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..printing import printable
from ..text_spans import Passage, Word
from . import evidence_html
from .captions import circumstances, meaning, prediction, share_meaning, summary_of, truncation
from .document import FULL_COLOURS, Document, document, is_long, short
from .evidence import MINUS, Evidence, text_evidence
from .marks import CELL_ALPHA, GREY, HUE, colour, exact, mark, signed_mark, stretch_colour
from .page import render_cell, render_page
from .pieces import pieces
from .protocols import TextResult
from .token_labels import token_labels, visible
from .view import MOST_TOKENS, View, heat_scale, is_whole, shown_tokens, special_tokens, views

_TOP_WORDS = 25
_MOST_WORDS = 500


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
    explained = text_evidence(attribution)
    one = shown[0] if len(shown) == 1 else View("the position", [], shown[0].scores, None)
    long = is_long(attribution)
    if explained is None:
        strips = [(_long_text if long else _coloured)(attribution, view) for view in shown]
        about = [meaning(one)]
    else:
        strips = [(_long_evidence if long else _coloured_evidence)(attribution, explained)]
        about = [explained.meaning(), share_meaning(attribution, one)]
    return {
        "truncation": truncation(attribution),
        "answer": evidence_html.answer(explained),
        "strips": strips,
        "sections": _sections(attribution, shown, explained),
        "footnotes": [*about, circumstances(attribution)],
    }


def _coloured(attribution: TextResult, view: View, hue: str = HUE) -> dict[str, Any]:
    """The text, and its pair, coloured for one position, with the special tokens where they stand."""
    scale = view.full_scale()
    return {
        "long": False,
        "position": view.position if attribution.scores.ndim > 1 else None,
        "paragraphs": _paragraphs(
            attribution, view.words, lambda piece: mark(piece, scale, hue=hue), lambda word: _chip(view, word)
        ),
        "note": f"Full colour is the highest word{view.aside()}, {view.percent(scale)}. All tokens add up to 100%; "
        f"special tokens have {view.percent(view.special_share())} of it.",
    }


def _coloured_evidence(attribution: TextResult, explained: Evidence) -> dict[str, Any]:
    """The same by class scores."""
    scale = explained.scale
    return {
        "long": False,
        "position": None,
        "paragraphs": _paragraphs(
            attribution,
            explained.words,
            lambda piece: signed_mark(piece, scale),
            lambda word: evidence_html.signed_chip(explained, word),
        ),
        "note": f"{evidence_html.note(explained, scale)}, the strongest word; what is against is underlined.",
    }


def _paragraphs(
    attribution: TextResult, words: list[Word], marked: Callable[..., Any], chip: Callable[..., Any]
) -> list[Any]:
    """The text and its pair: the special tokens in front, what is coloured, the special tokens behind."""
    runs: list[list[Word]] = [[], []]
    for word in words:
        # a special token stands with the text in front of it; [CLS] with the first
        second = bool(runs[1]) or word.segment == 1
        runs[1 if second else 0].append(word)
    paragraphs = []
    for segment, run in enumerate(runs if attribution.text_pair is not None else runs[:1]):
        first = next((k for k, word in enumerate(run) if not word.special), len(run))
        marks = [marked(piece) for piece in pieces(attribution, words, segment)]
        before, after = ([chip(word) for word in part if word.special] for part in (run[:first], run[first:]))
        paragraphs.append((before, marks, after))
    return paragraphs


def _long_text(attribution: TextResult, view: View) -> dict[str, Any]:
    """A long text: where in it the attribution is, its top sentences, and its paragraphs with the low ones folded."""
    sections = document(attribution, view)
    return {
        **_document(attribution, sections, view.percent, exact, mark, lambda share: colour(share, CELL_ALPHA)),
        "position": view.position if attribution.scores.ndim > 1 else None,
        "quantity": "",
        "most": "Top",
        "strip_note": "The text from beginning to end, pale where a stretch has least of the attribution for its "
        "length, deep where it has most.",
        "special": [_chip(view, word) for word in view.words if word.special],
        "note": f"Full colour is a word with {sections.scale:.3%} or more, the {FULL_COLOURS} highest. All tokens add "
        f"up to 100%; special tokens have {view.percent(view.special_share())} of it",
    }


def _long_evidence(attribution: TextResult, explained: Evidence) -> dict[str, Any]:
    """The same by class scores."""
    sections = document(attribution, explained.view(), signed=True)
    return {
        **_document(
            attribution,
            sections,
            lambda score: explained.signed(score, MINUS),
            lambda score: exact(score, signed=True),
            signed_mark,
            stretch_colour,
            _passage_shares(attribution),
        ),
        "position": None,
        "quantity": explained.quantity if attribution.scores.ndim == 1 else "",
        "most": "Strongest",
        "strip_note": "The text from beginning to end: above, in blue, what speaks for the label, below, in orange, "
        "what speaks against it.",
        "special": [evidence_html.signed_chip(explained, word) for word in explained.special()],
        "note": f"{evidence_html.note(explained, sections.scale)} and beyond, the {FULL_COLOURS} strongest words; what "
        "is against is underlined. Special tokens",
    }


def _document(
    attribution: TextResult,
    sections: Document,
    number: Callable[[float], str],
    exactly: Callable[[float], str],
    marked: Callable[..., Any],
    coloured: Callable[[float], str],
    shares: dict[tuple[int, int, int], str] | None = None,
) -> dict[str, Any]:
    """What both have in common; `number` writes a score, `exactly` writes it in full, `marked` and `coloured` are for
    the words of the text and the stretches of the strip, `shares` has those of passages."""

    def passages(chosen: list[tuple[Passage, str]]) -> list[dict[str, str]]:
        """Scores, and the beginnings of passages as links to where they stand."""
        return [
            {
                "score": number(p.score),
                "exact": exactly(p.score),
                "share": (shares or {}).get((p.segment, p.start, p.end), ""),
                "anchor": anchor,
                "text": short(p.text),
            }
            for p, anchor in chosen
        ]

    return {
        "long": True,
        "unread": bool(attribution.unread()),
        "stretches": [
            {
                "anchor": stretch.anchor,
                "title": f"{stretch.text}: {number(stretch.score)}" if stretch.read else stretch.text,
                "read": stretch.read,
                "style": f"flex:{stretch.length} 0 0" + (f";{coloured(stretch.relative)}" if stretch.read else ""),
            }
            for stretch in sections.strip
        ],
        "sentences": passages(sections.best),
        "top_paragraphs": passages(sections.top),
        "groups": [
            {
                "folded": group.folded,
                "name": f"{group.name}: {number(group.score)}",
                "blocks": [
                    (block.anchor, [marked(piece, sections.scale, plain_below=0.04) for piece in block.pieces])
                    for block in group.blocks
                ],
            }
            for group in sections.groups
        ],
    }


def _passage_shares(attribution: TextResult) -> dict[tuple[int, int, int], str]:
    """The shares of sentences and paragraphs, where one position is asked for."""
    if attribution.scores.ndim > 1:
        return {}
    passages = [*attribution.sentences(), *attribution.paragraphs()]
    return {(p.segment, p.start, p.end): f"{p.score:.1%}" for p in passages}


def _chip(view: View, word: Word) -> dict[str, str]:
    """A special token with its share."""
    return {
        "text": f"{printable(word.text)} {view.percent(word.score)}",
        "title": f"{word.text}: {exact(word.score)}",
    }


def _sections(attribution: TextResult, shown: list[View], explained: Evidence | None) -> list[dict[str, Any]]:
    """What follows the coloured text, each with its title."""
    sections = []
    joint = explained is not None and len(shown) == 1
    hue = HUE if explained is None else GREY
    if explained is not None:
        rows = evidence_html.ranking(explained, shown[0] if joint else None, _MOST_WORDS)
        table = {"kind": "evidence", "quantity": explained.quantity, "shares": joint}
        sections.append({"title": "Words, strongest first", **table, **_folded(rows, len(explained.ranked()))})
    if is_whole(attribution):
        sections.append({"title": "Every token to every token", **_matrix(attribution, shown[0], hue)})
    for view in shown:
        to = f", to {view.position}" if len(shown) > 1 else ""
        if explained is not None and not is_long(attribution):
            title = f"How much of each word is in {summary_of(attribution, view)}"
            strip = {**_coloured(attribution, view, hue), "position": None}
            sections.append({"title": title, "kind": "strip", "strip": strip})
        if not joint:
            bar = "bar" if explained is None else "bar-share"
            sections.append({"title": f"Words, highest first{to}", "bar": bar, **_ranking(view)})
        if view.layer_scores is not None:
            sections.append({"title": f"Layer by layer{to}", **_layers(attribution, view, view.layer_scores, hue)})
    return sections


def _ranking(view: View) -> dict[str, Any]:
    ranked, scale = view.ranked(), view.full_scale()
    rows = [
        {
            "rank": rank,
            "text": visible(word.text),
            "exact": exact(word.score),
            "share": view.percent(word.score),
            "width": f"width:{min(word.score / scale, 1.0):.1%}",
        }
        for rank, word in enumerate(ranked[:_MOST_WORDS], 1)
    ]
    return {"kind": "ranking", **_folded(rows, len(ranked))}


def _folded(rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """A table's rows, of `count` words those at the top, with the rest behind a click."""
    more = f"{count - _TOP_WORDS:,} more words" if count > _TOP_WORDS else ""
    if count > _MOST_WORDS:
        more = f"{_MOST_WORDS - _TOP_WORDS:,} of {more}"
    return {"rows": rows[:_TOP_WORDS], "hidden": rows[_TOP_WORDS:], "more": more}


def _layers(attribution: TextResult, view: View, layer_scores: np.ndarray, hue: str) -> dict[str, Any]:
    """Tokens down, layers across: long texts scroll the way a page does."""
    special, labels = special_tokens(attribution), token_labels(attribution)
    top = view.token_scale()
    names = [str(layer) for layer in range(1, len(layer_scores) + 1)]
    rows = [
        _row(
            labels[token],
            layer_scores[:, token] / top,
            [f"{labels[token]}, layer {name}: {exact(layer_scores[k, token])}" for k, name in enumerate(names)],
            [GREY if special[token] else hue] * len(names),
        )
        for token in shown_tokens(attribution, view.scores)
    ]
    note = (
        f"Share of each token in {view.position} up to every layer; the last column is the score. "
        f"Full colour is the highest token of the text{view.aside()}, {view.percent(top)}, or more{_grey(hue)}. "
        f"{_choice_note(attribution)}"
    )
    return {"kind": "heat", "columns": names, "upright": False, "rows": rows, "note": note}


def _matrix(attribution: TextResult, view: View, hue: str) -> dict[str, Any]:
    """Every token's share in every token."""
    special, labels = special_tokens(attribution), token_labels(attribution)
    shown = shown_tokens(attribution, attribution.scores.mean(0))
    matrix = attribution.scores[np.ix_(shown, shown)]
    top = heat_scale(attribution)
    rows = [
        _row(
            labels[to],
            matrix[k] / top,
            [f"{labels[source]} to {labels[to]}: {exact(matrix[k, j])}" for j, source in enumerate(shown)],
            [GREY if special[source] else hue for source in shown],
        )
        for k, to in enumerate(shown)
    ]
    note = (
        f"A row is a token that is attributed, a column one that it comes from; rows add up to 100%. "
        f"Full colour is the highest share of a token in another one, {view.percent(top)}, or more{_grey(hue)}. "
        f"{_choice_note(attribution)}"
    )
    return {"kind": "heat", "columns": [labels[k] for k in shown], "upright": True, "rows": rows, "note": note}


def _grey(hue: str) -> str:
    """What to add of special tokens where other tokens have a colour."""
    return "" if hue == GREY else "; special tokens are grey"


def _row(name: str, shares: np.ndarray, titles: Sequence[str], hues: Sequence[str]) -> dict[str, Any]:
    """A row of a heat map: its name, and the colour and the title of each cell."""
    cells = [(colour(share, CELL_ALPHA, hue), title) for share, title, hue in zip(shares, titles, hues, strict=True)]
    return {"name": name, "cells": cells}


def _choice_note(attribution: TextResult) -> str:
    n = len(attribution.tokens)
    return f"The {MOST_TOKENS} highest of {n:,} tokens, in order of the text." if n > MOST_TOKENS else ""
