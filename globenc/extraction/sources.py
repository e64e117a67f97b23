"""Rows out of files, standard input and Hugging Face data sets, one at a time, with what is wrong about bad ones."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from ..errors import short

HUB = "hf://"
LONGEST_LINE = 64 << 20  # bytes; what is longer is no text but a file without line ends
LONGEST_FIELD = 16 << 20  # characters of a CSV field: where a quote is never closed, reading goes on behind this
PIECE = 1 << 20  # bytes read at once, and of a text in JSON that are decoded at once
ROWS_PEEKED, CHARACTERS_PEEKED = 1000, 4_000_000  # looked through for a column that JSON objects may lack
BATCH_ROWS, BATCH_BYTES = 256, 16 << 20  # most of a Parquet file in memory, but for a row that is longer
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".log": "text",
}
_MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
_BLANK = object()
_CONTROL = re.compile(rb"[\x00-\x1f]")
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, by "surrogateescape"
_TOO_LONG = f"the line is longer than {LONGEST_LINE >> 20} MiB"
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))


class Raw(NamedTuple):
    """A row as it stands in an input: its values by column, or what is wrong with it; and its line where it has one.

    Where values come with a reason, some of them hold bytes that are no UTF-8, as the halves of surrogate pairs that
    Python's "surrogateescape" makes of them; the reason is for where that matters.
    """

    values: Mapping[str, Any] | None
    reason: str | None = None
    line: int | None = None


@dataclass
class Input:
    """One input of an extraction.

    Attributes:
        name: file, "-" for standard input, "hf://..." for a data set, "table", "texts" or "rows" for what
            comes from Python.
        format: one of FORMATS, "hub", "table", "texts" or "rows"; None is to be found out from standard input's first
            line.
        size: of the file in bytes; None where there is no file.
        given: a table, a column of texts or rows from Python.
        fraction: how much of it has been read, 0 to 1; None where that is not known.
        path: the file with the bytes, if it is not that of the name.
    """

    name: str
    format: str | None
    size: int | None = None
    given: Any = field(default=None, repr=False)
    fraction: float | None = None
    path: str | None = None
    _opened: tuple[IO[bytes], os.stat_result] | None = field(default=None, init=False, repr=False, compare=False)

    def check(self, columns: Sequence[str]) -> None:
        """Open it, and see whether it has the columns.

        Raises:
            OSError, ValueError: it cannot be read, or lacks a column.
        """
        if self.name != "-" and not isinstance(self.given, Iterator):
            next(self.rows(columns), None)
            self.fraction = None

    def rows(self, columns: Sequence[str]) -> Iterator[Raw]:
        """All rows, the good and the bad, in order. Only `columns` need be there."""
        reader = {
            "jsonl": self._jsonl,
            "csv": self._csv,
            "tsv": self._tsv,
            "text": self._text,
            "parquet": self._parquet,
            "hub": self._hub,
            "table": self._table,
            "texts": self._column,
            "rows": self._mappings,
        }
        try:
            with contextlib.ExitStack() as stack:
                stream: Any = None
                if self.format not in ("hub", "table", "texts", "rows"):
                    stream = stack.enter_context(self._open())
                    if self.format is None:
                        stream, self.format = self._sniffed(stream)
                yield from reader[str(self.format)](stream, columns)
                self.check_unchanged()
            self.fraction = 1.0
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OSError(f"input {self.name!r} is cut off or damaged: {error}") from error

    def on_disk(self) -> tuple[int, int, int] | None:
        """What tells one version of the file from another; None where there is no file."""
        if self.name == "-" or self.format in ("hub", "table", "texts", "rows"):
            return None
        try:
            status = os.stat(self.name)
        except OSError:
            return None
        return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None

    def check_unchanged(self) -> None:
        """See that an open file is still what it was when it was opened. One that another file was put in the place of
        is: this one is read on.

        Raises:
            OSError: it was written to.
        """
        if self._opened is None:
            return
        stream, then = self._opened
        now = os.fstat(stream.fileno())
        # the status time tells of a writer who restores the time of writing; but taking away a name changes it too
        renamed = now.st_nlink != then.st_nlink
        if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns) or (
            now.st_ctime_ns != then.st_ctime_ns and not renamed
        ):
            raise OSError(
                f"input {self.name!r} was changed while it was read, and rows of two versions are not to be mixed: run "
                "again once it is at rest, which compares it with all rows that are done, or read a copy"
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[Any]:
        """The bytes, unpacked where they are gzip."""
        with contextlib.ExitStack() as stack:
            raw: IO[bytes]
            if self.name == "-" and self.path is None:
                raw = stdin_stream()
                peeked = raw.peek(2)[:2] if hasattr(raw, "peek") else b""
            else:
                try:
                    raw = stack.enter_context(open(self.path or self.name, "rb"))
                except OSError as error:
                    raise OSError(f"input {self.name!r} cannot be read: {error.strerror}") from None
                status = os.fstat(raw.fileno())
                if stat.S_ISREG(status.st_mode):
                    if self.size not in (None, status.st_size):
                        raise OSError(
                            f"input {self.name!r} was changed since the run began: it had {self.size} bytes and now "
                            f"has {status.st_size}; run again once it is at rest"
                        )
                    self._opened = raw, status
                    stack.callback(setattr, self, "_opened", None)
                peeked = raw.read(2)
                raw.seek(0)
            self._tell: Callable[[], int] = raw.tell
            stack.callback(delattr, self, "_tell")
            if peeked == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield unpacked
                return
            if peeked in (b"\xff\xfe", b"\xfe\xff"):
                raise ValueError(f"input {self.name!r} is UTF-16 text: save it as UTF-8")
            yield raw

    def _lines(self, stream: IO[bytes], ends: bool = False) -> Iterator[tuple[int, bytes | bytearray | None]]:
        """Lines with their numbers from 1, with or without line ends; None for one that is too long to be one."""

        def look(number: int) -> None:
            if number % 64 == 1 and self.size:
                self.fraction = min(1.0, self._tell() / self.size)

        return _Lines(stream, ends, look)

    def _text(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        self._has(columns, ["text"])
        for number, line in self._lines(stream):
            if line is None:
                yield Raw(None, _TOO_LONG, number)
                continue
            text, reason = _decoded(line)
            del line
            yield Raw({"text": text}, reason, number)

    def _jsonl(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        return self._looked_through(self._objects(stream, columns), columns)

    def _looked_through(self, rows: Iterator[Raw], columns: Sequence[str]) -> Iterator[Raw]:
        """The same rows, once the columns have been seen in the first of them."""
        first, names = _peeked(rows, columns)
        if names:
            self._has(columns, names)
        while first:
            yield first.popleft()
        yield from rows

    def _objects(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        for number, line in self._lines(stream):
            if line is None:
                yield Raw(None, _TOO_LONG, number)
                continue
            if number == 1 and re.match(rb"\s*\[", line):
                raise ValueError(
                    f"input {self.name!r} is one JSON array: write one object a line (JSONL), such as jq -c '.[]' does"
                )
            if not line:
                continue
            values, reason = _json(line, columns)
            del line
            if values is _BLANK:
                continue
            if isinstance(values, dict):
                yield Raw(values, reason, number)
            else:
                yield Raw(None, reason or f"the line is a JSON {_kind(values)}, not an object", number)

    def _sniffed(self, stream: IO[bytes]) -> tuple[Any, str]:
        """Standard input and its format: JSONL where the first line is a JSON object, else plain text."""
        first = bytearray(stream.readline(min(PIECE, LONGEST_LINE)))
        while len(first) < LONGEST_LINE and not first.endswith(b"\n"):
            piece = stream.readline(min(PIECE, LONGEST_LINE - len(first)))
            if not piece:
                break
            first += piece
        chained = _Chained(first, stream)
        found, _ = _json(first.removeprefix(_MARK), [])
        return chained, "jsonl" if isinstance(found, dict) else "text"

    def _csv(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        longest = _allow_long_fields()

        def text(numbered: tuple[int, bytes | bytearray | None]) -> str:
            _, line = numbered
            return "x" * (longest + 1) if line is None else _decoded(line)[0]

        records = csv.reader(map(text, self._lines(stream, ends=True)), strict=True)
        header = self._header(next((record for record in _records(records) if record[0]), None), columns)
        for record, reason, line in _records(records):
            yield self._record(header, record, reason, line, columns)

    def _tsv(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        """A record is a line; quotes count where they surround a whole field, and stand for themselves elsewhere."""
        _allow_long_fields()
        header: list[str] | None = None
        for number, line in self._lines(stream):
            if line is None:
                fields, reason = [], _TOO_LONG
            else:
                text, reason = _decoded(line)[0], None
                del line
                if text[:1] in "\r\n" and not text.strip("\r\n"):
                    continue
                fields = _tab_separated(text)
                del text
            if header is None:
                header = self._header((fields, reason, number), columns)
            else:
                yield self._record(header, fields, reason, number, columns)
        if header is None:
            self._header(None, columns)

    def _header(self, record: tuple[list[str], str | None, int] | None, columns: Sequence[str]) -> list[str]:
        if record is None:
            raise ValueError(f"input {self.name!r} has no header line with the names of its columns")
        header = record[0]
        self._has(columns, header)
        return header

    def _record(
        self, header: list[str], record: list[str], reason: str | None, line: int, columns: Sequence[str]
    ) -> Raw:
        if reason is None and len(record) != len(header):
            reason = f"the row has {len(record)} fields where the header has {len(header)}"
        if reason is not None:
            return Raw(None, reason, line)
        values = {name: record[header.index(name)] for name in columns}
        for text in values.values():
            bad = None if text.isascii() else _ESCAPED.search(text)
            if bad is not None:
                return Raw(values, _undecodable(ord(bad[0]) - 0xDC00), line)
        return Raw(values, None, line)

    def _parquet(self, stream: Any, columns: Sequence[str]) -> Iterator[Raw]:
        import pyarrow as pa
        from pyarrow import parquet

        if self.name == "-":
            raise ValueError("Parquet cannot be read from standard input: give the file's name")
        with tempfile.TemporaryFile() as unpacked:
            if isinstance(stream, gzip.GzipFile):
                shutil.copyfileobj(stream, unpacked)
                stream = unpacked
            try:
                file = parquet.ParquetFile(stream)
            except pa.ArrowInvalid as error:
                raise OSError(f"input {self.name!r} is no Parquet file: {_short(error)}") from None
            self._has(columns, file.schema_arrow.names)
            total, done = file.metadata.num_rows, 0
            groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
            row = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
            at_once = max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(row, 1))))
            batches = file.iter_batches(batch_size=at_once, columns=list(columns), use_threads=False)
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise OSError(f"input {self.name!r} is damaged behind row {done}: {_short(error)}") from None
                if batch is None:
                    return
                done += batch.num_rows
                self.fraction = done / total
                if batch.nbytes > BATCH_BYTES:
                    pa.default_memory_pool().release_unused()
                yield from _arrow_rows(batch)
                del batch

    def _hub(self, stream: None, columns: Sequence[str]) -> Iterator[Raw]:
        dataset, total = _hub_dataset(self.name)
        if dataset.column_names is not None:
            self._has(columns, dataset.column_names)
            dataset = dataset.select_columns(list(columns))
        rows, number = iter(dataset), -1
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # as above
                raise OSError(f"data set {self.name!r} broke off behind row {number}: {_short(error)}") from error
            if row is None:
                return
            number += 1
            if not number and dataset.column_names is None:
                self._has(columns, list(row))
            if total:
                self.fraction = min(1.0, number / total)
            yield Raw(row)

    def _table(self, stream: None, columns: Sequence[str]) -> Iterator[Raw]:
        names, column, count = _table_columns(self.given)
        self._has(columns, names)
        values = {name: column(name) for name in columns}
        for number, row in enumerate(zip(*values.values(), strict=True)):
            if number % 256 == 0:
                self.fraction = number / count
            yield Raw(dict(zip(values, row, strict=True)))

    def _column(self, stream: None, columns: Sequence[str]) -> Iterator[Raw]:
        own = getattr(self.given, "name", None)
        self._has(columns, ["text", own] if isinstance(own, str) and own != "text" else ["text"])
        for text in _plain_values(self.given):
            yield Raw(dict.fromkeys(columns, text))

    def _mappings(self, stream: None, columns: Sequence[str]) -> Iterator[Raw]:
        given = self.given
        if _made_by(given, "datasets") and hasattr(given, "with_format"):
            given = given.with_format(None)  # rows of tensors, tables or frames are no mappings of plain values
        if isinstance(getattr(given, "column_names", None), list) and hasattr(given, "select_columns"):
            self._has(columns, given.column_names)
            given = given.select_columns(list(columns))  # a data set would decode pictures and sounds beside the text
        return self._looked_through(map(self._mapping, given, itertools.count()), columns)

    def _mapping(self, row: Any, number: int) -> Raw:
        if not number and isinstance(row, str | Path):
            raise TypeError(
                f"inputs must be file names in a list, or rows as mappings such as {{'text': ...}}; got "
                f"{short(repr(row), 60)} as a row"
            )
        if not isinstance(row, Mapping):
            return Raw(None, f"the row is a {type(row).__name__}, not a mapping from columns to values")
        return Raw(row)

    def _has(self, columns: Sequence[str], present: Sequence[str]) -> None:
        for name in columns:
            if name not in present:
                shown = ", ".join(map(str, present[:20])) + (", ..." if len(present) > 20 else "")
                raise ValueError(f"input {self.name!r} has no column {name!r}; its columns are {shown or 'none'}")
            if list(present).count(name) > 1:
                raise ValueError(f"input {self.name!r} has several columns {name!r}")


def inputs_of(inputs: Any, format_: str | None = None) -> list[Input]:
    """What was given as inputs, looked at but not read.

    Raises:
        OSError, TypeError, ValueError: an input is not there, or its format is not known.
    """
    if format_ is not None and format_ not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format_!r}")
    if isinstance(inputs, Mapping):
        named = ", ".join(map(str, itertools.islice(inputs, 5)))
        raise TypeError(
            f"inputs must be file names, rows as mappings or a table, got a {type(inputs).__name__} of {short(named)}: "
            "give one of its values, or make a data frame of its columns"
        )
    if _is_column(inputs):
        return [Input("texts", "texts", given=inputs)]
    if _is_frame(inputs):
        return [Input("table", "table", given=inputs)]
    if hasattr(inputs, "__arrow_c_stream__"):
        import pyarrow as pa

        return [Input("table", "table", given=pa.table(inputs))]  # at once: it may come only once
    several = [inputs] if isinstance(inputs, str | Path) else inputs
    if not isinstance(several, Iterable) or isinstance(several, bytes):
        raise TypeError(f"inputs must be a file name, a list of them or rows as mappings, got {type(inputs).__name__}")
    if isinstance(several, list | tuple) and not (several and isinstance(several[0], Mapping)):
        if not several:
            raise ValueError("inputs is an empty list: give at least one file")
        if sum(str(name) == "-" for name in several) > 1:
            raise ValueError("inputs names standard input (-) more than once")
        return [_input(name, format_) for name in several]
    return [Input("rows", "rows", given=several)]


def _input(name: Any, format_: str | None) -> Input:
    if not isinstance(name, str | Path):
        raise TypeError(f"an input must be a file name, got {type(name).__name__}")
    written = str(name)
    if written == "-":
        return Input(written, format_)
    if written.startswith(HUB):
        _hub_parts(written)
        return Input(written, "hub")
    if "://" in written:
        raise ValueError(f"input {written!r}: only files and {HUB} data sets can be read; fetch it first")
    path = Path(written).expanduser()
    try:
        there = path.exists()
    except (OSError, ValueError):  # too long to be a name
        there = False
    if there and path.is_dir():
        raise OSError(f"input {written!r} is a folder: name the files in it")
    if not there:
        texts = "; texts themselves are rows such as {'text': ...}" if " " in written else ""
        raise OSError(f"there is no input {short(written)!r}{texts}")
    endings = [ending.lower() for ending in path.suffixes]
    ending = next((e for e in reversed(endings) if e not in (".gz", ".gzip")), "")
    chosen = format_ or ENDINGS.get(ending)
    if chosen is None:
        raise ValueError(
            f"input {written!r}: the format of a file that ends in {ending or 'nothing'!r} is not known; say which it "
            f"is with format ({', '.join(FORMATS)})"
        )
    return Input(str(path), chosen, path.stat().st_size if path.is_file() else None)


def stdin_stream() -> Any:
    """The bytes of standard input.

    Raises:
        OSError: it is closed.
    """
    if sys.stdin is None:
        raise OSError("standard input is closed")
    try:
        # not sys.stdin.buffer: a thread that waits in it for a line would keep Python from ending
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except (OSError, ValueError):  # replaced by something that is no file
        return sys.stdin.buffer


class _Chained(io.RawIOBase):
    """A stream from which a line has been read already."""

    def __init__(self, first: bytes | bytearray, rest: IO[bytes]):
        self._first, self._rest = io.BytesIO(first), rest

    def readline(self, size: int | None = -1) -> bytes:
        line = self._first.readline(size)
        if line:
            return line
        self._first = io.BytesIO()  # it may have been long
        return self._rest.readline(-1 if size is None else size)


class _Lines:
    """Lines of a stream with their numbers from 1. None of them is held here while the next one waits: it may be a
    large part of the memory. `look` is told every number."""

    def __init__(self, stream: IO[bytes], ends: bool, look: Callable[[int], None]):
        self._stream, self._ends, self._look, self._number = stream, ends, look, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> tuple[int, bytes | bytearray | None]:
        line = _read_line(self._stream)
        if line is not None and not line:
            raise StopIteration
        self._number += 1
        self._look(self._number)
        if line is not None and self._number == 1 and line.startswith(_MARK):
            line = line[len(_MARK) :]
        if line is not None and not self._ends:
            line = _without_end(_without_end(line, b"\n"), b"\r")
        return self._number, line


def _without_end(line: bytes | bytearray, end: bytes) -> bytes | bytearray:
    if not line.endswith(end):
        return line
    if isinstance(line, bytes):
        return line[: -len(end)]
    del line[-len(end) :]
    return line


def _read_line(stream: IO[bytes]) -> bytes | bytearray | None:
    """The next line, a long one as a bytearray; empty at the end, None for one that is too long to be one."""
    at_once = min(PIECE, LONGEST_LINE)
    line = stream.readline(at_once)
    if len(line) < at_once or line.endswith(b"\n"):
        return line
    whole = bytearray(line)
    while len(whole) < LONGEST_LINE:
        line = stream.readline(min(PIECE, LONGEST_LINE - len(whole)))
        whole += line
        if not line.endswith(b"\n") and len(line) == PIECE:
            continue
        if not line or line.endswith(b"\n"):
            return whole
    del whole
    while line and not line.endswith(b"\n"):
        line = stream.readline(PIECE)
    return None


def _decoded(line: bytes | bytearray) -> tuple[str, str | None]:
    """A line as text, with "surrogateescape" for what is no UTF-8, and what is wrong with it. A long one is emptied."""
    reason = None
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        reason = _undecodable(line[error.start], error.start)
        text = line.decode(errors="surrogateescape")
    if isinstance(line, bytearray):
        line.clear()
    return text, reason


def _json(line: bytes | bytearray, columns: Sequence[str]) -> tuple[Any, str | None]:
    """A line of JSON, _BLANK if there is nothing in it, and what is wrong with it; of an object only `columns` are sure
    to be whole. A long line is emptied."""
    reason: str | None = None
    texts: dict[str, bytearray] = {}
    try:
        if isinstance(line, bytearray):
            line, texts = _without_long_texts(line)
        text, reason = _decoded(line)
        if text.isspace():
            return _BLANK, None
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of more digits than Python reads
            values = json.loads(text, parse_int=_whole_number)
        if texts and isinstance(values, dict):
            values.update({name: _with_texts(values[name], texts) for name in columns if name in values})
    except UnicodeDecodeError as error:
        return None, _undecodable(error.object[error.start])
    except json.JSONDecodeError as error:
        # the places in a line that was taken apart are not those of the line
        return None, reason or f"malformed JSON: {error.msg if texts else error}"
    except (ValueError, RecursionError) as error:
        return None, reason or f"malformed JSON: {_short(error)}"
    return values, reason


def _whole_number(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


def _without_long_texts(line: bytearray) -> tuple[bytes, dict[str, bytearray]]:
    """JSON with a name for every long text in it, and these texts by name, still as JSON: Python's reader would copy
    the whole line several times, at up to four bytes a character. The line is emptied."""
    prefix, kept = uuid.uuid4().hex, 0
    parts: list[bytes | bytearray] = []
    texts: dict[str, bytearray] = {}
    start = line.find(b'"')
    while start >= 0:
        end = line.find(b'"', start + 1)
        while end >= 0 and _backslashes_before(line, end) % 2:
            end = line.find(b'"', end + 1)
        if end < 0:
            break
        if end - start > PIECE:
            name = f"{prefix}{len(texts)}"
            parts += [line[kept : start + 1], name.encode()]
            texts[name] = line[start + 1 : end]
            kept = end
        start = line.find(b'"', end + 1)
    rest = bytes(line[kept:])
    line.clear()
    return b"".join([*parts, rest]), texts


def _backslashes_before(line: bytearray, end: int) -> int:
    found, some = 0, 16
    while True:
        before = line[max(0, end - found - some) : end - found]
        run = len(before) - len(before.rstrip(b"\\"))
        found += run
        if run < some:
            return found
        some = PIECE


def _with_texts(value: Any, texts: dict[str, bytearray]) -> Any:
    """A JSON value with its long texts in their places."""
    if isinstance(value, str):
        return _unescaped(texts.pop(value)) if value in texts else value
    if isinstance(value, list):
        return [_with_texts(item, texts) for item in value]
    if isinstance(value, dict):
        return {name: _with_texts(item, texts) for name, item in value.items()}
    return value


def _unescaped(text: bytearray) -> str:
    """What stands between the quotes of JSON as a text, piece by piece; it is emptied."""
    if b"\\" not in text:
        if _CONTROL.search(text):
            raise ValueError("Invalid control character")
        return _strict(text)
    plain, begin = bytearray(), 0
    while begin < len(text):
        for end in range(begin + PIECE, begin + PIECE + 13):  # an escape, or two of a pair, may be at the cut
            try:
                piece = json.loads(b'"' + text[begin:end] + b'"')
            except ValueError:
                if end >= len(text) or end == begin + PIECE + 12:
                    raise  # it is not the cut
                continue
            if end >= len(text) or not "\ud800" <= piece[-1] <= "\udbff":
                break
        plain += piece.encode(errors="surrogatepass")
        begin = end
    text.clear()
    return _strict(plain)


def _strict(text: bytearray) -> str:
    decoded = text.decode(errors="surrogatepass")
    text.clear()
    return decoded


def _allow_long_fields() -> int:
    """Let Python's CSV reader take fields of LONGEST_FIELD characters."""
    longest = max(csv.field_size_limit(), LONGEST_FIELD)
    csv.field_size_limit(longest)
    return longest


