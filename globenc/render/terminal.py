"""An Attribution on a terminal; without colours (NO_COLOR, a pipe) the ranked table says the same."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..printing import printable
from ..text_spans import Word
from .captions import circumstances, meaning, prediction, share_meaning, truncation
from .document import document, is_long, short
from .evidence import Evidence, text_evidence
from .pieces import pieces
from .protocols import TextResult
from .token_labels import visible
from .view import View, is_whole, views

# From grey to blue, and to orange, at one luminance, under black: the same order of emphasis on dark and on light
# terminals. Blue and orange are told apart by all kinds of colour blindness; what is against is underlined too.
_RAMP = ((166, 171, 180), (145, 170, 205), (120, 167, 228), (92, 162, 248), (64, 156, 255))
_AGAINST_RAMP = ((178, 168, 155), (196, 160, 125), (213, 150, 95), (228, 140, 66), (240, 128, 40))
_FAINTEST = 0.3  # of the highest word; below it a word stays as it is
_BAR_COLOUR, _AGAINST_COLOUR = "rgb(64,156,255)", "rgb(240,128,40)"
_BAR_WIDTH = 24
_WORD_WIDTH = 24
_LAYER_WIDTH = 6
_EIGHTHS = " ▏▎▍▌▋▊▉"
_UNREAD_CHARACTERS = 200


def show(attribution: TextResult, console: Console, top: int = 15) -> None:
    """Print the prediction, what was asked of it and the sum that answers, the text coloured by score, the `top`
    strongest words, and the layers where asked for."""
    shown, explained = views(attribution), text_evidence(attribution)
    predicted = prediction(attribution)
    if predicted is not None:
        console.print(Text(predicted, "bold"))
    joint = explained is not None and len(shown) == 1
    if explained is not None:
        _print_evidence(attribution, explained, shown[0] if joint else None, top, console)
    for view in shown:
        if not joint:
            _print_shares(attribution, view, top, console)
        if view.layer_scores is not None:
            console.print()
            console.print(_layers(view, top, console))
    console.print()
    if is_whole(attribution):
        _note("The whole matrix, token by token, is in --html, --plot and --json.", console)
    lost = truncation(attribution)
    if lost is not None:
        console.print(Text(lost, "bold"))
    one = shown[0] if len(shown) == 1 else View("the position", [], shown[0].scores, None)
    if explained is not None:
        _note(explained.meaning(), console)
    _note(meaning(one) if explained is None else share_meaning(attribution, one), console)
    _note(circumstances(attribution), console)


def _print_shares(attribution: TextResult, view: View, top: int, console: Console) -> None:
    """One position: the text coloured by share, the highest words."""
    if attribution.scores.ndim > 1:
        console.print()
        console.print(Text.assemble("to ", (view.position, "bold")))
    if _in_colour(attribution, console):
        _print_text(attribution, view.words, view.full_scale(), console)
    if is_long(attribution):
        console.print()
        console.print(_sentences(attribution, view))
    console.print()
    console.print(_ranking(view, top, console))
    _print_rest(view, top, console)


def _in_colour(attribution: TextResult, console: Console) -> bool:
    return console.color_system is not None and not console.no_color and not is_long(attribution)


def _print_evidence(
    attribution: TextResult, explained: Evidence, view: View | None, top: int, console: Console
) -> None:
    """What was asked and answered, the text coloured by class score, the strongest words; with a view its shares."""
    console.print(Text(explained.question))
    logit, terms = explained.terms()
    colours = {"for": f"bold {_BAR_COLOUR}", "against": f"bold underline {_AGAINST_COLOUR}"}
    line = Text.assemble(f"{explained.quantity} ", (logit, "bold"), " =")
    for k, term in enumerate(terms):
        line.append("" if k == 0 and term.sign == "+" else f" {term.sign}")
        line.append(" ").append(f"{term.name} {term.digits}", colours.get(term.kind, ""))
    console.print(line)
    if _in_colour(attribution, console):
        _print_text(attribution, explained.words, explained.scale, console)
    if is_long(attribution):
        console.print()
        console.print(_strongest_sentences(attribution, explained, view))
    console.print()
    console.print(_strongest(explained, view, top, console))
    _print_evidence_rest(explained, view, top, console)


def _note(sentence: str, console: Console) -> None:
    console.print(Text(sentence, "dim"))


def _style(relative: float) -> Style:
    """Blue, of what is below zero orange and underlined."""
    size = min(abs(relative), 1.0)
    if size < _FAINTEST:
        return Style.null()
    level = int((size - _FAINTEST) / (1 - _FAINTEST) * (len(_RAMP) - 1) + 0.5)
    red, green, blue = (_RAMP if relative > 0 else _AGAINST_RAMP)[level]
    shade = Style.parse(f"black on rgb({red},{green},{blue})")
    return shade + Style(bold=level == len(_RAMP) - 1, underline=True if relative < 0 else None)


def _print_text(attribution: TextResult, words: list[Word], scale: float, console: Console) -> None:
    for segment in (0, 1) if attribution.text_pair is not None else (0,):
        text = Text()
        for piece in pieces(attribution, words, segment):
            lines = "\n".join(printable(line) for line in piece.text.split("\n"))
            if piece.score is not None:
                text.append(lines, _style(piece.score / scale))
            elif piece.read:
                text.append(lines)
            else:
                text.append(printable(piece.short(_UNREAD_CHARACTERS)), "dim strike")
        console.print()
        console.print(text)


def _sentences(attribution: TextResult, view: View) -> Table:
    """The highest sentences of a long text."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("score", justify="right")
    table.add_column("sentence")
    for passage, _ in document(attribution, view).best[:5]:
        table.add_row(view.percent(passage.score), Text(printable(short(passage.text))))
    return table


