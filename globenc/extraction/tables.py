"""A shard as an Arrow table and as a Parquet file: the columns of its texts, their scores, words and labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..explainer import GlobEnc
from ..predictions import Prediction, class_count, in_words, kind_of
from ..rollouts import Position
from ..text_spans import find_words
from ..tokenization import Encoding
from .checksum import parquet_bytes
from .options import RunOptions
from .rows import Example

TEXT_COLUMNS = ("text", "text_pair")


@dataclass
class ScoredText:
    """A text with its attribution, as arrays without padding."""

    example: Example
    encoding: Encoding
    scores: np.ndarray
    log2_scale: np.ndarray
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    prediction: Prediction
    explained: dict[str, Any] | None = None  # of `BatchClassScores`


class TableBuilder:
    """Tables of scored texts; the columns passed through are left null.

    Args:
        explainer: the model.
        options: which columns are asked for.
    """

    def __init__(self, explainer: GlobEnc, options: RunOptions):
        self.explainer, self.options = explainer, options
        self._vocabulary: pa.Array | None = None

    def table(self, rows: list[ScoredText]) -> pa.Table:
        """A row for each of the texts.

        Raises:
            ValueError: the model predicts something else than its configuration says, or a list holds too many values.
        """
        encodings = [row.encoding for row in rows]
        lengths = [len(encoding) for encoding in encodings]
        ids = _joined([encoding.ids for encoding in encodings], np.int32)
        spans = np.concatenate([np.full((0, 2), -1, np.int32), *map(_spans, encodings)])
        depth = rows[0].scores.ndim if rows else 1 + _several(self.options.position)
        columns: dict[str, pa.Array] = {
            "id": pa.nulls(len(rows)),  # `with_passed` fills in what was passed through
            "tokens": _lists(lengths, self._names().take(pa.array(ids))),
            "scores": _nested([row.scores for row in rows], depth),
            "start": _lists(lengths, pa.array(spans[:, 0], mask=spans[:, 0] < 0)),
            "end": _lists(lengths, pa.array(spans[:, 1], mask=spans[:, 0] < 0)),
            **self._predictions([row.prediction for row in rows]),
            "n_tokens": pa.array(lengths, pa.int32()),
            "truncated": pa.array([encoding.lost for encoding in encodings], pa.int32()),
            "log2_scale": _nested([row.log2_scale for row in rows], depth - 1),
            **self._optional(rows, lengths, depth),
        }
        return pa.table(columns)

    def _optional(self, rows: list[ScoredText], lengths: list[int], depth: int) -> dict[str, pa.Array]:
        """The columns that are there where they are asked for; scores of a text are `depth` lists deep."""
        options = self.options
        pair = options.pair_column is not None
        columns: dict[str, pa.Array] = {}
        if pair:
            segments = _joined([row.encoding.segments for row in rows], np.int8)
            columns["segment"] = _lists(lengths, pa.array(segments, mask=segments < 0))
        if options.label_column is not None:
            columns["gold_label"] = pa.nulls(len(rows))
        if options.words:
            words = [self._words(row) for row in rows]
            spelled = pa.array([text for row in words for text in row[0]], pa.string())
            columns["words"] = _lists([len(row[0]) for row in words], spelled)
            columns["word_scores"] = _nested([row[1] for row in words], depth)
            counts = pa.array([count for row in words for count in row[2]], pa.int32())
            columns["word_tokens"] = _lists([len(row[2]) for row in words], counts)
            if options.class_scores:
                columns["word_class_scores"] = _nested([row[3] for row in words], 1)
        if options.per_layer:
            layers = [row.layer_scores for row in rows if row.layer_scores is not None]
            scales = [row.layer_log2_scale for row in rows if row.layer_log2_scale is not None]
            columns["layer_scores"] = _nested(layers, depth + 1)
            columns["layer_log2_scale"] = _nested(scales, depth)
        if options.class_scores:
            columns |= _explained([row.explained for row in rows if row.explained is not None])
        if options.keep_text:
            texts = [row.example.whole_texts or (row.example.text, row.example.pair) for row in rows]
            columns["text"] = pa.array([text for text, _ in texts], pa.string())
            if pair:
                columns["text_pair"] = pa.array([second for _, second in texts], pa.string())
        return columns

    def _predictions(self, predictions: list[Prediction]) -> dict[str, pa.Array]:
        """The columns of the predictions, the same ones in every shard of a model.

        Raises:
            ValueError: the model predicts something else than its configuration says.
        """
        model = self.explainer.model
        kind, several = kind_of(model), class_count(model) > 1
        promised = (kind, kind == "value" and several)
        for prediction in predictions:
            if prediction.kind is not None and (prediction.kind, isinstance(prediction.value, list)) != promised:
                raise ValueError(
                    f"{type(model).__name__} answers {in_words(prediction)!r}, which is not what its configuration "
                    f"says (problem_type {model.config.problem_type!r}, {class_count(model)} names in id2label): set "
                    "problem_type, and id2label to one name for each of its outputs"
                )
        columns = {
            "label": pa.array([prediction.label for prediction in predictions], pa.string()),
            "probability": pa.array([prediction.probability for prediction in predictions], pa.float64()),
        }
        if kind == "value":
            type_ = pa.list_(pa.float64()) if several else pa.float64()
            columns["value"] = pa.array([prediction.value for prediction in predictions], type_)
        if kind == "labels":
            above = [prediction.labels for prediction in predictions]
            for k, (name, type_) in enumerate((("labels", pa.string()), ("label_probabilities", pa.float64()))):
                cells = [None if pairs is None else [pair[k] for pair in pairs] for pairs in above]
                columns[name] = pa.array(cells, pa.list_(type_))
        return columns

    def _words(self, row: ScoredText) -> tuple[list[str], np.ndarray, list[int], np.ndarray]:
        """The words of a text without special tokens, their scores, how many tokens each is made of, and their class
        scores, which are none where none are asked for."""
        encoding = row.encoding
        spans = [None] * len(encoding) if encoding.offsets is None else encoding.offsets.tolist()
        names = self._names().take(pa.array(encoding.ids)).to_pylist()
        sources = (row.example.text, row.example.pair)
        runs = find_words(sources, names, spans, encoding.segments.tolist(), encoding.word_ids.tolist())
        runs = [run for run in runs if run.segment is not None]
        scores = [row.scores[..., run.first : run.stop].sum(-1) for run in runs]
        for_label = np.zeros(0, np.float32)
        if row.explained is not None:
            for_label = np.array([row.explained["class_scores"][run.first : run.stop].sum() for run in runs])
        counts = [run.stop - run.first for run in runs]
        return [run.text for run in runs], np.stack(scores, axis=-1), counts, for_label

    def _names(self) -> pa.Array:
        """The tokenizer's tokens by id."""
        if self._vocabulary is None:
            tokenizer = self.explainer.tokenizer
            names = tokenizer.convert_ids_to_tokens(list(range(max(tokenizer.get_vocab().values()) + 1)))
            self._vocabulary = pa.array(names, pa.string())
        return self._vocabulary


