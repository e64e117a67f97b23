"""Rows of what a program gives instead of a file: tables, columns of texts, mappings."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..printing import short
from .column_values import made_by, plain_values
from .raw_rows import RawRow, require_columns, with_columns_seen


def table_rows(table: Any, columns: Sequence[str], name: str, report: Callable[[float], None]) -> Iterator[RawRow]:
    """Rows of an Arrow table or a data frame; `report` is told which part of them has been read."""
    names, column, count = _table_columns(table)
    require_columns(name, columns, names)
    values = {each: column(each) for each in columns}
    for number, row in enumerate(zip(*values.values(), strict=True)):
        if number % 256 == 0:
            report(number / count)
        yield RawRow(dict(zip(values, row, strict=True)))


def column_rows(texts: Any, columns: Sequence[str], name: str) -> Iterator[RawRow]:
    """Rows of a column of texts, called "text" or by its name."""
    title = getattr(texts, "name", None)
    require_columns(name, columns, ["text", title] if isinstance(title, str) and title != "text" else ["text"])
    for text in plain_values(texts):
        yield RawRow(dict.fromkeys(columns, text))


def mapping_rows(given: Any, columns: Sequence[str], name: str) -> Iterator[RawRow]:
    """Rows of mappings, such as dicts or a `datasets.Dataset`."""
    if made_by(given, "datasets") and hasattr(given, "with_format"):
        given = given.with_format(None)  # rows of tensors, tables or frames are no mappings of plain values
    if isinstance(getattr(given, "column_names", None), list) and hasattr(given, "select_columns"):
        require_columns(name, columns, given.column_names)
        given = given.select_columns(list(columns))  # a data set would decode pictures and sounds beside the text
    return with_columns_seen(map(_mapping, given, itertools.count()), columns, name)


def _mapping(row: Any, number: int) -> RawRow:
    if not number and isinstance(row, str | Path):
        raise TypeError(
            f"inputs must be file names in a list, or rows as mappings such as {{'text': ...}}; got "
            f"{short(repr(row), 60)} as a row"
        )
    if not isinstance(row, Mapping):
        return RawRow(None, f"the row is a {type(row).__name__}, not a mapping from columns to values")
    return RawRow(row)


def is_frame(inputs: Any) -> bool:
    """Whether something is a data frame of pandas or Polars."""
    return made_by(inputs, "pandas", "DataFrame") or made_by(inputs, "polars", "DataFrame")


def is_column(inputs: Any) -> bool:
    """Whether something is a single column: of a data frame, a table, a data set, or a numpy array."""
    series = made_by(inputs, "pandas", "Series", "Index") or made_by(inputs, "polars", "Series")
    arrow = made_by(inputs, "pyarrow", "Array", "ChunkedArray")
    if not isinstance(inputs, np.ndarray):
        return series or arrow or made_by(inputs, "datasets", "Column", "IterableColumn")
    if inputs.ndim != 1 or inputs.dtype.names:
        raise TypeError(f"inputs must be a column of texts where it is an array, got one of shape {inputs.shape}")
    return True


def _table_columns(table: Any) -> tuple[list[Any], Callable[[str], Iterator[Any]], int]:
    """The names of a table's columns, what gives the values of one, and the number of rows."""
    if made_by(table, "pyarrow"):
        return table.column_names, lambda name: plain_values(table.column(name)), table.num_rows
    if made_by(table, "pandas"):
        names = [str(name) for name in table.columns]  # they may be whole numbers
        return names, lambda name: plain_values(table.iloc[:, names.index(name)]), len(table)
    return list(table.columns), lambda name: plain_values(table[name]), len(table)