def _ranking(view: View, top: int, console: Console) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("word", max_width=_WORD_WIDTH, no_wrap=True, overflow="ellipsis")
    table.add_column("score", justify="right")
    table.add_column("", no_wrap=True)
    scale = view.full_scale()
    for word in view.ranked()[:top]:
        bar = Text(_bar(word.score / scale, console.options.ascii_only), _BAR_COLOUR)
        table.add_row(Text(visible(word.text)), view.percent(word.score), bar)
    return table


def _bar(relative: float, ascii_only: bool) -> str:
    eighths = int(min(max(relative, 0.0), 1.0) * _BAR_WIDTH * 8 + 0.5)
    if ascii_only:
        return "#" * round(eighths / 8)
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def _strongest(explained: Evidence, view: View | None, top: int, console: Console) -> Table:
    """The strongest words with their class scores, and their shares where a view is given; no number is cut."""
    shares = {} if view is None else {word.tokens: view.percent(word.score) for word in view.words}
    words = explained.ranked()[:top]
    numbers = [explained.signed(word.score) for word in words]
    room = console.width - sum(max(map(len, column), default=0) + 2 for column in (numbers, shares.values())) - 3
    half = max(3, min(_BAR_WIDTH // 2, (room - _WORD_WIDTH) // 2))
    table = Table(box=None, pad_edge=False, header_style="dim")
    word_width = max(6, min(_WORD_WIDTH, room - 2 * half))
    table.add_column("word", max_width=word_width, no_wrap=True, overflow="ellipsis")
    table.add_column(explained.quantity, justify="right", no_wrap=True)
    table.add_column(f"{'against':>{half}} for" if half >= len("against") else "", no_wrap=True)
    if view is not None:
        table.add_column("share", justify="right", no_wrap=True)
    for word, number in zip(words, numbers, strict=True):
        bar = _two_sided_bar(word.score / explained.scale, half, console.options.ascii_only)
        share = [] if view is None else [shares[word.tokens]]
        table.add_row(Text(visible(word.text)), number, bar, *share)
    return table


def _two_sided_bar(relative: float, half: int, ascii_only: bool) -> Text:
    """A bar to the right of an axis, or where it is below zero to the left."""
    halves = int(min(abs(relative), 1.0) * half * 2 + 0.5)
    if ascii_only:
        bar, axis = "#" * round(halves / 2), "|"
    else:
        edge = "▌" if relative > 0 else "▐"
        full, axis = "█" * (halves // 2), "│"
        bar = full + edge * (halves % 2) if relative > 0 else edge * (halves % 2) + full
    if relative > 0:
        return Text.assemble(" " * half, (axis, "dim"), (bar, _BAR_COLOUR))
    return Text.assemble((bar.rjust(half), _AGAINST_COLOUR), (axis, "dim"))


def _strongest_sentences(attribution: TextResult, explained: Evidence, view: View | None) -> Table:
    """The sentences of a long text that speak most, for or against."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(explained.quantity, justify="right", no_wrap=True)
    if view is not None:
        table.add_column("share", justify="right", no_wrap=True)
    table.add_column("sentence")
    for passage in sorted(attribution.sentences(), key=lambda sentence: -abs(sentence.class_score or 0.0))[:5]:
        share = [] if view is None else [view.percent(float(np.mean(passage.score)))]
        signed = explained.signed(passage.class_score or 0.0)
        table.add_row(signed, *share, Text(printable(short(passage.text))))
    return table


def _print_evidence_rest(explained: Evidence, view: View | None, top: int, console: Console) -> None:
    """What the table leaves out, so that everything adds up."""
    shares = {} if view is None else {word.tokens: word.score for word in view.words}

    def both(words: list[Word]) -> str:
        signed = explained.signed(sum(word.score for word in words))
        return signed if view is None else f"{signed}, {view.percent(sum(shares[word.tokens] for word in words))}"

    others, special = explained.ranked()[top:], explained.special()
    if others:
        _note(f"{len(others):,} other word{'s' if len(others) > 1 else ''}: {both(others)}", console)
    if special:
        named = "; ".join(f"{printable(word.text)} {both([word])}" for word in special)
        _note(f"special tokens: {both(special)} ({named})", console)


def _print_rest(view: View, top: int, console: Console) -> None:
    """What the table leaves out, so that everything adds up to 100%."""
    ranked = view.ranked()
    others = ranked[top:]
    if others:
        share = sum(word.score for word in others)
        _note(f"{len(others):,} other word{'s' if len(others) > 1 else ''}: {view.percent(share)}", console)
    special = [word for word in view.words if word.special]
    if special:
        named = ", ".join(f"{printable(word.text)} {view.percent(word.score)}" for word in special)
        _note(f"special tokens: {view.percent(view.special_share())} ({named})", console)


def _layers(view: View, top: int, console: Console) -> Table:
    """The highest words by layers, in percent; of deep models as many layers as fit, the last one always."""
    layer_scores = view.layer_scores
    assert layer_scores is not None
    count = len(layer_scores)
    scale = view.full_scale()
    width = max(_LAYER_WIDTH, len(view.percent(1.0)) - 1, len(view.percent(scale)))
    room = max((console.width - _WORD_WIDTH) // width, 2)
    chosen = range(count) if count <= room else sorted({round(k * (count - 1) / (room - 1)) for k in range(room)})
    table = Table(box=None, pad_edge=False, header_style="dim", title_justify="left", title_style="dim", padding=0)
    table.title = "share up to each layer, %"
    table.add_column("word", max_width=_WORD_WIDTH - 2, no_wrap=True, overflow="ellipsis")
    for layer in chosen:
        table.add_column(str(layer + 1), justify="right", width=width)
    for word in view.ranked()[:top]:
        shares = [float(layer_scores[layer, slice(*word.tokens)].sum()) for layer in chosen]
        cells = [Text(view.percent(share)[:-1], _style(share / scale)) for share in shares]
        table.add_row(Text(visible(word.text)), *cells)
    for name, rest in (
        ("other words", view.ranked()[top:]),
        ("special tokens", [word for word in view.words if word.special]),
    ):
        if rest:
            shares = [sum(float(layer_scores[layer, slice(*word.tokens)].sum()) for word in rest) for layer in chosen]
            table.add_row(Text(name, "dim"), *(Text(view.percent(share)[:-1], "dim") for share in shares))
    return table
