"""An Attribution as HTML: a fragment for notebooks and a page of its own.

All styles are inline, and colour is a translucent layer over whatever background there is, weak enough that dark text
on light and light text on dark both keep a contrast above 4.5: a notebook's theme cannot be asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ..text_spans import Passage, Word
from .document import FULL_COLOURS, document, is_long, short
from .view import (
    MOST_TOKENS,
    Piece,
    TextResult,
    View,
    answer,
    circumstances,
    heat_scale,
    is_whole,
    meaning,
    pieces,
    printable,
    shown_tokens,
    special_tokens,
    token_labels,
    truncation,
    views,
    visible,
)

_HUE = "37,99,235"
_GREY = "128,128,128"
_TEXT_ALPHA = 0.6  # of the highest word: text stays readable on it
_CELL_ALPHA = 0.95  # of cells without text
_TOP_WORDS = 25
_MOST_WORDS = 500
_UNREAD_CHARACTERS = 300

_HATCHED = f"background:repeating-linear-gradient(45deg,rgba({_GREY},.5) 0 2px,transparent 2px 7px)"
_MUTED = "opacity:.72"
_BLOCK = "margin:.7em 0"
_NUMBER = "text-align:right;padding:0 .8em 0 .4em;font-variant-numeric:tabular-nums"
_PLAIN_TABLE = "border-collapse:collapse;margin:.4em 0;font-size:.92em;background:none;color:inherit"
_VERTICAL = "writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;padding:.3em 0;max-height:9em"

_PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 2rem auto; max-width: 58rem; padding: 0 1.2rem; background: #ffffff; color: #1b1f24;
  font: 1rem/1.65 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  -webkit-print-color-adjust: exact; print-color-adjust: exact; }
h1 { font-size: 1.5rem; margin: 0 0 .3em; line-height: 1.3; }
h2 { font-size: 1.1rem; margin: 2em 0 .3em; }
summary { cursor: pointer; }
@media (prefers-color-scheme: dark) { body { background: #14171c; color: #e6e8eb; } }
"""


def fragment(attribution: TextResult) -> str:
    """The attribution for a notebook's output cell: the coloured text, the rest behind a click."""
    shown = views(attribution)
    title = answer(attribution)
    head = "" if title is None else f'<p style="{_BLOCK};font-size:1.15em"><b>{escape(title)}</b></p>'
    folded = "".join(
        f'<details style="{_BLOCK}"><summary style="cursor:pointer">{escape(name)}</summary>{content}</details>'
        for name, content in _sections(attribution, shown)
    )
    return (
        f'<div class="globenc" style="max-width:58em;line-height:1.65">{head}{_text(attribution, shown)}{folded}'
        f"{_footer(attribution, shown)}</div>"
    )


def page(attribution: TextResult) -> str:
    """The attribution as one HTML file: no other file, no script, light or dark as the reader's system is."""
    shown = views(attribution)
    title = answer(attribution) or f"Attribution to {shown[0].position}"
    sections = "\n".join(
        f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in _sections(attribution, shown)
    )
    return (
        '<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · globenc</title>\n<style>{_PAGE_STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1><bdi>{escape(title)}</bdi></h1>\n{_text(attribution, shown)}\n{sections}\n</main>\n"
        f"{_footer(attribution, shown)}\n</body>\n</html>\n"
    )


def _text(attribution: TextResult, shown: list[View]) -> str:
    """The coloured text, once for each position, and in front of it what was cut off."""
    lost = truncation(attribution)
    note = "" if lost is None else f'<p style="{_BLOCK}"><b>{escape(lost)}</b></p>'
    return note + "".join(_strip(attribution, view) for view in shown)


