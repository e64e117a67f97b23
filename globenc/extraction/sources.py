"""What can be read: files, standard input, data sets and what a program gives, each with its format and its state."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..printing import short
from .csv_rows import csv_rows, tsv_rows
from .hub import HUB, hub_parts, hub_rows
from .json_rows import json_rows, sniffed
from .lines import Lines, stdin_stream, text_rows
from .parquet_rows import parquet_rows
from .python_rows import column_rows, is_column, is_frame, mapping_rows, table_rows
from .raw_rows import RawRow

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
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))
GIVEN = ("hub", "table", "texts", "rows")  # formats of what is no file


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

    def rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        """All rows, the good and the bad, in order. Only `columns` need be there."""
        try:
            with contextlib.ExitStack() as stack:
                if self.format in GIVEN:
                    yield from self._given_rows(columns)
                else:
                    yield from self._file_rows(stack.enter_context(self._open()), columns)
                self.check_unchanged()
            self.fraction = 1.0
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise OSError(f"input {self.name!r} is cut off or damaged: {error}") from error

    def _given_rows(self, columns: Sequence[str]) -> Iterator[RawRow]:
        if self.format == "hub":
            return hub_rows(self.name, columns, self._report)
        if self.format == "table":
            return table_rows(self.given, columns, self.name, self._report)
        return (column_rows if self.format == "texts" else mapping_rows)(self.given, columns, self.name)

    def _file_rows(self, stream: Any, columns: Sequence[str]) -> Iterator[RawRow]:
        if self.format is None:
            stream, self.format = sniffed(stream)
        if self.format == "parquet":
            return parquet_rows(stream, columns, self.name, self._report)
        readers = {"jsonl": json_rows, "csv": csv_rows, "tsv": tsv_rows, "text": text_rows}
        lines = Lines(stream, self.format == "csv", self._look)
        return readers[self.format](lines, columns, self.name)

    def _report(self, fraction: float) -> None:
        self.fraction = fraction

    def _look(self, number: int) -> None:
        """At every 64th line, how much of the file has been read."""
        if number % 64 == 1 and self.size:
            self.fraction = min(1.0, self._tell() / self.size)

    def on_disk(self) -> tuple[int, int, int] | None:
        """What tells one version of the file from another; None where there is no file."""
        if self.name == "-" or self.format in GIVEN:
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
    if is_column(inputs):
        return [Input("texts", "texts", given=inputs)]
    if is_frame(inputs):
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
        hub_parts(written)
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
