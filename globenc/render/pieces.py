"""A text cut into its words and what stands between them."""

from __future__ import annotations

from dataclasses import dataclass

from ..text_spans import Word
from .protocols import TextResult, text_of


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


def pieces(attribution: TextResult, words: list[Word], segment: int) -> list[Piece]:
    """A text cut into its words and what stands between them; joined, they are the text.

    Words without offsets are joined by spaces. Words that share characters (a character that the tokenizer spelled out
    as several) become one piece.
    """
    chosen = [word for word in words if word.segment == segment]
    text = text_of(attribution, segment)
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
