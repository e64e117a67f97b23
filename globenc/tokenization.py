"""Texts to token ids and back to characters: encoding of many texts at once, batches by length, padding."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from .passages import divide_words

TEXTS_AT_ONCE = 256  # encoded by one call: enough for the tokenizer's threads, and few enough to hold as Python lists
CHARACTERS_AT_ONCE = 1 << 18  # in one call: a character costs some 300 bytes while its token is in hand
PIECE = 1 << 15  # characters; texts of more than four pieces are tokenized piece by piece
PIECE_IN_PYTHON = 1 << 12  # where the tokenizer is written in Python: some take the square of a word's length
MARGIN = 256  # tokens read beyond the limit, so that none within it feels where the text was cut
_BLANK = re.compile(r"\s")


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
class _Reading:
    """What of a text is tokenized: all of it, or of a very long one a part, which the model cannot see the end of.

    Attributes:
        text: what is tokenized.
        parts: where its parts begin in it and in the whole text, [2, parts]; None where it is the whole text.
        beyond: how many tokens the rest of the text has.
    """

    text: str
    parts: np.ndarray | None = None
    beyond: int = 0

    def narrowed(self, spans: np.ndarray, room: int, left: bool) -> _Reading:
        """Its first `room` tokens, or the last ones; `spans` are those of all of them."""
        if len(spans) <= room:
            return self
        begin, end = (int(spans[-room:, 0].min()), len(self.text)) if left else (0, int(spans[:room, 1].max()))
        here, there = np.zeros((2, 1), np.int64) if self.parts is None else self.parts
        return _Reading(self.text[begin:end], np.array([here - begin, there]), self.beyond)

    def in_whole_text(self, spans: np.ndarray) -> np.ndarray:
        """Spans of characters of the whole text."""
        if self.parts is None:
            return spans
        here, there = self.parts
        ends = np.stack([spans[:, 0], np.maximum(spans[:, 0], spans[:, 1] - 1)], axis=1)
        return spans + (there - here)[np.searchsorted(here, ends, side="right") - 1]


@dataclass(slots=True)
class _Tokens:
    """The tokens of one text or pair as the tokenizer gives them; `words` are numbered as it divides the text."""

    ids: list[int]
    types: list[int] | None
    names: list[str]
    segments: np.ndarray
    spans: np.ndarray | None
    words: np.ndarray
    lost: int


def encode(tokenizer: Any, texts: Sequence[str], text_pair: Sequence[str] | None, limit: int | None) -> list[Encoding]:
    """Encode texts, or pairs, cutting off what is beyond `limit` tokens, special ones included.

    May run in several threads at once, and beside other uses of the same tokenizer: nothing of it is switched. Of a
    text of many megabytes no more is held as tokens than is read.

    Raises:
        ValueError: the limit leaves no room beside the special tokens.
    """
    own = _unshared(tokenizer)
    tokenize = _tokens if tokenizer.is_fast else _tokens_in_python
    divides = _divides_words(own) if tokenizer.is_fast else _mark(tokenizer) != ""
    encodings: list[Encoding] = []
    for group in _together(texts, text_pair):
        readings = [_readings(own, pair, limit) for pair in group]
        encodings += _encodings(own, readings, tokenize(own, readings, limit), divides)
    return encodings


def _unshared(tokenizer: Any) -> Any:
    """The tokenizer, with cutting and padding of its own: these are a state of the backend, which all users share."""
    if not tokenizer.is_fast:
        return tokenizer  # takes them as arguments
    shared, backend = tokenizer.backend_tokenizer, tokenizers.Tokenizer(tokenizer.backend_tokenizer.model)
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if getattr(shared, part) is not None:
            setattr(backend, part, getattr(shared, part))
    added = shared.get_added_tokens_decoder()
    backend.add_tokens([added[i] for i in sorted(added)])
    backend.encode_special_tokens = shared.encode_special_tokens
    own = copy.copy(tokenizer)
    own._tokenizer = backend
    return own


def _together(texts: Sequence[str], text_pair: Sequence[str] | None) -> Iterator[list[tuple[str, ...]]]:
    """Texts or pairs in groups that are encoded by one call."""
    group: list[tuple[str, ...]] = []
    size = 0
    for pair in zip(texts) if text_pair is None else zip(texts, text_pair, strict=True):
        length = sum(map(len, pair))
        if group and (len(group) == TEXTS_AT_ONCE or size + length > CHARACTERS_AT_ONCE):
            yield group
            group, size = [], 0
        group.append(pair)
        size += length
    if group:
        yield group


def _tokens(own: Any, readings: list[list[_Reading]], limit: int | None) -> list[_Tokens]:
    """The tokens of a fast tokenizer."""
    columns = [[reading.text for reading in column] for column in zip(*readings, strict=True)]
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    batch = own(*columns, truncation=False, **options)
    encoded, typed = list(batch.encodings), "token_type_ids" in batch
    full = [len(e) + sum(r.beyond for r in pair) for e, pair in zip(encoded, readings, strict=True)]
    longer = [i for i, n in enumerate(full) if limit is not None and n > limit]
    if longer:
        _check_room(own, limit, len(columns))
        for i in longer:
            readings[i] = _narrowed(readings[i], encoded[i], limit or 0, own.truncation_side == "left")
        chosen = [[readings[i][k].text for i in longer] for k in range(len(columns))]
        cut = own(*chosen, truncation=True, max_length=limit, **options)
        for i, e in zip(longer, cut.encodings, strict=True):
            encoded[i] = e
    return [
        _Tokens(
            ids=e.ids,
            types=e.type_ids if typed else None,
            names=e.tokens,
            segments=np.array(
                [-1 if s is None or m else s for s, m in zip(e.sequence_ids, e.special_tokens_mask, strict=True)],
                dtype=np.int8,
            ),
            spans=np.array(e.offsets, dtype=np.int64).reshape(-1, 2),
            words=np.array([-1 if w is None else w for w in e.word_ids], dtype=np.int32),
            lost=n - len(e),
        )
        for e, n in zip(encoded, full, strict=True)
    ]


def _narrowed(pair: list[_Reading], encoded: Any, limit: int, left: bool) -> list[_Reading]:
    """What is tokenized again to be cut: the backend makes tokens of all that is cut off, of pairs of all in pairs."""
    sources = np.array([-1 if s is None else s for s in encoded.sequence_ids])
    spans = np.array(encoded.offsets).reshape(-1, 2)
    counts = [int((sources == k).sum()) for k in range(len(pair))]
    if max(counts) <= limit + 2 * MARGIN:
        return pair
    longer = int(len(pair) > 1 and counts[0] <= counts[1])  # it keeps one token more and must stay the longer one
    rooms = [limit + MARGIN * (1 + (k == longer)) for k in range(len(pair))]
    return [reading.narrowed(spans[sources == k], rooms[k], left) for k, reading in enumerate(pair)]


def _tokens_in_python(own: Any, readings: list[list[_Reading]], limit: int | None) -> list[_Tokens]:
    """The tokens of a tokenizer that is written in Python and knows no offsets."""
    columns = [_ids(own, [reading.text for reading in column]) for column in zip(*readings, strict=True)]
    overhead = own.num_special_tokens_to_add(pair=len(columns) > 1)
    mark, verbatim = _mark(own), _is_verbatim(own)
    found = []
    for pair, whole in zip(readings, zip(*columns, strict=True), strict=True):
        ids, pieces = list(whole), [_pieces(own, r.text, row) for r, row in zip(pair, whole, strict=True)]
        full = overhead + sum(map(len, ids)) + sum(reading.beyond for reading in pair)
        if limit is not None and full > limit:
            _check_room(own, limit, len(columns))
            left = own.truncation_side == "left"
            kept = _longest_first([len(row) for row in ids], limit - overhead)
            ids, pieces = (
                [row[len(row) - n :] if left else row[:n] for row, n in zip(rows, kept, strict=True)]
                for rows in (ids, pieces)
            )
        made = own.prepare_for_model(*ids, return_attention_mask=False, verbose=False)
        # where each text goes is seen by building the input of numbers that stand for it
        layout = own.build_inputs_with_special_tokens(*([-2 - k] * len(row) for k, row in enumerate(ids)))
        segments = np.array([max(-1, -2 - i) for i in layout[: len(made["input_ids"])]], dtype=np.int8)
        names = own.convert_ids_to_tokens(made["input_ids"])
        spans, words, placed = np.full((len(names), 2), -1), np.full(len(names), -1, np.int32), True
        for k, reading in enumerate(pair):
            here = np.flatnonzero(segments == k)
            words[here] = _words_by_names(pieces[k], mark)
            known = _verbatim_spans(reading.text, pieces[k]) if verbatim else None
            placed = placed and known is not None
            spans[here] = -1 if known is None else known
        found.append(
            _Tokens(
                ids=made["input_ids"],
                types=made.get("token_type_ids"),
                names=names,
                segments=segments,
                spans=spans if placed else None,
                words=words,
                lost=full - len(names),
            )
        )
    return found


def _ids(own: Any, texts: list[str]) -> list[list[int]]:
    """The ids of texts without special tokens, all of them."""
    if own.is_fast:
        own.backend_tokenizer.no_truncation()
        return [e.ids for e in own.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return own(texts, truncation=False, **options)["input_ids"]


def _pieces(own: Any, text: str, ids: list[int]) -> list[str]:
    """The tokens' names, of unknown ones what stands in the text where the tokenizer says."""
    if own.unk_token_id in ids:
        pieces = own.tokenize(text)
        if own.convert_tokens_to_ids(pieces) == ids:
            return pieces
    return own.convert_ids_to_tokens(ids)