def _strip(attribution: TextResult, view: View) -> str:
    """The text, and its pair, coloured for one position, with the special tokens at their places."""
    if is_long(attribution):
        return _document(attribution, view)
    scale = view.full_scale()
    runs: list[list[Word]] = [[], []]
    for word in view.words:
        # a special token stands with the text in front of it; [CLS] with the first
        seen = bool(runs[1]) or word.segment == 1
        runs[1 if seen else 0].append(word)
    paragraphs = []
    for segment, run in enumerate(runs if attribution.text_pair is not None else runs[:1]):
        before = [word for word in run[: _first_word(run)] if word.special]
        after = [word for word in run[_first_word(run) :] if word.special]
        text = "".join(_piece(piece, scale) for piece in pieces(attribution, view.words, segment))
        inside = " ".join(filter(None, [_chips(view, before), text, _chips(view, after)]))
        paragraphs.append(f'<p dir="auto" style="{_BLOCK};white-space:pre-wrap;overflow-wrap:anywhere">{inside}</p>')
    name = f'<p style="{_BLOCK};{_MUTED}">to <b><bdi>{escape(view.position)}</bdi></b></p>'
    plain = attribution.scores.ndim == 1
    note = (
        f'<p style="{_BLOCK};{_MUTED};font-size:.88em">Full colour is the highest word{view.aside()}, '
        f"{view.percent(scale)}. All tokens add up to 100%; special tokens have {view.percent(view.special_share())} "
        "of it.</p>"
    )
    return f"{'' if plain else name}{''.join(paragraphs)}{note}"


def _document(attribution: TextResult, view: View) -> str:
    """A long text: where in it the attribution is, its top sentences, and its paragraphs with the low ones folded."""
    sections = document(attribution, view)
    several = attribution.scores.ndim > 1
    name = f'<p style="{_BLOCK};{_MUTED}">to <b><bdi>{escape(view.position)}</bdi></b></p>' if several else ""
    stretches = "".join(
        f'<a href="#{stretch.anchor}" title="{escape(stretch.place)}'
        f'{f": {view.percent(stretch.score)}" if stretch.read else ""}" '
        f'style="flex:{stretch.length} 0 0;{_colour(stretch.relative, _CELL_ALPHA) if stretch.read else _HATCHED}"></a>'
        for stretch in sections.strip
    )
    strip = (
        f'<p style="{_BLOCK};{_MUTED};font-size:.88em">The text from beginning to end, pale where a stretch has '
        "least of the attribution for its length, deep where it has most. A click leads to it."
        f"{' Hatched is what was cut off.' if attribution.unread() else ''}</p>"
        f'<div style="display:flex;height:2.2em;border:1px solid rgba({_GREY},.5);border-radius:.2em;overflow:hidden">'
        f"{stretches}</div>"
    )
    tables = "".join(
        f'<h2>{name}</h2><table style="{_PLAIN_TABLE}">{_passages(view, found)}</table>'
        for name, found in (("Top sentences", sections.best), ("Top paragraphs", sections.top))
    )
    blocks = []
    for group in sections.groups:
        inside = "".join(
            f'<p id="{block.anchor}" dir="auto" style="{_BLOCK};white-space:pre-wrap;overflow-wrap:anywhere">'
            f"{''.join(_piece(piece, sections.scale, plain_below=0.04) for piece in block.pieces)}</p>"
            for block in group.blocks
        )
        if group.folded:
            inside = (
                f'<details style="{_BLOCK}"><summary style="cursor:pointer;{_MUTED}">{escape(group.name)}: '
                f"{view.percent(group.score)}</summary>{inside}</details>"
            )
        blocks.append(inside)
    chips = _chips(view, [word for word in view.words if word.special])
    note = (
        f'<p style="{_BLOCK};{_MUTED};font-size:.88em">Full colour is a word with {sections.scale:.3%} or more, the '
        f"{FULL_COLOURS} highest. All tokens add up to 100%; special tokens have {view.percent(view.special_share())} "
        f"of it: {chips}</p>"
    )
    return f"{name}{strip}{tables}<h2>The text</h2>{note}{''.join(blocks)}"


