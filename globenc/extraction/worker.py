"""The three stages of a shard, for every engine: encode its texts, run the model, build the Parquet file."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..answers import Answer, class_count, in_words, kind_of
from ..attribution import find_words
from ..errors import blames_text, in_a_line, out_of_memory
from ..explainer import BatchScores, GlobEnc
from ..rollouts import Position, check_position
from ..tokenization import Encoding
from .checksum import parquet_bytes
from .rows import BadRowError, Example, Reject, Work, typed

TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
PASSED = ("id", "gold_label")  # columns of values that are passed through
KEPT = ("text", "text_pair")
KINDS = {"bool": bool, "int64": int, "float64": float, "string": str}
LETTERS = {type(None): "-", bool: "b", int: "i", float: "f", str: "s"}  # how values were written, in a shard's metadata
PATIENCE = 16  # texts that fail in a row until the model is tried with a plain one
PROBES = ("a", "1", "\u7684")
LEAN = 1 << 16  # characters behind which a long text is dropped when nothing reads it any more
IDENTITY_KEY, SHARD_KEY, REJECTS_KEY = b"globenc", b"globenc.shard", b"globenc.rejects"
WRITTEN_KEY = b"globenc.written"


@dataclass(frozen=True)
class Settings:
    """What the stages need to know.

    Attributes:
        method, position, per_layer, row_normalize, max_length: as in `globenc.GlobEnc`.
        words, keep_text: whether the columns of words and of the text are written.
        pair, gold: whether the inputs have a second text and a label to be passed through.
        batch_tokens: budget of a batch; None goes by the free memory.
        strict: raise at the first bad row.
        identity: of the model and of all options, as JSON; goes into every file.
    """

    method: str
    position: Position
    per_layer: bool
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
            "position": self.position,
            "per_layer": self.per_layer,
            "row_normalize": self.row_normalize,
        }


@dataclass(frozen=True)
class ShardInfo:
    """What a shard says about itself in its metadata; `rows` are the attributed ones, `unknown` those of which the
    tokenizer knows no token; `digest` is of its own rows, `input_digest` of the first shard's."""

    index: int
    first_row: int
    end_row: int
    rows: int
    rejected: int
    tokens: int
    truncated: int
    unknown: int
    digest: str
    input_digest: str


