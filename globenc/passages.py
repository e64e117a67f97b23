"""A text in paragraphs, sentences and words, as character spans: by blanks and punctuation, in any language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

Span = tuple[int, int]

LONGEST_PARAGRAPH = 3000  # characters; what is longer is cut between lines, else between sentences
_CUT_AT = 1200
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(
    r"[.!?…]+[\"'”’»)\]]*(?=\s+[\"'“‘«(\[—-]*[^\W_a-zß-öø-ÿ])"  # before white space and no small letter
    r"|[。！？]+[」』”’）]*"  # CJK needs no white space
    r"|\n[^\S\n]*\n\s*"
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\"'“‘])(?:[^\W\d_]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Gen|Sen|Rep|Gov|Capt|Lt|Col|Rev|Hon|vs|etc|cf|approx|"
    r"Inc|Ltd|Co|Corp|Fig|Eq|Sec|Vol|pp|e\.g|i\.e|U\.S|U\.K|a\.m|p\.m|bzw|usw|z\.B|d\.h)\.$"
)


def paragraphs(text: str) -> list[Span]:
    """Spans (start, end) of the paragraphs: what blank lines divide; a very long one is cut further.

    Example:
        >>> paragraphs("One.\\n\\nTwo. Three.")
        [(0, 4), (6, 17)]
    """
    found: list[Span] = []
    for span in _between(_BLANK_LINE, text, 0, len(text)):
        found.extend(_shortened(text, span))
    return found


def sentences(text: str) -> list[Span]:
    """Spans (start, end) of the sentences; no sentence goes beyond a blank line.

    Example:
        >>> sentences('Dr. Who came. "Really?" He did.')
        [(0, 13), (14, 23), (24, 31)]
    """
    return list(_sentences(text, 0, len(text)))


def _sentences(text: str, start: int, end: int) -> Iterator[Span]:
    for match in _SENTENCE_END.finditer(text, start, end):
        if text[match.start()] == "." and _ABBREVIATION.search(
            text[max(start, match.start() - 12) : match.start() + 1]
        ):
            continue
        stop = match.start() if text[match.start()].isspace() else match.end()
        yield from _stripped(text, start, stop)
        start = match.end()
    yield from _stripped(text, start, end)


def _shortened(text: str, span: Span) -> Iterator[Span]:
    """A paragraph in parts of readable length."""
    start, end = span
    if end - start <= LONGEST_PARAGRAPH:
        yield span
        return
    lines = list(_between(re.compile(r"\n"), text, start, end))
    parts = lines if len(lines) > 1 else list(_sentences(text, start, end))
    begin = None
    for first, last in parts:
        begin = first if begin is None else begin
        if last - begin >= _CUT_AT:
            yield begin, last
            begin = None
    if begin is not None:
        yield begin, parts[-1][1]


def _between(pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[Span]:
    for match in pattern.finditer(text, start, end):
        yield from _stripped(text, start, match.start())
        start = match.end()
    yield from _stripped(text, start, end)


def _stripped(text: str, start: int, end: int) -> Iterator[Span]:
    """The span without white space at its ends; nothing where there is nothing else."""
    inside = text[start:end]
    if inside.strip():
        yield start + len(inside) - len(inside.lstrip()), end - len(inside) + len(inside.rstrip())


# What a character is to a word. Those up to _HIDDEN are never at a word's end; two of one kind up to _KATAKANA are one
# word; at _KATAKANA and _UNSPACED a word may end without a blank.
_BLANK, _HIDDEN, _LETTER, _FLAG, _KATAKANA, _UNSPACED, _OTHER, _MARK = range(8)
_UNKNOWN = 255
_ZERO_WIDTH_SPACE, _NON_JOINER, _JOINER = "\u200b", "\u200c", "\u200d"
# CJK, and the scripts of South-East Asia that write no blanks either
_UNSPACED_BLOCKS = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19FF), (0x1A20, 0x1AAF), (0x2E80, 0x312F),
    (0x3190, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0xF900, 0xFAFF), (0xFE30, 0xFE4F), (0x20000, 0x3FFFF),
)  # fmt: skip
_KATAKANA_BLOCKS = ((0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F))
_known_kinds = np.full(0x110000, _UNKNOWN, np.uint8)  # filled as characters come


def _kind(character: str) -> int:
    code = ord(character)
    if _known_kinds[code] == _UNKNOWN:
        _known_kinds[code] = _classified(character, code)
    return int(_known_kinds[code])


def _classified(character: str, code: int) -> int:
    def within(blocks: Sequence[Span]) -> bool:
        return any(first <= code <= last for first, last in blocks)

    category = unicodedata.category(character)
    if character.isspace() or character == _ZERO_WIDTH_SPACE:
        return _BLANK
    if category[0] == "M" or character in (_NON_JOINER, _JOINER) or within(((0x1F3FB, 0x1F3FF), (0xE0020, 0xE007F))):
        return _MARK
    if category in ("Cc", "Cf", "Cs"):
        return _HIDDEN
    if within(_KATAKANA_BLOCKS):
        return _KATAKANA
    if within(_UNSPACED_BLOCKS) or (category[0] == "P" and within(((0xFF00, 0xFFEF),))):
        return _UNSPACED
    if within(((0x1F1E6, 0x1F1FF),)):
        return _FLAG
    return _LETTER if character.isalnum() else _OTHER


def trimmed(text: str, span: Span) -> Span:
    """The span without what shows nothing at its ends, such as blanks; start is not below end where nothing shows."""
    start, end = span
    while start < end and _kind(text[start]) <= _HIDDEN:
        start += 1
    while start < end and _kind(text[end - 1]) <= _HIDDEN:
        end -= 1
    return start, end


def with_marks(text: str, end: int) -> int:
    """The end moved behind accents and joiners, which belong to the character before them."""
    while end < len(text) and _kind(text[end]) == _MARK:
        end += 1
    return end


def divide_words(
    text: str,
    spans: np.ndarray,
    sources: np.ndarray,
    tokenizer_words: np.ndarray | None,
    continues: np.ndarray,
    empty: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens make up a word, by what stands in the text between them.

    Blanks divide words, and so do the characters of scripts that are written without blanks (Chinese, Thai); letters
    and digits side by side are never divided, nor is what shares a character. At punctuation and symbols the
    tokenizer's own words decide, where it has any; otherwise they divide. A token that reaches over such a border joins
    the words on both sides, and one that shows nothing (a blank, a line end) goes with the word behind it, at the end
    with the last one.

    Args:
        text: one text, or several one behind the other.
        spans: characters (start, end) of each of n tokens, [n, 2].
        sources: which of the texts each token is of, ascending, [n].
        tokenizer_words: numbers of the words that the tokenizer divides a text into, [n]; None for one that does not.
        continues: tokens whose name says that they go on with the word before them, [n] bool.
        empty: tokens whose name has nothing but a blank in it, whatever their span, [n] bool.

    Returns:
        The spans without blanks at their ends, [n, 2], and the number of each token's word in its text, [n]. A token
        that shows nothing keeps its span; it is empty where a tokenizer gives an inserted blank the character behind.
    """
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    kinds = _known_kinds[codes]
    for code in set(codes[kinds == _UNKNOWN].tolist()):
        _kind(chr(code))
        kinds[codes == code] = _known_kinds[code]
    shows, places, n = kinds > _HIDDEN, np.arange(len(codes)), len(spans)
    following = _with(np.minimum.accumulate(np.where(shows, places, len(codes))[::-1])[::-1], after=len(codes))
    starts = following[spans[:, 0]]
    ends = _with(np.maximum.accumulate(np.where(shows, places + 1, 0)))[spans[:, 1]]
    found, shown = spans.copy(), starts < ends
    found[shown, 0], found[shown, 1] = starts[shown], ends[shown]
    if empty.any():
        inserted = empty & shown
        found[inserted, 1] = found[inserted, 0]
        shown &= ~empty

    tokens = np.flatnonzero(shown)
    words = np.zeros(n, np.int64)
    if not len(tokens):
        return found, words
    reach, here = np.maximum.accumulate(ends[tokens])[:-1], starts[tokens[1:]]
    blanks = _with(np.cumsum(kinds == _BLANK))
    bases = np.maximum.accumulate(np.where(shows & (kinds != _MARK), places, 0))
    left, right = kinds[bases[here - 1]], kinds[here]
    joined = (right == _MARK) | (codes[here - 1] == ord(_JOINER)) | continues[tokens[1:]]
    joined |= (left == right) & (right <= _KATAKANA)
    divided = np.ones(len(here), bool) if tokenizer_words is None else np.diff(tokenizer_words[tokens]) != 0
    for kind in (_KATAKANA, _UNSPACED):
        divided |= (left == kind) | (right == kind)
    begins = divided & ~joined | (blanks[here] > blanks[np.minimum(reach, here)])
    begins &= here >= reach
    fresh = _with(np.diff(sources[tokens]) != 0, before=True)
    numbers = np.cumsum(_with(begins, before=True) | fresh)
    words[tokens] = numbers - np.maximum.accumulate(np.where(fresh, numbers, 0))
    for k in np.flatnonzero(~shown).tolist():
        behind = np.searchsorted(tokens, k)
        for other in (*tokens[behind : behind + 1], *tokens[:behind][-1:]):
            if sources[other] == sources[k]:
                words[k] = words[other]
                break
    return found, words


def _with(values: np.ndarray, before: Any = 0, after: Any = None) -> np.ndarray:
    """One value more, before the others, or behind them where `after` is given."""
    return np.concatenate([[before], values] if after is None else [values, [after]])
