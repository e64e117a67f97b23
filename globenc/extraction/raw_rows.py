"""A row as an input gives it, not looked at yet; and the one thing an input must have: the columns that are read."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

ROWS_PEEKED, CHARACTERS_PEEKED = 1000, 4_000_000  # looked through for a column that JSON objects may lack


class RawRow(NamedTuple):
    """A row as it stands in an input: its values by column, or what is wrong with it; and its line where it has one.

    Where values come with a reason, some of them hold bytes that are no UTF-8, as the halves of surrogate pairs that
    Python's "surrogateescape" makes of them; the reason is for where that matters.
    """

    values: Mapping[str, Any] | None
    reason: str | None = None
    line: int | None = None


def require_columns(name: str, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise ValueError where the input of a name lacks one of `columns`, or has it twice."""
    for column in columns:
        if column not in present:
            shown = ", ".join(map(str, present[:20])) + (", ..." if len(present) > 20 else "")
            raise ValueError(f"input {name!r} has no column {column!r}; its columns are {shown or 'none'}")
        if list(present).count(column) > 1:
            raise ValueError(f"input {name!r} has several columns {column!r}")


def with_columns_seen(rows: Iterator[RawRow], columns: Sequence[str], name: str) -> Iterator[RawRow]:
    """The same rows, once the columns have been seen in the first of them.

    Raises:
        ValueError: none of the first rows has a column.
    """
    first, names = _peeked(rows, columns)
    if names:
        require_columns(name, columns, names)
    while first:
        yield first.popleft()
    yield from rows


def _peeked(rows: Iterator[RawRow], columns: Sequence[str]) -> tuple[deque[RawRow], list[str]]:
    """The first rows, until every column has been seen, and the columns in them."""
    first: deque[RawRow] = deque()
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


def first_line(error: BaseException | None) -> str:
    """The first line of another library's error, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
