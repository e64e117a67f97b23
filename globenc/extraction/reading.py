"""`globenc.load_extract`: the folder of an extraction back as one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from ..errors import warn_caller
from .manifest import MANIFEST, DamagedManifestError, read_manifest
from .passed_columns import widened, widest
from .shard_info import PROVENANCE_KEY, ShardInfo
from .shards import (
    OTHER_INPUT,
    WrongShardError,
    done_rows,
    of_other_inputs,
    passed_types,
    read_shard,
    shard_files,
    shard_path,
)


def load_extract(folder: str | Path, columns: Sequence[str] | None = None, *, incomplete: bool = False) -> pa.Table:
    """Read an extraction back, and check every byte of it on the way.

    Args:
        folder: what `globenc.extract` wrote.
        columns: which columns; None is all of them.
        incomplete: take what is there of a run that has not come to its end, or of one that is damaged; a warning says
            what is left out.

    Returns:
        A pyarrow table, rows in the order of the input: `.to_pandas()`, `polars.from_arrow(...)`, or by name in a
        DuckDB query. `table.schema.metadata[b"globenc"]` says by JSON which model and options made it.

    Raises:
        OSError: the folder holds no extraction, or the manifest or a shard is missing, damaged or of another run.
        ValueError: the extraction is incomplete, or there is no such column.
    """
    path, shown = Path(folder).expanduser(), repr(str(folder))
    advice = "run the same command again to mend it, or load what is there with incomplete=True"
    files = dict(shard_files(path))
    try:
        manifest = read_manifest(path)
    except DamagedManifestError as error:
        if not incomplete or not files:
            raise OSError(f"{error}{f': {advice}' if files else ''}") from None
        manifest = None
    if manifest is None and not files:
        raise OSError(f"{shown} holds no extraction: it has no {MANIFEST}")
    if manifest is None and not incomplete:
        raise OSError(f"{shown} has lost its {MANIFEST}: {advice}")
    if manifest is not None and not manifest["complete"] and not incomplete:
        raise ValueError(
            f"{shown} is incomplete: {done_rows(path):,} rows of the input are done; run the same command "
            "again to finish it, or load what is there with incomplete=True"
        )
    run_options = None if manifest is None else manifest["identity"]
    hashes = manifest["shard_hashes"] if manifest is not None and manifest["complete"] else None
    indices = sorted(files) if hashes is None else range(len(hashes))
    if manifest is not None and manifest.get("overwriting"):
        indices = []
    left_out = {part: "is behind the end" for index, part in files.items() if index not in indices}
    tables: dict[int, pa.Table] = {}
    infos: dict[int, ShardInfo] = {}
    for index in indices:
        part = shard_path(path, index)
        try:
            shard = read_shard(part, index, run_options, hashes)
        except WrongShardError as error:
            if not incomplete:
                raise OSError(f"{str(part)!r} {error}: {advice}") from None
            left_out[part] = str(error)
            continue
        run_options = run_options or shard.run_options
        for name in columns or ():
            if name not in shard.file.schema_arrow.names:
                raise ValueError(f"{shown} has no column {name!r}; its columns are {shard.file.schema_arrow.names}")
        tables[index] = shard.file.read(columns=None if columns is None else list(columns))
        infos[index] = shard.info
    for index in of_other_inputs(infos):
        del tables[index]
        left_out[shard_path(path, index)] = OTHER_INPUT
    if left_out:
        first = min(left_out)
        warn_caller(f"{shown}: {len(left_out)} of its shards are left out, the first: {first.name} {left_out[first]}")
    if not tables:
        raise ValueError(f"{shown} has no finished shard yet")
    if len({passed_types(table.schema) for table in tables.values()}) > 1:  # of an unfinished run
        kinds = widest(tables.values())
        tables = {index: widened(table, kinds) for index, table in tables.items()}
    return pa.concat_tables(
        table.replace_schema_metadata({PROVENANCE_KEY: table.schema.metadata[PROVENANCE_KEY]})
        for table in tables.values()
    )
