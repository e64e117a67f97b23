"""What every rendering shows of an attribution: the positions, the text in pieces, the colour scale, the words."""

from __future__ import annotations

import functools
import math
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..answers import in_words
from ..methods import get_method
from ..printing import printable as printable
from ..text_spans import Passage, Word

MOST_TOKENS = 64  # more columns than this are no longer readable in a heat map
_LETTERS_PER_INCH = 11  # of a title
_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # in names of byte-level tokens


class Result(Protocol):
    """What every rendering reads of an attribution; documented in `globenc.Attribution`."""

    @property
    def scores(self) -> np.ndarray: ...
    @property
    def layer_scores(self) -> np.ndarray | None: ...
    @property
    def label(self) -> str | None: ...
    @property
    def probability(self) -> float | None: ...
    @property
    def value(self) -> float | list[float] | None: ...
    @property
    def labels(self) -> list[tuple[str, float]] | None: ...
    @property
    def method(self) -> str: ...
    @property
    def position(self) -> Any: ...
    @property
    def row_normalize(self) -> bool: ...
    @property
    def model(self) -> str: ...
    @property
    def tokens(self) -> list[str]: ...


class TextResult(Result, Protocol):
    """What a rendering reads of an attribution to a text's tokens; `globenc.Attribution` is one."""

    @property
    def text(self) -> str: ...
    @property
    def text_pair(self) -> str | None: ...
    @property
    def offsets(self) -> list[tuple[int, int] | None]: ...
    @property
    def segments(self) -> list[int | None]: ...
    @property
    def truncated(self) -> int: ...
    def words(self) -> list[Word]: ...
    def sentences(self) -> list[Passage]: ...
    def paragraphs(self) -> list[Passage]: ...
    def unread(self) -> list[tuple[int, int, int]]: ...


@dataclass(frozen=True)
class View:
    """One row of scores of an attribution.

    Attributes:
        position: whose scores they are, in words: "[CLS]", "bleak (token 13)".
        words: in order of the text, special tokens included; each score is a float.
        scores: [n], of the tokens.
        layer_scores: [layers, n], or None.
        position_token: the position itself, where it is one token.
    """

    position: str
    words: list[Word]
    scores: np.ndarray
    layer_scores: np.ndarray | None
    position_token: int | None = None

    def ranked(self) -> list[Word]:
        """The words of the text, highest score first."""
        return sorted((word for word in self.words if not word.special), key=lambda word: -word.score)

    def full_scale(self) -> float:
        """The score that is drawn in full colour: that of the highest word but special tokens and the position itself.

        They may have nearly everything, so that no word could be told from another.
        """
        return self._full_scale

    @functools.cached_property
    def _full_scale(self) -> float:
        words = [word for word in self.words if not word.special]
        others = [word.score for word in words if not self._holds_position(word)]
        return full_scale(others if any(others) else [word.score for word in words])

    def token_scale(self) -> float:
        """The same for single tokens."""
        words = [word for word in self.words if not word.special]
        scores = {k: float(self.scores[k]) for word in words for k in range(*word.tokens)}
        others = [score for k, score in scores.items() if k != self.position_token]
        return full_scale(others if any(others) else list(scores.values()))

    def aside(self) -> str:
        """What to add to "the highest word" for a reader."""
        shown = any(self._holds_position(word) and not word.special for word in self.words)
        return " besides the position" if shown else ""

    def _holds_position(self, word: Word) -> bool:
        return self.position_token is not None and word.tokens[0] <= self.position_token < word.tokens[1]

    def percent(self, share: float) -> str:
        """A share for the eye: 12.3%, or 0.42% where the words have little each, as in a long text."""
        scale = self.full_scale()
        if scale < 1e-7:
            return f"{share:.1%}" if share >= 5e-4 or not share else f"{100 * share:.1e}%"
        digits = 1 if scale >= 0.05 else max(2, -1 - math.floor(math.log10(scale)))
        return f"{share:.{digits}%}"

    def special_share(self) -> float:
        """What went to special tokens; the words have the rest of 1."""
        return float(sum(word.score for word in self.words if word.special))


@dataclass(frozen=True)
class Piece:
    """A stretch of the text: a word with its score, or what stands between words.

    Attributes:
        score: None where no token is, such as white space.
        read: False where the text was cut off, in front of its first token or behind its last.
        front: whether it stands in front of the first token.
    """

    text: str
    score: float | None
    read: bool = True
    front: bool = False

    def short(self, most: int) -> str:
        """Its text; of a longer one the `most` characters that are next to what was read."""
        more = len(self.text) - most
        if more <= 0:
            return self.text
        if self.front:
            return f"{more:,} more characters … {self.text[more:]}"
        return f"{self.text[:most]} … {more:,} more characters"


