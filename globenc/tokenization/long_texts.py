"""What is tokenized of a very long text: the pieces that a model can see, counted without holding its tokens."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from .records import Reading, ids_of

PIECE = 1 << 15  # characters; texts of more than four pieces are tokenized piece by piece
PIECE_IN_PYTHON = 1 << 12  # where the tokenizer is written in Python: some take the square of a word's length
MARGIN = 256  # tokens read beyond the limit, so that none within it feels where the text was cut
_BLANK = re.compile(r"\s")


def readings_of(tokenizer: Any, pair: tuple[str, ...], limit: int | None) -> list[Reading]:
    """What is tokenized of a text or pair for `limit` tokens."""
    piece = PIECE if tokenizer.is_fast else PIECE_IN_PYTHON
    if limit is None or not any(len(text) > max(4 * piece, limit + MARGIN) for text in pair):
        return [Reading(text) for text in pair]
    counted = [_Pieces(tokenizer, text, piece) for text in pair]
    readings = [pieces.read(limit + MARGIN) for pieces in counted]
    if len(pair) == 2:
        # of two texts that are cut, one token more is left of the longer one: it must be the longer one here too
        read = [pieces.total - reading.beyond for pieces, reading in zip(counted, readings, strict=True)]
        longer = counted[0].total > counted[1].total
        if longer != (read[0] > read[1]):
            readings[1 - longer] = counted[1 - longer].read(read[longer] + MARGIN)
    return readings


class _Pieces:
    """A very long text in pieces, which are tokenized only to be counted.

    Attributes:
        total: tokens of the text. Exact where its pieces begin at blanks; where there are none, each piece may count
            one too many.
    """

    def __init__(self, tokenizer: Any, text: str, piece: int):
        self.text, self.left = text, tokenizer.truncation_side == "left"
        self.begins, torn = _cuts(text, piece)
        ends = [*self.begins[1:], len(text)]
        glued = not _ids_add_up(tokenizer)
        self.counts: list[int] = []
        last, is_one = None, False
        for some in range(0, len(ends), 8):
            part = [
                text[begin + (glued and begin > 0 and text[begin].isspace()) : end]
                for begin, end in zip(self.begins[some : some + 8], ends[some : some + 8], strict=True)
            ]
            for k, ids in enumerate(ids_of(tokenizer, part), some):
                # a word that the tokenizer does not know is one token, however long
                goes_on = torn[k] and ids[:1] == [last] == [tokenizer.unk_token_id] and (is_one or len(ids) == 1)
                self.counts.append(len(ids) - goes_on)
                last, is_one = ids[-1] if ids else None, ids == [tokenizer.unk_token_id]
        self.total = sum(self.counts)

    def read(self, room: int) -> Reading:
        """As many pieces as hold `room` tokens; of pieces that add none the characters at their ends."""
        chosen: list[tuple[int, int]] = []
        tokens = 0
        pieces = list(zip(self.begins, [*self.begins[1:], len(self.text)], self.counts, strict=True))
        for begin, end, count in reversed(pieces) if self.left else pieces:
            whole = count > 0 or end - begin < 3
            chosen += [(begin, end)] if whole else [(begin, begin + 1), (end - 1, end)]
            tokens += count
            if tokens >= room:
                break
        chosen.sort()
        parts = [self.text[begin:end] for begin, end in chosen]
        both = np.array([np.cumsum([0, *map(len, parts[:-1])]), [begin for begin, _ in chosen]])
        return Reading("".join(parts), both, self.total - tokens)


def _cuts(text: str, piece: int) -> tuple[list[int], list[bool]]:
    """Where pieces of a text begin, before blanks wherever there are any, and whether they begin within a word."""
    begins, torn = [0], [False]
    while len(text) - begins[-1] > piece:
        low, high = begins[-1] + piece // 2, begins[-1] + piece
        cut = next((k for k in (text.rfind(blank, low, high) for blank in " \n") if k >= 0), -1)
        if cut < 0:
            cut = max((blank.start() for blank in _BLANK.finditer(text, low, high)), default=-1)
        torn.append(cut < 0)
        while cut > low and text[cut - 1] == text[cut]:
            cut -= 1
        begins.append(high if cut < 0 else cut)
    return begins, torn


def _ids_add_up(tokenizer: Any) -> bool:
    """Whether a text's ids are those of its pieces that begin with a blank, rather than behind one."""
    whole, first, spaced, bare = ids_of(tokenizer, ["a b", "a", " b", "b"])
    return whole == first + spaced or whole != first + bare
