"""Texts to token ids and back to characters: encoding of many texts at once, batches by length, padding."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

TEXTS_AT_ONCE = 256  # encoded by one call: enough for the tokenizer's threads, and few enough to hold as Python lists


@dataclass(frozen=True, slots=True)
class Encoding:
    """The tokens of one text or pair, n of them, special ones included.

    Attributes:
        ids: [n] int32.
        type_ids: [n] int32; None where the tokenizer makes none.
        spans: characters (start, end) of each token in its text, [n, 2] int32, -1 for special tokens; None for a
            tokenizer that knows no offsets.
        segments: 0 for tokens of the text, 1 of the pair, -1 for special tokens; [n] int8.
        word_ids: number of the word a token belongs to within its segment, -1 for special tokens; [n] int32.
        lost: how many tokens were cut off.
        unknown: whether the tokenizer knows none of the tokens.
    """

    ids: np.ndarray
    type_ids: np.ndarray | None
    spans: np.ndarray | None
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


def encode(tokenizer: Any, texts: Sequence[str], text_pair: Sequence[str] | None, limit: int | None) -> list[Encoding]:
    """Encode texts, or pairs, cutting off what is beyond `limit` tokens, special ones included.

    Raises:
        ValueError: the limit leaves no room beside the special tokens.
    """
    encodings: list[Encoding] = []
    for begin in range(0, len(texts), TEXTS_AT_ONCE):
        part = slice(begin, begin + TEXTS_AT_ONCE)
        encodings += _encode(tokenizer, list(texts[part]), None if text_pair is None else list(text_pair[part]), limit)
    return encodings


def _encode(tokenizer: Any, texts: list[str], pairs: list[str] | None, limit: int | None) -> list[Encoding]:
    options: dict[str, Any] = {
        "return_offsets_mapping": tokenizer.is_fast,
        "return_special_tokens_mask": True,
        "return_attention_mask": False,
        "verbose": False,
    }
    whole = tokenizer(texts, pairs, truncation=False, **options)
    lengths = [len(ids) for ids in whole["input_ids"]]
    encodings = [_encoding(tokenizer, whole, i, pairs is not None, 0) for i, n in enumerate(lengths) if _fits(n, limit)]
    longer = [i for i, n in enumerate(lengths) if not _fits(n, limit)]
    if longer:
        overhead = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
        if limit is None or limit <= overhead:
            raise ValueError(f"max_length must be more than the {overhead} special tokens, got {limit}")
        chosen = None if pairs is None else [pairs[i] for i in longer]
        cut = tokenizer([texts[i] for i in longer], chosen, truncation=True, max_length=limit, **options)
        for k, i in enumerate(longer):
            lost = lengths[i] - len(cut["input_ids"][k])
            encodings.insert(i, _encoding(tokenizer, cut, k, pairs is not None, lost))
    return encodings


def _fits(n: int, limit: int | None) -> bool:
    return limit is None or n <= limit


def _encoding(tokenizer: Any, batch: Any, i: int, pair: bool, lost: int) -> Encoding:
    ids = np.array(batch["input_ids"][i], dtype=np.int32)
    types = np.array(batch["token_type_ids"][i], dtype=np.int32) if "token_type_ids" in batch else None
    special = np.array(batch["special_tokens_mask"][i], dtype=bool)
    spans = None
    if tokenizer.is_fast:
        spans = np.array(batch["offset_mapping"][i], dtype=np.int32).reshape(-1, 2)
        spans[special] = -1
        sequence_ids = batch.sequence_ids(i)
        word_ids = batch.word_ids(i)
        segments = np.array([-1 if s is None else s for s in sequence_ids], dtype=np.int8)
        words = np.array([-1 if w is None else w for w in word_ids], dtype=np.int32)
    else:
        segments = types.astype(np.int8) if types is not None and pair else np.zeros(len(ids), dtype=np.int8)
        names = tokenizer.convert_ids_to_tokens(ids.tolist())
        words = np.cumsum([not name.startswith("##") for name in names], dtype=np.int32) - 1
    segments[special] = -1
    words[special] = -1
    unknown = tokenizer.unk_token_id is not None and bool((ids[~special] == tokenizer.unk_token_id).all())
    return Encoding(ids, types, spans, segments, words, lost, unknown)


def by_length(lengths: Sequence[int], budget: int, padded: bool = True) -> list[list[int]]:
    """Indices of texts, batched by length so that batch size times longest text stays within the budget.

    `padded`: texts of a batch may differ in length.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[batches[-1][0]] if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= budget and (padded or longest == lengths[i]):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad(encodings: Sequence[Encoding], tokenizer: Any, model: Any) -> dict[str, Any]:
    """Model inputs of a batch, padded on the right, on the model's device."""
    device = next(model.parameters()).device
    lengths = np.array([len(e) for e in encodings])
    real = np.arange(lengths.max()) < lengths[:, None]
    columns = {"input_ids": ([e.ids for e in encodings], tokenizer.pad_token_id or 0)}
    taken = set(tokenizer.model_input_names) & set(inspect.signature(model.forward).parameters)
    types = [e.type_ids for e in encodings if e.type_ids is not None]
    if types and "token_type_ids" in taken:
        columns["token_type_ids"] = (types, 0)
    inputs = {}
    for name, (rows, filler) in columns.items():
        padded = np.full(real.shape, filler, dtype=np.int64)
        padded[real] = np.concatenate(rows)
        inputs[name] = torch.from_numpy(padded).to(device)
    inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64)).to(device)
    return inputs
