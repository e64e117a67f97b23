"""What a rendering shows of a long text: where the attribution is, its top sentences, what may be folded."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from ..text_spans import Passage
from .pieces import Piece, pieces
from .protocols import TextResult
from .view import View

LONG_TEXT = 1000  # tokens; from here on a text is shown as a document
FULL_COLOURS = 20  # words in full colour: one alone would leave a long text pale
_STRETCHES = 160  # of the strip, at most
_TOP_SENTENCES = 10
_TOP_PARAGRAPHS = 5
_OPEN = 12  # paragraphs that are not folded, besides those of the top sentences
_SHORT = 240  # characters of a sentence in a list


@dataclass(frozen=True)
class Stretch:
    """A part of the strip: how its `text` begins, its colour as `relative`, 0 to 1 or of class scores -1 to 1, and how
    many characters it has; not `read` where the text was cut."""

    anchor: str
    text: str
    score: float
    relative: float
    length: int
    read: bool = True


@dataclass(frozen=True)
class Block:
    """A paragraph."""

    anchor: str
    score: float
    pieces: list[Piece]


@dataclass(frozen=True)
class Group:
    """Paragraphs in a row that are all open or all folded."""

    folded: bool
    name: str
    score: float
    blocks: list[Block]


@dataclass(frozen=True)
class Document:
    """A long text for one position; `scale` is the size of score in full colour, `best` the top sentences and `top` the
    top paragraphs with their anchors."""

    strip: list[Stretch]
    best: list[tuple[Passage, str]]
    top: list[tuple[Passage, str]]
    groups: list[Group]
    scale: float


def is_long(attribution: TextResult) -> bool:
    """Whether a text is shown as a document."""
    return len(attribution.tokens) > LONG_TEXT and any(span is not None for span in attribution.offsets)


def document(attribution: TextResult, view: View, signed: bool = False) -> Document:
    """A long text, and its pair, divided for one position.

    Args:
        signed: the view's scores are class scores: the top ones are the strongest, for or against.
    """
    prefix = f"g{zlib.crc32(f'{view.position} {attribution.text}'.encode()):x}-"
    paragraphs, scores = attribution.paragraphs(), _per_token(attribution, view)
    blocks, passages = [], []
    for segment in (0, 1):
        inside = [passage for passage in paragraphs if passage.segment == segment]
        if inside:
            blocks += _blocks(attribution, view, segment, inside, scores[segment], f"{prefix}{segment}-")
            passages += inside
    sentences = sorted(attribution.sentences(), key=lambda s: -abs(_sum(scores[s.segment], s.start, s.end)))[
        :_TOP_SENTENCES
    ]
    best = []
    for sentence in sentences:
        k = next(k for k, p in enumerate(passages) if p.segment == sentence.segment and sentence.start < p.end)
        score = _sum(scores[sentence.segment], sentence.start, sentence.end)
        best.append((replace(sentence, score=score), blocks[k].anchor))
    ranked = sorted(range(len(blocks)), key=lambda k: -abs(blocks[k].score))
    shown = {blocks[k].anchor for k in ranked[:_OPEN]} | {anchor for _, anchor in best}
    word_scores = sorted((abs(word.score) for word in view.words if not word.special), reverse=True)
    scale = float(word_scores[min(FULL_COLOURS, len(word_scores)) - 1]) if word_scores else 1.0
    top = [(replace(passages[k], score=blocks[k].score), blocks[k].anchor) for k in ranked[:_TOP_PARAGRAPHS]]
    strip = _with_unread(attribution, _strip(blocks, passages, scores, signed), prefix)
    return Document(strip, best, top, _groups(blocks, shown), scale or 1.0)


def short(text: str) -> str:
    """A sentence on one line of a list."""
    text = " ".join(text.split())
    return text if len(text) <= _SHORT else f"{text[: _SHORT - 1]}…"


def _per_token(attribution: TextResult, view: View) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """For the text and the pair: the last characters of its tokens, and the sum of the scores before each."""
    sums = {}
    for segment in (0, 1):
        chosen = [
            (span[1] - 1, score)  # where it ends: some tokens begin with the space before them
            for span, where, score in zip(attribution.offsets, attribution.segments, view.scores, strict=True)
            if span is not None and where == segment
        ]
        chosen.sort(key=lambda pair: pair[0])
        total = np.cumsum([0.0, *(float(score) for _, score in chosen)])
        sums[segment] = np.array([start for start, _ in chosen]), total
    return sums


def _sum(tokens: tuple[np.ndarray, np.ndarray], start: int, end: int) -> float:
    """The attribution of a stretch of characters."""
    starts, total = tokens
    first, last = np.searchsorted(starts, [start, end])
    return float(total[last] - total[first])


def _blocks(
    attribution: TextResult,
    view: View,
    segment: int,
    paragraphs: list[Passage],
    scores: tuple[np.ndarray, np.ndarray],
    prefix: str,
) -> list[Block]:
    """The pieces of a text, each with the paragraph that it begins in."""
    inside: list[list[Piece]] = [[] for _ in paragraphs]
    k = end = 0
    for piece in pieces(attribution, view.words, segment):
        start, end = end, end + len(piece.text)
        while k + 1 < len(paragraphs) and start >= paragraphs[k + 1].start:
            k += 1
        if piece.text.strip() or (inside[k] and end < paragraphs[k].end):
            inside[k].append(piece)
    return [
        Block(f"{prefix}{k}", _sum(scores, passage.start, passage.end), chosen)
        for k, (passage, chosen) in enumerate(zip(paragraphs, inside, strict=True))
    ]


def _groups(blocks: list[Block], shown: set[str]) -> list[Group]:
    runs: list[list[Block]] = []
    for block in blocks:
        if runs and (runs[-1][-1].anchor in shown) == (block.anchor in shown):
            runs[-1].append(block)
        else:
            runs.append([block])
    return [
        Group(
            folded=run[0].anchor not in shown,
            name=f"{len(run)} paragraph{'s' if len(run) > 1 else ''}",
            score=sum(block.score for block in run),
            blocks=run,
        )
        for run in runs
    ]


def _strip(
    blocks: list[Block],
    passages: list[Passage],
    scores: dict[int, tuple[np.ndarray, np.ndarray]],
    signed: bool,
) -> list[Stretch]:
    """The text in stretches of like length, each with its score and its density for a colour."""
    whole = sum(passage.end - passage.start for passage in passages)
    size = max(40, -(-whole // _STRETCHES))
    parts: list[tuple[str, str, float, int]] = []
    for block, passage in zip(blocks, passages, strict=True):
        count = max(1, round((passage.end - passage.start) / size))
        edges = np.linspace(passage.start, passage.end, count + 1).astype(int).tolist()
        for start, end in pairwise(edges):
            score = _sum(scores[passage.segment], start, end)
            parts.append(
                (
                    block.anchor,
                    short(passage.text[start - passage.start : end - passage.start])[:60],
                    score,
                    end - start,
                )
            )
    density = np.array([score / max(1, length) for _, _, score, length in parts])
    low, high = np.quantile(np.abs(density) if signed else density, [0.02, 0.98]) if len(density) else (0.0, 1.0)
    low = 0.0 if signed else low
    relative = np.clip((density - low) / (high - low if high > low else 1.0), -1.0 if signed else 0.0, 1.0)
    return [
        Stretch(anchor, text, score, share, length)
        for (anchor, text, score, length), share in zip(parts, relative.tolist(), strict=True)
    ]


def _with_unread(attribution: TextResult, strip: list[Stretch], prefix: str) -> list[Stretch]:
    """The strip with what was cut off in front or behind, no longer than half of the text that was read."""
    room = sum(stretch.length for stretch in strip) // 2
    for segment, start, end in attribution.unread():
        inside = [k for k, stretch in enumerate(strip) if stretch.anchor.startswith(f"{prefix}{segment}-")]
        if inside:
            front = end < len(attribution.text if segment == 0 else attribution.text_pair or "")
            near = strip[inside[0 if front else -1]]
            cut = Stretch(
                near.anchor, f"{end - start:,} characters were cut off", 0.0, 0.0, min(end - start, room), False
            )
            strip.insert(inside[0] if front else inside[-1] + 1, cut)
    return strip
