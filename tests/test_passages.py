"""Paragraphs and sentences, their scores, and long texts made visible."""

from __future__ import annotations

import copy
import io
import json
import re
import warnings
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

import globenc
from globenc.passages import LONGEST_PARAGRAPH, paragraphs, sentences
from globenc.render.document import LONG_TEXT, document, is_long
from globenc.render.evidence import text_evidence
from globenc.render.html import fragment, page
from globenc.render.terminal import show
from globenc.render.view import views


def texts(divide, text):
    return [text[start:end] for start, end in divide(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n ", []),
        ("One", ["One"]),
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ('He said "No." She left.', ['He said "No."', "She left."]),
        (
            "Dr. Who and Mrs. X met at 3.5 p.m. in the U.S. Senate.",
            ["Dr. Who and Mrs. X met at 3.5 p.m. in the U.S. Senate."],
        ),
        ("J. R. R. Tolkien wrote it. Yes.", ["J. R. R. Tolkien wrote it.", "Yes."]),
        ("and so on ... but no. Then", ["and so on ... but no.", "Then"]),
        ("No stop\n\nNext part. End", ["No stop", "Next part.", "End"]),
        ("これはペンです。それは何？本だ", ["これはペンです。", "それは何？", "本だ"]),
        ("Это так. Нет!", ["Это так.", "Нет!"]),
        ("  padded.  Twice. \n", ["padded.", "Twice."]),
    ],
)
def test_sentences(text, expected):
    assert texts(sentences, text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("One.\nStill one.", ["One.\nStill one."]),
        ("One.\n\nTwo.\n \n\n  Three. ", ["One.", "Two.", "Three."]),
    ],
)
def test_paragraphs(text, expected):
    assert texts(paragraphs, text) == expected


@pytest.mark.parametrize(
    "long", ["A line of a log.\n" * 900, "A sentence of a wall of text. " * 600, "x" * 9000], ids=len
)
def test_long_paragraphs_are_cut(long):
    spans = paragraphs(long)
    assert "".join(long[a:b] for a, b in spans).replace("\n", "").replace(" ", "") == re.sub(r"\s", "", long)
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
    if "." in long:
        assert len(spans) > 5
        assert max(b - a for a, b in spans) <= LONGEST_PARAGRAPH


@pytest.fixture(scope="module")
def explainer():
    return globenc.GlobEnc.from_pretrained()


@pytest.mark.parametrize("position", ["cls", [0, 3], "all"], ids=str)
def test_scores_of_passages_add_up(explainer, position):
    text = "The plot drags. The acting is superb!\n\nA second part, with 3.5 stars. Good"
    a = explainer(text, position=position)
    special = [k for k, segment in enumerate(a.segments) if segment is None]
    for passages in (a.sentences(), a.paragraphs()):
        total = sum(np.asarray(passage.score) for passage in passages)
        np.testing.assert_allclose(total + a.scores[..., special].sum(-1), 1, atol=1e-5)
        assert all(text[p.start : p.end] == p.text for p in passages)
    assert [p.text for p in a.paragraphs()] == text.split("\n\n")
    # by hand: the words of the first sentence
    inside = [w.score for w in a.words() if w.start is not None and w.end <= len("The plot drags.")]
    np.testing.assert_allclose(a.sentences()[0].score, sum(np.asarray(score) for score in inside), rtol=1e-5)


def test_passages_of_pairs_and_json(explainer):
    a = explainer("First one. First two.", "Second one.")
    assert [(p.text, p.segment) for p in a.sentences()] == [("First one.", 0), ("First two.", 0), ("Second one.", 1)]
    read = json.loads(a.to_json())
    assert [(s["start"], s["end"], s["segment"]) for s in read["sentences"]] == [(0, 10, 0), (11, 21, 0), (0, 11, 1)]
    assert read["paragraphs"][0]["score"] == pytest.approx(sum(s["score"] for s in read["sentences"][:2]))


def test_no_offsets_no_passages(explainer):
    a = explainer("One. Two.")
    assert replace(a, offsets=[None] * len(a.tokens)).sentences() == []


