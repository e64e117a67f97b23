"""Which words and characters tokens belong to, where a tokenizer says so and where only its tokens' names do."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from ..passages import divide_words
from .records import Tokens


def find_words(texts: list[str], tokenized: list[Tokens], divides: bool) -> None:
    """Divide texts into words, all of them joined into one text: replaces spans and words of the tokens."""
    lengths = [len(tokens.ids) for tokens in tokenized]
    segments = np.concatenate([tokens.segments for tokens in tokenized])
    sources = np.repeat(np.arange(len(tokenized)), lengths) * (len(texts) // len(tokenized)) + segments
    real = np.flatnonzero(segments >= 0)
    real = real[np.argsort(sources[real], kind="stable")]
    sources, begins = sources[real], np.cumsum([0, *map(len, texts)])
    spans, words = (np.concatenate([getattr(tokens, name) for tokens in tokenized]) for name in ("spans", "words"))
    flat = [name for tokens in tokenized for name in tokens.names]
    names, text = [flat[i] for i in real.tolist()], "".join(texts)
    joined_spans = spans[real] + begins[sources, None]
    distinct = set(names)
    if any(name.startswith("\u0120") for name in distinct):
        _widen_trimmed(joined_spans, sources, names, text)
    blank = {name for name in distinct if not name.strip("\u2581\u0120")}
    empty = np.zeros(len(names), bool)
    for k in [k for k, name in enumerate(names) if name in blank] if blank else []:
        empty[k] = text[joined_spans[k, 0] : joined_spans[k, 1]] != names[k]
    behind = {name for name in distinct if name.startswith("##")}
    continues = np.array([name in behind for name in names], bool)
    tokenizer_words = words[real] if divides else None
    joined_spans, numbers = divide_words(text, joined_spans, sources, tokenizer_words, continues, empty)
    spans, words = np.full(spans.shape, -1, np.int32), np.full(words.shape, -1, np.int32)
    spans[real], words[real] = joined_spans - begins[sources, None], numbers
    for tokens, end in zip(tokenized, np.cumsum(lengths).tolist(), strict=True):
        part = slice(end - len(tokens.ids), end)
        tokens.spans, tokens.words = spans[part], words[part]


def _widen_trimmed(spans: np.ndarray, sources: np.ndarray, names: list[str], text: str) -> None:
    """Add back the character that byte-level tokenizers trim off, as if it were the blank that they insert."""
    gaps = np.flatnonzero((spans[1:, 0] > spans[:-1, 1]) & (np.diff(sources) == 0)) + 1
    for k, start in zip(gaps.tolist(), spans[gaps, 0].tolist(), strict=True):
        if names[k].startswith("\u0120") and not text[start - 1].isspace():
            spans[k, 0] = start - 1


def divides_words(tokenizer: Any) -> bool:
    """Whether a fast tokenizer divides a text into words before it looks for tokens."""
    backend, text = tokenizer.backend_tokenizer, "ab cd"
    if backend.pre_tokenizer is None:
        return False
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    pieces = [piece.strip("\u2581\u0120 ").lower() for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    return "ab" in pieces and "cd" in pieces


_MARKS = {
    "##": lambda name: name.startswith("##"),
    "@@": lambda name: name.endswith("@@"),
    "</w>": lambda name: name.endswith("</w>"),
    "\u2581": lambda name: name.startswith("\u2581"),
    "\u0120": lambda name: name.startswith("\u0120"),
}
_marks: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def word_mark(tokenizer: Any) -> str:
    """What the pieces of a tokenizer are marked by, before or behind them; "" where by nothing."""
    if tokenizer not in _marks:
        names = [name for name in tokenizer.get_vocab() if len(name) > 1]
        counts = {mark: sum(map(has, names)) for mark, has in _MARKS.items()}
        best = max(counts, key=lambda mark: counts[mark])
        _marks[tokenizer] = best if counts[best] else ""
    return _marks[tokenizer]


def words_by_names(names: list[str], mark: str) -> np.ndarray:
    """Numbers of the words that names of tokens make up; one for each token where the tokenizer marks none."""
    marked = [mark != "" and _MARKS[mark](name) for name in names]
    before = [False, *marked[:-1]]
    begins = {"##": [not m for m in marked], "@@": [not m for m in before], "</w>": before, "": [True] * len(names)}
    return np.cumsum(begins.get(mark, marked), dtype=np.int64)


def is_verbatim(tokenizer: Any) -> bool:
    """Whether the tokens are the text's characters or bytes themselves, blanks included."""
    return word_mark(tokenizer) == "" and any(not token.strip() for token in tokenizer.tokenize("a b"))


def verbatim_spans(text: str, names: list[str]) -> np.ndarray | None:
    """Where in the text its tokens stand, each a character or a byte of it; None where they are not the text."""
    characters = np.arange(len(text) + 1)
    data = text.encode("utf-8", "surrogatepass")
    sizes = [len(character.encode("utf-8", "surrogatepass")) for character in text] if len(data) > len(text) else 1
    of_bytes = np.append(np.repeat(characters[:-1], sizes), len(text))
    raw = [bytes([ord(name)]) if len(name) == 1 and ord(name) < 256 else name.encode() for name in names]
    for whole, pieces, positions in ((text, names, characters), (data, raw, of_bytes)):
        joined = pieces[0][:0].join(pieces) if pieces else whole[:0]  # type: ignore[arg-type]
        if whole.startswith(joined) or whole.endswith(joined):  # type: ignore[arg-type]
            ends = np.cumsum([0, *map(len, pieces)]) + (0 if whole.startswith(joined) else len(whole) - len(joined))  # type: ignore[arg-type]
            return np.stack([positions[ends[:-1]], positions[ends[1:] - 1] + 1], axis=1)
    return None
