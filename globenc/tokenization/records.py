"""What encoding gives: the tokens of a text, and what of the text they were made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one text or pair, n of them, special ones included.

    Attributes:
        ids: [n] int32.
        type_ids: [n] int32; None where the tokenizer makes none.
        offsets: characters (start, end) of each token in its text without blanks at the ends, [n, 2] int32, -1 for
            special tokens; of a token that shows nothing what the tokenizer says. None for a tokenizer that knows no
            offsets.
        segments: 0 for tokens of the text, 1 of the pair, -1 for special tokens; [n] int8.
        word_ids: number of the word a token belongs to within its segment (`globenc.passages.divide_words`; by the
            tokens' names where there are no offsets), -1 for special tokens; [n] int32.
        lost: how many tokens were cut off.
        unknown: whether the tokenizer knows none of the tokens.
    """

    ids: np.ndarray
    type_ids: np.ndarray | None
    offsets: np.ndarray | None
    segments: np.ndarray
    word_ids: np.ndarray
    lost: int
    unknown: bool

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def empty(self) -> bool:
        """Whether there is nothing but special tokens."""
        return bool((self.segments < 0).all())


@dataclass(frozen=True, slots=True)
class Reading:
    """What of a text is tokenized: all of it, or of a very long one a part, which the model cannot see the end of.

    Attributes:
        text: what is tokenized.
        parts: where its parts begin in it and in the whole text, [2, parts]; None where it is the whole text.
        beyond: how many tokens the rest of the text has.
    """

    text: str
    parts: np.ndarray | None = None
    beyond: int = 0

    def narrowed(self, spans: np.ndarray, room: int, left: bool) -> Reading:
        """Its first `room` tokens, or the last ones; `spans` are those of all of them."""
        if len(spans) <= room:
            return self
        begin, end = (int(spans[-room:, 0].min()), len(self.text)) if left else (0, int(spans[:room, 1].max()))
        here, there = np.zeros((2, 1), np.int64) if self.parts is None else self.parts
        return Reading(self.text[begin:end], np.array([here - begin, there]), self.beyond)

    def in_whole_text(self, spans: np.ndarray) -> np.ndarray:
        """Spans of characters of the whole text."""
        if self.parts is None:
            return spans
        here, there = self.parts
        ends = np.stack([spans[:, 0], np.maximum(spans[:, 0], spans[:, 1] - 1)], axis=1)
        return spans + (there - here)[np.searchsorted(here, ends, side="right") - 1]


@dataclass(slots=True)
class Tokens:
    """The tokens of one text or pair as the tokenizer gives them; `words` are numbered as it divides the text."""

    ids: list[int]
    types: list[int] | None
    names: list[str]
    segments: np.ndarray
    spans: np.ndarray | None
    words: np.ndarray
    lost: int


def ids_of(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts without special tokens, all of them."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        return [e.ids for e in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, truncation=False, **options)["input_ids"]


def pieces_of(tokenizer: Any, text: str, ids: list[int]) -> list[str]:
    """The tokens' names, of unknown ones what stands in the text where the tokenizer says."""
    if tokenizer.unk_token_id in ids:
        pieces = tokenizer.tokenize(text)
        if tokenizer.convert_tokens_to_ids(pieces) == ids:
            return pieces
    return tokenizer.convert_ids_to_tokens(ids)
