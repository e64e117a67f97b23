"""Columns of values that are passed through, `id` and `gold_label`: each the narrowest type that holds all its values.

Which type that is only the last row tells: what was written as a narrower one is written again at the end of a run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .lines import SURROGATE
from .shard_info import PROVENANCE_KEY, REJECTS_KEY, SHARD_KEY, WRITTEN_KEY

PASSED = ("id", "gold_label")
TYPES = {"bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64(), "string": pa.string()}
KINDS = {"bool": bool, "int64": int, "float64": float, "string": str}
LETTERS = {type(None): "-", bool: "b", int: "i", float: "f", str: "s"}  # how values were written, in a shard's metadata


class ColumnType:
    """The narrowest type of a column that holds every value that it has seen."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def see(self, value: bool | int | float | str | None) -> None:
        if value is not None:
            exact = not isinstance(value, int) or abs(value) <= 2**53
            self._seen.add(type(value).__name__ if exact else "long")

    @property
    def name(self) -> str:
        if not self._seen or "str" in self._seen or self._seen >= {"float", "long"}:
            return "string"
        if "float" in self._seen:
            return "float64"
        return "bool" if self._seen == {"bool"} else "int64"


def typed(value: bool | int | float | str | None, kind: str) -> bool | int | float | str | None:
    """A value that was passed through as one of its column's type, which is wide enough for it."""
    makes: dict[str, Callable] = {"bool": bool, "int64": int, "float64": float, "string": str}
    return None if value is None else makes[kind](value)


def as_written(value: Any) -> bool | int | float | str | None:
    """A value to be passed through as what a column can hold: what is neither truth value nor number is text, and what
    cannot be written as UTF-8 is escaped in it. No value is a reason to lose a row."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy's numbers, and tensors of a single one
        value = value[()] if isinstance(value, np.ndarray) else value
        if not isinstance(value, np.generic) or value.dtype.kind not in "mM":
            value = value.item()
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own nulls
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value)
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**63 else _in_words(value)
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    text = str.__str__(value) if isinstance(value, str) else _in_words(value)
    if text.isascii() or not SURROGATE.search(text):
        return text
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")  # bytes that were not UTF-8
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace").decode()


def _in_words(value: Any) -> str:
    """str() of any value: dates, decimals, lists; of a number with more digits than Python writes, its hexadecimal."""
    try:
        return str(value)
    except Exception:  # a stranger's __str__
        return hex(value) if isinstance(value, int) else f"<{type(value).__name__}>"


def with_passed(table: pa.Table, name: str, values: Sequence[Any], kind: str) -> pa.Table:
    """A shard's table with a column of values that were passed through, as one type; where the type does not tell how a
    value was written, such as 5 among numbers with decimals, the metadata do, so that it can be widened later on."""
    column = pa.array([typed(value, kind) for value in values], TYPES[kind])
    metadata = {**table.schema.metadata}
    written = json.loads(metadata.get(WRITTEN_KEY, b"{}"))
    written.pop(name, None)
    letters = "".join(LETTERS[type(value)] for value in values)
    if kind != "string" and set(letters) - {LETTERS[type(None)], LETTERS[KINDS[kind]]}:
        written[name] = letters
    metadata[WRITTEN_KEY] = json.dumps(written).encode()
    index = table.schema.get_field_index(name)
    return table.set_column(index, name, column).replace_schema_metadata(metadata)


def widened(table: pa.Table, kinds: Mapping[str, str]) -> pa.Table:
    """A shard's table with columns of values that were passed through as wider types, every value as it was written."""
    written = json.loads(table.schema.metadata.get(WRITTEN_KEY, b"{}"))
    makes = {letter: kind for kind, letter in LETTERS.items()}
    shard_keys = (PROVENANCE_KEY, SHARD_KEY, REJECTS_KEY, WRITTEN_KEY)
    table = table.replace_schema_metadata(
        {key: value for key, value in table.schema.metadata.items() if key in shard_keys}
    )
    for name, kind in kinds.items():
        values = table[name].to_pylist()
        if name in written:
            values = [None if v is None else makes[letter](v) for v, letter in zip(values, written[name], strict=True)]
        table = with_passed(table, name, values, kind)
    return table


def widest(tables: Iterable[pa.Table]) -> dict[str, str]:
    """The types that hold the columns passed through of all shards; those of nulls alone fit any."""
    names = {kind: name for name, kind in TYPES.items()}
    types: dict[str, set[str]] = {}
    for table in tables:
        for name in PASSED:
            if name in table.column_names:
                seen = types.setdefault(name, set())
                column = table[name]
                if column.null_count < len(column):
                    seen.add(names[column.type])
    order = [*TYPES]
    return {name: max(seen, key=order.index) if seen else "string" for name, seen in types.items()}
