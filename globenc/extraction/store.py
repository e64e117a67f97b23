"""The folder of an extraction while a run writes it: lock, manifest, shards (whole or not at all) and rejects."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pyarrow import parquet

from ..errors import warn_caller
from .checksum import json_bytes, parquet_hash
from .folder_checks import LOCK, REJECTS, half_written, refuse_other_folder, refuse_strange_shards, refuse_wrong_kinds
from .manifest import MANIFEST, DamagedManifestError, OtherVersionError, difference, now, read_manifest
from .passed_columns import PASSED, TYPES, widened, widest
from .shard_info import ShardInfo
from .shards import (
    DATA,
    OTHER_INPUT,
    WrongShardError,
    counts,
    in_order,
    of_other_inputs,
    passed_types,
    read_shard,
    rejects_of,
    shard_files,
    shard_path,
)
from .tables import shard_bytes
from .whole_files import as_cannot_write, write_whole


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
                refuse_wrong_kinds(folder)
                store._look(overwrite)
                refuse_strange_shards(folder)
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

    def _look(self, overwrite: bool) -> None:
        """Read manifest.json; where it says nothing, see that nothing else than an extraction is in the folder."""
        try:
            self.manifest = self._on_disk = read_manifest(self.folder)
        except OtherVersionError:
            if not overwrite:
                raise
            return
        except DamagedManifestError:
            pass
        if self.manifest is None:
            refuse_other_folder(self.folder)

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
        for index, path in shard_files(self.folder):
            with contextlib.suppress(WrongShardError):
                return read_shard(path, index).made_by
        return {}

    def done(self) -> dict[int, tuple[int, int, str, int]]:
        """First row, end row, digest and number of rejects of every finished shard, by number."""
        return {i: (s.first_row, s.end_row, s.digest, s.rejected) for i, s in self.shards.items()}

    def begin(self, manifest: dict[str, Any], overwrite: bool) -> None:
        """Start anew, or go on with what is there; `manifest` is what belongs to this run.

        Raises:
            OSError: the folder cannot be read or written.
            ValueError: the folder holds an extraction that differs, and is not to be overwritten.
        """
        manifest = json.loads(json.dumps(manifest))
        run_options, held = manifest["identity"], self.manifest
        if held is not None and not overwrite:
            self._refuse_other(held["identity"], run_options)
        with as_cannot_write(self.folder / DATA):
            (self.folder / DATA).mkdir(exist_ok=True)
        if overwrite or (held is not None and held.get("overwriting")):
            # said before anything goes, so that a run that is killed here is gone on with, and old shards never count
            self._write(MANIFEST, {**manifest, "overwriting": True})
            self._remove(path for _, path in shard_files(self.folder))
            held, wrong = None, {}
        else:
            wrong = self._take(run_options, held)
        if wrong:
            first = min(wrong)
            reason = str(wrong[first]).replace("missing or damaged", "damaged")  # it is there
            numbers = _numbers_of(wrong.values())
            warn_caller(
                f"output {str(self.folder)!r}: {numbers}, removed, and what is missing is made again; "
                f"{'' if len(wrong) == 1 else 'the first: '}{first.name} {reason}"
            )
            self._remove(wrong)  # before a manifest without hashes, which knows less of what is wrong
        whole = held is not None and held["complete"] and held["shard_hashes"] == _in_a_row(self._hashes)
        if held is not None and not whole:
            manifest["started"] = held["started"]
        self.manifest = held if whole else manifest
        if not whole:
            self._write(MANIFEST, manifest)
        self._remove(path for path in half_written(self.folder) if path.exists() or path.is_symlink())
        self._write_rejects()

    def _take(self, run_options: dict[str, Any], held: dict[str, Any] | None) -> dict[Path, WrongShardError]:
        """Find the shards of this run, and what is wrong with the others.

        Raises:
            ValueError: there are only shards of other runs.
        """
        hashes = held["shard_hashes"] if held is not None and held["complete"] else None
        wrong: dict[Path, WrongShardError] = {}
        for index, path in shard_files(self.folder):
            try:
                shard = read_shard(path, index, run_options, hashes)
            except WrongShardError as error:
                wrong[path] = error
                continue
            self.shards[index], self._hashes[index] = shard.info, shard.hash
        for index in of_other_inputs(self.shards):
            del self.shards[index], self._hashes[index]
            wrong[shard_path(self.folder, index)] = WrongShardError(OTHER_INPUT)
        if not self.shards:
            for path, why in wrong.items():
                if why.run_options is not None and held is not None:
                    raise ValueError(
                        f"output {str(self.folder)!r} holds no shard of this run: {path.name} {why}; name another "
                        "folder, or overwrite it"
                    )
                if why.run_options is not None:
                    self._refuse_other(why.run_options, run_options)
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
            with as_cannot_write(path):
                path.unlink(missing_ok=True)

    def write(self, info: ShardInfo, content: bytes) -> None:
        """Add a shard: it is there whole, or not at all."""
        if self.manifest is not None and self.manifest["complete"]:
            self.manifest = {**self.manifest, "complete": False}
            self._write(MANIFEST, self.manifest)
        self._put(info, content)
        if info.rejected:
            path = self.folder / REJECTS
            with as_cannot_write(path), open(path, "ab") as file:
                file.write(_lines(rejects_of(shard_path(self.folder, info.index))))

    def _put(self, info: ShardInfo, content: bytes) -> None:
        """A shard's file, in the place of what may be there."""
        self._replace(shard_path(self.folder, info.index), content)
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
            path = shard_path(self.folder, info.index)
            if not path.exists():
                raise OSError(f"{str(path)!r} went away during the run: run the same command again to mend it")
        totals = counts(infos)
        if self.manifest is not None and self.manifest["complete"]:
            return totals
        self._write_rejects()
        self._widen()
        self.manifest = {
            **(self.manifest or {}),
            "complete": True,
            "counts": totals,
            "finished": now(),
            "shard_hashes": _in_a_row(self._hashes),
        }
        self._write(MANIFEST, self.manifest)
        return totals

    def _widen(self) -> None:
        """Give the columns that were passed through one type in all shards: those written before a value that needs a
        wider one are written again, each whole or not at all."""
        paths = {index: shard_path(self.folder, index) for index in sorted(self.shards)}
        if len({passed_types(parquet.read_schema(path)) for path in paths.values()}) == 1:
            return
        names = [name for name in PASSED if name in parquet.read_schema(paths[0]).names]
        kinds = widest(parquet.ParquetFile(path).read(columns=names) for path in paths.values())
        for index, path in paths.items():
            if passed_types(parquet.read_schema(path)) != tuple(TYPES[kinds[name]] for name in names):
                try:
                    table = read_shard(path, index).file.read()
                except WrongShardError as error:
                    raise OSError(f"{str(path)!r} {error}: run the same command again to mend it") from None
                self._put(self.shards[index], shard_bytes(widened(table, kinds)))

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self._replace(self.folder / name, json_bytes(content))
        self._on_disk = content

    def _write_rejects(self) -> None:
        """rejects.jsonl from what the shards say, where it says anything else."""
        path = self.folder / REJECTS
        bad = [index for index in sorted(self.shards) if self.shards[index].rejected]
        content = b"".join(_lines(rejects_of(shard_path(self.folder, index))) for index in bad)
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
            on_disk = read_manifest(self.folder)
        except Timeout:
            raise OSError(f"output {shown} is being written by another run: wait for it, or stop it") from None
        except OSError as error:
            raise OSError(f"output {shown} was changed during the run: {error.strerror or error}") from None
        if on_disk != self._on_disk:
            raise OSError(f"output {shown} was written by another run meanwhile: run the same command again")

    def _replace(self, path: Path, content: bytes) -> None:
        self._still_locked()
        write_whole(path, content)


def _in_a_row(hashes: Mapping[int, str]) -> list[str]:
    return [hashes[index] for index in sorted(hashes)]


def _lines(rejects: Iterable[Mapping[str, Any]]) -> bytes:
    lines = "".join(f"{json.dumps(reject, ensure_ascii=False)}\n" for reject in rejects)
    return lines.encode(errors="backslashreplace")  # JSON's own way to write half a surrogate pair, as in a file's name


def _numbers_of(wrong: Iterable[WrongShardError]) -> str:
    """How many shards are damaged, and how many of something else, in words."""
    damaged = [why.run_options is None and "damaged" in str(why) for why in wrong]
    parts = []
    for count, one, several in (
        (sum(damaged), "1 shard is damaged", "shards are damaged"),
        (len(damaged) - sum(damaged), "1 shard is not of this run", "shards are not of this run"),
    ):
        if count:
            parts.append(one if count == 1 else f"{count} {several}")
    return " and ".join(parts)


def _file_number(path: Path) -> tuple[int, int]:
    """What tells a file from another one of the same name."""
    status = path.stat()
    return status.st_dev, status.st_ino
