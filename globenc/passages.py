"""A text in paragraphs and sentences, as character spans: by blank lines and punctuation, in any language."""

from __future__ import annotations

import re
from collections.abc import Iterator

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
