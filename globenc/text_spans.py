"""Words and passages of a text: records with scores, and how tokens make up words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .passages import trimmed, with_marks

_MARKS = re.compile(r"^##(?=.)|(?<=.)(?:@@|</w>)$", re.DOTALL)
_BYTES, _NOT_HEX = re.compile(r"(?:<0x[0-9A-F]{2}>)+"), re.compile(r"<0x|>")
# byte-level tokenizers write bytes that are no printable Latin-1 characters as those from U+0100 on
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + k): byte for k, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))
}


@dataclass(frozen=True)
class Word:
    """One word of the text, or one special token.

    Blanks divide words; so do punctuation marks and symbols, unless the tokenizer's own words hold them; of scripts
    that are written without blanks (Chinese, Thai) every character is a word, but for those that one token holds.
    Tokens that reach over such a border join the words on both sides. A token of blanks alone goes with the word behind
    it, at the end with the last one. Where a tokenizer knows no offsets, its own words count.

    Attributes:
        text: as it stands in the text, text[start:end], without blanks around it; a special token's own name.
        score: sum of its tokens' scores: a float, or [positions] where several positions were asked for.
        start, end: characters text[start:end]; None for special tokens, and for all words of a tokenizer that knows no
            offsets.
        tokens: which tokens it is made of, as slice bounds first:stop.
        segment: 0 in the text, 1 in the pair; None for special tokens.
        class_score: sum of its tokens' class scores, in logits; None where no label is explained.
    """

    text: str
    score: Any
    start: int | None
    end: int | None
    tokens: tuple[int, int]
    segment: int | None
    class_score: float | None = None

    @property
    def special(self) -> bool:
        """Whether this is a special token of the tokenizer, such as [CLS]."""
        return self.segment is None


@dataclass(frozen=True)
class Passage:
    """A sentence or a paragraph of the text.

    Attributes:
        text: as it stands in the text.
        score: sum of its words' scores: a float, or [positions] where several positions were asked for.
        start, end: characters text[start:end].
        segment: 0 in the text, 1 in the pair.
        class_score: sum of its words' class scores, in logits; None where no label is explained.
    """

    text: str
    score: Any
    start: int
    end: int
    segment: int
    class_score: float | None = None


def word_spans(segments: Sequence[int | None], word_ids: Sequence[int | None]) -> list[tuple[int, int]]:
    """Slice bounds first:stop of the tokens of every word; special tokens, whose segment is None or -1, stand alone."""
    starts = [
        k
        for k, (segment, word) in enumerate(zip(segments, word_ids, strict=True))
        if not k or segment is None or segment < 0 or segment != segments[k - 1] or word != word_ids[k - 1]
    ]
    return list(zip(starts, [*starts[1:], len(segments)], strict=True))


@dataclass(frozen=True, slots=True)
class TokenRun:
    """The tokens of one word: slice bounds first:stop of the tokens, and where it stands in its text.

    Attributes:
        text: the word; a special token's own name.
        start, end: characters of it in its text, without blanks around it; None where they are not known.
        first, stop: which tokens.
        segment: 0 in the text, 1 in the pair; None for special tokens.
    """

    text: str
    start: int | None
    end: int | None
    first: int
    stop: int
    segment: int | None


def find_words(
    sources: Sequence[str | None],
    tokens: Sequence[str],
    spans: Sequence[Sequence[int] | None],
    segments: Sequence[int | None],
    word_ids: Sequence[int | None],
) -> list[TokenRun]:
    """The words of a text and its pair, special tokens among them; arguments as in `Attribution`, segment or span of
    special tokens None or negative."""
    found = []
    for first, stop in word_spans(segments, word_ids):
        segment = segments[first]
        if segment is None or segment < 0:
            found.append(TokenRun(tokens[first], None, None, first, stop, None))
            continue
        source = sources[segment] or ""
        known = [(span[0], span[1]) for span in spans[first:stop] if span is not None and span[0] >= 0]
        # where nothing shows, which is only so of a text that shows nothing at all, the word is what there is
        shown = [span for span in (trimmed(source, span) for span in known) if span[0] < span[1]] or known
        start, end = min((span[0] for span in shown), default=0), max((span[1] for span in shown), default=0)
        if start < end:
            end = with_marks(source, end)
            found.append(TokenRun(source[start:end], start, end, first, stop, segment))
        else:
            found.append(TokenRun(joined(tokens[first:stop]), None, None, first, stop, segment))
    return found


def joined(pieces: Sequence[str]) -> str:
    """Names of tokens as one word, without the marks that say how they go together.

    Example:
        >>> joined(["wonder@@", "ful"]), joined(["charm", "##ing"]), joined(["\u2581caf", "<0xC3>", "<0xA9>"])
        ('wonderful', 'charming', 'caf\u00e9')
    """
    word = "".join(_MARKS.sub("", piece) for piece in pieces)
    if word.startswith(("\u0120", "\u010a")) and all(character in _BYTE_LEVEL for character in word):
        word = bytes(_BYTE_LEVEL[character] for character in word).decode(errors="replace")
    word = _BYTES.sub(lambda run: bytes.fromhex(_NOT_HEX.sub("", run[0])).decode(errors="replace"), word)
    word = word.replace("\u2581", " ")
    return word.strip() or "".join(pieces)
