"""Bytes to lines to text: standard input, lines of any length, bytes that are no UTF-8. And rows of plain text."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from .raw_rows import RawRow, require_columns

LONGEST_LINE = 64 << 20  # bytes; what is longer is no text but a file without line ends
PIECE = 1 << 20  # bytes read at once
MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair, which no valid text holds
TOO_LONG = f"the line is longer than {LONGEST_LINE >> 20} MiB"


def text_rows(lines: Lines, columns: Sequence[str], name: str) -> Iterator[RawRow]:
    """Rows of plain text: every line is a row with the one column "text"."""
    require_columns(name, columns, ["text"])
    for number, line in lines:
        if line is None:
            yield RawRow(None, TOO_LONG, number)
            continue
        text, reason = decoded(line)
        del line
        yield RawRow({"text": text}, reason, number)


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


class Chained(io.RawIOBase):
    """A stream from which a line has been read already."""

    def __init__(self, first: bytes | bytearray, rest: IO[bytes]):
        self._first, self._rest = io.BytesIO(first), rest

    def readline(self, size: int | None = -1) -> bytes:
        line = self._first.readline(size)
        if line:
            return line
        self._first = io.BytesIO()  # it may have been long
        return self._rest.readline(-1 if size is None else size)


class Lines:
    """Lines of a stream with their numbers from 1. None of them is held here while the next one waits: it may be a
    large part of the memory. `look` is told every number."""

    def __init__(self, stream: IO[bytes], ends: bool, look: Callable[[int], None]):
        self._stream, self._ends, self._look, self._number = stream, ends, look, 0

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> tuple[int, bytes | bytearray | None]:
        line = _read_line(self._stream)
        if line is not None and not line:
            raise StopIteration
        self._number += 1
        self._look(self._number)
        if line is not None and self._number == 1 and line.startswith(MARK):
            line = line[len(MARK) :]
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


def decoded(line: bytes | bytearray) -> tuple[str, str | None]:
    """A line as text, with "surrogateescape" for what is no UTF-8, and what is wrong with it. A long one is emptied."""
    reason = None
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        reason = undecodable(line[error.start], error.start)
        text = line.decode(errors="surrogateescape")
    if isinstance(line, bytearray):
        line.clear()
    return text, reason


def undecodable(byte: int, index: int | None = None) -> str:
    """Why a text that holds a byte is none; `index` is where it stands."""
    where = "" if index is None else f" at byte {index}"
    return f"undecodable bytes: 0x{byte:02x}{where} is not UTF-8"
