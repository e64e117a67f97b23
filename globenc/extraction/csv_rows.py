"""Rows of comma- and tab-separated values, each with a header line."""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any

from .lines import TOO_LONG, Lines, decoded, undecodable
from .raw_rows import RawRow, require_columns

LONGEST_FIELD = 16 << 20  # characters of a CSV field: where a quote is never closed, reading goes on behind this
_ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are no UTF-8, by "surrogateescape"


def csv_rows(lines: Lines, columns: Sequence[str], name: str) -> Iterator[RawRow]:
    """Rows of CSV; its lines come with their ends, which may stand inside of quotes."""
    longest = _allow_long_fields()

    def text(numbered: tuple[int, bytes | bytearray | None]) -> str:
        _, line = numbered
        return "x" * (longest + 1) if line is None else decoded(line)[0]

    records = csv.reader(map(text, lines), strict=True)
    header = _header(name, next((record for record in _records(records) if record[0]), None), columns)
    for record, reason, line in _records(records):
        yield _record(header, record, reason, line, columns)


def tsv_rows(lines: Lines, columns: Sequence[str], name: str) -> Iterator[RawRow]:
    """Rows of TSV. A record is a line; quotes count where they surround a field, and stand for themselves elsewhere."""
    _allow_long_fields()
    header: list[str] | None = None
    for number, line in lines:
        if line is None:
            fields, reason = [], TOO_LONG
        else:
            text, reason = decoded(line)[0], None
            del line
            if text[:1] in "\r\n" and not text.strip("\r\n"):
                continue
            fields = _tab_separated(text)
            del text
        if header is None:
            header = _header(name, (fields, reason, number), columns)
        else:
            yield _record(header, fields, reason, number, columns)
    if header is None:
        _header(name, None, columns)


def _header(name: str, record: tuple[list[str], str | None, int] | None, columns: Sequence[str]) -> list[str]:
    if record is None:
        raise ValueError(f"input {name!r} has no header line with the names of its columns")
    header = record[0]
    require_columns(name, columns, header)
    return header


def _record(header: list[str], record: list[str], reason: str | None, line: int, columns: Sequence[str]) -> RawRow:
    if reason is None and len(record) != len(header):
        reason = f"the row has {len(record)} fields where the header has {len(header)}"
    if reason is not None:
        return RawRow(None, reason, line)
    values = {name: record[header.index(name)] for name in columns}
    for text in values.values():
        bad = None if text.isascii() else _ESCAPED.search(text)
        if bad is not None:
            return RawRow(values, undecodable(ord(bad[0]) - 0xDC00), line)
    return RawRow(values, None, line)


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