def _records(reader: Any) -> Iterator[tuple[list[str], str | None, int]]:
    """CSV records with their first line; blank lines are none."""
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" (lines {line} to {reader.line_num})" if reader.line_num > line else ""
            yield [], f"malformed CSV: {error}{lines}", line
            continue
        if record:
            yield record, None, line


def _tab_separated(line: str) -> list[str]:
    if '"' in line:
        with contextlib.suppress(csv.Error):
            return next(csv.reader([line], delimiter="\t", strict=True), [])
    return line.split("\t")


def _arrow_rows(batch: Any) -> Iterator[Raw]:
    names = batch.schema.names
    for row in zip(*map(_plain_values, batch.columns), strict=True):
        yield Raw(dict(zip(names, row, strict=True)))


def _plain_values(column: Any) -> Iterator[Any]:
    """The values of a column of pandas, Polars, Arrow or numpy, as Python has them, one at a time."""
    import pyarrow as pa

    if _made_by(column, "pandas"):
        try:
            column = pa.array(column, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # values of several types
            for value in column:
                yield None if isinstance(value, float) and value != value else value
            return
    if not _made_by(column, "pyarrow"):
        yield from column
        return
    if str(getattr(column.type, "extension_name", "")).startswith("pandas."):  # Arrow has only the numbers behind them
        for value in column.to_pandas():
            yield None if value is None or value != value else str(value)
        return
    for array in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        for begin in range(0, len(array), BATCH_ROWS):
            part = array.slice(begin, BATCH_ROWS)
            yield from (_strings if part.type in (pa.string(), pa.large_string()) else _scalars)(part)


def _strings(array: Any) -> Iterator[str | bytes | None]:
    """The texts of an Arrow array, without the copy that its scalars are; bytes where they are no UTF-8."""
    _, places, content = array.buffers()
    offsets = np.frombuffer(places, np.int32 if array.type == "string" else np.int64)
    ends = offsets[array.offset : array.offset + len(array) + 1].tolist()
    data = memoryview(content or b"")
    for valid, begin, end in zip(array.is_valid().to_pylist(), ends, ends[1:], strict=False):
        try:
            yield str(data[begin:end], "utf-8") if valid else None
        except UnicodeDecodeError:
            yield bytes(data[begin:end])


def _scalars(array: Any) -> Iterator[Any]:
    import pyarrow as pa

    for scalar in array:
        try:
            yield scalar.as_py()
        except UnicodeDecodeError as error:
            yield _Unreadable(f"<{scalar.type}>") if pa.types.is_nested(scalar.type) else bytes(error.object)
        except Exception:  # what Python has no value for, such as nanoseconds
            try:
                yield _Unreadable(scalar.cast(pa.string()).as_py())
            except pa.ArrowException:
                yield _Unreadable(f"<{scalar.type}>")


class _Unreadable:
    """What Python has no value for, in Arrow's words: it can be passed through, and is no text."""

    def __init__(self, words: str):
        self._words = words

    def __str__(self) -> str:
        return self._words


def _made_by(value: Any, library: str, *names: str) -> bool:
    """Whether a value is of a class of a library, or derived from one of these names; the library need not be here."""
    return any(
        kind.__module__.partition(".")[0] == library and (not names or kind.__name__ in names)
        for kind in type(value).__mro__
    )


def _is_frame(inputs: Any) -> bool:
    return _made_by(inputs, "pandas", "DataFrame") or _made_by(inputs, "polars", "DataFrame")


def _is_column(inputs: Any) -> bool:
    """Whether something is a single column: of a data frame, a table, a data set, or a numpy array."""
    series = _made_by(inputs, "pandas", "Series", "Index") or _made_by(inputs, "polars", "Series")
    arrow = _made_by(inputs, "pyarrow", "Array", "ChunkedArray")
    if not isinstance(inputs, np.ndarray):
        return series or arrow or _made_by(inputs, "datasets", "Column", "IterableColumn")
    if inputs.ndim != 1 or inputs.dtype.names:
        raise TypeError(f"inputs must be a column of texts where it is an array, got one of shape {inputs.shape}")
    return True


def _table_columns(table: Any) -> tuple[list[Any], Callable[[str], Iterator[Any]], int]:
    """The names of a table's columns, what gives the values of one, and the number of rows."""
    if _made_by(table, "pyarrow"):
        return table.column_names, lambda name: _plain_values(table.column(name)), table.num_rows
    if _made_by(table, "pandas"):
        names = [str(name) for name in table.columns]  # they may be whole numbers
        return names, lambda name: _plain_values(table.iloc[:, names.index(name)]), len(table)
    return list(table.columns), lambda name: _plain_values(table[name]), len(table)


def _hub_parts(name: str) -> tuple[str, dict[str, str]]:
    """The path of hf://PATH?split=...&name=...&revision=..., and its options."""
    parts = urlsplit(name)
    path = (parts.netloc + parts.path).rstrip("/")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - {"split", "name", "revision"})
    if not path or unknown:
        wrong = f"has the unknown option {unknown[0]!r}" if unknown else "names no data set"
        raise ValueError(f"input {name!r} {wrong}: write hf://OWNER/DATASET?split=train, with name= and revision= too")
    return path, options


