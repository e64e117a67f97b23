"""What else is in the folder of an extraction, writing that fails, and others who write."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from extract_helpers import (
    assert_same,
    at_a_shard,
    posix,
    quietly,
    run,
)
from filelock import FileLock
from pyarrow import parquet

import globenc


@pytest.mark.parametrize("overwrite", [False, True], ids=["same", "overwrite"])
def test_killed_before_the_first_manifest(finished, corpus, loaded, tmp_path, overwrite):
    folder = tmp_path / "out"
    (folder / "data").mkdir(parents=True)
    for name in (".lock", ".manifest.json.tmp", ".rejects.jsonl.tmp", "data/.part-00000.parquet.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / "data" / "part-00000.parquet").write_bytes(bytes(100))  # a file system that lost the content
    quietly(corpus, folder, loaded, overwrite=overwrite)
    assert_same(folder, finished)


STRANGE = {
    "notes.txt": "precious",
    "data/mine.csv": "a,b",
    "data/part-00000.parquet": "PAR1 of another program",
    "data/part-0.parquet": "PAR1",
    "manifest.json": '{"name": "my web page"}',
    "rejects.jsonl": "what I did not like",
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_not_ours_is_refused_and_left_alone(corpus, loaded, tmp_path, name):
    folder = tmp_path / "out"
    (folder / "data").mkdir(parents=True)
    (folder / name).write_text(STRANGE[name])
    for overwrite in (False, True):
        with pytest.raises(OSError, match=rf"holds '{name}' and no (?:sound )?manifest.json: it is no extraction"):
            run(corpus, folder, loaded, overwrite=overwrite)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == [Path(name).name]
    assert (folder / name).read_text() == STRANGE[name]


def test_what_is_not_ours_outlives_everything(finished, out, corpus, loaded):
    others = ["notes.txt", "README.md", ".hidden.tmp", "data/mine.parquet", "data/.mine.tmp", "data/part-7.parquet"]
    for name in others:
        (out / name).write_text("precious")
    (out / "manifest.json").unlink()
    run(corpus, out, loaded)
    run(corpus, out, loaded, overwrite=True)
    for name in others:
        assert (out / name).read_text() == "precious"
        (out / name).unlink()
    assert_same(out, finished)


def test_a_sound_parquet_file_of_the_users_is_never_removed(out, corpus, loaded):
    mine = out / "data" / "part-00007.parquet"
    parquet.write_table(pa.table({"mine": [1, 2]}), mine)
    before = mine.read_bytes()
    for overwrite in (False, True):
        with pytest.raises(OSError, match=r"part-00007.parquet' is a Parquet file that globenc has not written: move"):
            run(corpus, out, loaded, overwrite=overwrite)
    (out / "manifest.json").unlink()
    with pytest.raises(OSError, match=r"part-00007.parquet"):
        run(corpus, out, loaded)
    assert mine.read_bytes() == before


@pytest.mark.parametrize("overwrite", [False, True], ids=["same", "overwrite"])
@pytest.mark.parametrize("manifest", ["lost", "cut"])
def test_every_shard_and_the_manifest_cut(finished, out, corpus, loaded, manifest, overwrite):
    for path in (out / "data").iterdir():
        path.write_bytes(path.read_bytes()[:500])
    (out / "manifest.json").write_bytes((out / "manifest.json").read_bytes()[:5])
    if manifest == "lost":
        (out / "manifest.json").unlink()
    if overwrite:
        run(corpus, out, loaded, overwrite=True)
    else:
        with pytest.warns(UserWarning, match="5 shards are damaged, removed"):
            run(corpus, out, loaded)
    assert_same(out, finished)


def test_json_too_deep_to_be_read_is_damage(finished, out, corpus, loaded):
    (out / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(OSError, match="cannot be read"):
        globenc.load_extract(out)
    quietly(corpus, out, loaded)
    assert_same(out, finished)


@pytest.mark.parametrize("name", ["manifest.json", "rejects.jsonl", ".lock", "data"])
def test_what_is_in_the_place_of_a_file_or_folder(out, corpus, loaded, name):
    path = out / name
    if name == "data":
        shutil.rmtree(path)
        path.write_text("precious")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    kind = "file where the folder of the shards belongs" if name == "data" else "folder"
    told = rf"{name}' is a {kind}: move it away"
    for overwrite in (False, True):
        with pytest.raises(OSError, match=told):
            run(corpus, out, loaded, overwrite=overwrite)


def told_by(act: Callable[[], object]) -> str | None:
    """What an OSError says; None where there is none."""
    try:
        act()
    except OSError as error:
        return str(error)
    return None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT], ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_call_that_fails_is_a_sentence_and_loses_nothing(finished, corpus, loaded, tmp_path, call, number):
    act, folder = getattr(os, call), tmp_path / "out"
    for failing in range(2, 40, 5):
        count = 0

        def fails(*arguments, count_at=failing, **options):
            nonlocal count
            count += 1
            if count >= count_at:
                raise OSError(number, os.strerror(number))
            return act(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, call, fails)
            told = told_by(lambda: run(corpus, folder, loaded))
        if told is None:
            break
        assert told.startswith(("cannot write '", "output '"))
        assert told.endswith(os.strerror(number))
    else:
        pytest.fail("it never came to its end")
    run(corpus, folder, loaded)
    assert_same(folder, finished)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 128 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=128k", "none", str(place)], capture_output=True
        ).returncode
    )
    if not made:
        pytest.skip("needs a file system of its own")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@posix
def test_a_really_full_disk(finished, corpus, loaded, small_disk):
    full = small_disk / "full"
    sizes = [128, 124, 120, 116, 112, 100, 90, 0]  # KiB that others take
    rows = [0]
    for size in sizes:
        try:
            full.write_bytes(bytes(size << 10))
        except OSError:
            assert size > 100
        told = told_by(lambda: run(corpus, small_disk / "out", loaded))
        if told is None:
            break
        assert told.endswith("No space left on device")
        full.unlink()
        rows.append(globenc.extraction.shards.done_rows(small_disk / "out"))
    assert rows == sorted(rows)
    assert len(set(rows)) > 1
    assert_same(small_disk / "out", finished)
    full.unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OSError, match="out' cannot be written to: Read-only file system"):
        run(corpus, small_disk / "out", loaded)
    assert globenc.load_extract(small_disk / "out").num_rows == 26


def test_a_lock_that_the_user_takes_away(finished, corpus, other_corpus, loaded, tmp_path):
    folder = tmp_path / "out"
    with at_a_shard(lambda: (folder / ".lock").unlink()):
        run(corpus, folder, loaded)
    assert_same(folder, finished)

    def another() -> None:
        (folder / ".lock").unlink()
        run(other_corpus, folder, loaded, overwrite=True)

    with (
        at_a_shard(another, 1),
        pytest.raises(OSError, match="was written by another run meanwhile: run the same command again"),
    ):
        run(corpus, folder, loaded, overwrite=True)
    run(other_corpus, tmp_path / "other", loaded)
    assert_same(folder, tmp_path / "other")


def test_another_run_that_still_writes(corpus, loaded, tmp_path):
    folder = tmp_path / "out"
    locks = []

    def another() -> None:
        (folder / ".lock").unlink()
        locks.append(FileLock(folder / ".lock"))
        locks[0].acquire(timeout=0)

    with at_a_shard(another, 1), pytest.raises(OSError, match="is being written by another run"):
        run(corpus, folder, loaded)
    locks[0].release()
    assert run(corpus, folder, loaded).rows == 26


@posix
def test_a_folder_that_is_moved_during_the_run(finished, corpus, loaded, tmp_path):
    folder, moved = tmp_path / "out", tmp_path / "moved"
    with (
        at_a_shard(lambda: folder.rename(moved), 1),
        pytest.raises(OSError, match="out' was moved or removed during the run"),
    ):
        run(corpus, folder, loaded)
    assert not folder.exists()
    run(corpus, moved, loaded)
    assert_same(moved, finished)