def _passages(view: View, passages: list[tuple[Passage, str]]) -> str:
    """Rows of a table: scores, and the beginnings of passages as links to where they stand."""
    return "".join(
        f'<tr style="background:none"><td style="{_NUMBER};vertical-align:top" title="{_exact(passage.score)}">'
        f'{view.percent(passage.score)}</td><td style="text-align:start;padding:0 0 .4em 0"><a href="#{anchor}" '
        f'style="color:inherit;text-decoration-color:rgba({_HUE},.6)" dir="auto">{escape(short(passage.text))}</a>'
        "</td></tr>"
        for passage, anchor in passages
    )


def _first_word(run: list[Word]) -> int:
    return next((k for k, word in enumerate(run) if not word.special), len(run))


def _piece(piece: Piece, scale: float, plain_below: float = 0.0) -> str:
    if piece.score is not None and piece.score < plain_below * scale:
        return escape(piece.text)
    if piece.score is not None:
        colour = _colour(piece.score / scale, _TEXT_ALPHA)
        return (
            f'<span style="{colour};border-radius:.2em;padding:.08em 0" '
            f'title="{escape(visible(piece.text))}: {_exact(piece.score)}">{escape(piece.text)}</span>'
        )
    if piece.read:
        return escape(piece.text)
    rest = escape(piece.short(_UNREAD_CHARACTERS))
    return f'<s style="{_MUTED}" title="cut off: the model did not read this">{rest}</s>'


def _chips(view: View, words: list[Word]) -> str:
    """Special tokens with their share, small and in grey."""
    return " ".join(
        f'<bdi style="{_MUTED};font-size:.78em;white-space:nowrap" title="{escape(word.text)}: {_exact(word.score)}">'
        f"{escape(printable(word.text))} {view.percent(word.score)}</bdi>"
        for word in words
    )


def _sections(attribution: TextResult, shown: list[View]) -> list[tuple[str, str]]:
    """Title and content of what follows the coloured text."""
    sections = []
    if is_whole(attribution):
        sections.append(("Every token to every token", _matrix(attribution, shown[0])))
    for view in shown:
        to = f", to {view.position}" if len(shown) > 1 else ""
        sections.append((f"Words, highest first{to}", _ranking(view)))
        if view.layer_scores is not None:
            sections.append((f"Layer by layer{to}", _layers(attribution, view, view.layer_scores)))
    return sections


def _ranking(view: View) -> str:
    ranked, scale = view.ranked(), view.full_scale()
    rows = [
        f'<tr style="background:none"><td style="{_NUMBER};{_MUTED}">{place}</td>'
        f'<td style="text-align:start;padding:0 1em 0 0"><bdi>{escape(visible(word.text))}</bdi></td>'
        f'<td style="{_NUMBER}" title="{_exact(word.score)}">{view.percent(word.score)}</td>'
        '<td style="width:14em;padding:0;text-align:left">'
        f'<div style="height:.75em;width:{min(word.score / scale, 1.0):.1%};'
        f'background:rgba({_HUE},.75);border-radius:.15em"></div></td></tr>'
        for place, word in enumerate(ranked, 1)
    ]
    table = f'<table style="{_PLAIN_TABLE}">{{}}</table>'
    shown = table.format("".join(rows[:_TOP_WORDS]))
    if len(rows) <= _TOP_WORDS:
        return shown
    hidden = table.format("".join(rows[_TOP_WORDS:_MOST_WORDS]))
    more = f"{len(rows) - _TOP_WORDS:,} more words"
    if len(rows) > _MOST_WORDS:
        more = f"{_MOST_WORDS - _TOP_WORDS:,} of {more}"
    return f"{shown}<details><summary>{more}</summary>{hidden}</details>"


