"""The values of a column of pandas, Polars, Arrow or numpy as Python has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

ROWS_AT_ONCE = 256  # of a column in Python's own objects


def made_by(value: Any, library: str, *names: str) -> bool:
    """Whether a value is of a class of a library, or derived from one of these names; the library need not be here."""
    return any(
        kind.__module__.partition(".")[0] == library and (not names or kind.__name__ in names)
        for kind in type(value).__mro__
    )


def plain_values(column: Any) -> Iterator[Any]:
    """The values of a column of pandas, Polars, Arrow or numpy, as Python has them, one at a time."""
    import pyarrow as pa

    if made_by(column, "pandas"):
        try:
            column = pa.array(column, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # values of several types
            for value in column:
                yield None if isinstance(value, float) and value != value else value
            return
    if not made_by(column, "pyarrow"):
        yield from column
        return
    if str(getattr(column.type, "extension_name", "")).startswith("pandas."):  # Arrow has only the numbers behind them
        for value in column.to_pandas():
            yield None if value is None or value != value else str(value)
        return
    for array in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
        for begin in range(0, len(array), ROWS_AT_ONCE):
            part = array.slice(begin, ROWS_AT_ONCE)
            yield from (_strings if part.type in (pa.string(), pa.large_string()) else _scalars)(part)


def _strings(array: Any) -> Iterator[str | bytes | None]:
    """The texts of an Arrow array, without the copy that its scalars are; bytes where they are no UTF-8."""
    _, offset_bytes, content = array.buffers()
    offsets = np.frombuffer(offset_bytes, np.int32 if array.type == "string" else np.int64)
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
