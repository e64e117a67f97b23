"""The three stages of a shard, for every engine: encode its texts, run the model, build the Parquet file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet

from ..attribution import find_words
from ..explainer import BatchScores, GlobEnc
from ..rollouts import Target, check_target
from ..tokenization import Encoding, encode
from .rows import BadRowError, Example, Reject, Work

TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
PATIENCE = 16  # texts without finite numbers, and none with, until it is the model that must be wrong
IDENTITY_KEY, SHARD_KEY, REJECTS_KEY = b"globenc", b"globenc.shard", b"globenc.rejects"


@dataclass(frozen=True)
class Settings:
    """What the stages need to know.

    Attributes:
        method, target, layers, row_normalize, max_length: as in `globenc.GlobEnc`.
        words, keep_text: whether the columns of words and of the text are written.
        pair, gold: whether the inputs have a second text and a label to be passed through.
        batch_tokens: budget of a batch; None goes by the free memory.
        strict: raise at the first bad row.
        identity: of the model and of all options, as JSON; goes into every file.
    """

    method: str
    target: Target
    layers: bool
    row_normalize: bool
    max_length: int | None
    words: bool
    keep_text: bool
    pair: bool
    gold: bool
    batch_tokens: int | None
    strict: bool
    identity: str

    @property
    def model_options(self) -> dict[str, Any]:
        """Options of `globenc.attribute`."""
        return {
            "method": self.method,
            "target": self.target,
            "layers": self.layers,
            "row_normalize": self.row_normalize,
        }


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says about itself in its metadata; `rows` are the attributed ones, `unknown` those of which the
    tokenizer knows no token."""

    index: int
    first_row: int
    end_row: int
    rows: int
    rejected: int
    tokens: int
    truncated: int
    unknown: int
    digest: str


@dataclass
class Scored:
    """A text with its attribution, as arrays without padding."""

    example: Example
    encoding: Encoding
    scores: np.ndarray
    log2_scale: np.ndarray
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    label: str | None
    probability: float | None


@dataclass
class Shard:
    """A shard on its way: its rows, then also their encodings, then their scores."""

    work: Work
    examples: list[Example]
    rejects: list[Reject]
    encodings: list[Encoding] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)