def _explained(rows: list[dict[str, Any]]) -> dict[str, pa.Array]:
    """The columns of class scores."""
    return {
        "class_scores": _nested([row["class_scores"] for row in rows], 1),
        "explained_label": pa.array([row["explained_label"] for row in rows], pa.string()),
        "logit": pa.array([row["logit"] for row in rows], pa.float64()),
        "remainder": pa.array([row["remainder"] for row in rows], pa.float64()),
    }


def shard_bytes(table: pa.Table) -> bytes:
    """A shard's file: a table, and in its schema what the shard says about itself."""
    # a dictionary and statistics of whole texts do not help, and hold three copies of a long one
    paths = [
        path for field in table.schema if field.name not in TEXT_COLUMNS for path in _leaves(field.name, field.type)
    ]
    return parquet_bytes(table, paths)


def _leaves(name: str, kind: pa.DataType) -> list[str]:
    """The names of a column in a Parquet file."""
    return _leaves(f"{name}.list.element", kind.value_type) if pa.types.is_list(kind) else [name]


def _several(position: Position) -> bool:
    """Whether a position asks for several rows of scores a text."""
    return position == "all" if isinstance(position, str) else not isinstance(position, int)


def _spans(encoding: Encoding) -> np.ndarray:
    """Where the tokens stand in the text, [n, 2], -1 where that is not known."""
    return np.full((len(encoding), 2), -1, np.int32) if encoding.offsets is None else encoding.offsets


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
