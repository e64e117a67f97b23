"""Rows of any input, checked one by one and gathered into the rows of one shard after another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..printing import short
from .lines import SURROGATE
from .passed_columns import ColumnType, as_written
from .raw_rows import RawRow
from .sources import Input

CHARACTERS = 4_000_000  # most in a shard: about a million tokens, so that memory is bounded for long texts too
MOST_ROWS = 100_000  # of a shard: were all of them rejected, a Parquet file's metadata would still hold the reasons
SLICE = 1 << 16  # characters hashed at once


class BadRowError(ValueError):
    """Why a row cannot be attributed; raised to the caller where a run is to stop at the first such row."""


@dataclass(frozen=True, slots=True)
class Example:
    """A row to attribute: its number from 0, where it comes from, its id, its texts, the label that came with it.

    Id and label are None, bool, int, float or str as they were written, whatever type their columns come to have.
    `whole_texts` are long texts as UTF-8 where they are to be written; `text` and `pair` are then their beginnings.
    """

    row: int
    input: str
    line: int | None
    id: Any
    text: str
    pair: str | None
    gold: Any
    whole_texts: tuple[bytes, bytes | None] | None = None


@dataclass(frozen=True, slots=True)
class Reject:
    """A row that cannot be attributed: its number from 0, the input and line it comes from, and the reason, in one line
    that can be printed; input and reason are cut to 200 characters."""

    row: int
    input: str
    line: int | None
    reason: str

    def __post_init__(self) -> None:
        if len(self.input) > 200:
            object.__setattr__(self, "input", f"{self.input[:197]}...")
        object.__setattr__(self, "reason", short(self.reason))

    def __str__(self) -> str:
        line = "" if self.line is None else f" line {self.line}"
        return f"row {self.row} ({self.input}{line}): {self.reason}"


@dataclass
class ShardRows:
    """The rows of one shard: those to attribute, and those that are not good for it.

    Attributes:
        index: number of the shard from 0.
        first_row, end_row: which rows of all inputs, first_row to end_row - 1.
        digest: of everything the shard depends on, to tell another input from the same.
        input_digest: that of the first shard, to tell shards of another input from those of the same.
        id_type, gold_type: "bool", "int64", "float64" or "string": the narrowest that holds the values of all rows so
            far; a later shard's may be wider.
        fraction: how much of all inputs has been read behind these rows; None where that is not known.
    """

    index: int
    first_row: int
    end_row: int
    examples: list[Example] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    digest: str = ""
    input_digest: str = ""
    id_type: str = "int64"
    gold_type: str = "string"
    fraction: float | None = None


@dataclass(frozen=True)
class Columns:
    """Which columns of the inputs are read."""

    text: str = "text"
    pair: str | None = None
    id: str | None = None
    label: str | None = None

    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(name for name in (self.text, self.pair, self.id, self.label) if name is not None))


class Reader:
    """Reads inputs into the rows of one shard after another, in the order of the inputs.

    Args:
        inputs: where the rows come from.
        columns: which columns are read.
        shard_rows: rows of a shard; it has fewer where its texts are long, and never more than 100,000.
        limit: rows to read; None is all.
        strict: raise at the first bad row.
    """

    def __init__(self, inputs: Sequence[Input], columns: Columns, shard_rows: int, limit: int | None, strict: bool):
        self.inputs, self.columns, self.shard_rows, self.limit, self.strict = inputs, columns, shard_rows, limit, strict
        self._id_type, self._gold_type = ColumnType(), ColumnType()
        self._first_digest = ""

    def __iter__(self) -> Iterator[ShardRows]:
        """The rows of one shard after another; of no rows at all one shard that is empty.

        Raises:
            BadRowError: a row is bad, and the run is strict.
            OSError, ValueError: an input cannot be read on, or was changed since it was opened.
        """
        self._id_type, self._gold_type = ColumnType(), ColumnType()
        rows, digest, characters = ShardRows(0, 0, 0), hashlib.blake2b(digest_size=16), 0
        for name, raw in self._raw():
            row = rows.end_row
            try:
                example = self._example(row, name, raw)
            except BadRowError as error:
                reject = Reject(row, name, raw.line, str(error))
                if self.strict:
                    raise BadRowError(str(reject)) from None
                rows.rejects.append(reject)
                digest.update(f"{reject.reason}\0".encode())
                characters += 100 + len(reject.input) + len(reject.reason)
            else:
                rows.examples.append(example)
                fields = (example.id, example.text, example.pair, example.gold)
                for value in fields:
                    _feed(digest, value)
                characters += sum(len(value) for value in fields if isinstance(value, str))
                del example, fields, value
            rows.end_row = row + 1
            if rows.end_row - rows.first_row >= min(self.shard_rows, MOST_ROWS) or characters >= CHARACTERS:
                yield self._closed(rows, digest)
                rows = ShardRows(rows.index + 1, rows.end_row, rows.end_row)
                digest, characters = hashlib.blake2b(digest_size=16), 0
        if rows.end_row > rows.first_row or not rows.index:
            yield self._closed(rows, digest)

    def _raw(self) -> Iterator[tuple[str, RawRow]]:
        count = 0
        for source in self.inputs:
            if count == self.limit:
                return
            name = Path(source.name).name if source.format != "hub" else source.name
            for raw in source.rows(self.columns.names()):
                yield name, raw
                count += 1
                if count == self.limit:
                    source.check_unchanged()
                    return

    def _closed(self, rows: ShardRows, digest: Any) -> ShardRows:
        rows.digest, rows.gold_type = digest.hexdigest(), self._gold_type.name
        rows.id_type = "int64" if self.columns.id is None else self._id_type.name
        if rows.index == 0:
            self._first_digest = rows.digest
        rows.input_digest = self._first_digest
        rows.fraction = self._fraction(rows.end_row)
        for source in self.inputs:
            source.check_unchanged()
        return rows

    def _fraction(self, rows: int) -> float | None:
        by_limit = rows / self.limit if self.limit else None
        fractions = [source.fraction for source in self.inputs]
        begun = [f for f in fractions if f is not None]
        if not begun or None in fractions[: len(begun)]:
            return by_limit
        sizes = [source.size for source in self.inputs]
        weights = [size or 1 for size in sizes] if None not in sizes else [1] * len(sizes)
        read = sum(f * w for f, w in zip(begun, weights, strict=False)) / sum(weights)
        return max(read, by_limit or 0.0)

    def _example(self, row: int, name: str, raw: RawRow) -> Example:
        if raw.values is None:
            raise BadRowError(raw.reason)
        columns = self.columns
        text = _text(columns.text, raw)
        pair = None if columns.pair is None else _text(columns.pair, raw)
        id_: Any = row
        gold: Any = None
        if columns.id is not None:
            id_ = as_written(raw.values.get(columns.id))
            self._id_type.see(id_)
        if columns.label is not None:
            gold = as_written(raw.values.get(columns.label))
            self._gold_type.see(gold)
        return Example(row, name, raw.line, id_, text, pair, gold)


def _text(column: str, raw: RawRow) -> str:
    values = raw.values or {}
    if column not in values:
        raise BadRowError(f"text column {column!r} is missing")
    text = values[column]
    if text is None:
        raise BadRowError(f"text column {column!r} is null")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise BadRowError(
                f"undecodable bytes: 0x{text[error.start]:02x} at byte {error.start} is not UTF-8"
            ) from None
    if not isinstance(text, str):
        raise BadRowError(f"text column {column!r} holds a value of type {type(text).__name__}, not text")
    if not text or text.isspace():
        raise BadRowError(f"text column {column!r} is empty")
    if not text.isascii() and SURROGATE.search(text):
        raise BadRowError(raw.reason or f"text column {column!r} is no valid text: it holds half of a surrogate pair")
    return text if type(text) is str else str.__str__(text)


def _feed(digest: Any, value: bool | int | float | str | None) -> None:
    """Hash a value with its type; a long text slice by slice."""
    if not isinstance(value, str):
        digest.update(f"{value!r},".encode())
        return
    digest.update(f'"{len(value)}'.encode())
    for begin in range(0, len(value), SLICE):
        digest.update(value[begin : begin + SLICE].encode())


class Plan:
    """The shards that are still to do: those of a reader but for the finished ones. `end_row` is how far it has read.

    Args:
        reader: reads the rows of all shards.
        done: first row, end row, digest and number of rejects of every shard that is finished.
        skip: told the rows, the end row and the fraction of every shard that is left out.
    """

    def __init__(
        self,
        reader: Reader,
        done: Mapping[int, tuple[int, int, str, int]],
        skip: Callable[[int, int, float | None], None] | None = None,
    ):
        self.reader, self.done = reader, done
        self.end_row = 0
        self._skip = skip or (lambda rows, end_row, fraction: None)

    def __iter__(self) -> Iterator[ShardRows]:
        """As for Reader.

        Raises:
            ValueError: a finished shard is of another input.
        """
        for rows in self.reader:
            self.end_row = rows.end_row
            if rows.index not in self.done:
                yield rows
                continue
            first_row, end_row, digest, rejected = self.done[rows.index]
            if (first_row, end_row, digest) != (rows.first_row, rows.end_row, rows.digest):
                raise ValueError(
                    f"the output was begun with another input: rows {first_row} to {end_row - 1} are not what they "
                    "were; name another folder, or overwrite it"
                )
            if rejected and self.reader.strict:
                raise BadRowError(f"{rejected} of the rows {first_row} to {end_row - 1} were rejected before")
            self._skip(end_row - first_row, end_row, rows.fraction)
