"""The folder of an extraction: its lock, its manifest, its shards (whole or not at all) and its rejects."""

from __future__ import annotations

import collections
import contextlib
import datetime
import errno
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from filelock import FileLock, Timeout
from pyarrow import parquet

from .checksum import checked_json, json_bytes, parquet_hash
from .identity import identity_in
from .worker import IDENTITY_KEY, PASSED, REJECTS_KEY, SHARD_KEY, TYPES, ShardInfo, shard_bytes, widened, widest

FORMAT = "globenc-extract-2"
MANIFEST, REJECTS, DATA, LOCK, CARD = "manifest.json", "rejects.jsonl", "data", ".lock", "README.md"
_FORMATS = "globenc-extract-"
_OWN = {MANIFEST, REJECTS, DATA, LOCK, CARD}
_SHARD_NAME = re.compile(r"part-(\d{5,})\.parquet")
_OTHER_INPUT = "is of another input"
_SHARD_BEGIN = b"PAR1\x15"  # Parquet's mark and the first byte of a page
_MARKS = {MANIFEST: b"globenc", REJECTS: b'{"row": '}  # what stands in these files, and in a shard SHARD_KEY


class _DamagedManifestError(OSError):
    """manifest.json is there, and not as it was written."""


class _OtherVersionError(OSError):
    """manifest.json is of another version of globenc."""


class _WrongShardError(ValueError):
    """Why a file is not the shard that belongs in its place; `identity` of the run it is of, where it is a shard."""

    def __init__(self, reason: str, identity: dict[str, Any] | None = None):
        super().__init__(reason)
        self.identity = identity


@dataclass(frozen=True)
class _Shard:
    """A shard as it was written: what it says of itself, of the run that made it, and its hash."""

    info: ShardInfo
    made_by: dict[str, Any]
    hash: str
    file: parquet.ParquetFile

    @property
    def identity(self) -> dict[str, Any]:
        return identity_in(self.made_by)