def full_scale(scores: Sequence[float] | np.ndarray) -> float:
    """The highest of some scores as a divisor: 1 where there is none above zero."""
    return float(max(scores, default=0.0)) or 1.0


def heat_scale(attribution: TextResult) -> float:
    """The share that is drawn in full colour where several rows share a scale: the highest that a token of the text
    has in another token. Special tokens, and what a token keeps for itself, can lie above it."""
    scores = np.atleast_2d(attribution.scores).copy()
    positions = _positions(attribution)
    if positions is not None:
        scores[np.arange(len(scores)), positions] = 0
    return full_scale(scores[:, ~special_tokens(attribution)].ravel())


def views(attribution: TextResult) -> list[View]:
    """One view a position; one only, the mean over all tokens, for position "all"."""
    words, scores, layers = attribution.words(), attribution.scores, attribution.layer_scores
    positions = _positions(attribution)
    if scores.ndim == 1:
        return [
            View(position_names(attribution)[0], words, scores, layers, None if positions is None else positions[0])
        ]
    if is_whole(attribution):
        averaged = [replace(word, score=float(word.score.mean())) for word in words]
        return [View("all tokens on average", averaged, scores.mean(0), None if layers is None else layers.mean(1))]
    return [
        View(
            name,
            [replace(word, score=float(word.score[k])) for word in words],
            scores[k],
            None if layers is None else layers[:, k],
            None if positions is None else positions[k],
        )
        for k, name in enumerate(position_names(attribution))
    ]


def is_whole(attribution: TextResult) -> bool:
    """Whether every token was a position, so that the scores are a square matrix."""
    return isinstance(attribution.position, str) and attribution.position == "all"


def position_names(attribution: TextResult) -> list[str]:
    """What was asked for in words, one for each row of the scores."""
    position, labels = attribution.position, token_labels(attribution)
    if isinstance(position, str):
        named = {"cls": labels[:1], "mean": ["the mean of all tokens"], "all": labels}
        return named[position]
    rows = 1 if attribution.scores.ndim == 1 else len(attribution.scores)
    positions = _positions(attribution)
    if positions is not None:
        return [f"{labels[p]} (token {p})" for p in positions]
    return ["the weighted tokens"] if rows == 1 else [f"weights {k}" for k in range(rows)]


def _positions(attribution: TextResult) -> list[int] | None:
    """The token that each row of scores is for; None where a position is not one token."""
    position, n = attribution.position, len(attribution.tokens)
    if isinstance(position, str):
        return {"cls": [0], "all": list(range(n))}.get(position)
    positions = [position] if isinstance(position, int) else position
    return [p % n for p in positions] if all(isinstance(position, int) for position in positions) else None


def token_labels(attribution: TextResult) -> list[str]:
    """Tokens as they stand in the text, a continuing word piece marked by ##; names as text where that is not known.

    Blank tokens are shown by signs, "␣" and "↵".
    """
    names, labels = token_texts(attribution.tokens), []
    for k, (token, span, segment) in enumerate(
        zip(attribution.tokens, attribution.offsets, attribution.segments, strict=True)
    ):
        if segment is None:
            labels.append(printable(token))
            continue
        found = "" if span is None else _source(attribution, segment)[slice(*span)].strip()
        if not found:
            found = names[k]
        elif token.startswith("##"):
            found = f"##{found}"
        labels.append(visible(found))
    return labels


def token_texts(tokens: Sequence[str]) -> list[str]:
    """The names of tokens as text: "é" for the byte-level "Ã©" and for "<0xC3>", "<0xA9>" each; "film" for "▁film",
    "film@@" and "film</w>"; the blanks of blank tokens. WordPiece's ## stays."""
    pieces = [_token_bytes(token) for token in tokens]
    texts, k = [], 0
    while k < len(tokens):
        # the bytes of one character may be several tokens
        for count in range(1, 5):
            joined = pieces[k : k + count]
            found = None if None in joined else _decoded(b"".join(piece or b"" for piece in joined))
            if found is not None:
                break
        else:
            count, found = 1, tokens[k].removesuffix("</w>").replace("▁", " ")
            if len(found) > 2:
                found = found.removesuffix("@@")
        count = min(count, len(tokens) - k)
        texts += [found.strip() or found] * count
        k += count
    return texts


