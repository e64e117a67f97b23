"""What else may stand in an extraction's folder: a user's files, which no run removes, and half-written ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from .manifest import MANIFEST
from .shard_info import PROVENANCE_KEY, SHARD_KEY
from .shards import DATA, SHARD_NAME, shard_files

REJECTS, LOCK, CARD = "rejects.jsonl", ".lock", "README.md"
_WRITTEN = {MANIFEST, REJECTS, DATA, LOCK, CARD}
_SHARD_BEGIN = b"PAR1\x15"  # Parquet's mark and the first byte of a page
_MARKS = {MANIFEST: b"globenc", REJECTS: b'{"row": '}  # what stands in these files, and in a shard SHARD_KEY


def refuse_wrong_kinds(folder: Path) -> None:
    """Raise where a folder stands in a file's place, or a file in a folder's."""
    for path in (folder / MANIFEST, folder / REJECTS):
        if path.is_dir():
            raise OSError(f"{str(path)!r} is a folder: move it away")
    data = folder / DATA
    if data.exists() and not data.is_dir():
        raise OSError(f"{str(data)!r} is a file where the folder of the shards belongs: move it away")


def refuse_strange_shards(folder: Path) -> None:
    """Raise where a Parquet file of the user's has a shard's name: it would be removed."""
    for _, path in shard_files(folder):
        if _is_strange(path):
            raise OSError(f"{str(path)!r} is a Parquet file that globenc has not written: move it away")


def refuse_other_folder(folder: Path) -> None:
    """Raise OSError where a folder without a sound manifest holds other things than an extraction's."""
    written = [path for path in (folder / MANIFEST, folder / REJECTS) if path.is_file()]
    written += [path for _, path in shard_files(folder)]
    marked = {path for path in written if _mark(path) in path.read_bytes()}
    if marked:
        return
    others = [path for path in folder.iterdir() if path.name not in _WRITTEN and path.name[0] != "."]
    data = folder / DATA
    if data.is_dir():
        others += [path for path in data.iterdir() if not SHARD_NAME.fullmatch(path.name) and path.name[0] != "."]
    elif data.exists():
        others.append(data)
    cut = any(path.parent == data and _is_cut(path) and path.stat().st_size for path in written)
    others += [path for path in written if path.read_bytes().strip(b"\0 \r\n") and not (cut and _is_cut(path))]
    if others:
        held = min(others).relative_to(folder).as_posix()
        but = "no sound" if (folder / MANIFEST).exists() else "no"
        raise OSError(
            f"output {str(folder)!r} holds {held!r} and {but} {MANIFEST}: it is no extraction; name a new folder"
        )


def _mark(path: Path) -> bytes:
    """What stands in a file that globenc writes, even in a damaged one."""
    return _MARKS.get(path.name, SHARD_KEY)


def _is_strange(path: Path) -> bool:
    """Whether a file is sound Parquet, and nothing in it is of globenc's making."""
    if not _is_sound(path):
        return False
    metadata = parquet.read_metadata(path).metadata or {}
    return not any(key.startswith(PROVENANCE_KEY) for key in metadata)


def _is_cut(path: Path) -> bool:
    """Whether a file may be the beginning of one that globenc writes."""
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


def half_written(folder: Path) -> Iterator[Path]:
    """What a killed run may have left half-written."""
    yield from (folder / f".{name}.tmp" for name in (MANIFEST, REJECTS))
    for path in (folder / DATA).glob(".part-*.parquet.tmp"):
        if SHARD_NAME.fullmatch(path.name[1:-4]):
            yield path
