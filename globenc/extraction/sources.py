"""Rows out of files, standard input and Hugging Face data sets, one at a time, with what is wrong about bad ones."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

HUB = "hf://"
LONGEST_LINE = 64 << 20  # bytes; what is longer is no text but a file without line ends
LONGEST_FIELD = 16 << 20  # characters of a CSV field: where a quote is never closed, reading goes on behind this
ROWS_PEEKED = 1000  # looked through for a column that JSON objects may lack
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
_TOO_LONG = f"the line is longer than {LONGEST_LINE >> 20} MiB"
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))


class Raw(NamedTuple):
    """A row as it stands in an input: its values by column, or what is wrong with it; and its line where it has one."""

    values: Mapping[str, Any] | None
    reason: str | None = None
    line: int | None = None


@dataclass
class Input:
    """One input of an extraction.

    Attributes:
        name: file, "-" for standard input, "hf://..." for a data set, "table" or "rows" for what
            comes from Python.
        format: one of FORMATS, "hub", "table" or "rows"; None is to be found out from standard input's first line.
        size: of the file in bytes; None where there is no file.
        given: a table or rows from Python.
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
            "rows": self._mappings,
        }
        try:
            with contextlib.ExitStack() as stack:
                stream: Any = None
                if self.format not in ("hub", "table", "rows"):
                    stream = stack.enter_context(self._open())
                    if self.format is None:
                        stream, self.format = _sniffed(stream)
                yield from reader[str(self.format)](stream, columns)
                self.check_unchanged()
            self.fraction = 1.0
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OSError(f"input {self.name!r} is cut off or damaged: {error}") from error

    def on_disk(self) -> tuple[int, int, int] | None:
        """What tells one version of the file from another; None where there is no file."""
        if self.name == "-" or self.format in ("hub", "table", "rows"):
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

    def _lines(self, stream: IO[bytes], ends: bool = False) -> Iterator[tuple[int, bytes | None]]:
        """Lines with their numbers from 1, with or without line ends; None for one that is too long to be one."""
        for number in itertools.count(1):
            line = stream.readline(LONGEST_LINE)
            if not line:
                return
            if number % 64 == 1 and self.size:
                self.fraction = min(1.0, self._tell() / self.size)
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST_LINE)
                yield number, None
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            yield number, line if ends else line.removesuffix(b"\n").removesuffix(b"\r")

    def _texts(self, stream: IO[bytes]) -> Iterator[tuple[int, str, str | None]]:
        """Lines as text, and what is wrong with a line."""
        for number, line in self._lines(stream):
            if line is None:
                yield number, "", _TOO_LONG
                continue
            try:
                yield number, line.decode(), None
            except UnicodeDecodeError as error:
                yield number, "", _undecodable(error.object[error.start], error.start)

    def _text(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        self._has(columns, ["text"])
        for number, text, reason in self._texts(stream):
            yield Raw({"text": text} if reason is None else None, reason, number)

    def _jsonl(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        return self._looked_through(self._objects(stream), columns)

    def _looked_through(self, rows: Iterator[Raw], columns: Sequence[str]) -> Iterator[Raw]:
        """The same rows, once the columns have been seen in the first of them."""
        first: list[Raw] = []
        missing = list(columns)
        for row in itertools.islice(rows, ROWS_PEEKED):
            first.append(row)
            missing = [name for name in missing if row.values is None or name not in row.values]
            if not missing:
                break
        names = list(dict.fromkeys(name for row in first if row.values is not None for name in row.values))
        if names:
            self._has(columns, names)
        yield from first
        yield from rows

    def _objects(self, stream: IO[bytes]) -> Iterator[Raw]:
        for number, text, reason in self._texts(stream):
            if reason is None and not text.strip():
                continue
            if number == 1 and text.lstrip().startswith("["):
                raise ValueError(
                    f"input {self.name!r} is one JSON array: write one object a line (JSONL), such as jq -c '.[]' does"
                )
            values = None
            if reason is None:
                try:
                    values = json.loads(text)
                except (ValueError, RecursionError) as error:
                    reason = f"malformed JSON: {_short(error)}"
                else:
                    if not isinstance(values, dict):
                        reason = f"the line is a JSON {_kind(values)}, not an object"
            yield Raw(values if reason is None else None, reason, number)

    def _csv(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        longest = max(csv.field_size_limit(), LONGEST_FIELD)
        csv.field_size_limit(longest)
        lines = (b"x" * (longest + 1) if line is None else line for _, line in self._lines(stream, ends=True))
        records = csv.reader((line.decode(errors="surrogateescape") for line in lines), strict=True)
        header = self._header(next((record for record in _records(records) if record[0]), None), columns)
        for record, reason, line in _records(records):
            yield self._record(header, record, reason, line)

    def _tsv(self, stream: IO[bytes], columns: Sequence[str]) -> Iterator[Raw]:
        """A record is a line; quotes count where they surround a whole field, and stand for themselves elsewhere."""
        header: list[str] | None = None
        for number, line in self._lines(stream):
            text = "" if line is None else line.decode(errors="surrogateescape")
            reason = _TOO_LONG if line is None else None
            if reason is None and not text.strip("\r\n"):
                continue
            fields = _tab_separated(text)
            if header is None:
                header = self._header((fields, reason, number), columns)
            else:
                yield self._record(header, fields, reason, number)
        if header is None:
            self._header(None, columns)

    def _header(self, record: tuple[list[str], str | None, int] | None, columns: Sequence[str]) -> list[str]:
        if record is None:
            raise ValueError(f"input {self.name!r} has no header line with the names of its columns")
        header = record[0]
        self._has(columns, header)
        twice = [name for name in columns if header.count(name) > 1]
        if twice:
            raise ValueError(f"input {self.name!r} has several columns {twice[0]!r}")
        return header

    def _record(self, header: list[str], record: list[str], reason: str | None, line: int) -> Raw:
        if reason is None and len(record) != len(header):
            reason = f"the row has {len(record)} fields where the header has {len(header)}"
        if reason is not None:
            return Raw(None, reason, line)
        for text in record:
            bad = next((c for c in text if "\udc80" <= c <= "\udcff"), None) if not text.isascii() else None
            if bad is not None:
                return Raw(None, _undecodable(ord(bad) - 0xDC00), line)
        return Raw(dict(zip(header, record, strict=True)), None, line)

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
            batches = file.iter_batches(batch_size=256, columns=list(columns))
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise OSError(f"input {self.name!r} is damaged behind row {done}: {_short(error)}") from None
                if batch is None:
                    return
                done += batch.num_rows
                self.fraction = done / total
                yield from _arrow_rows(batch)

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
        import pyarrow as pa

        table = pa.table(self.given)
        self._has(columns, table.column_names)
        done = 0
        for batch in table.select(list(columns)).to_batches(max_chunksize=256):
            done += batch.num_rows
            self.fraction = done / table.num_rows
            yield from _arrow_rows(batch)

    def _mappings(self, stream: None, columns: Sequence[str]) -> Iterator[Raw]:
        return self._looked_through((self._mapping(row) for row in self.given), columns)

    def _mapping(self, row: Any) -> Raw:
        if isinstance(row, str | Path):
            raise TypeError(f"inputs must be file names in a list, or rows as mappings; got {row!r} as a row")
        if not isinstance(row, Mapping):
            return Raw(None, f"the row is a {type(row).__name__}, not a mapping from columns to values")
        return Raw(row)

    def _has(self, columns: Sequence[str], present: Sequence[str]) -> None:
        for name in columns:
            if name not in present:
                shown = ", ".join(present[:20]) + (", ..." if len(present) > 20 else "")
                raise ValueError(f"input {self.name!r} has no column {name!r}; its columns are {shown or 'none'}")


def inputs_of(inputs: Any, format_: str | None = None) -> list[Input]:
    """What was given as inputs, looked at but not read.

    Raises:
        OSError, TypeError, ValueError: an input is not there, or its format is not known.
    """
    if format_ is not None and format_ not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}; got {format_!r}")
    if hasattr(inputs, "__arrow_c_stream__"):
        return [Input("table", "table", given=inputs)]
    several = [inputs] if isinstance(inputs, str | Path) else inputs
    if not isinstance(several, Iterable) or isinstance(several, bytes | Mapping):
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
    if path.is_dir():
        raise OSError(f"input {written!r} is a folder: name the files in it")
    if not path.exists():
        raise OSError(f"there is no input {written!r}")
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


def _sniffed(stream: IO[bytes]) -> tuple[Any, str]:
    """Standard input and its format: JSONL where the first line is a JSON object, else plain text."""
    first = stream.readline(LONGEST_LINE)
    try:
        found = isinstance(json.loads(first.removeprefix(b"\xef\xbb\xbf")), dict)
    except (ValueError, RecursionError):
        found = False
    return _Chained(first, stream), "jsonl" if found else "text"


class _Chained(io.RawIOBase):
    """A stream from which a line has been read already."""

    def __init__(self, first: bytes, rest: IO[bytes]):
        self._first: bytes | None = first
        self._rest = rest

    def readline(self, size: int | None = -1) -> bytes:
        first, self._first = self._first, None
        return self._rest.readline(-1 if size is None else size) if first is None else first


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
    try:
        columns = [column.to_pylist() for column in batch.columns]
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield Raw({name: column[i].as_py() for name, column in zip(names, batch.columns, strict=True)})
            except UnicodeDecodeError as error:
                yield Raw(None, _undecodable(error.object[error.start], error.start))
        return
    for values in zip(*columns, strict=True):
        yield Raw(dict(zip(names, values, strict=True)))


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


def _kind(value: Any) -> str:
    """The type of a value in JSON's words."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object" if isinstance(value, Mapping) else type(value).__name__)


def _short(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