@pytest.fixture(scope="module")
def long_one(explainer):
    """A made-up result of 1,501 tokens: one paragraph in the middle has most of it."""
    paragraph = "The cast was good <b>& loud</b>. It rained. "
    text = "\n\n".join(
        [paragraph.strip()] * 60 + ["Here it is, the finest film of all. Truly!"] + [paragraph.strip()] * 60
    )
    a = explainer("short", label=None)
    matches = list(re.finditer(r"\w+|[^\w\s]", text))
    n = len(matches)
    scores = np.full(n + 1, 0.2 / (n + 1), np.float32)
    where = [k for k, m in enumerate(matches, 1) if text.index("Here") <= m.start() < text.index("Truly!") + 6]
    scores[where] += 0.8 / len(where)
    return replace(
        a,
        text=text,
        tokens=["[CLS]", *(m.group() for m in matches)],
        offsets=[None, *(m.span() for m in matches)],
        segments=[None, *[0] * n],
        word_ids=[None, *range(n)],
        scores=scores,
    )


def test_long_texts_are_documents(long_one, explainer):
    assert len(long_one.tokens) > LONG_TEXT
    assert is_long(long_one)
    assert not is_long(explainer("short"))
    found = document(long_one, views(long_one)[0])
    assert found.best[0][0].text == "Here it is, the finest film of all."
    assert found.top[0][0].text.startswith("Here it is")
    assert found.top[0][0].score > 0.8
    assert sum(block.score for group in found.groups for block in group.blocks) == pytest.approx(
        1 - 0.2 / len(long_one.tokens), abs=1e-3
    )
    assert sum(stretch.score for stretch in found.strip) == pytest.approx(1, abs=0.01)
    deepest = max(found.strip, key=lambda stretch: stretch.relative)
    assert deepest.text.startswith("Here it is")
    assert len(found.strip) <= 250
    folded = [group for group in found.groups if group.folded]
    assert sum(len(group.blocks) for group in folded) > 90
    assert all("finest" not in piece.text for group in folded for block in group.blocks for piece in block.pieces)
    written = "".join(piece.text for group in found.groups for block in group.blocks for piece in block.pieces)
    assert re.sub(r"\s", "", written) == re.sub(r"\s", "", long_one.text)


def test_page_of_a_long_text(long_one):
    html = page(long_one)
    assert html.count("<details") >= 2
    assert "Top sentences" in html
    assert "Top paragraphs" in html
    assert "<b>&" not in html
    anchors = re.findall(r'href="#([^"]+)"', html)
    assert len(anchors) > 100
    assert set(anchors) <= set(re.findall(r' id="([^"]+)"', html))
    assert "<script" not in html
    assert "Top sentences" in fragment(long_one)


def test_terminal_of_a_long_text(long_one):
    out = io.StringIO()
    show(long_one, Console(file=out, width=100), 5)
    assert "Here it is, the finest film of all." in out.getvalue()
    assert len(out.getvalue().splitlines()) < 40


@pytest.fixture(scope="module")
def long_explained(long_one):
    """The same with class scores: that paragraph speaks for the label, the first one against it."""
    scores = np.where(long_one.scores > 1e-3, 0.5, 0.001).astype(np.float32)
    scores[1:4] = -1.0
    return replace(
        long_one, class_scores=scores, explained_label="positive", logit=float(scores.sum()) + 0.5, remainder=0.5,
        reference="zero",
    )  # fmt: skip


def test_documents_by_class_scores_have_the_strongest_first_for_or_against(long_explained):
    found = document(long_explained, text_evidence(long_explained).view(), signed=True)
    assert [passage.text for passage, _ in found.best[:2]] == [
        "Here it is, the finest film of all.",
        "The cast was good <b>& loud</b>.",
    ]
    assert found.best[0][0].score > 0 > found.best[1][0].score
    assert min(stretch.relative for stretch in found.strip) == -1
    assert max(stretch.relative for stretch in found.strip) > 0.5
    assert sum(stretch.score for stretch in found.strip) == pytest.approx(float(long_explained.class_scores[1:].sum()))
    assert found.scale == pytest.approx(0.001)


