"""The folder of an extraction: its lock, its manifest, its shards (whole or not at all) and its rejects."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import parquet

from .worker import IDENTITY_KEY, PASSED, REJECTS_KEY, SHARD_KEY, TYPES, ShardInfo, shard_bytes, widened, widest

FORMAT = "globenc-extract-1"
MANIFEST, REJECTS, DATA, LOCK, CARD = "manifest.json", "rejects.jsonl", "data", ".lock", "README.md"
_OWN = {MANIFEST, REJECTS, DATA, LOCK, CARD}


class Store:
    """A folder that one run writes at a time; use `opened`.

    Attributes:
        folder: the folder.
        manifest: what manifest.json holds; None where there is none yet.
        shards: the finished shards by number.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict[str, Any] | None = None
        self.shards: dict[int, ShardInfo] = {}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, output: str | Path) -> Iterator[Store]:
        """The folder, made where it is not there, and locked against other runs; a new one that is still empty at the
        end goes away.

        Raises:
            OSError: it cannot be written to, another run writes it, or it holds other things.
        """
        folder = Path(output).expanduser()
        shown = str(folder)
        if folder.exists() and not folder.is_dir():
            raise OSError(f"output {shown!r} is a file: name a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / LOCK)
            lock.acquire(timeout=0)
        except Timeout:
            raise OSError(f"output {shown!r} is being written by another run: wait for it, or stop it") from None
        except OSError as error:
            raise OSError(f"output {shown!r} cannot be written to: {error.strerror or error}") from None
        store = cls(folder)
        try:
            store._look()
            yield store
        finally:
            empty = not any(path.name != LOCK for path in folder.iterdir())
            with contextlib.suppress(OSError):
                if empty:
                    (folder / LOCK).unlink(missing_ok=True)
                    folder.rmdir()
            lock.release()

    def _look(self) -> None:
        others = sorted(path.name for path in self.folder.iterdir() if path.name not in _OWN and path.name[0] != ".")
        self.manifest = read_manifest(self.folder)
        if self.manifest is None and (others or (self.folder / DATA).exists()):
            held = others[0] if others else DATA
            raise OSError(
                f"output {str(self.folder)!r} holds {held!r} and no {MANIFEST}: it is no extraction; name a new folder"
            )

    def begin(self, manifest: dict[str, Any], overwrite: bool) -> None:
        """Start anew, or go on with what is there; `manifest` is what belongs to this run.

        Raises:
            ValueError: the folder holds an extraction that differs, and is not to be overwritten.
        """
        data = self.folder / DATA
        if self.manifest is not None and not overwrite:
            different = difference(self.manifest["identity"], manifest["identity"])
            if different is not None:
                raise ValueError(
                    f"output {str(self.folder)!r} was begun with {different}; name another folder, or overwrite it"
                )
            manifest = {**manifest, "started": self.manifest["started"]}
            if self.manifest["complete"]:
                manifest = self.manifest  # stands until a shard is added
        if overwrite and data.exists():
            self._write(MANIFEST, {**(self.manifest or manifest), "complete": False})
            for path in sorted(data.iterdir()):
                if path.name.endswith((".parquet", ".tmp")):
                    path.unlink()
        self.manifest = manifest
        data.mkdir(exist_ok=True)
        for path in [*data.glob(".*.tmp"), *self.folder.glob(".*.tmp")]:
            path.unlink(missing_ok=True)
        self.shards = {info.index: info for info in finished(self.folder)}
        if not manifest["complete"]:
            self._write(MANIFEST, manifest)
            self._write_rejects()

    def write(self, info: ShardInfo, content: bytes) -> None:
        """Add a shard: it is there whole, or not at all."""
        if self.manifest is not None and self.manifest["complete"]:
            self.manifest = {**self.manifest, "complete": False}
            self._write(MANIFEST, self.manifest)
        self._replace(_shard_path(self.folder, info.index), content)
        self.shards[info.index] = info
        if info.rejected:
            lines = rejects_of(_shard_path(self.folder, info.index))
            with open(self.folder / REJECTS, "a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)

    def finish(self, end_row: int) -> dict[str, int]:
        """Check that every row of the input is there once, and say so in the manifest; returns the counts.

        Raises:
            ValueError: there are shards behind the end of the input.
        """
        infos = in_order(list(self.shards.values()))
        if infos[-1].end_row != end_row or sum(i.rows + i.rejected for i in infos) != end_row:
            raise ValueError(
                f"output {str(self.folder)!r} has rows up to {infos[-1].end_row}, and the input only {end_row}: "
                "it was begun with another input; name another folder, or overwrite it"
            )
        found = counts(infos)
        if self.manifest is not None and self.manifest["complete"]:
            return found
        self._write_rejects()
        self._widen()
        self.manifest = {**(self.manifest or {}), "complete": True, "counts": found, "finished": now()}
        self._write(MANIFEST, self.manifest)
        return found

    def _widen(self) -> None:
        """Give the columns that were passed through one type in all shards: those written before a value that needs a
        wider one are written again, each whole or not at all."""
        paths = [_shard_path(self.folder, index) for index in sorted(self.shards)]
        if len({_passed_types(parquet.read_schema(path)) for path in paths}) == 1:
            return
        names = [name for name in PASSED if name in parquet.read_schema(paths[0]).names]
        kinds = widest(parquet.ParquetFile(path).read(columns=names) for path in paths)
        for path in paths:
            if _passed_types(parquet.read_schema(path)) != tuple(TYPES[kinds[name]] for name in names):
                self._replace(path, shard_bytes(widened(parquet.ParquetFile(path).read(), kinds)))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self._replace(self.folder / name, f"{json.dumps(content, ensure_ascii=False, indent=2)}\n".encode())

    def _write_rejects(self) -> None:
        """rejects.jsonl anew, from what the shards say."""
        lines = []
        for index in sorted(self.shards):
            if self.shards[index].rejected:
                lines += rejects_of(_shard_path(self.folder, index))
        self._replace(
            self.folder / REJECTS, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines).encode()
        )

    def _replace(self, path: Path, content: bytes) -> None:
        part = path.with_name(f".{path.name}.tmp")
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What manifest.json of a folder holds; None where there is none.

    Raises:
        OSError: it is not one of an extraction's.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise OSError(f"{str(path)!r} cannot be read: {error}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise OSError(f"{str(path)!r} is no manifest of this version's extractions: its format is {found!r}")
    return manifest


def finished(folder: Path) -> Iterator[ShardInfo]:
    """What the shards in a folder say about themselves; damaged ones are not finished."""
    for path in sorted((folder / DATA).glob("part-*.parquet")):
        try:
            metadata = parquet.read_metadata(path).metadata
            info = ShardInfo(**json.loads(metadata[SHARD_KEY]))
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            continue
        if path == _shard_path(folder, info.index):
            yield info


def done_rows(folder: Path) -> int:
    """How many rows of the input the finished shards in a folder stand for."""
    return sum(info.end_row - info.first_row for info in finished(folder))


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


def difference(old: dict[str, Any], new: dict[str, Any], path: str = "") -> str | None:
    """The first difference of two identities in words; None where there is none."""
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            return difference(before, after, f"{name} ")
        was, is_ = (json.dumps(value, ensure_ascii=False) for value in (before, after))
        return f"{path}{name} {was}, and now it is {is_}"
    return None


def load_extract(folder: str | Path, columns: Sequence[str] | None = None, *, incomplete: bool = False) -> pa.Table:
    """Read an extraction back.

    Args:
        folder: what `globenc.extract` wrote.
        columns: which columns; None is all of them.
        incomplete: take what is there of a run that has not come to its end.

    Returns:
        A pyarrow table, rows in the order of the input: `.to_pandas()`, `polars.from_arrow(...)`, or by name in a
        DuckDB query. `table.schema.metadata[b"globenc"]` says by JSON which model and options made it.

    Raises:
        OSError: the folder holds no extraction, or a shard is missing or damaged.
        ValueError: the extraction is incomplete, or there is no such column.
    """
    place = Path(folder).expanduser()
    manifest = read_manifest(place)
    if manifest is None:
        raise OSError(f"{str(folder)!r} holds no extraction: it has no {MANIFEST}")
    infos = sorted(finished(place), key=lambda info: info.index)
    if not incomplete:
        if not manifest["complete"]:
            raise ValueError(
                f"{str(folder)!r} is incomplete: {done_rows(place):,} rows of the input are done; run the same command "
                "again to finish it, or load what is there with incomplete=True"
            )
        if counts(in_order(infos)) != manifest["counts"]:
            missing = next((k for k in range(manifest["counts"]["shards"]) if k not in {i.index for i in infos}), 0)
            raise OSError(
                f"{str(_shard_path(place, missing))!r} is missing or damaged: run the same command again to mend it, "
                "or load what is there with incomplete=True"
            )
    if not infos:
        raise ValueError(f"{str(folder)!r} has no finished shard yet")
    tables = []
    for info in infos:
        file = parquet.ParquetFile(_shard_path(place, info.index))
        for name in columns or ():
            if name not in file.schema_arrow.names:
                raise ValueError(f"{str(folder)!r} has no column {name!r}; its columns are {file.schema_arrow.names}")
        tables.append(file.read(columns=None if columns is None else list(columns)))
    if len({_passed_types(table.schema) for table in tables}) > 1:  # of an unfinished run
        kinds = widest(tables)
        tables = [widened(table, kinds) for table in tables]
    return pa.concat_tables(
        table.replace_schema_metadata({IDENTITY_KEY: table.schema.metadata[IDENTITY_KEY]}) for table in tables
    )


def _passed_types(schema: pa.Schema) -> tuple[pa.DataType, ...]:
    return tuple(schema.field(name).type for name in PASSED if name in schema.names)


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _shard_path(folder: Path, index: int) -> Path:
    return folder / DATA / f"part-{index:05d}.parquet"


def _sync_folder(folder: Path) -> None:
    """Make a rename last; where a system cannot, it does not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
