"""Attributions to be rendered, and what the tests of rendering read in the output."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
from rich.console import Console

from globenc import Attribution
from globenc.render.terminal import show

VOID = {"meta", "col", "br"}


def attribution(
    text: str = "A charming film",
    pair: str | None = None,
    positions: int | None = None,
    layers: int = 0,
    position: Any = "cls",
    truncated: int = 0,
    scores: list[float] | None = None,
    class_scores: list[float] | None = None,
) -> Attribution:
    """An attribution of a text; its tokens are runs of letters and single other characters, its scores random. Class
    scores are of the label "positive", with a remainder of 0.5."""
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
        class_scores=None if class_scores is None else np.array(class_scores),
        explained_label=None if class_scores is None else "positive",
        logit=None if class_scores is None else sum(class_scores) + 0.5,
        remainder=None if class_scores is None else 0.5,
        reference=None if class_scores is None else "zero",
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


def alpha(style: str) -> float:
    return float(re.search(r"rgba\(\d+,\d+,\d+,([\d.]+)\)", style).group(1))  # type: ignore[union-attr]


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