def _layers(attribution: TextResult, view: View, layer_scores: np.ndarray) -> str:
    """Tokens down, layers across: long texts scroll the way a page does."""
    special, labels = special_tokens(attribution), token_labels(attribution)
    shown = shown_tokens(attribution, view.scores)
    top = view.token_scale()
    names = [str(layer) for layer in range(1, len(layer_scores) + 1)]
    body = "".join(
        _row(
            labels[token],
            layer_scores[:, token] / top,
            [f"{labels[token]}, layer {name}: {_exact(layer_scores[k, token])}" for k, name in enumerate(names)],
            [bool(special[token])] * len(names),
        )
        for token in shown
    )
    head = "".join(f'<th style="font-weight:normal;text-align:center;padding:0">{name}</th>' for name in names)
    return _heat_map(
        f"<tr><th></th>{head}</tr>{body}",
        len(names),
        f"Share of each token in {view.position} up to every layer; the last column is the score. "
        f"{_scale_note(view, top)}{_choice_note(attribution)}",
    )


def _matrix(attribution: TextResult, view: View) -> str:
    """Every token's share in every token."""
    special, labels = special_tokens(attribution), token_labels(attribution)
    shown = shown_tokens(attribution, attribution.scores.mean(0))
    matrix = attribution.scores[np.ix_(shown, shown)]
    top = heat_scale(attribution)
    body = "".join(
        _row(
            labels[to],
            matrix[k] / top,
            [f"{labels[source]} to {labels[to]}: {_exact(matrix[k, j])}" for j, source in enumerate(shown)],
            [bool(special[source]) for source in shown],
        )
        for k, to in enumerate(shown)
    )
    head = "".join(
        f'<th style="font-weight:normal;vertical-align:bottom;padding:0"><bdi style="{_VERTICAL}">'
        f"{escape(labels[source])}</bdi></th>"
        for source in shown
    )
    return _heat_map(
        f"<tr><th></th>{head}</tr>{body}",
        len(shown),
        f"A row is a token that is attributed, a column one that it comes from; rows add up to 100%. "
        f"Full colour is the highest share of a token in another one, {view.percent(top)}, or more; special tokens are "
        f"grey. {_choice_note(attribution)}",
    )


def _heat_map(rows: str, columns: int, note: str) -> str:
    widths = f'<col><col span="{columns}" style="width:1.7em">'
    return (
        f'<p style="{_BLOCK};{_MUTED};font-size:.88em">{escape(note)}</p><div style="overflow-x:auto">'
        f'<table style="{_PLAIN_TABLE};border-collapse:separate;border-spacing:1px;font-size:.82em;line-height:1.4">'
        f"<colgroup>{widths}</colgroup>{rows}</table></div>"
    )


def _row(name: str, shares: np.ndarray, titles: Sequence[str], grey: Sequence[bool]) -> str:
    cells = "".join(
        f'<td style="{_colour(share, _CELL_ALPHA, hue=_GREY if is_grey else _HUE)};min-width:1.5em" '
        f'title="{escape(title)}"></td>'
        for share, title, is_grey in zip(shares, titles, grey, strict=True)
    )
    return (
        f'<tr style="background:none"><th style="font-weight:normal;text-align:end;padding:0 .6em 0 0;'
        f'white-space:nowrap"><bdi>{escape(name)}</bdi></th>{cells}</tr>'
    )


def _scale_note(view: View, top: float) -> str:
    return (
        f"Full colour is the highest token of the text{view.aside()}, {view.percent(top)}, or more; special tokens are "
        "grey. "
    )


def _choice_note(attribution: TextResult) -> str:
    n = len(attribution.tokens)
    return f"The {MOST_TOKENS} highest of {n:,} tokens, in order of the text." if n > MOST_TOKENS else ""


def _footer(attribution: TextResult, shown: list[View]) -> str:
    about = meaning(shown[0] if len(shown) == 1 else View("the position", [], shown[0].scores, None))
    inside = "".join(f'<p style="margin:.3em 0">{escape(line)}</p>' for line in (about, circumstances(attribution)))
    return f'<footer style="margin:1.2em 0;{_MUTED};font-size:.88em">{inside}</footer>'


def _colour(relative: float, alpha: float, hue: str = _HUE) -> str:
    return f"background:rgba({hue},{alpha * min(max(float(relative), 0.0), 1.0):.3f})"


def _exact(score: float) -> str:
    return f"{score:.6f}" if score == 0 or score >= 1e-4 else f"{score:.2e}"