@dataclass
class Scored:
    """A text with its attribution, as arrays without padding."""

    example: Example
    encoding: Encoding
    scores: np.ndarray
    log2_scale: np.ndarray
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    answer: Answer


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
        self._failures = 0  # texts in a row that the model could not score
        self._vocabulary: pa.Array | None = None

    def encode(self, work: Work) -> Shard:
        """The first stage: texts to tokens; what has none, or not the position asked for, is rejected."""
        settings = self.settings
        shard = Shard(work, [], list(work.rejects))
        texts = [example.text for example in work.examples]
        pairs = [str(example.pair) for example in work.examples] if settings.pair else None
        limit = self.explainer.limit(settings.max_length)
        encodings = self.explainer.encode_each(texts, pairs, limit) if texts else []
        self._check_encoder(encodings, limit)
        del texts, pairs
        for example, encoding in zip(work.examples, encodings, strict=True):
            if isinstance(encoding, BaseException):
                self._reject(shard, example, in_a_line(encoding))
                continue
            if encoding.empty:
                self._reject(shard, example, "the tokenizer finds no token in the text")
                continue
            try:
                check_position(settings.position, len(encoding), many=True)
            except ValueError as error:
                self._reject(shard, example, str(error))
                continue
            shard.examples.append(self._lean(example, encoding))
            shard.encodings.append(encoding)
        work.examples, work.rejects = [], []  # the texts that are needed further on are the shard's
        return shard

    def _check_encoder(self, encodings: Sequence[Encoding | BaseException], limit: int | None) -> None:
        """Raise an error that every text has as it is, where a plain one has it too: it is no text's."""
        errors = [encoding for encoding in encodings if isinstance(encoding, BaseException)]
        if errors and len(errors) == len(encodings) and not any(self._probes(limit)):
            raise errors[0]

    def _probes(self, limit: int | None) -> Iterator[Encoding]:
        """Plain texts, which may be none of the corpus's, if they can be encoded."""
        for text in PROBES:
            (encoding,) = self.explainer.encode_each([text], [text] if self.settings.pair else None, limit)
            if isinstance(encoding, Encoding):
                yield encoding

    def _lean(self, example: Example, encoding: Encoding) -> Example:
        """An example without those parts of long texts that nothing reads any more: Python holds up to four bytes a
        character."""
        text, pair = example.text, example.pair
        if max(len(text), len(pair or "")) <= LEAN or (self.settings.words and encoding.spans is None):
            return example
        kept = (text.encode(), None if pair is None else pair.encode()) if self.settings.keep_text else None
        end = LEAN if encoding.spans is None else int(encoding.spans.max(initial=0)) + LEAN
        return replace(example, text=text[:end], pair=None if pair is None else pair[:end], kept=kept)

    def score(self, shard: Shard) -> Shard:
        """The second stage: every text once through the model, in batches of like length. A batch that fails is
        halved until the text that fails alone is found; that one is rejected.

        Raises:
            Exception: what the model raises for any text, also for a plain one that is none of the corpus's.
        """
        lengths = [len(encoding) for encoding in shard.encodings]
        found: dict[int, Scored] = {}
        pending = self.explainer.batches(lengths, self.budget)
        while pending:
            batch = pending.pop(0)
            failure: BaseException | None = None
            try:
                scored = self.explainer.score([shard.encodings[i] for i in batch], **self.settings.model_options)
            except BaseException as error:
                if not out_of_memory(error) and not blames_text(error):
                    raise
                failure = error.with_traceback(None)  # frees what the model had in memory
            if failure is None:
                self._failures = 0
                found.update(self._rows(shard, batch, scored))
                self._advance(len(batch), sum(lengths[i] for i in batch))
            elif out_of_memory(failure):
                tokens = len(batch) * max(lengths[i] for i in batch)
                pending = self._shrunk(shard, batch, pending, lengths, tokens)
            elif len(batch) > 1:
                pending[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            else:
                self._check_model(failure, last=not pending)
                self._reject(shard, shard.examples[batch[0]], in_a_line(failure))
        shard.scored = [found[i] for i in sorted(found)]
        return shard

    def _check_model(self, failure: BaseException, last: bool) -> None:
        """Raise the error of a text where no text at all goes through the model, also one that worked before; looked at
        when several texts in a row, or the last ones of a shard, have failed."""
        self._failures += 1
        if self._failures < PATIENCE and not last:
            return
        if not self._takes_plain_text():
            raise failure
        self._failures = 0

    def _takes_plain_text(self) -> bool:
        """Whether the model scores a plain text.

        Raises:
            Exception: it fails for what is the machine's fault.
        """
        position = self.settings.position if isinstance(self.settings.position, str) else 0
        for encoding in self._probes(self.explainer.limit(self.settings.max_length)):
            try:
                self.explainer.score([encoding], **{**self.settings.model_options, "position": position})
            except Exception as error:
                if not blames_text(error):
                    raise
            else:
                return True
        return False

    def _shrunk(
        self, shard: Shard, batch: list[int], pending: list[list[int]], lengths: list[int], tokens: int
    ) -> list[list[int]]:
        """The batches still to do, for half the memory of one that did not fit."""
        if self.explainer.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(batch) == 1:
            self._takes_plain_text()  # where memory is too short even for that, no text is to blame
            reason = f"out of memory: its {lengths[batch[0]]:,} tokens do not fit; lower max_length"
            self._reject(shard, shard.examples[batch[0]], reason)
            return pending
        self.budget = max(1, min(self.budget, tokens) // 2)
        warnings.warn(f"out of memory: going on with batches of {self.budget:,} tokens", stacklevel=3)
        rest = sorted(i for batch in [batch, *pending] for i in batch)
        return [[rest[k] for k in chosen] for chosen in self.explainer.batches([lengths[i] for i in rest], self.budget)]

    def _rows(self, shard: Shard, batch: list[int], scored: BatchScores) -> dict[int, Scored]:
        whole = self.settings.position == "all" if isinstance(self.settings.position, str) else False
        rows = {}
        for k, i in enumerate(batch):
            encoding = shard.encodings[i]
            parts = scored.of(k, len(encoding), whole)
            rows[i] = Scored(shard.examples[i], encoding, *parts, scored.answers[k])
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
            input_digest=work.input_digest,
        )
        examples = [scored.example for scored in shard.scored]
        passed = {"id": ([example.id for example in examples], work.id_type)}
        if self.settings.gold:
            passed["gold_label"] = ([example.gold for example in examples], work.gold_type)
        table = self._table(work, shard.scored).replace_schema_metadata(
            {
                IDENTITY_KEY: self.settings.identity,
                SHARD_KEY: json.dumps(asdict(info)),
                # a name of an input may hold half a surrogate pair, which JSON writes so too
                REJECTS_KEY: json.dumps([asdict(reject) for reject in rejects], ensure_ascii=False).encode(
                    errors="backslashreplace"
                ),
            }
        )
        for name, (values, kind) in passed.items():
            table = with_passed(table, name, values, kind)
        shard.examples, shard.scored = [], []  # the table has what is needed of them, and a text may be long
        del examples, passed
        return info, shard_bytes(table)

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
        many = rows[0].scores.ndim > 1 if rows else _several(settings.position)
        scores = [row.scores for row in rows]
        columns: dict[str, pa.Array] = {
            "id": pa.nulls(len(rows)),  # `build` fills in what was passed through
            "tokens": _lists(lengths, self._names().take(pa.array(ids))),
            "scores": _nested(scores, 2 if many else 1),
            "start": _lists(lengths, pa.array(spans[:, 0], mask=spans[:, 0] < 0)),
            "end": _lists(lengths, pa.array(spans[:, 1], mask=spans[:, 0] < 0)),
            **self._answers([row.answer for row in rows]),
            "n_tokens": pa.array(lengths, pa.int32()),
            "truncated": pa.array([encoding.lost for encoding in encodings], pa.int32()),
            "log2_scale": _nested([row.log2_scale for row in rows], 1 if many else 0),
        }
        if settings.pair:
            segments = _joined([encoding.segments for encoding in encodings], np.int8)
            columns["segment"] = _lists(lengths, pa.array(segments, mask=special))
        if settings.gold:
            columns["gold_label"] = pa.nulls(len(rows))
        if settings.words:
            words = [self._words(row) for row in rows]
            texts = pa.array([text for row in words for text in row[0]], pa.string())
            columns["words"] = _lists([len(row[0]) for row in words], texts)
            columns["word_scores"] = _nested([row[1] for row in words], 2 if many else 1)
            counts = pa.array([count for row in words for count in row[2]], pa.int32())
            columns["word_tokens"] = _lists([len(row[2]) for row in words], counts)
        if settings.per_layer:
            layers = [row.layer_scores for row in rows if row.layer_scores is not None]
            scales = [row.layer_log2_scale for row in rows if row.layer_log2_scale is not None]
            columns["layer_scores"] = _nested(layers, 3 if many else 2)
            columns["layer_log2_scale"] = _nested(scales, 2 if many else 1)
        if settings.keep_text:
            kept = [example.kept or (example.text, example.pair) for example in examples]
            columns["text"] = pa.array([text for text, _ in kept], pa.string())
            if settings.pair:
                columns["text_pair"] = pa.array([pair for _, pair in kept], pa.string())
        return pa.table(columns)

    def _answers(self, answers: list[Answer]) -> dict[str, pa.Array]:
        """The columns of the answers, the same ones in every shard of a model.

        Raises:
            ValueError: the model answers otherwise than its configuration says.
        """
        model = self.explainer.model
        kind, several = kind_of(model), class_count(model) > 1
        promised = (kind, kind == "value" and several)
        for answer in answers:
            if answer.kind is not None and (answer.kind, isinstance(answer.value, list)) != promised:
                raise ValueError(
                    f"{type(model).__name__} answers {in_words(answer)!r}, which is not what its configuration says "
                    f"(problem_type {model.config.problem_type!r}, {class_count(model)} names in id2label): set "
                    "problem_type, and id2label to one name for each of its outputs"
                )
        columns = {
            "label": pa.array([answer.label for answer in answers], pa.string()),
            "probability": pa.array([answer.probability for answer in answers], pa.float64()),
        }
        if kind == "value":
            type_ = pa.list_(pa.float64()) if several else pa.float64()
            columns["value"] = pa.array([answer.value for answer in answers], type_)
        if kind == "labels":
            above = [answer.labels for answer in answers]
            for k, (name, type_) in enumerate((("labels", pa.string()), ("label_probabilities", pa.float64()))):
                cells = [None if pairs is None else [pair[k] for pair in pairs] for pairs in above]
                columns[name] = pa.array(cells, pa.list_(type_))
        return columns

    def _words(self, row: Scored) -> tuple[list[str], np.ndarray, list[int]]:
        """The words of a text without special tokens, their scores, and how many tokens each is made of."""
        encoding = row.encoding
        spans = [None] * len(encoding) if encoding.spans is None else encoding.spans.tolist()
        names = self._names().take(pa.array(encoding.ids)).to_pylist()
        sources = (row.example.text, row.example.pair)
        runs = find_words(sources, names, spans, encoding.segments.tolist(), encoding.word_ids.tolist())
        runs = [run for run in runs if run.segment is not None]
        scores = [row.scores[..., run.first : run.stop].sum(-1) for run in runs]
        return [run.text for run in runs], np.stack(scores, axis=-1), [run.stop - run.first for run in runs]

    def _names(self) -> pa.Array:
        """The tokenizer's tokens by id."""
        if self._vocabulary is None:
            tokenizer = self.explainer.tokenizer
            names = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
            self._vocabulary = pa.array(names, pa.string())
        return self._vocabulary


def shard_bytes(table: pa.Table) -> bytes:
    """A shard's file: a table, and in its schema what the shard says about itself."""
    # a dictionary and statistics of whole texts help nobody, and hold three copies of a long one
    paths = [path for field in table.schema if field.name not in KEPT for path in _leaves(field.name, field.type)]
    return parquet_bytes(table, paths)


def _leaves(name: str, kind: pa.DataType) -> list[str]:
    """The names of a column in a Parquet file."""
    return _leaves(f"{name}.list.element", kind.value_type) if pa.types.is_list(kind) else [name]


def with_passed(table: pa.Table, name: str, values: Sequence[Any], kind: str) -> pa.Table:
    """A shard's table with a column of values that were passed through, as one type; where the type does not tell how a
    value was written, such as 5 among numbers with decimals, the metadata do, so that it can be widened later on."""
    column = pa.array([typed(value, kind) for value in values], TYPES[kind])
    metadata = {**table.schema.metadata}
    written = json.loads(metadata.get(WRITTEN_KEY, b"{}"))
    written.pop(name, None)
    own = "".join(LETTERS[type(value)] for value in values)
    if kind != "string" and set(own) - {LETTERS[type(None)], LETTERS[KINDS[kind]]}:
        written[name] = own
    metadata[WRITTEN_KEY] = json.dumps(written).encode()
    place = table.schema.get_field_index(name)
    return table.set_column(place, name, column).replace_schema_metadata(metadata)


def widened(table: pa.Table, kinds: Mapping[str, str]) -> pa.Table:
    """A shard's table with columns of values that were passed through as wider types, every value as it was written."""
    written = json.loads(table.schema.metadata.get(WRITTEN_KEY, b"{}"))
    makes = {letter: kind for kind, letter in LETTERS.items()}
    ours = (IDENTITY_KEY, SHARD_KEY, REJECTS_KEY, WRITTEN_KEY)
    table = table.replace_schema_metadata({key: value for key, value in table.schema.metadata.items() if key in ours})
    for name, kind in kinds.items():
        values = table[name].to_pylist()
        if name in written:
            values = [None if v is None else makes[own](v) for v, own in zip(values, written[name], strict=True)]
        table = with_passed(table, name, values, kind)
    return table


def widest(tables: Iterable[pa.Table]) -> dict[str, str]:
    """The types that hold the columns passed through of all shards; those of nulls alone fit any."""
    names = {kind: name for name, kind in TYPES.items()}
    found: dict[str, set[str]] = {}
    for table in tables:
        for name in PASSED:
            if name in table.column_names:
                seen = found.setdefault(name, set())
                column = table[name]
                if column.null_count < len(column):
                    seen.add(names[column.type])
    order = [*TYPES]
    return {name: max(seen, key=order.index) if seen else "string" for name, seen in found.items()}


def _several(position: Position) -> bool:
    """Whether a position asks for several rows of scores a text."""
    return position == "all" if isinstance(position, str) else not isinstance(position, int)


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
