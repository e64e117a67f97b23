"""Texts to token ids: many texts at once, in threads, cut without changing the tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers

from .long_texts import MARGIN, readings_of
from .records import Encoding, Reading, Tokens, ids_of, pieces_of
from .words import divides_words, find_words, is_verbatim, verbatim_spans, word_mark, words_by_names

TEXTS_AT_ONCE = 256  # encoded by one call: enough for the tokenizer's threads, and few enough to hold as Python lists
CHARACTERS_AT_ONCE = 1 << 18  # in one call: a character costs some 300 bytes while its token is in hand


def encode(tokenizer: Any, texts: Sequence[str], text_pair: Sequence[str] | None, limit: int | None) -> list[Encoding]:
    """Encode texts, or pairs, cutting off what is beyond `limit` tokens, special ones included.

    May run in several threads at once, and beside other uses of the same tokenizer: nothing of it is switched. Of a
    text of many megabytes no more is held as tokens than is read.

    Raises:
        ValueError: the limit leaves no room beside the special tokens.
    """
    unshared = _unshared(tokenizer)
    tokenize = _tokens if tokenizer.is_fast else _tokens_in_python
    divides = divides_words(unshared) if tokenizer.is_fast else word_mark(tokenizer) != ""
    encodings: list[Encoding] = []
    for group in _together(texts, text_pair):
        readings = [readings_of(unshared, pair, limit) for pair in group]
        encodings += _encodings(unshared, readings, tokenize(unshared, readings, limit), divides)
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
    unshared = copy.copy(tokenizer)
    unshared._tokenizer = backend
    return unshared


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


def _tokens(tokenizer: Any, readings: list[list[Reading]], limit: int | None) -> list[Tokens]:
    """The tokens of a fast tokenizer."""
    columns = [[reading.text for reading in column] for column in zip(*readings, strict=True)]
    options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
    batch = tokenizer(*columns, truncation=False, **options)
    encoded, typed = list(batch.encodings), "token_type_ids" in batch
    full = [len(e) + sum(r.beyond for r in pair) for e, pair in zip(encoded, readings, strict=True)]
    longer = [i for i, n in enumerate(full) if limit is not None and n > limit]
    if longer:
        _check_room(tokenizer, limit, len(columns))
        for i in longer:
            readings[i] = _narrowed(readings[i], encoded[i], limit or 0, tokenizer.truncation_side == "left")
        chosen = [[readings[i][k].text for i in longer] for k in range(len(columns))]
        cut = tokenizer(*chosen, truncation=True, max_length=limit, **options)
        for i, e in zip(longer, cut.encodings, strict=True):
            encoded[i] = e
    return [
        Tokens(
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


def _narrowed(pair: list[Reading], encoded: Any, limit: int, left: bool) -> list[Reading]:
    """What is tokenized again to be cut: the backend makes tokens of all that is cut off, of pairs of all in pairs."""
    sources = np.array([-1 if s is None else s for s in encoded.sequence_ids])
    spans = np.array(encoded.offsets).reshape(-1, 2)
    counts = [int((sources == k).sum()) for k in range(len(pair))]
    if max(counts) <= limit + 2 * MARGIN:
        return pair
    longer = int(len(pair) > 1 and counts[0] <= counts[1])  # it keeps one token more and must stay the longer one
    rooms = [limit + MARGIN * (1 + (k == longer)) for k in range(len(pair))]
    return [reading.narrowed(spans[sources == k], rooms[k], left) for k, reading in enumerate(pair)]


def _tokens_in_python(tokenizer: Any, readings: list[list[Reading]], limit: int | None) -> list[Tokens]:
    """The tokens of a tokenizer that is written in Python and knows no offsets."""
    columns = [ids_of(tokenizer, [reading.text for reading in column]) for column in zip(*readings, strict=True)]
    overhead = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    mark, verbatim = word_mark(tokenizer), is_verbatim(tokenizer)
    tokenized = []
    for pair, whole in zip(readings, zip(*columns, strict=True), strict=True):
        ids, pieces = list(whole), [pieces_of(tokenizer, r.text, row) for r, row in zip(pair, whole, strict=True)]
        full = overhead + sum(map(len, ids)) + sum(reading.beyond for reading in pair)
        if limit is not None and full > limit:
            _check_room(tokenizer, limit, len(columns))
            left = tokenizer.truncation_side == "left"
            lengths = _longest_first([len(row) for row in ids], limit - overhead)
            ids, pieces = (
                [row[len(row) - n :] if left else row[:n] for row, n in zip(rows, lengths, strict=True)]
                for rows in (ids, pieces)
            )
        made = tokenizer.prepare_for_model(*ids, return_attention_mask=False, verbose=False)
        # where each text goes is known by building the input of numbers that stand for it
        layout = tokenizer.build_inputs_with_special_tokens(*([-2 - k] * len(row) for k, row in enumerate(ids)))
        segments = np.array([max(-1, -2 - i) for i in layout[: len(made["input_ids"])]], dtype=np.int8)
        names = tokenizer.convert_ids_to_tokens(made["input_ids"])
        spans, words, has_spans = np.full((len(names), 2), -1), np.full(len(names), -1, np.int32), True
        for k, reading in enumerate(pair):
            here = np.flatnonzero(segments == k)
            words[here] = words_by_names(pieces[k], mark)
            known = verbatim_spans(reading.text, pieces[k]) if verbatim else None
            has_spans = has_spans and known is not None
            spans[here] = -1 if known is None else known
        tokenized.append(
            Tokens(
                ids=made["input_ids"],
                types=made.get("token_type_ids"),
                names=names,
                segments=segments,
                spans=spans if has_spans else None,
                words=words,
                lost=full - len(names),
            )
        )
    return tokenized


def _check_room(tokenizer: Any, limit: int | None, texts: int) -> None:
    overhead = tokenizer.num_special_tokens_to_add(pair=texts > 1)
    if limit is None or limit <= overhead:
        raise ValueError(f"max_length must be more than the {overhead} special tokens, got {limit}")


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """How many tokens of a text or pair remain, by the rule of transformers' tokenizers in Python."""
    if len(lengths) == 1:
        return [room]
    first, second = lengths
    surplus = first + second - room
    uneven = min(abs(first - second), surplus)
    half = (surplus - uneven) // 2
    rest = surplus - uneven - half
    return [first - uneven - half, second - rest] if first > second else [first - half, second - uneven - rest]


def _encodings(tokenizer: Any, readings: list[list[Reading]], tokenized: list[Tokens], divides: bool) -> list[Encoding]:
    """The tokens with their words and their offsets in the texts; `divides`: the tokenizer's own words are words."""
    known = [k for k, tokens in enumerate(tokenized) if tokens.spans is not None]
    if known:
        texts = [reading.text for k in known for reading in readings[k]]
        find_words(texts, [tokenized[k] for k in known], divides)
    encodings, unk = [], tokenizer.unk_token_id
    for tokens, pair in zip(tokenized, readings, strict=True):
        ids, spans = np.array(tokens.ids, dtype=np.int32), tokens.spans
        real = tokens.segments >= 0
        for k, reading in enumerate(pair):
            if spans is not None and reading.parts is not None:
                spans[tokens.segments == k] = reading.in_whole_text(spans[tokens.segments == k])
        types = None if tokens.types is None else np.array(tokens.types, dtype=np.int32)
        unknown = unk is not None and bool((ids[real] == unk).all())
        encodings.append(Encoding(ids, types, spans, tokens.segments, tokens.words, tokens.lost, unknown))
    return encodings
