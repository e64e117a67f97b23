"""Rows of Parquet files, a few in memory at a time."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .column_values import plain_values
from .raw_rows import RawRow, first_line, require_columns

BATCH_ROWS, BATCH_BYTES = 256, 16 << 20  # most of a Parquet file in memory, but for a row that is longer


def parquet_rows(stream: Any, columns: Sequence[str], name: str, report: Callable[[float], None]) -> Iterator[RawRow]:
    """Rows of a Parquet file, gzipped or not; `report` is told which part of them has been read.

    Raises:
        OSError, ValueError: it is no Parquet, damaged, lacks a column, or is standard input.
    """
    import pyarrow as pa
    from pyarrow import parquet

    if name == "-":
        raise ValueError("Parquet cannot be read from standard input: give the file's name")
    with tempfile.TemporaryFile() as unpacked:
        if isinstance(stream, gzip.GzipFile):
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        try:
            file = parquet.ParquetFile(stream)
        except pa.ArrowInvalid as error:
            raise OSError(f"input {name!r} is no Parquet file: {first_line(error)}") from None
        require_columns(name, columns, file.schema_arrow.names)
        total, done = file.metadata.num_rows, 0
        groups = [file.metadata.row_group(k) for k in range(file.metadata.num_row_groups)]
        row = max((group.total_byte_size / max(group.num_rows, 1) for group in groups), default=1)
        at_once = max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(row, 1))))
        batches = file.iter_batches(batch_size=at_once, columns=list(columns), use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"input {name!r} is damaged behind row {done}: {first_line(error)}") from None
            if batch is None:
                return
            done += batch.num_rows
            report(done / total)
            if batch.nbytes > BATCH_BYTES:
                pa.default_memory_pool().release_unused()
            yield from _arrow_rows(batch)
            del batch


def _arrow_rows(batch: Any) -> Iterator[RawRow]:
    names = batch.schema.names
    for row in zip(*map(plain_values, batch.columns), strict=True):
        yield RawRow(dict(zip(names, row, strict=True)))
