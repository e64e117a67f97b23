"""An Attribution on a terminal; without colours (NO_COLOR, a pipe) the ranked table says the same."""

from __future__ import annotations

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ..printing import printable
from .captions import circumstances, meaning, prediction, truncation
from .document import document, is_long, short
from .pieces import pieces
from .protocols import TextResult
from .token_labels import visible
from .view import View, is_whole, views

# From grey to blue at one luminance, under black: the same order of emphasis on dark and on light terminals.
_RAMP = ((166, 171, 180), (145, 170, 205), (120, 167, 228), (92, 162, 248), (64, 156, 255))
_FAINTEST = 0.3  # of the highest word; below it a word stays as it is
_BAR_COLOUR = "rgb(64,156,255)"
_BAR_WIDTH = 24
_WORD_WIDTH = 24
_LAYER_WIDTH = 6
_EIGHTHS = " ▏▎▍▌▋▊▉"
_UNREAD_CHARACTERS = 200


def show(attribution: TextResult, console: Console, top: int = 15) -> None:
    """Print the prediction, the text coloured by score, the `top` highest words, and the layers where asked for."""
    shown = views(attribution)
    predicted = prediction(attribution)
    if predicted is not None:
        console.print(Text(predicted, "bold"))
    for view in shown:
        if attribution.scores.ndim > 1:
            console.print()
            console.print(Text.assemble("to ", (view.position, "bold")))
        if console.color_system is not None and not console.no_color and not is_long(attribution):
            _print_text(attribution, view, console)
        if is_long(attribution):
            console.print()
            console.print(_sentences(attribution, view))
        console.print()
        console.print(_ranking(view, top, console))
        _print_rest(view, top, console)
        if view.layer_scores is not None:
            console.print()
            console.print(_layers(view, top, console))
    console.print()
    if is_whole(attribution):
        _note("The whole matrix, token by token, is in --html, --plot and --json.", console)
    lost = truncation(attribution)
    if lost is not None:
        console.print(Text(lost, "bold"))
    _note(meaning(shown[0] if len(shown) == 1 else View("the position", [], shown[0].scores, None)), console)
    _note(circumstances(attribution), console)


def _note(sentence: str, console: Console) -> None:
    console.print(Text(sentence, "dim"))


def _style(relative: float) -> Style:
    if relative < _FAINTEST:
        return Style.null()
    level = int((min(relative, 1.0) - _FAINTEST) / (1 - _FAINTEST) * (len(_RAMP) - 1) + 0.5)
    red, green, blue = _RAMP[level]
    return Style.parse(f"black on rgb({red},{green},{blue})") + Style(bold=level == len(_RAMP) - 1)


def _print_text(attribution: TextResult, view: View, console: Console) -> None:
    scale = view.full_scale()
    for segment in (0, 1) if attribution.text_pair is not None else (0,):
        text = Text()
        for piece in pieces(attribution, view.words, segment):
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
