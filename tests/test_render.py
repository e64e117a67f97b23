"""Rendering: HTML that parses and holds every word, pictures of a sensible size, terminals with and without colour."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from globenc import Attribution
from globenc.render.figure import figure
from globenc.render.html import fragment, page
from globenc.render.terminal import show
from globenc.render.view import pieces, position_names, printable, shown_tokens, token_labels, views, visible

VOID = {"meta", "col", "br"}


def attribution(
    text: str = "A charming film",
    pair: str | None = None,
    positions: int | None = None,
    layers: int = 0,
    position: Any = "cls",
    truncated: int = 0,
    scores: list[float] | None = None,
) -> Attribution:
    """An attribution of a text; its tokens are runs of letters and single other characters, its scores random."""
    tokens, offsets, segments, word_ids = ["[CLS]"], [None], [None], [None]
    for segment, part in enumerate([text] if pair is None else [text, pair]):
        for word, match in enumerate(re.finditer(r"\w+|[^\w\s]", part)):
            tokens.append(match.group().lower())
            offsets.append(match.span())
            segments.append(segment)
            word_ids.append(word)
        tokens.append("[SEP]")
        offsets.append(None)
        segments.append(None)
        word_ids.append(None)
    shape = (() if positions is None else (positions,)) + (len(tokens),)
    random = np.random.default_rng(0)

    def rows(*leading: int) -> np.ndarray:
        values = random.random((*leading, *shape)) + 0.05
        return values / values.sum(-1, keepdims=True)

    return Attribution(
        text=text,
        text_pair=pair,
        tokens=tokens,
        offsets=offsets,
        segments=segments,
        word_ids=word_ids,
        scores=rows() if scores is None else np.array(scores),
        log2_scale=np.zeros(shape[:-1]),
        layer_scores=rows(layers) if layers else None,
        layer_log2_scale=np.zeros((layers, *shape[:-1])) if layers else None,
        label="positive",
        probability=0.75,
        method="N-Enc",
        position=position,
        row_normalize=False,
        model="toy/model",
        truncated=truncated,
    )


def whole(text: str = "A charming film", **options: Any) -> Attribution:
    n = len(attribution(text).tokens)
    return attribution(text, positions=n, position="all", **options)


class Parsed(HTMLParser):
    """Tags in order, spans with a title (the words), and an error where tags do not match."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.titles: list[str] = []
        self._word: list[str] | None = None
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.titles.append(given.get("title") or "")
        if tag not in VOID:
            self.open.append(tag)
        if tag == "span":
            self._word = [given["title"] or "", given["style"] or "", ""]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "span" and self._word is not None:
            self.words.append((self._word[2], self._word[0], self._word[1]))
            self._word = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._word is not None:
            self._word[2] += data