class Store:
    """A folder that one run writes at a time; use `opened`.

    Attributes:
        folder: the folder.
        manifest: what manifest.json holds; None where there is none yet, or a damaged one.
        shards: the finished shards by number.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest: dict[str, Any] | None = None
        self.shards: dict[int, ShardInfo] = {}
        self._hashes: dict[int, str] = {}
        self._on_disk: dict[str, Any] | None = None  # the manifest, as this run knows it
        self._lock = self._locked()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, output: str | Path, overwrite: bool = False) -> Iterator[Store]:
        """The folder, made where it is not there, and locked against other runs; a new one that is still empty at the
        end goes away.

        Raises:
            OSError: it cannot be written to, another run writes it, it holds other things, or it is of another version
                of globenc and not to be overwritten.
        """
        folder = Path(output).expanduser()
        shown = str(folder)
        try:
            if folder.exists() and not folder.is_dir():
                raise OSError(f"output {shown!r} is a file: name a folder")
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / LOCK).is_dir():
                raise OSError(f"{str(folder / LOCK)!r} is a folder: move it away")
            new = not (folder / LOCK).exists()
            store = cls(folder)
        except Timeout:
            raise OSError(f"output {shown!r} is being written by another run: wait for it, or stop it") from None
        except OSError as error:
            if error.errno is None:
                raise
            raise OSError(f"output {shown!r} cannot be written to: {error.strerror or error}") from None
        try:
            try:
                store._refuse_wrong_kinds()
                store._look(overwrite)
                store._refuse_strange_shards()
            except OSError as error:
                if new:
                    (folder / LOCK).unlink(missing_ok=True)
                if error.errno is None:
                    raise
                raise OSError(f"output {shown!r} cannot be read: {error.strerror or error}") from None
            yield store
        finally:
            with contextlib.suppress(OSError):
                store._leave_nothing_empty()
            store._lock.release()

    def _locked(self) -> FileLock:
        lock = FileLock(self.folder / LOCK, thread_local=False)
        lock.acquire(timeout=0)
        self._lock_file = _file_number(self.folder / LOCK)
        return lock

    def _refuse_wrong_kinds(self) -> None:
        """Raise where a folder stands in a file's place, or a file in a folder's."""
        for path in (self.folder / MANIFEST, self.folder / REJECTS):
            if path.is_dir():
                raise OSError(f"{str(path)!r} is a folder: move it away")
        data = self.folder / DATA
        if data.exists() and not data.is_dir():
            raise OSError(f"{str(data)!r} is a file where the folder of the shards belongs: move it away")

    def _refuse_strange_shards(self) -> None:
        """Raise where a Parquet file of the user's own has a shard's name: it would be removed."""
        for _, path in _shard_files(self.folder):
            if _is_strange(path):
                raise OSError(f"{str(path)!r} is a Parquet file that globenc has not written: move it away")

    def _look(self, overwrite: bool) -> None:
        """What manifest.json says; where it says nothing, whether the folder is one of ours for all that."""
        try:
            self.manifest = self._on_disk = read_manifest(self.folder)
        except _OtherVersionError:
            if not overwrite:
                raise
            return
        except _DamagedManifestError:
            pass
        if self.manifest is not None:
            return
        own = [path for path in (self.folder / MANIFEST, self.folder / REJECTS) if path.is_file()]
        own += [path for _, path in _shard_files(self.folder)]
        marked = {path for path in own if _mark(path) in path.read_bytes()}
        if marked:
            return
        others = [path for path in self.folder.iterdir() if path.name not in _OWN and path.name[0] != "."]
        data = self.folder / DATA
        if data.is_dir():
            others += [path for path in data.iterdir() if not _SHARD_NAME.fullmatch(path.name) and path.name[0] != "."]
        elif data.exists():
            others.append(data)
        cut = any(path.parent == data and _is_cut(path) and path.stat().st_size for path in own)
        others += [path for path in own if path.read_bytes().strip(b"\0 \r\n") and not (cut and _is_cut(path))]
        if others:
            held = min(others).relative_to(self.folder).as_posix()
            but = "no sound" if (self.folder / MANIFEST).exists() else "no"
            raise OSError(
                f"output {str(self.folder)!r} holds {held!r} and {but} {MANIFEST}: it is no extraction; name a new "
                "folder"
            )

    def _leave_nothing_empty(self) -> None:
        names = {path.name for path in self.folder.iterdir()}
        if names <= {LOCK, DATA} and self._lock.is_locked:
            if DATA in names:
                (self.folder / DATA).rmdir()
            (self.folder / LOCK).unlink(missing_ok=True)
            self.folder.rmdir()

    @property
    def made_by(self) -> dict[str, Any]:
        """What the folder says of the run that began it: the manifest, or where that is lost the first sound shard."""
        if self.manifest is not None:
            return self.manifest
        for index, path in _shard_files(self.folder):
            with contextlib.suppress(_WrongShardError):
                return _read_shard(path, index).made_by
        return {}

    def begin(self, manifest: dict[str, Any], overwrite: bool) -> None:
        """Start anew, or go on with what is there; `manifest` is what belongs to this run.

        Raises:
            OSError: the folder cannot be read or written.
            ValueError: the folder holds an extraction that differs, and is not to be overwritten.
        """
        manifest = json.loads(json.dumps(manifest))
        identity, held = manifest["identity"], self.manifest
        if held is not None and not overwrite:
            self._refuse_other(held["identity"], identity)
        with _sentence(self.folder / DATA):
            (self.folder / DATA).mkdir(exist_ok=True)
        if overwrite or (held is not None and held.get("overwriting")):
            # said before anything goes, so that a run that is killed here is gone on with, and old shards never count
            self._write(MANIFEST, {**manifest, "overwriting": True})
            self._remove(path for _, path in _shard_files(self.folder))
            held, wrong = None, {}
        else:
            wrong = self._take(identity, held)
        if wrong:
            first = min(wrong)
            reason = str(wrong[first]).replace("missing or damaged", "damaged")  # it is there
            warnings.warn(
                f"output {str(self.folder)!r}: {_numbers(wrong.values())}, removed, and what is missing is made again; "
                f"{'' if len(wrong) == 1 else 'the first: '}{first.name} {reason}",
                stacklevel=4,  # where `extract` is called
            )
            self._remove(wrong)  # before a manifest without hashes, which knows less of what is wrong
        whole = held is not None and held["complete"] and held["shard_hashes"] == _in_a_row(self._hashes)
        if held is not None and not whole:
            manifest["started"] = held["started"]
        self.manifest = held if whole else manifest
        if not whole:
            self._write(MANIFEST, manifest)
        self._remove(path for path in _parts(self.folder) if path.exists() or path.is_symlink())
        self._write_rejects()

    def _take(self, identity: dict[str, Any], held: dict[str, Any] | None) -> dict[Path, _WrongShardError]:
        """Find the shards of this run, and what is wrong with the others.

        Raises:
            ValueError: there are only shards of other runs.
        """
        hashes = held["shard_hashes"] if held is not None and held["complete"] else None
        wrong: dict[Path, _WrongShardError] = {}
        for index, path in _shard_files(self.folder):
            try:
                shard = _read_shard(path, index, identity, hashes)
            except _WrongShardError as error:
                wrong[path] = error
                continue
            self.shards[index], self._hashes[index] = shard.info, shard.hash
        for index in _of_other_inputs(self.shards):
            del self.shards[index], self._hashes[index]
            wrong[_shard_path(self.folder, index)] = _WrongShardError(_OTHER_INPUT)
        if not self.shards:
            for path, why in wrong.items():
                if why.identity is not None and held is not None:
                    raise ValueError(
                        f"output {str(self.folder)!r} holds no shard of this run: {path.name} {why}; name another "
                        "folder, or overwrite it"
                    )
                if why.identity is not None:
                    self._refuse_other(why.identity, identity)
        return wrong

    def _refuse_other(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        different = difference(before, now)
        if different is not None:
            raise ValueError(
                f"output {str(self.folder)!r} was begun with {different}; name another folder, or overwrite it"
            )

    def _remove(self, paths: Iterable[Path]) -> None:
        self._still_locked()
        for path in paths:
            with _sentence(path):
                path.unlink(missing_ok=True)

    def write(self, info: ShardInfo, content: bytes) -> None:
        """Add a shard: it is there whole, or not at all."""
        if self.manifest is not None and self.manifest["complete"]:
            self.manifest = {**self.manifest, "complete": False}
            self._write(MANIFEST, self.manifest)
        self._put(info, content)
        if info.rejected:
            path = self.folder / REJECTS
            with _sentence(path), open(path, "ab") as file:
                file.write(_lines(rejects_of(_shard_path(self.folder, info.index))))

    def _put(self, info: ShardInfo, content: bytes) -> None:
        """A shard's file, in the place of what may be there."""
        self._replace(_shard_path(self.folder, info.index), content)
        self.shards[info.index], self._hashes[info.index] = info, parquet_hash(content)

    def finish(self, end_row: int) -> dict[str, int]:
        """Check that every row of the input is there once, and say so in the manifest; returns the counts.

        Raises:
            OSError: a shard is not there any more, or the folder cannot be written.
            ValueError: there are shards behind the end of the input.
        """
        infos = in_order(list(self.shards.values()))
        last = max(info.end_row for info in self.shards.values())
        if (len(infos), last, sum(i.rows + i.rejected for i in infos)) != (len(self.shards), end_row, end_row):
            raise ValueError(
                f"output {str(self.folder)!r} has rows up to {last}, and the input only {end_row}: "
                "it was begun with another input; name another folder, or overwrite it"
            )
        for info in infos:
            path = _shard_path(self.folder, info.index)
            if not path.exists():
                raise OSError(f"{str(path)!r} went away during the run: run the same command again to mend it")
        found = counts(infos)
        if self.manifest is not None and self.manifest["complete"]:
            return found
        self._write_rejects()
        self._widen()
        self.manifest = {
            **(self.manifest or {}),
            "complete": True,
            "counts": found,
            "finished": now(),
            "shard_hashes": _in_a_row(self._hashes),
        }
        self._write(MANIFEST, self.manifest)
        return found

    def _widen(self) -> None:
        """Give the columns that were passed through one type in all shards: those written before a value that needs a
        wider one are written again, each whole or not at all."""
        paths = {index: _shard_path(self.folder, index) for index in sorted(self.shards)}
        if len({_passed_types(parquet.read_schema(path)) for path in paths.values()}) == 1:
            return
        names = [name for name in PASSED if name in parquet.read_schema(paths[0]).names]
        kinds = widest(parquet.ParquetFile(path).read(columns=names) for path in paths.values())
        for index, path in paths.items():
            if _passed_types(parquet.read_schema(path)) != tuple(TYPES[kinds[name]] for name in names):
                try:
                    table = _read_shard(path, index).file.read()
                except _WrongShardError as error:
                    raise OSError(f"{str(path)!r} {error}: run the same command again to mend it") from None
                self._put(self.shards[index], shard_bytes(widened(table, kinds)))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self._replace(self.folder / name, json_bytes(content))
        self._on_disk = content

    def _write_rejects(self) -> None:
        """rejects.jsonl from what the shards say, where it says anything else."""
        path = self.folder / REJECTS
        bad = [index for index in sorted(self.shards) if self.shards[index].rejected]
        content = b"".join(_lines(rejects_of(_shard_path(self.folder, index))) for index in bad)
        with contextlib.suppress(OSError):
            if path.read_bytes() == content:
                return
        self._replace(path, content)

    def _still_locked(self) -> None:
        """That the folder is where it was, and no other run has come in although this one has locked it.

        Raises:
            OSError: it is not so.
        """
        with contextlib.suppress(OSError):
            if _file_number(self.folder / LOCK) == self._lock_file:
                return
        shown = repr(str(self.folder))
        if not self.folder.is_dir():
            raise OSError(f"output {shown} was moved or removed during the run: run again where it is now")
        try:
            self._lock.release()
            self._lock = self._locked()
            found = read_manifest(self.folder)
        except Timeout:
            raise OSError(f"output {shown} is being written by another run: wait for it, or stop it") from None
        except OSError as error:
            raise OSError(f"output {shown} was changed during the run: {error.strerror or error}") from None
        if found != self._on_disk:
            raise OSError(f"output {shown} was written by another run meanwhile: run the same command again")

    def _replace(self, path: Path, content: bytes) -> None:
        self._still_locked()
        part = path.with_name(f".{path.name}.tmp")
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            _sync_folder(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What manifest.json of a folder holds; None where there is none.

    Raises:
        OSError: it is not one of an extraction's, or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        passing = isinstance(error, OSError) and error.errno != errno.EIO  # a permission, not damage
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise (OSError if passing else _DamagedManifestError)(f"{str(path)!r} cannot be read: {reason}") from None
    written = manifest if isinstance(manifest, dict) else {}
    found = written.get("format")
    if found == FORMAT or "sha256" in written:
        try:
            manifest = checked_json(written)
        except ValueError as error:
            raise _DamagedManifestError(f"{str(path)!r} is damaged: {error}") from None
    told = f"{str(path)!r} is no manifest of this version's extractions: its format is {found!r}"
    if str(found).startswith(_FORMATS) and found != FORMAT:
        raise _OtherVersionError(f"{told}; name another folder, or overwrite it")
    if found != FORMAT:
        raise _DamagedManifestError(told)
    return manifest


def done_rows(folder: Path) -> int:
    """How many rows of the input the finished shards in a folder stand for, by what they say of themselves."""
    rows = 0
    with contextlib.suppress(OSError):
        manifest = read_manifest(folder)
        if manifest is None or manifest.get("overwriting"):
            return 0
        for _, path in _shard_files(folder):
            with contextlib.suppress(pa.ArrowException, OSError, KeyError, TypeError, ValueError):
                metadata = parquet.read_metadata(path).metadata
                if identity_in(json.loads(metadata[IDENTITY_KEY])) == manifest["identity"]:
                    info = ShardInfo(**json.loads(metadata[SHARD_KEY]))
                    rows += info.end_row - info.first_row
    return rows


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


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first difference of two identities in words; None where there is none."""
    found = _first_difference(old, new)
    return None if found is None else f"{found[0]} {found[1]}, and now it is {found[2]}"


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> tuple[str, str, str] | None:
    """Name, old and new value."""
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            return _first_difference(before, after, f"{name} ")
        was, is_ = (json.dumps(value, ensure_ascii=False) for value in (before, after))
        return f"{path}{name}", was, is_
    return None


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
    place, shown = Path(folder).expanduser(), repr(str(folder))
    mend = "run the same command again to mend it, or load what is there with incomplete=True"
    files = dict(_shard_files(place))
    try:
        manifest = read_manifest(place)
    except _DamagedManifestError as error:
        if not incomplete or not files:
            raise OSError(f"{error}{f': {mend}' if files else ''}") from None
        manifest = None
    if manifest is None and not files:
        raise OSError(f"{shown} holds no extraction: it has no {MANIFEST}")
    if manifest is None and not incomplete:
        raise OSError(f"{shown} has lost its {MANIFEST}: {mend}")
    if manifest is not None and not manifest["complete"] and not incomplete:
        raise ValueError(
            f"{shown} is incomplete: {done_rows(place):,} rows of the input are done; run the same command "
            "again to finish it, or load what is there with incomplete=True"
        )
    identity = None if manifest is None else manifest["identity"]
    hashes = manifest["shard_hashes"] if manifest is not None and manifest["complete"] else None
    indices = sorted(files) if hashes is None else range(len(hashes))
    if manifest is not None and manifest.get("overwriting"):
        indices = []
    left_out = {path: "is behind the end" for index, path in files.items() if index not in indices}
    tables: dict[int, pa.Table] = {}
    infos: dict[int, ShardInfo] = {}
    for index in indices:
        path = _shard_path(place, index)
        try:
            shard = _read_shard(path, index, identity, hashes)
        except _WrongShardError as error:
            if not incomplete:
                raise OSError(f"{str(path)!r} {error}: {mend}") from None
            left_out[path] = str(error)
            continue
        identity = identity or shard.identity
        for name in columns or ():
            if name not in shard.file.schema_arrow.names:
                raise ValueError(f"{shown} has no column {name!r}; its columns are {shard.file.schema_arrow.names}")
        tables[index] = shard.file.read(columns=None if columns is None else list(columns))
        infos[index] = shard.info
    for index in _of_other_inputs(infos):
        del tables[index]
        left_out[_shard_path(place, index)] = _OTHER_INPUT
    if left_out:
        first = min(left_out)
        warnings.warn(
            f"{shown}: {len(left_out)} of its shards are left out, the first: {first.name} {left_out[first]}",
            stacklevel=2,
        )
    if not tables:
        raise ValueError(f"{shown} has no finished shard yet")
    if len({_passed_types(table.schema) for table in tables.values()}) > 1:  # of an unfinished run
        kinds = widest(tables.values())
        tables = {index: widened(table, kinds) for index, table in tables.items()}
    return pa.concat_tables(
        table.replace_schema_metadata({IDENTITY_KEY: table.schema.metadata[IDENTITY_KEY]}) for table in tables.values()
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


def _shard_files(folder: Path) -> list[tuple[int, Path]]:
    """What stands where shards belong, by number.

    Raises:
        OSError: one is a folder, or cannot be looked at.
    """
    found = []
    data = folder / DATA
    if not data.is_dir():
        return []
    try:
        paths = list(data.iterdir())
    except OSError as error:
        raise OSError(f"{str(data)!r} cannot be read: {error.strerror or error}") from None
    for path in paths:
        name = _SHARD_NAME.fullmatch(path.name)
        if name is None or path != _shard_path(folder, int(name[1])):
            continue
        if path.exists() and not path.is_file():
            raise OSError(f"{str(path)!r} is a folder where a shard belongs: move it away")
        found.append((int(name[1]), path))
    return sorted(found)


def _read_shard(
    path: Path, index: int, identity: Mapping[str, Any] | None = None, hashes: Sequence[str] | None = None
) -> _Shard:
    """A shard, once all its bytes are seen to be as they were written.

    Args:
        path, index: the file, and its number.
        identity: of the run that it must be of; None is any.
        hashes: of all shards of the run; None where they are not known.

    Raises:
        _WrongShardError: it is missing, damaged, or not the one that belongs there.
        OSError: it cannot be read, for a reason that may pass.
    """
    try:
        content = _arrow_bytes(path)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EIO):
            raise OSError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
        raise _WrongShardError("is missing or damaged") from None
    try:
        found = parquet_hash(memoryview(content))
        file = parquet.ParquetFile(pa.BufferReader(content))
        metadata = file.metadata.metadata
        info, made_by = ShardInfo(**json.loads(metadata[SHARD_KEY])), json.loads(metadata[IDENTITY_KEY])
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise _WrongShardError("is missing or damaged") from None
    shard = _Shard(info, made_by, found, file)
    if info.index != index:  # a copy of another shard
        raise _WrongShardError("is missing or damaged")
    different = None if identity is None else _first_difference(identity, shard.identity)
    if different is not None:
        name, wanted, actual = different
        raise _WrongShardError(f"is of another run: its {name} is {actual}, not {wanted}", shard.identity)
    if hashes is not None and [found] != list(hashes[index : index + 1]):
        raise _WrongShardError("is not what the run wrote")
    return shard


def _arrow_bytes(path: Path) -> pa.Buffer:
    """A file in Arrow's own memory, which its threads may free while Python ends; Python's own must not be."""
    with path.open("rb") as file:
        content = pa.allocate_buffer(os.fstat(file.fileno()).st_size)
        read = file.readinto(memoryview(content))
    return content.slice(0, read)


def _of_other_inputs(shards: Mapping[int, ShardInfo]) -> list[int]:
    """Those that begin with other rows than most."""
    inputs = collections.Counter(shards[index].input_digest for index in sorted(shards))
    return [index for index in shards if shards[index].input_digest != inputs.most_common(1)[0][0]]


def _in_a_row(hashes: Mapping[int, str]) -> list[str]:
    return [hashes[index] for index in sorted(hashes)]


def _lines(rejects: Iterable[Mapping[str, Any]]) -> bytes:
    lines = "".join(f"{json.dumps(reject, ensure_ascii=False)}\n" for reject in rejects)
    return lines.encode(errors="backslashreplace")  # JSON's own way to write half a surrogate pair, as in a file's name


def _mark(path: Path) -> bytes:
    """What stands in a file of ours, even in a damaged one."""
    return _MARKS.get(path.name, SHARD_KEY)


def _is_strange(path: Path) -> bool:
    """Whether a file is sound Parquet, and nothing in it is of globenc's making."""
    if not _is_sound(path):
        return False
    metadata = parquet.read_metadata(path).metadata or {}
    return not any(key.startswith(IDENTITY_KEY) for key in metadata)


def _is_cut(path: Path) -> bool:
    """Whether a file may be the beginning of one of ours."""
    content = path.read_bytes()
    if path.name == MANIFEST:
        try:
            json.loads(content)
        except (ValueError, RecursionError):
            return True
        return False
    if path.name == REJECTS:
        return _MARKS[REJECTS].startswith(content[: len(_MARKS[REJECTS])])
    return _SHARD_BEGIN.startswith(content[: len(_SHARD_BEGIN)]) and not _is_sound(path)


def _is_sound(path: Path) -> bool:
    try:
        parquet.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError):
        return False
    return True


def _numbers(wrong: Iterable[_WrongShardError]) -> str:
    """How many shards are damaged, and how many of something else, in words."""
    damaged = [why.identity is None and "damaged" in str(why) for why in wrong]
    told = []
    for count, one, several in (
        (sum(damaged), "1 shard is damaged", "shards are damaged"),
        (len(damaged) - sum(damaged), "1 shard is not of this run", "shards are not of this run"),
    ):
        if count:
            told.append(one if count == 1 else f"{count} {several}")
    return " and ".join(told)


def _parts(folder: Path) -> Iterator[Path]:
    """What a killed run may have left half-written."""
    yield from (folder / f".{name}.tmp" for name in (MANIFEST, REJECTS))
    for path in (folder / DATA).glob(".part-*.parquet.tmp"):
        if _SHARD_NAME.fullmatch(path.name[1:-4]):
            yield path


def _file_number(path: Path) -> tuple[int, int]:
    """What tells a file from another one of the same name."""
    status = path.stat()
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def _sentence(path: Path) -> Iterator[None]:
    """An OSError of the system's as one of globenc's."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
