"""The shards in a folder: their files, what one says of itself, and whether it belongs there with every byte."""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from .checksum import parquet_hash
from .manifest import first_difference, read_manifest
from .passed_columns import PASSED
from .provenance import run_options_in
from .shard_info import PROVENANCE_KEY, REJECTS_KEY, SHARD_KEY, ShardInfo

DATA = "data"
SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")
OTHER_INPUT = "is of another input"


class WrongShardError(ValueError):
    """Why a file is not the shard that belongs in its place; `run_options` of the run it is of, where it is a shard."""

    def __init__(self, reason: str, run_options: dict[str, Any] | None = None):
        super().__init__(reason)
        self.run_options = run_options


@dataclass(frozen=True)
class StoredShard:
    """A shard as it was written: what it says of itself, of the run that made it, and its hash."""

    info: ShardInfo
    made_by: dict[str, Any]
    hash: str
    file: parquet.ParquetFile

    @property
    def run_options(self) -> dict[str, Any]:
        return run_options_in(self.made_by)


def shard_path(folder: Path, index: int) -> Path:
    return folder / DATA / f"part-{index:05d}.parquet"


def shard_files(folder: Path) -> list[tuple[int, Path]]:
    """What stands where shards belong, by number.

    Raises:
        OSError: one is a folder, or cannot be looked at.
    """
    shards = []
    data = folder / DATA
    if not data.is_dir():
        return []
    try:
        paths = list(data.iterdir())
    except OSError as error:
        raise OSError(f"{str(data)!r} cannot be read: {error.strerror or error}") from None
    for path in paths:
        name = SHARD_NAME.fullmatch(path.name)
        if name is None or path != shard_path(folder, int(name[1])):
            continue
        if path.exists() and not path.is_file():
            raise OSError(f"{str(path)!r} is a folder where a shard belongs: move it away")
        shards.append((int(name[1]), path))
    return sorted(shards)


def read_shard(
    path: Path, index: int, run_options: Mapping[str, Any] | None = None, hashes: Sequence[str] | None = None
) -> StoredShard:
    """A shard, once all its bytes are seen to be as they were written.

    Args:
        path, index: the file, and its number.
        run_options: of the run that it must be of; None is any.
        hashes: of all shards of the run; None where they are not known.

    Raises:
        WrongShardError: it is missing, damaged, or not the one that belongs there.
        OSError: it cannot be read, for a reason that may pass.
    """
    try:
        content = _arrow_bytes(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise OSError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
        raise WrongShardError("is missing or damaged") from None
    try:
        digest = parquet_hash(memoryview(content))
        file = parquet.ParquetFile(pa.BufferReader(content))
        metadata = file.metadata.metadata
        info, made_by = ShardInfo(**json.loads(metadata[SHARD_KEY])), json.loads(metadata[PROVENANCE_KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise WrongShardError("is missing or damaged") from None
    shard = StoredShard(info, made_by, digest, file)
    if info.index != index:  # a copy of another shard
        raise WrongShardError("is missing or damaged")
    different = None if run_options is None else first_difference(run_options, shard.run_options)
    if different is not None:
        name, wanted, actual = different
        raise WrongShardError(f"is of another run: its {name} is {actual}, not {wanted}", shard.run_options)
    if hashes is not None and [digest] != list(hashes[index : index + 1]):
        raise WrongShardError("is not what the run wrote")
    return shard


def _arrow_bytes(path: Path) -> pa.Buffer:
    """A file in Arrow's own memory, which its threads may free while Python ends; Python's own must not be."""
    with path.open("rb") as file:
        content = pa.allocate_buffer(os.fstat(file.fileno()).st_size)
        read = file.readinto(memoryview(content))
    return content.slice(0, read)


def rejects_of(path: Path) -> list[dict[str, Any]]:
    """The rejects that a shard carries."""
    return json.loads(parquet.read_metadata(path).metadata[REJECTS_KEY])


def in_order(infos: Sequence[ShardInfo]) -> list[ShardInfo]:
    """Shards by number, as far as they follow one another from the first row on."""
    chain: list[ShardInfo] = []
    for info in sorted(infos, key=lambda info: info.index):
        if info.index != len(chain) or info.first_row != (chain[-1].end_row if chain else 0):
            break
        chain.append(info)
    return chain


def counts(infos: Sequence[ShardInfo]) -> dict[str, int]:
    """Sums over shards."""
    names = ("rows", "rejected", "tokens", "truncated", "unknown")
    totals = {name: sum(getattr(info, name) for info in infos) for name in names}
    return {"input_rows": totals["rows"] + totals["rejected"], **totals, "shards": len(infos)}


def of_other_inputs(shards: Mapping[int, ShardInfo]) -> list[int]:
    """Those that begin with other rows than most."""
    inputs = collections.Counter(shards[index].input_digest for index in sorted(shards))
    return [index for index in shards if shards[index].input_digest != inputs.most_common(1)[0][0]]


def passed_types(schema: pa.Schema) -> tuple[pa.DataType, ...]:
    return tuple(schema.field(name).type for name in PASSED if name in schema.names)


def done_rows(folder: Path) -> int:
    """How many rows of the input the finished shards in a folder stand for, by what they say of themselves."""
    rows = 0
    with contextlib.suppress(OSError):
        manifest = read_manifest(folder)
        if manifest is None or manifest.get("overwriting"):
            return 0
        for _, path in shard_files(folder):
            with contextlib.suppress(pa.ArrowException, OSError, KeyError, TypeError, ValueError):
                metadata = parquet.read_metadata(path).metadata
                if run_options_in(json.loads(metadata[PROVENANCE_KEY])) == manifest["identity"]:
                    info = ShardInfo(**json.loads(metadata[SHARD_KEY]))
                    rows += info.end_row - info.first_row
    return rows