def test_renderings_of_a_long_text_with_class_scores(long_explained):
    html = page(long_explained)
    assert "below, in orange, what speaks against it" in html
    halves = re.findall(r'<a href="#[^"]+" title="[^"]+: ([+\N{MINUS SIGN}]?)[\d.]+" style="[^"]*gradient\((t?)', html)
    assert len(halves) > 100
    assert {lower for sign, lower in halves if sign == "+"} == {""}
    assert {lower for sign, lower in halves if sign == "\N{MINUS SIGN}"} == {"t"}
    assert re.search(r'<td class="number" title="-[\d.]+">\N{MINUS SIGN}\d', html)
    assert "finest film of all" in html[: html.index("The text</h2>")]
    out = io.StringIO()
    show(long_explained, Console(file=out, width=100), 5)
    assert re.search(r"^\+5\.00 +\d.*Here it is, the finest film of all\. *$", out.getvalue(), re.M)
    assert len(out.getvalue().splitlines()) < 40


def test_pages_are_the_same_every_time(long_one):
    assert page(long_one) == page(long_one)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_was_cut_off_a_long_text_is_none_of_its_passages(long_one, side):
    """The text has as much again, in front or behind, that was not read."""
    more = "Nobody read this. " * 40 + "\n\n" + "Nor that, and"
    front = f"{more} " if side == "left" else ""
    moved = [None if span is None else (span[0] + len(front), span[1] + len(front)) for span in long_one.offsets]
    text = f"{front}{long_one.text}" if front else f"{long_one.text} {more}"
    a = replace(long_one, text=text, offsets=moved, truncated=300)
    read = long_one.text
    assert [p.text for p in a.sentences()] == [p.text for p in long_one.sentences()]
    assert all(p.start >= len(front) and p.end <= len(front) + len(read) for p in a.paragraphs())
    assert all(text[p.start : p.end] == p.text for p in [*a.sentences(), *a.paragraphs()])
    found = document(a, views(a)[0])
    cut = [stretch for stretch in found.strip if not stretch.read]
    assert [stretch.text for stretch in cut] == [f"{len(more) + 1:,} characters were cut off"]
    assert found.strip[0 if front else -1] is cut[0]
    unread = [piece for group in found.groups for block in group.blocks for piece in block.pieces if not piece.read]
    assert [piece.text for piece in unread] == [f"{more} " if front else f" {more}"]
    html = page(a)
    assert len(re.findall("<s ", html)) == 1
    assert "Hatched is what was cut off" in html
    assert "Nobody" not in html[: html.index("The text</h2>")]
    assert json.loads(a.to_json())["unread"] == [
        {"segment": 0, "start": 0 if front else len(read), "end": len(front) if front else len(text)}
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pair", [None, "short one", "A second text that is as long as the first is and longer by far"])
def test_unread_text_is_what_the_tokenizer_cut(explainer, side, pair):
    """Against the tokens of the whole texts, with control characters at the ends, for every length."""
    tokenizer = copy.deepcopy(explainer.tokenizer)
    tokenizer.truncation_side = side
    text = "\x01 A charming, unflinchingly bleak and affecting journey. \x02"
    whole = tokenizer(text, pair, return_offsets_mapping=True)
    for limit in range(6, 24, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            a = globenc.GlobEnc(explainer.model, tokenizer)(text, pair, max_length=limit)
        expected = []
        for segment, source in enumerate([text] if pair is None else [text, pair]):
            spans = [s for s, k in zip(whole["offset_mapping"], whole.sequence_ids(0), strict=True) if k == segment]
            lost = len(spans) - a.segments.count(segment)
            if lost:
                kept = spans[lost:] if side == "left" else spans[: len(spans) - lost]
                expected.append((segment, 0, kept[0][0]) if side == "left" else (segment, kept[-1][1], len(source)))
        assert a.unread() == expected