def printed(shown: Attribution, width: int = 80, top: int = 10, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    show(shown, console, top)
    return console.file.getvalue()  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------- html


@pytest.mark.parametrize("render", [fragment, page])
def test_html_parses_and_has_every_word_once_with_its_exact_score(render):
    a = attribution("A charming, charming film & more")
    parsed = Parsed(render(a))
    words = [word for word in a.words() if not word.special]
    assert [text for text, _, _ in parsed.words] == [word.text for word in words]
    assert [title for _, title, _ in parsed.words] == [f"{word.text}: {word.score:.6f}" for word in words]


@pytest.mark.parametrize("render", [fragment, page])
def test_html_escapes_everything(render):
    evil = '<script>alert("x")</script>'
    a = replace(attribution("A b", pair="c"), text=f"{evil} {evil}", text_pair=evil, model=evil, label=evil)
    spans = [None, (0, len(evil)), (len(evil) + 1, 2 * len(evil) + 1), None, (0, len(evil)), None]
    a = replace(a, offsets=spans, tokens=[evil] * 6)
    source = render(a)
    assert "<script" not in source
    assert [text for text, _, _ in Parsed(source).words] == [evil] * 3


def test_page_is_self_contained():
    source = page(attribution(layers=2))
    assert source.startswith("<!DOCTYPE html>")
    assert source.endswith("</html>\n")
    assert "http" not in source
    assert "src=" not in source
    assert "script" not in Parsed(source).tags
    assert "prefers-color-scheme: dark" in source
    assert "positive 75.0%" in source


def alpha(style: str) -> float:
    return float(re.search(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", style).group(1))  # type: ignore[union-attr]


def test_colour_is_relative_to_the_highest_word_and_never_to_special_tokens():
    a = attribution("low high", scores=[0.6, 0.08, 0.16, 0.16])
    low, high = (alpha(style) for _, _, style in Parsed(page(a)).words)
    assert high == pytest.approx(0.6)
    assert low == pytest.approx(0.3)


def contrast(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """WCAG 2 contrast ratio of two colours, 0..255."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_on_full_colour_in_light_and_dark():
    source = page(attribution("one", scores=[0.2, 0.6, 0.2]))
    pairs = [
        tuple(tuple(int(value[i : i + 2], 16) for i in (0, 2, 4)) for value in match)
        for match in re.findall(r"background: #(\w{6}); color: #(\w{6})", source)
    ]
    assert len(pairs) == 2
    (style,) = [style for _, _, style in Parsed(source).words]
    hue = tuple(int(v) for v in re.search(r"rgba\((\d+),(\d+),(\d+),", style).groups())  # type: ignore[union-attr]
    for background, colour in pairs:
        mixed = tuple(alpha(style) * h + (1 - alpha(style)) * b for h, b in zip(hue, background, strict=True))
        assert contrast(mixed, colour) > 4.5


def test_special_tokens_are_shown_with_their_share_and_a_pair_has_two_paragraphs():
    a = attribution("One two", pair="three", scores=[0.1, 0.2, 0.2, 0.1, 0.3, 0.1])
    source = page(a)
    assert [name in source for name in ("[CLS] 10.0%", "[SEP] 10.0%", "special tokens have 30.0%")] == [True] * 3
    assert source.count('<p dir="auto"') == 2
    assert page(attribution()).count('<p dir="auto"') == 1


def test_several_positions_have_a_strip_each_with_the_position_named():
    a = attribution("A charming film", positions=2, position=[0, -2])
    parsed = Parsed(page(a))
    assert [text for text, _, _ in parsed.words] == ["A", "charming", "film"] * 2
    assert "[CLS] (token 0)" in parsed.text
    assert "film (token 3)" in parsed.text


def test_layers_are_a_heat_map_of_tokens_by_layers():
    a = attribution("A charming film", layers=4)
    parsed = Parsed(page(a))
    cells = [title for title in parsed.titles if ", layer " in title]
    assert len(cells) == 4 * len(a.tokens)
    assert f"charming, layer 3: {a.layer_scores[2, 2]:.6f}" in cells  # type: ignore[index]
    assert not any(", layer " in title for title in Parsed(page(attribution())).titles)


def test_whole_matrix_is_a_heat_map():
    a = whole("A charming film", layers=2)
    cells = [title for title in Parsed(page(a)).titles if " to " in title]
    assert len(cells) == len(a.tokens) ** 2
    assert f"charming to A: {a.scores[1, 2]:.6f}" in cells


def test_long_texts_stay_small():
    text = " ".join(f"word{k}" for k in range(600))
    a = attribution(text, layers=12)
    source = page(a)
    assert len(Parsed(source).words) == 600
    assert "575 more words" in source
    assert "64 highest of 602" in source
    assert len([title for title in Parsed(source).titles if ", layer " in title]) == 64 * 12
    assert len(page(whole(text))) < 3_000_000


def test_truncated_text_says_so_and_marks_what_was_not_read():
    a = attribution("A charming film", truncated=5)
    a = replace(a, text=f"{a.text} with an unread end")
    source = page(a)
    assert "5 of 10 tokens (50%) were cut off" in source
    assert re.search(r"<s [^>]*> with an unread end</s>", source)
    assert "<s " not in page(attribution())
    assert "cut off" not in page(attribution())


def shifted(a: Attribution, front: str, segment: int = 0) -> Attribution:
    """With text in front of the first token, which was not read."""
    move = len(front)
    spans = [
        (span[0] + move, span[1] + move) if span is not None and where == segment else span
        for span, where in zip(a.offsets, a.segments, strict=True)
    ]
    texts = {"text": f"{front}{a.text}"} if segment == 0 else {"text_pair": f"{front}{a.text_pair}"}
    return replace(a, offsets=spans, truncated=5, **texts)


def struck(source: str) -> list[str]:
    return re.findall(r"<s [^>]*>(.*?)</s>", source, re.S)


def test_a_text_cut_at_its_front_is_marked_there():
    a = shifted(attribution("A charming film"), "An unread beginning. ")
    assert a.unread() == [(0, 0, 21)]
    source = page(a)
    assert struck(source) == ["An unread beginning. "]
    assert source.index("<s ") < source.index("charming</span>")
    assert "cut off at the beginning." in source
    assert "".join(piece.text for piece in pieces(a, a.words(), 0)) == a.text
    assert "cut off at the beginning." in printed(a, width=100, color_system=None)
    assert re.search(r"\x1b\[2;9mAn unread beginning. \x1b", printed(a, force_terminal=True, color_system="truecolor"))
    assert "at the beginning" in figure(a)._suptitle.get_text().replace("\n", " ")  # type: ignore[union-attr]
    assert a.to_dict()["unread"] == [{"segment": 0, "start": 0, "end": 21}]
    assert [passage.text for passage in a.sentences()] == ["A charming film"]


def test_the_part_of_what_was_not_read_that_is_shown_is_next_to_what_was():
    front = shifted(attribution("film"), f"{'x' * 1000} near ")
    end = replace(attribution("film"), text=f"film near {'x' * 1000}", truncated=5)
    assert [re.sub("x+", "x", text) for text in struck(page(front)) + struck(page(end))] == [
        "706 more characters … x near ",
        " near x … 706 more characters",
    ]


@pytest.mark.parametrize("gap", ["\x00\x01 ", " \n\t", "\u200b", "\ufffd ", "\ufe0f"], ids=ascii)
def test_characters_without_a_token_at_the_ends_are_not_unread(gap):
    a = shifted(attribution("A film"), gap)
    assert a.unread() == []
    assert struck(page(replace(a, text=f"{a.text} and more"))) == [" and more"]
    assert struck(page(replace(a, text=f"{a.text} and more", truncated=0))) == []


def test_only_the_text_of_a_pair_that_was_cut_is_marked():
    """The longer one is cut, down to the length of the other."""
    a = shifted(attribution("emoji", pair="A much longer second text"), "Not read: ", 1)
    a = replace(a, text="emoji \N{GRINNING FACE}")  # which the tokenizer drops
    assert a.unread() == [(1, 0, 10)]
    assert struck(page(a)) == ["Not read: "]
    assert "cut off at the beginning of the second text." in page(a)
    both = shifted(shifted(attribution("one two", pair="three four"), "Neither "), "nor ", 1)
    assert struck(page(both)) == ["Neither ", "nor "]
    assert "cut off at the beginning of both texts." in page(both)


def test_words_that_share_characters_or_have_no_offsets_are_shown_once():
    a = attribution("A ½ film")
    shared = replace(a, tokens=["[CLS]", "a", "1", "2", "[SEP]"], offsets=[None, (0, 1), (2, 3), (2, 3), None])
    assert [(p.text, p.score is None) for p in pieces(shared, shared.words(), 0)] == [
        ("A", False),
        (" ", True),
        ("½", False),
        (" film", True),
    ]
    bare = replace(a, offsets=[None] * len(a.tokens))
    assert "".join(piece.text for piece in pieces(bare, bare.words(), 0)) == " ".join(bare.tokens[1:-1])


# ---------------------------------------------------------------------------------------- view


def test_pieces_joined_are_the_text():
    text = "  Odd \n spacing ,  here\tand 这部电影 مرحبا!  "
    a = attribution(text)
    assert "".join(piece.text for piece in pieces(a, a.words(), 0)) == text


def test_position_names():
    assert position_names(attribution()) == ["[CLS]"]
    assert position_names(attribution(position="mean")) == ["the mean of all tokens"]
    assert position_names(attribution(position=-2)) == ["film (token 3)"]
    assert position_names(attribution(position=np.ones(5))) == ["the weighted tokens"]
    assert position_names(attribution(positions=2, position=np.ones((1, 2, 5)))) == ["weights 0", "weights 1"]
    assert position_names(whole()) == ["[CLS]", "A", "charming", "film", "[SEP]"]


def test_views_of_the_whole_matrix_are_its_mean():
    a = whole(layers=3)
    (view,) = views(a)
    assert np.allclose(view.scores, a.scores.mean(0))
    assert view.layer_scores.shape == (3, 5)
    assert sum(word.score for word in view.words) == pytest.approx(1)


def test_labels_are_the_text_and_steer_nothing():
    a = replace(attribution("naïve text"), tokens=["[CLS]", "naive", "##text", "[SEP]"])
    assert token_labels(a) == ["[CLS]", "naïve", "##text", "[SEP]"]
    assert printable("a\x1b[31m\u202eb\nc\x00") == "a\ufffd[31m\ufffdb c\ufffd"


def named(tokens: list[str], text: str | None = None, spans: list[tuple[int, int]] | None = None) -> Attribution:
    """An attribution of these tokens, with or without offsets."""
    n = len(tokens)
    return replace(
        attribution("x"),
        text=" ".join(tokens) if text is None else text,
        tokens=["<s>", *tokens, "</s>"],
        offsets=[None, *(spans or [None] * n), None],
        segments=[None, *[0] * n, None],
        word_ids=[None, *range(n), None],
        scores=np.full(n + 2, 1 / (n + 2)),
    )


@pytest.mark.parametrize(
    ("tokens", "labels"),
    [
        (["ĠcafÃ©", "Ġ", "Ċ", "ĊĊ", "ĉ"], ["café", "␣", "↵", "↵↵", "⇥"]),
        (["Ã", "©", "Ġfilm"], ["é", "é", "film"]),
        (["▁film", "▁", "▁▁", "<0x0A>", "<0xC3>", "<0xA9>"], ["film", "␣", "␣␣", "↵", "é", "é"]),
        (["wonder@@", "ful", "@@"], ["wonder", "ful", "@@"]),
        (["film</w>", "fi", "</w>"], ["film", "fi", "␣"]),
        (["##ing", "naïve", "ñandú", "Ñ"], ["##ing", "naïve", "ñandú", "Ñ"]),
        (["\u200b", "\n"], ["U+200B", "↵"]),
    ],
    ids=lambda value: value[0],
)
def test_names_of_tokens_are_shown_as_text(tokens, labels):
    a = named(tokens)
    assert token_labels(a) == ["<s>", *labels, "</s>"]
    assert position_names(replace(a, position=1)) == [f"{labels[0]} (token 1)"]


def test_blank_tokens_have_a_sign_and_a_colour():
    a = named(["a", "Ġ", "Ċ", "Ġb"], text="a  \nb", spans=[(0, 1), (1, 2), (3, 4), (4, 5)])
    assert token_labels(a)[1:-1] == ["a", "␣", "↵", "b"]
    (axes,) = figure(a).axes
    assert [label.get_text() for label in axes.get_xticklabels()][1:-1] == ["a", "␣", "↵", "b"]
    spans = Parsed(page(a)).words
    assert [(text, title.split(":")[0]) for text, title, _ in spans] == [
        ("a", "a"),
        (" ", "␣"),
        ("\n", "↵"),
        ("b", "b"),
    ]
    assert re.search(r"^␣ +16\.7%", printed(a, color_system=None), re.M)
    assert [visible(text) for text in ("", " ", "\r\n", "a b", "ि")] == ["␣", "␣", "↵↵", "a b", "ि"]


def test_long_texts_keep_their_highest_tokens_in_order():
    a = attribution(" ".join("x" * 100))
    shown = shown_tokens(a, a.scores)
    assert len(shown) == 64
    assert list(shown) == sorted(shown)
    assert a.scores[shown].min() >= np.delete(a.scores, shown).max()


# ------------------------------------------------------------------------------------ terminal


def test_terminal_without_colour_is_a_ranked_table_with_bars():
    a = attribution("low high", scores=[0.2, 0.1, 0.6, 0.1])
    lines = printed(a, color_system=None).splitlines()
    assert lines[0] == "positive 75.0%"
    (high,) = [k for k, line in enumerate(lines) if line.startswith("high")]
    assert lines[high].split() == ["high", "60.0%", "█" * 24]
    assert lines[high + 1].split() == ["low", "10.0%", "█" * 4]
    assert "special tokens: 30.0% ([CLS] 20.0%, [SEP] 10.0%)" in lines
    assert "\x1b" not in "\n".join(lines)


def test_terminal_with_colour_shows_the_text_with_its_highest_word_strongest():
    a = attribution("low high", scores=[0.2, 0.1, 0.6, 0.1])
    out = printed(a, force_terminal=True, color_system="truecolor")
    assert re.search(r"low \x1b\[1;30;48;2;64;156;255mhigh\x1b", out)
    assert "\x1b[1;30;48" not in printed(a, force_terminal=True, color_system="truecolor", no_color=True)


def test_terminal_steers_nothing_by_the_text():
    a = replace(attribution("bad word"), text="b\x1bd word")
    assert "\x1b" not in printed(a, color_system=None)


def test_terminal_table_is_as_long_as_asked_and_the_rest_is_summed_up():
    a = attribution(" ".join(f"w{k}" for k in range(20)))
    rest = sum(sorted(word.score for word in a.words() if not word.special)[:17])
    out = printed(a, top=3, color_system=None)
    assert len(re.findall(r"^w\d+ ", out, re.M)) == 3
    assert re.search(rf"17 other words: {rest:.1%}", out)


@pytest.mark.parametrize("width", [40, 80, 120])
@pytest.mark.parametrize("layers", [2, 12, 48])
def test_terminal_layers_fit_the_width_and_end_with_the_last(layers, width):
    out = printed(attribution(layers=layers), width=width, color_system=None)
    header = [line for line in out.splitlines() if line.startswith("word")][1]
    assert header.split()[-1] == str(layers)
    assert header.split()[1] == "1"
    assert max(len(line) for line in out.splitlines()) <= width


def test_terminal_several_positions_whole_matrix_and_truncation():
    out = printed(attribution(positions=2, position=[0, 1]), color_system=None)
    assert "to [CLS] (token 0)" in out
    assert "to A (token 1)" in out
    assert "to all tokens on average" in printed(whole(), color_system=None)
    assert "5 of 10 tokens (50%) were cut off" in printed(attribution(truncated=5), color_system=None)


def test_terminal_in_ascii():
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace"), width=80)
    show(attribution("low high", scores=[0.2, 0.1, 0.6, 0.1]), console)
    console.file.seek(0)
    assert "#" * 24 in console.file.read()


# -------------------------------------------------------------------------------------- figure


def titles(drawn: Figure) -> list[str]:
    return [axes.get_title() for axes in drawn.axes if axes.get_title()]


def test_figure_has_a_bar_for_each_token():
    a = attribution()
    (axes,) = figure(a).axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx(list(a.scores))
    assert [label.get_text() for label in axes.get_xticklabels()] == token_labels(a)
    assert axes.patches[0].get_facecolor() == axes.patches[-1].get_facecolor() != axes.patches[1].get_facecolor()


def test_words_set_the_scale_of_bars_and_what_goes_beyond_is_cut_and_told():
    a = attribution("low high", layers=3, scores=[0.99, 0.001, 0.008, 0.001])
    bars, heat = figure(a).axes[:2]
    assert 0.008 < bars.get_ylim()[1] < 0.01
    assert [text.get_text() for text in bars.texts] == ["0.99"]
    assert "cut where they go beyond" in bars.get_title()
    assert heat.images[0].get_clim()[1] == pytest.approx(0.008)
    (plain,) = figure(attribution("low high", scores=[0.2, 0.1, 0.6, 0.1])).axes
    assert not plain.texts
    assert "cut" not in plain.get_title()


@pytest.mark.parametrize(
    "scores",
    [[0.0] * 4, [1.0, 0, 0, 0], [1 - 1e-12, 1e-13, 9e-13, 0.0], [0, 1.0, 0, 0]],
    ids=["all-zero", "words-zero", "skewed", "one-word"],
)
def test_extreme_scores_are_drawn(scores, tmp_path):
    a = attribution("low high", layers=2, scores=scores)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        a.plot(tmp_path / "a.png")
        source, out = page(a), printed(a, color_system=None)
    assert len(Parsed(source).words) == 2
    assert "low " in out
    if 0 < scores[2] < 1e-9:
        assert re.search(r"^high +9\.0e-11%", out, re.M)
        assert "9.00e-13" in source


def test_what_a_token_keeps_for_itself_does_not_hide_the_others():
    """Positions that keep nearly everything, as in some pre-LN models: the scale is that of the others."""
    n = len(attribution().tokens)
    kept = np.full((n, n), 0.002) + (1 - 0.002 * n) * np.eye(n)
    kept[1, 2] = 0.004
    a = replace(whole(), scores=kept)
    assert figure(a).axes[1].images[0].get_clim()[1] == pytest.approx(0.004)
    assert "highest share of a token in another one, 0." in page(a)
    one = replace(attribution("low high", scores=[0.001, 0.99, 0.008, 0.001]), position=1)
    assert [round(alpha(style), 3) for _, _, style in Parsed(page(one)).words] == [0.6, 0.6]
    assert "highest word besides the position, 0.80%" in page(one)
    assert "width:100.0%" in page(one)
    assert not re.search(r"width:\d{4,}", page(one))


def test_figure_with_layers_has_the_heat_map():
    a = attribution(layers=4)
    heat = figure(a).axes[1]
    assert heat.get_title() == "Share of each token in [CLS], layer by layer"
    assert np.allclose(heat.images[0].get_array(), a.layer_scores)
    assert heat.images[0].origin == "lower"


def test_figure_of_several_positions_and_of_the_whole_matrix():
    several = attribution(positions=3, position=[0, 1, 2], layers=2)
    assert np.allclose(figure(several).axes[0].images[0].get_array(), several.scores)
    assert len(titles(figure(several))) == 1 + 3
    matrix = whole()
    assert np.allclose(figure(matrix).axes[1].images[0].get_array(), matrix.scores)


@pytest.mark.parametrize("make", [attribution, whole], ids=["cls", "all"])
@pytest.mark.parametrize("n", [1, 60, 510])
def test_figure_is_never_huge(make, n, tmp_path):
    drawn = figure(make(" ".join(f"word{k}" for k in range(n)), layers=24))
    width, height = drawn.get_size_inches()
    assert 6 <= width <= 18
    assert 3 <= height <= 32
    assert max(len(axes.get_xticklabels()) for axes in drawn.axes) <= 64


def test_plot_writes_a_picture(tmp_path):
    a = attribution("Costs $5 and $6 _{x} ^", layers=6)
    assert a.plot(tmp_path / "a.png").axes
    height, width, _ = matplotlib.image.imread(tmp_path / "a.png").shape
    assert 600 < width < 3000
    assert 400 < height < 2000
    a.plot(tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["a.xyz", "a"])
def test_plot_refuses_unknown_endings(name, tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of .*\.png"):
        attribution().plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_plot_warns_once_of_missing_glyphs(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attribution("\U0001e900 \U0001e901 end").plot(tmp_path / "a.png")
    assert [str(w.message) for w in caught] == [
        "a.png has boxes in place of 2 of the characters: no installed font has them"
    ]


def test_plot_leaves_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    attribution().plot(tmp_path / "a.png")
    assert plt.get_fignums() == []


def test_save_html_and_notebook(tmp_path):
    a = attribution()
    assert a.save_html(tmp_path / "a.html") == Path(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page(a)
    assert a._repr_html_() == fragment(a)
