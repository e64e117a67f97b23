"""What the tests of tokenizers share: the words that are seen, and a comparison with the tokenizer called alone."""

from __future__ import annotations

from globenc.text_spans import find_words
from globenc.tokenization import encode


def words_of(tokenizer, text, pair=None, limit=None):
    """The words, special tokens left out, and the encoding."""
    e = encode(tokenizer, [text], None if pair is None else [pair], limit)[0]
    spans = [None] * len(e) if e.offsets is None else e.offsets.tolist()
    names = tokenizer.convert_ids_to_tokens(e.ids.tolist())
    runs = find_words((text, pair), names, spans, e.segments.tolist(), e.word_ids.tolist())
    return [run for run in runs if run.segment is not None], e


# Cutting


def check_as_serial(tokenizer, texts, pairs, limit):
    """Ids, types, segments, places and counts are those of the tokenizer's own call."""
    options = {"truncation": limit is not None, "max_length": limit, "return_offsets_mapping": tokenizer.is_fast}
    expected = tokenizer(texts, pairs, verbose=False, **options)
    full = tokenizer(texts, pairs, verbose=False)["input_ids"]
    state = None
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(4)
        backend.enable_padding(length=60)
        state = (backend.truncation, backend.padding)
    found = encode(tokenizer, texts, pairs, limit)
    if tokenizer.is_fast:
        assert (backend.truncation, backend.padding) == state
        backend.no_truncation()
        backend.no_padding()
    for i, e in enumerate(found):
        assert e.ids.tolist() == expected["input_ids"][i]
        assert e.lost == len(full[i]) - len(e)
        if "token_type_ids" in expected:
            assert e.type_ids.tolist() == expected["token_type_ids"][i]
        if not tokenizer.is_fast:
            continue
        sources = expected.sequence_ids(i)
        assert e.segments.tolist() == [-1 if s is None else s for s in sources]
        for source, (start, end), (a, b) in zip(
            sources, e.offsets.tolist(), expected["offset_mapping"][i], strict=True
        ):
            if source is None:
                assert (start, end) == (-1, -1)
            elif start < end and a < b:
                text = (texts, pairs)[source][i]
                assert text[start:end].strip(" \n\u200b") == text[a:b].strip(" \n\u200b") or end == b