def _check_room(own: Any, limit: int | None, texts: int) -> None:
    overhead = own.num_special_tokens_to_add(pair=texts > 1)
    if limit is None or limit <= overhead:
        raise ValueError(f"max_length must be more than the {overhead} special tokens, got {limit}")


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """How many tokens of a text or pair are kept, by the rule of transformers' tokenizers in Python."""
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    surplus = first + second - room
    uneven = min(abs(first - second), surplus)
    half = (surplus - uneven) // 2
    rest = surplus - uneven - half
    return [first - uneven - half, second - rest] if first > second else [first - half, second - uneven - rest]


def _encodings(own: Any, readings: list[list[_Reading]], found: list[_Tokens], divides: bool) -> list[Encoding]:
    """The tokens with their words and their places in the texts; `divides`: the tokenizer's own words are words."""
    known = [k for k, tokens in enumerate(found) if tokens.spans is not None]
    if known:
        texts = [reading.text for k in known for reading in readings[k]]
        _find_words(texts, [found[k] for k in known], divides)
    encodings, unk = [], own.unk_token_id
    for tokens, pair in zip(found, readings, strict=True):
        ids, spans = np.array(tokens.ids, dtype=np.int32), tokens.spans
        real = tokens.segments >= 0
        for k, reading in enumerate(pair):
            if spans is not None and reading.parts is not None:
                spans[tokens.segments == k] = reading.in_whole_text(spans[tokens.segments == k])
        types = None if tokens.types is None else np.array(tokens.types, dtype=np.int32)
        unknown = unk is not None and bool((ids[real] == unk).all())
        encodings.append(Encoding(ids, types, spans, tokens.segments, tokens.words, tokens.lost, unknown))
    return encodings


