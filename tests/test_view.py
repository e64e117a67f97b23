"""What every rendering shows: pieces of the text, names of positions and of tokens."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from render_cases import Parsed, attribution, named, printed, whole

from globenc.printing import printable
from globenc.render.figure import figure
from globenc.render.html import page
from globenc.render.pieces import pieces
from globenc.render.token_labels import token_labels, visible
from globenc.render.view import position_names, shown_tokens, views


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
