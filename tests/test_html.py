"""HTML that parses, escapes everything and holds every word; pages that need no other file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from render_cases import Parsed, alpha, attribution, printed, shifted, struck, whole

from globenc import Attribution
from globenc.render.figure import figure
from globenc.render.html import fragment, page
from globenc.render.pieces import pieces


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


def test_save_html_and_notebook(tmp_path):
    a = attribution()
    assert a.save_html(tmp_path / "a.html") == Path(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == page(a)
    assert a._repr_html_() == fragment(a)


EVIL = '<script>alert("x")</script>'


def explained(**options: object) -> Attribution:
    return attribution(
        "low high bad", scores=[0.2, 0.1, 0.3, 0.3, 0.1], class_scores=[-0.5, 0.1, 2.0, -1.0, 0.25], **options
    )


@pytest.mark.parametrize("render", [fragment, page])
def test_html_says_what_was_asked_and_answered_before_the_text(render):
    parsed = Parsed(render(explained()))
    said = "".join(parsed.text)
    said = " ".join(said[said.index("Which") :].split())
    assert said.startswith(
        'Which words speak for "positive", and which against it? logit 1.35 = words for 2.35 \N{MINUS SIGN} '
        "words against 1.50 + rest 0.50 [CLS] \N{MINUS SIGN}0.50 low high bad [SEP] +0.25"
    )


@pytest.mark.parametrize("render", [fragment, page])
def test_words_are_blue_for_and_orange_underlined_against_on_one_scale(render):
    words = Parsed(render(explained())).words
    assert [title for _, title, _ in words[:3]] == ["low: +0.100000", "high: +2.000000", "bad: -1.000000"]
    low, high, bad = (style for _, _, style in words[:3])
    assert "37,99,235" in high and "213,94,0" in bad  # noqa: PT018
    assert alpha(high) == pytest.approx(0.6)
    assert alpha(bad) == pytest.approx(0.3)
    assert alpha(low) == pytest.approx(0.03)
    assert ["underline" in style for style in (low, high, bad)] == [False, False, True]


def test_shares_stay_beside_class_scores_in_grey():
    a = explained(layers=2)
    source = page(a)
    words = Parsed(source).words
    assert [title for _, title, _ in words[3:]] == ["low: 0.100000", "high: 0.300000", "bad: 0.300000"]
    assert all("128,128,128" in style for _, _, style in words[3:])
    assert "How much of each word is in [CLS], the summary that most classifiers decide from" in source
    rows = re.findall(r"<bdi lang=\"\">(\w+)</bdi></td><td [^>]*>(.\d\.\d\d)</td>.*?<td [^>]*>([\d.]+%)</td>", source)
    assert rows == [("high", "+2.00", "30.0%"), ("bad", "\N{MINUS SIGN}1.00", "30.0%"), ("low", "+0.10", "10.0%")]
    assert 'class="bar-against" style="margin-left:25.00%;width:25.00%"' in source
    assert 'class="bar" style="margin-left:50.00%;width:50.00%"' in source
    assert "special tokens are grey" not in source


def test_several_positions_have_class_scores_once():
    a = attribution(positions=2, position=[0, -2], class_scores=[0.0, 1.0, -1.0, 0.5, 0.0])
    source = page(a)
    assert source.count("Which words speak for") == 1
    assert source.count("How much of each word is in") == 2
    assert "Words, highest first, to film (token 3)" in source


@pytest.mark.parametrize("render", [fragment, page])
def test_class_scores_escape_everything(render):
    a = attribution("A b", pair="c", class_scores=[0.5, -1.0, 1.0, 0.0, 2.0, -0.5])
    spans = [None, (0, len(EVIL)), (len(EVIL) + 1, 2 * len(EVIL) + 1), None, (0, len(EVIL)), None]
    texts = {"text": f"{EVIL} {EVIL}", "text_pair": EVIL, "model": EVIL, "label": "a", "explained_label": f"{EVIL}\x1b"}
    source = render(replace(a, offsets=spans, tokens=[EVIL] * 6, **texts))
    assert "<script" not in source
    assert "\x1b" not in source
    assert [text for text, _, _ in Parsed(source).words] == [EVIL] * 6


def test_text_against_is_readable_in_light_and_dark():
    source = page(attribution("one", class_scores=[0.0, -1.0, 0.0]))
    pairs = re.findall(r"background: #(\w{6}); color: #(\w{6})", source)
    assert len(pairs) == 2
    style = Parsed(source).words[0][2]
    hue = tuple(int(v) for v in re.search(r"rgba\((\d+),(\d+),(\d+),", style).groups())  # type: ignore[union-attr]
    for pair in pairs:
        background, text = (tuple(int(value[i : i + 2], 16) for i in (0, 2, 4)) for value in pair)
        mixed = tuple(alpha(style) * h + (1 - alpha(style)) * b for h, b in zip(hue, background, strict=True))
        assert contrast(mixed, text) > 4.5


def test_blue_and_orange_are_told_apart_by_colour_blind_readers():
    """Simulated after Vienot, Brettel and Mollon (1999) for missing red and green cones, in linear RGB."""
    simulated = {
        "protan": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
        "deutan": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
    }
    words = Parsed(page(attribution("one two", class_scores=[0.0, 1.0, -1.0, 0.0]))).words[:2]
    hues = [re.search(r"rgba\((\d+),(\d+),(\d+),", style).groups() for _, _, style in words]  # type: ignore[union-attr]
    linear = np.array([[(int(v) / 255) ** 2.2 for v in hue] for hue in hues])
    for matrix in simulated.values():
        seen = (linear @ matrix.T).clip(0, 1) ** (1 / 2.2)
        assert np.abs(seen[0] - seen[1]).max() > 0.5