class Worker:
    """A model with the stages of its shards. Each stage may have a thread of its own.

    Args:
        explainer: the model.
        settings: what is asked for.
        advance: told after every batch how many texts and tokens it had.
    """

    def __init__(self, explainer: GlobEnc, settings: Settings, advance: Callable[[int, int], None] | None = None):
        self.explainer, self.settings = explainer, settings
        self.budget = settings.batch_tokens or explainer.budget()
        self._advance = advance or (lambda texts, tokens: None)
        self._any_scored, self._not_finite = False, 0
        self._vocabulary: pa.Array | None = None

    def encode(self, work: Work) -> Shard:
        """The first stage: texts to tokens; what has none, or not the target's, is rejected."""
        settings = self.settings
        shard = Shard(work, [], list(work.rejects))
        texts = [example.text for example in work.examples]
        pairs = [str(example.pair) for example in work.examples] if settings.pair else None
        limit = self.explainer.limit(settings.max_length)
        encodings = encode(self.explainer.tokenizer, texts, pairs, limit) if texts else []
        for example, encoding in zip(work.examples, encodings, strict=True):
            if encoding.empty:
                self._reject(shard, example, "the tokenizer finds no token in the text")
                continue
            try:
                check_target(settings.target, len(encoding), many=True)
            except ValueError as error:
                self._reject(shard, example, str(error))
                continue
            shard.examples.append(example)
            shard.encodings.append(encoding)
        return shard

    def score(self, shard: Shard) -> Shard:
        """The second stage: every text once through the model, in batches of like length.

        Raises:
            FloatingPointError: the model gives no finite numbers for any text.
        """
        lengths = [len(encoding) for encoding in shard.encodings]
        found: dict[int, Scored] = {}
        pending = self.explainer.batches(lengths, self.budget)
        while pending:
            batch = pending.pop(0)
            try:
                scored = self.explainer.score([shard.encodings[i] for i in batch], **self.settings.model_options)
            except FloatingPointError as error:
                if len(batch) > 1:
                    pending[:0] = [[i] for i in batch]
                elif not self._any_scored and (self._not_finite == PATIENCE or not pending):
                    raise
                else:
                    self._not_finite += 1
                    self._reject(shard, shard.examples[batch[0]], str(error))
                continue
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                tokens = len(batch) * max(lengths[i] for i in batch)
            else:
                tokens = 0
            if tokens:
                pending = self._shrunk(shard, batch, pending, lengths, tokens)
                continue
            self._any_scored = True
            found.update(self._rows(shard, batch, scored))
            self._advance(len(batch), sum(lengths[i] for i in batch))
        shard.scored = [found[i] for i in sorted(found)]
        return shard

    def _shrunk(
        self, shard: Shard, batch: list[int], pending: list[list[int]], lengths: list[int], tokens: int
    ) -> list[list[int]]:
        """The batches still to do, for half the memory of one that did not fit."""
        if self.explainer.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            reason = f"out of memory: its {lengths[batch[0]]:,} tokens do not fit; lower max_length"
            self._reject(shard, shard.examples[batch[0]], reason)
            return pending
        self.budget = max(1, min(self.budget, tokens) // 2)
        warnings.warn(f"out of memory: going on with batches of {self.budget:,} tokens", stacklevel=3)
        rest = sorted(i for batch in [batch, *pending] for i in batch)
        return [[rest[k] for k in chosen] for chosen in self.explainer.batches([lengths[i] for i in rest], self.budget)]

    def _rows(self, shard: Shard, batch: list[int], scored: BatchScores) -> dict[int, Scored]:
        whole = self.settings.target == "all" if isinstance(self.settings.target, str) else False
        rows = {}
        for k, i in enumerate(batch):
            encoding = shard.encodings[i]
            parts = scored.of(k, len(encoding), whole)
            rows[i] = Scored(shard.examples[i], encoding, *parts, scored.labels[k], scored.probabilities[k])
        return rows

    def _reject(self, shard: Shard, example: Example, reason: str) -> None:
        reject = Reject(example.row, example.input, example.line, reason)
        if self.settings.strict:
            raise BadRowError(str(reject))
        shard.rejects.append(reject)

    def build(self, shard: Shard) -> tuple[ShardInfo, bytes]:
        """The third stage: the shard's Parquet file."""
        work, rejects = shard.work, sorted(shard.rejects, key=lambda reject: reject.row)
        encodings = [scored.encoding for scored in shard.scored]
        info = ShardInfo(
            index=work.index,
            first_row=work.first_row,
            end_row=work.end_row,
            rows=len(shard.scored),
            rejected=len(rejects),
            tokens=sum(len(encoding) for encoding in encodings),
            truncated=sum(encoding.lost > 0 for encoding in encodings),
            unknown=sum(encoding.unknown for encoding in encodings),
            digest=work.digest,
        )
        table = self._table(work, shard.scored).replace_schema_metadata(
            {
                IDENTITY_KEY: self.settings.identity,
                SHARD_KEY: json.dumps(asdict(info)),
                REJECTS_KEY: json.dumps([asdict(reject) for reject in rejects]),
            }
        )
        sink = pa.BufferOutputStream()
        parquet.write_table(table, sink, compression="zstd")
        return info, sink.getvalue().to_pybytes()

    def _table(self, work: Work, rows: list[Scored]) -> pa.Table:
        settings = self.settings
        encodings = [row.encoding for row in rows]
        lengths = [len(encoding) for encoding in encodings]
        ids = _joined([encoding.ids for encoding in encodings], np.int32)
        special = _joined([encoding.segments for encoding in encodings], np.int8) < 0
        bare = np.full((0, 2), -1, np.int32)
        spans = np.concatenate(
            [
                bare,
                *(
                    np.full((n, 2), -1, np.int32) if e.spans is None else e.spans
                    for e, n in zip(encodings, lengths, strict=True)
                ),
            ]
        )
        examples = [row.example for row in rows]
        many = rows[0].scores.ndim > 1 if rows else _several(settings.target)
        scores = [row.scores for row in rows]
        columns: dict[str, pa.Array] = {
            "id": pa.array([example.id for example in examples], TYPES[work.id_type]),
            "tokens": _lists(lengths, self._names().take(pa.array(ids))),
            "scores": _nested(scores, 2 if many else 1),
            "start": _lists(lengths, pa.array(spans[:, 0], mask=spans[:, 0] < 0)),
            "end": _lists(lengths, pa.array(spans[:, 1], mask=spans[:, 0] < 0)),
            "label": pa.array([row.label for row in rows], pa.string()),
            "probability": pa.array([row.probability for row in rows], pa.float64()),
            "n_tokens": pa.array(lengths, pa.int32()),
            "truncated": pa.array([encoding.lost for encoding in encodings], pa.int32()),
            "log2_scale": _nested([row.log2_scale for row in rows], 1 if many else 0),
        }
        if settings.pair:
            segments = _joined([encoding.segments for encoding in encodings], np.int8)
            columns["segment"] = _lists(lengths, pa.array(segments, mask=special))
        if settings.gold:
            columns["gold_label"] = pa.array([example.gold for example in examples], TYPES[work.gold_type])
        if settings.words:
            words = [self._words(row) for row in rows]
            texts = pa.array([text for row in words for text in row[0]], pa.string())
            columns["words"] = _lists([len(row[0]) for row in words], texts)
            columns["word_scores"] = _nested([row[1] for row in words], 2 if many else 1)
        if settings.layers:
            layers = [row.layer_scores for row in rows if row.layer_scores is not None]
            scales = [row.layer_log2_scale for row in rows if row.layer_log2_scale is not None]
            columns["layer_scores"] = _nested(layers, 3 if many else 2)
            columns["layer_log2_scale"] = _nested(scales, 2 if many else 1)
        if settings.keep_text:
            columns["text"] = pa.array([example.text for example in examples], pa.string())
            if settings.pair:
                columns["text_pair"] = pa.array([example.pair for example in examples], pa.string())
        return pa.table(columns)

    def _words(self, row: Scored) -> tuple[list[str], np.ndarray]:
        """The words of a text without special tokens, and their scores."""
        encoding = row.encoding
        spans = [None] * len(encoding) if encoding.spans is None else encoding.spans.tolist()
        names = self._names().take(pa.array(encoding.ids)).to_pylist()
        sources = (row.example.text, row.example.pair)
        runs = find_words(sources, names, spans, encoding.segments.tolist(), encoding.word_ids.tolist())
        runs = [run for run in runs if run.segment is not None]
        scores = [row.scores[..., run.first : run.stop].sum(-1) for run in runs]
        return [run.text for run in runs], np.stack(scores, axis=-1)

    def _names(self) -> pa.Array:
        """The tokenizer's tokens by id."""
        if self._vocabulary is None:
            tokenizer = self.explainer.tokenizer
            names = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
            self._vocabulary = pa.array(names, pa.string())
        return self._vocabulary


def _several(target: Target) -> bool:
    """Whether a target asks for several rows of scores a text."""
    return target == "all" if isinstance(target, str) else not isinstance(target, int)


def _joined(arrays: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _lists(lengths: Sequence[int], values: pa.Array) -> pa.Array:
    """Values as one list for each length."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if offsets[-1] >= 2**31:
        raise ValueError(f"a shard of {offsets[-1]:,} values is more than a Parquet list holds: lower shard_rows")
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


def _nested(arrays: Sequence[np.ndarray], depth: int) -> pa.Array:
    """Arrays of `depth` dimensions as float32 lists of lists."""
    nested = pa.array(_joined([array.astype(np.float32, copy=False).ravel() for array in arrays], np.float32))
    for axis in reversed(range(depth)):
        lengths = [array.shape[axis] for array in arrays for _ in range(int(np.prod(array.shape[:axis])))]
        nested = _lists(lengths, nested)
    return nested


def _out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or "DefaultCPUAllocator: can't allocate memory" in str(error)