def _token_bytes(token: str) -> bytes | None:
    """The bytes that a byte-level or a byte-fallback token stands for; None for others."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    found = [_BYTE_OF.get(character) for character in token]
    return None if token.isascii() or None in found else bytes(byte for byte in found if byte is not None)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def visible(text: str) -> str:
    """Text on one line; by signs where there is nothing in it to be seen."""
    if any(not character.isspace() and unicodedata.category(character) != "Cf" for character in text):
        return printable(text)
    signs = {"\n": "↵", "\r": "↵", "\t": "⇥"}
    return "".join(signs.get(c, "␣" if c.isspace() else f"U+{ord(c):04X}") for c in text) or "␣"


def shown_tokens(attribution: TextResult, scores: np.ndarray) -> np.ndarray:
    """The tokens that a heat map has room for: all, or the MOST_TOKENS highest ones; in order of the text."""
    if len(attribution.tokens) <= MOST_TOKENS:
        return np.arange(len(attribution.tokens))
    return np.sort(np.argsort(-scores, kind="stable")[:MOST_TOKENS])


def special_tokens(attribution: TextResult) -> np.ndarray:
    """[n], True at special tokens."""
    return np.array([segment is None for segment in attribution.segments])


def pieces(attribution: TextResult, words: list[Word], segment: int) -> list[Piece]:
    """A text cut into its words and what stands between them; joined, they are the text.

    Words without offsets are joined by spaces. Words that share characters (a character that the tokenizer spelled out
    as several) become one piece.
    """
    chosen = [word for word in words if word.segment == segment]
    text = _source(attribution, segment)
    unread = [(start, end) for where, start, end in attribution.unread() if where == segment]
    cut: list[Piece] = []
    cursor = 0

    def between(end: int) -> None:
        """What stands up to the next word, or to the end."""
        if end <= cursor:
            return
        stretch = next((start for start, stop in unread if start >= cursor and stop <= end), None)
        if stretch is None:
            cut.append(Piece(text[cursor:end], None))
        else:
            cut.append(Piece(text[cursor:end], None, read=False, front=stretch == 0 and end < len(text)))

    for word in chosen:
        if word.start is None or word.end is None:
            cut.extend([Piece(" ", None)] if cut else [])
            cut.append(Piece(word.text, word.score))
            continue
        if word.start < cursor and cut and cut[-1].score is not None:
            last = cut.pop()
            cut.append(Piece(last.text + text[cursor : word.end], last.score + word.score))
        else:
            blank = len(word.text) - len(word.text.lstrip()) if word.text.strip() else 0
            start = min(word.start + blank, word.end)
            between(start)
            cut.append(Piece(text[start : word.end], word.score))
        cursor = max(cursor, word.end)
    if all(word.start is not None for word in chosen):
        between(len(text))
    return cut


def meaning(view: View) -> str:
    """What a score says, in one sentence."""
    return (
        f"A score is the share of the attribution that flows from a word to {view.position} through all layers: "
        "it says how much, not for or against."
    )


def wrapped(line: str, inches: float) -> str:
    """A line of a figure's title in as many as its width takes."""
    return "\n".join(textwrap.wrap(line, max(20, int(inches * _LETTERS_PER_INCH)))) or line


def answer(attribution: Result) -> str | None:
    """What the model answers: a class, labels, or a number; None where it does none of these."""
    said = in_words(attribution)
    return None if said is None else printable(said)


def circumstances(attribution: TextResult) -> str:
    """Method, position and model in one line."""
    position = "all tokens" if is_whole(attribution) else ", ".join(position_names(attribution)[:8])
    if not is_whole(attribution) and len(position_names(attribution)) > 8:
        position += ", ..."
    rows = ", rows normalised" if attribution.row_normalize else ""
    summary = get_method(attribution.method).summary
    return (
        f"Method {attribution.method}{rows} ({summary}); position {position}; model {model_name(attribution)}; "
        f"{len(attribution.tokens)} tokens."
    )


def truncation(attribution: TextResult) -> str | None:
    """What to say of a text that was cut off; None where it was not."""
    if not attribution.truncated:
        return None
    full = attribution.truncated + len(attribution.tokens)
    unread = attribution.unread()
    fronts = {start == 0 and end < len(_source(attribution, segment)) for segment, start, end in unread}
    where = f" at the {'beginning' if fronts == {True} else 'end'}" if len(fronts) == 1 else ""
    if where and attribution.text_pair is not None:
        names = {0: "of the first text", 1: "of the second text"}
        segments = sorted({segment for segment, _, _ in unread})
        where += f" {names[segments[0]] if len(segments) == 1 else 'of both texts'}"
    return (
        f"The model did not read all of it: {attribution.truncated:,} of {full:,} tokens "
        f"({attribution.truncated / full:.0%}) were cut off{where}."
    )


def model_name(attribution: TextResult) -> str:
    """The model's name; of a folder its last part."""
    path = Path(attribution.model)
    return printable(path.name if path.is_absolute() else attribution.model)


def _source(attribution: TextResult, segment: int) -> str:
    return attribution.text if segment == 0 else attribution.text_pair or ""