def _find_words(texts: list[str], found: list[_Tokens], divides: bool) -> None:
    """Divide texts into words, all in one go: replaces spans and words of the tokens."""
    lengths = [len(tokens.ids) for tokens in found]
    segments = np.concatenate([tokens.segments for tokens in found])
    sources = np.repeat(np.arange(len(found)), lengths) * (len(texts) // len(found)) + segments
    real = np.flatnonzero(segments >= 0)
    real = real[np.argsort(sources[real], kind="stable")]
    sources, begins = sources[real], np.cumsum([0, *map(len, texts)])
    spans, words = (np.concatenate([getattr(tokens, name) for tokens in found]) for name in ("spans", "words"))
    flat = [name for tokens in found for name in tokens.names]
    names, text = [flat[i] for i in real.tolist()], "".join(texts)
    placed = spans[real] + begins[sources, None]
    distinct = set(names)
    if any(name.startswith("\u0120") for name in distinct):
        _mend_trimmed(placed, sources, names, text)
    blank = {name for name in distinct if not name.strip("\u2581\u0120")}
    empty = np.zeros(len(names), bool)
    for k in [k for k, name in enumerate(names) if name in blank] if blank else []:
        empty[k] = text[placed[k, 0] : placed[k, 1]] != names[k]
    behind = {name for name in distinct if name.startswith("##")}
    continues = np.array([name in behind for name in names], bool)
    own_words = words[real] if divides else None
    placed, numbers = divide_words(text, placed, sources, own_words, continues, empty)
    spans, words = np.full(spans.shape, -1, np.int32), np.full(words.shape, -1, np.int32)
    spans[real], words[real] = placed - begins[sources, None], numbers
    for tokens, end in zip(found, np.cumsum(lengths).tolist(), strict=True):
        part = slice(end - len(tokens.ids), end)
        tokens.spans, tokens.words = spans[part], words[part]


def _mend_trimmed(spans: np.ndarray, sources: np.ndarray, names: list[str], text: str) -> None:
    """Give back the character that byte-level tokenizers trim off in place of a blank they have put in themselves."""
    gaps = np.flatnonzero((spans[1:, 0] > spans[:-1, 1]) & (np.diff(sources) == 0)) + 1
    for k, start in zip(gaps.tolist(), spans[gaps, 0].tolist(), strict=True):
        if names[k].startswith("\u0120") and not text[start - 1].isspace():
            spans[k, 0] = start - 1


def _divides_words(own: Any) -> bool:
    """Whether a fast tokenizer divides a text into words before it looks for tokens."""
    backend, text = own.backend_tokenizer, "ab cd"
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


def _mark(tokenizer: Any) -> str:
    """What the pieces of a tokenizer are marked by, before or behind them; "" where by nothing."""
    if tokenizer not in _marks:
        names = [name for name in tokenizer.get_vocab() if len(name) > 1]
        counts = {mark: sum(map(has, names)) for mark, has in _MARKS.items()}
        best = max(counts, key=lambda mark: counts[mark])
        _marks[tokenizer] = best if counts[best] else ""
    return _marks[tokenizer]


def _words_by_names(names: list[str], mark: str) -> np.ndarray:
    """Numbers of the words that names of tokens make up; each its own where the tokenizer marks none."""
    marked = [mark != "" and _MARKS[mark](name) for name in names]
    before = [False, *marked[:-1]]
    begins = {"##": [not m for m in marked], "@@": [not m for m in before], "</w>": before, "": [True] * len(names)}
    return np.cumsum(begins.get(mark, marked), dtype=np.int64)


def _is_verbatim(own: Any) -> bool:
    """Whether the tokens are the text's characters or bytes themselves, blanks included."""
    return _mark(own) == "" and any(not token.strip() for token in own.tokenize("a b"))


def _verbatim_spans(text: str, names: list[str]) -> np.ndarray | None:
    """Where in the text its tokens stand, each a character or a byte of it; None where they are not the text."""
    characters = np.arange(len(text) + 1)
    data = text.encode("utf-8", "surrogatepass")
    sizes = [len(character.encode("utf-8", "surrogatepass")) for character in text] if len(data) > len(text) else 1
    of_bytes = np.append(np.repeat(characters[:-1], sizes), len(text))
    raw = [bytes([ord(name)]) if len(name) == 1 and ord(name) < 256 else name.encode() for name in names]
    for whole, pieces, places in ((text, names, characters), (data, raw, of_bytes)):
        joined = pieces[0][:0].join(pieces) if pieces else whole[:0]  # type: ignore[arg-type]
        if whole.startswith(joined) or whole.endswith(joined):  # type: ignore[arg-type]
            ends = np.cumsum([0, *map(len, pieces)]) + (0 if whole.startswith(joined) else len(whole) - len(joined))  # type: ignore[arg-type]
            return np.stack([places[ends[:-1]], places[ends[1:] - 1] + 1], axis=1)
    return None


def _readings(own: Any, pair: tuple[str, ...], limit: int | None) -> list[_Reading]:
    """What is tokenized of a text or pair for `limit` tokens."""
    piece = PIECE if own.is_fast else PIECE_IN_PYTHON
    if limit is None or not any(len(text) > max(4 * piece, limit + MARGIN) for text in pair):
        return [_Reading(text) for text in pair]
    counted = [_Pieces(own, text, piece) for text in pair]
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

    def __init__(self, own: Any, text: str, piece: int):
        self.text, self.left = text, own.truncation_side == "left"
        self.begins, torn = _cuts(text, piece)
        ends = [*self.begins[1:], len(text)]
        glued = not _ids_add_up(own)
        self.counts: list[int] = []
        last, is_one = None, False
        for some in range(0, len(ends), 8):
            part = [
                text[begin + (glued and begin > 0 and text[begin].isspace()) : end]
                for begin, end in zip(self.begins[some : some + 8], ends[some : some + 8], strict=True)
            ]
            for k, ids in enumerate(_ids(own, part), some):
                # a word that the tokenizer does not know is one token, however long
                goes_on = torn[k] and ids[:1] == [last] == [own.unk_token_id] and (is_one or len(ids) == 1)
                self.counts.append(len(ids) - goes_on)
                last, is_one = ids[-1] if ids else None, ids == [own.unk_token_id]
        self.total = sum(self.counts)

    def read(self, room: int) -> _Reading:
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
        places = np.array([np.cumsum([0, *map(len, parts[:-1])]), [begin for begin, _ in chosen]])
        return _Reading("".join(parts), places, self.total - tokens)


def _cuts(text: str, piece: int) -> tuple[list[int], list[bool]]:
    """Where pieces of a text begin, before blanks wherever there are any, and whether they begin within a word."""
    begins, torn = [0], [False]
    while len(text) - begins[-1] > piece:
        low, high = begins[-1] + piece // 2, begins[-1] + piece
        found = next((k for k in (text.rfind(blank, low, high) for blank in " \n") if k >= 0), -1)
        if found < 0:
            found = max((blank.start() for blank in _BLANK.finditer(text, low, high)), default=-1)
        torn.append(found < 0)
        while found > low and text[found - 1] == text[found]:
            found -= 1
        begins.append(high if found < 0 else found)
    return begins, torn


def _ids_add_up(own: Any) -> bool:
    """Whether a text's ids are those of its pieces that begin with a blank, rather than behind one."""
    whole, first, spaced, bare = _ids(own, ["a b", "a", " b", "b"])
    return whole == first + spaced or whole != first + bare