def _hub_dataset(name: str) -> tuple[Any, int | None]:
    """A data set as a stream of rows, and how many it has where that is known."""
    import datasets

    path, options = _hub_parts(name)
    split = options.get("split")
    tries = [(path, options.get("name"))]
    if "name" not in options and not Path(path).exists() and path.count("/") in (1, 2):
        tries.append((path.rpartition("/")[0], path.rpartition("/")[2]))  # hf://glue/sst2 is configuration sst2 of glue
    load: Callable = datasets.load_dataset
    failure: Exception | None = None
    for repository, configuration in tries:
        try:
            found = load(
                repository, configuration, split=split, revision=options.get("revision") or None, streaming=True
            )
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
            failure = failure or error
            continue
        except Exception as error:  # what the hub, its files and their readers raise has no common type
            raise OSError(f"data set {name!r} cannot be loaded: {_short(error)}") from error
        if isinstance(found, Mapping):
            raise ValueError(f"data set {name!r} has the splits {', '.join(found)}: choose one with ?split=")
        info = (found.info.splits or {}).get(split) if split else None
        return found, info.num_examples or None if info is not None else None
    raise OSError(f"data set {name!r} is neither here nor on the Hugging Face hub: {_short(failure)}") from failure


def _undecodable(byte: int, place: int | None = None) -> str:
    where = "" if place is None else f" at byte {place}"
    return f"undecodable bytes: 0x{byte:02x}{where} is not UTF-8"


def _peeked(rows: Iterator[Raw], columns: Sequence[str]) -> tuple[deque[Raw], list[str]]:
    """The first rows, until every column has been seen, and the columns in them."""
    first: deque[Raw] = deque()
    names: dict[str, None] = {}
    missing, characters = list(columns), 0
    for row in itertools.islice(rows, ROWS_PEEKED):
        first.append(row)
        if row.values is not None:
            names.update(dict.fromkeys(row.values))
            missing = [name for name in missing if name not in names]
            characters += sum(len(value) for value in row.values.values() if isinstance(value, str))
        if not missing or characters >= CHARACTERS_PEEKED:
            break
    return first, list(names)


def _kind(value: Any) -> str:
    """The type of a value in JSON's words."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object" if isinstance(value, Mapping) else type(value).__name__)


def _short(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
