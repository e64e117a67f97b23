"""Inputs that are written to, replaced or removed while they are read."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from extract_helpers import (
    assert_same,
    at_a_shard,
    posix,
    run,
)
from helpers import LETTERS
from pyarrow import parquet

import globenc


def written(path: Path, texts: list[str]) -> None:
    """Rows in the format that the ending says, into the file that is there."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        content = gzip.compress(lines, mtime=0)
    elif path.suffix == ".parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.table({"text": texts}), sink, row_group_size=10, use_dictionary=False)
        content = sink.getvalue().to_pybytes()
    else:
        content = lines if path.suffix == ".jsonl" else "\n".join(["text", *texts, ""]).encode()
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.write(content)
        file.truncate()


def rewritten(path: Path) -> None:
    written(path, [text[::-1] for text in LONG])


def restored(path: Path) -> None:
    before = path.stat()
    rewritten(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def appended(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"one more")


GENERATOR = np.random.default_rng(0)
LONG = [" ".join(GENERATOR.choice(LETTERS, 4)) for _ in range(100)]
CHANGES = [(change, "in.jsonl", None) for change in (rewritten, restored, appended, os.utime)]
CHANGES += [(rewritten, name, None) for name in ("in.csv", "in.tsv", "in.txt", "in.jsonl.gz", "in.parquet")]
CHANGES += [(rewritten, "in.jsonl", 60), (appended, "in.txt", None)]


@posix
@pytest.mark.parametrize(("change", "name", "limit"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_an_input_that_is_written_to_is_not_called_done(loaded, tmp_path, change, name, limit):
    path, folder = tmp_path / name, tmp_path / "out"
    written(path, LONG)
    with (
        at_a_shard(lambda: change(path)),
        pytest.raises(OSError, match=rf"input '.*{name}' was changed while it was read, and rows of two versions"),
    ):
        run(path, folder, loaded, limit=limit)
    assert not json.loads((folder / "manifest.json").read_text())["complete"]
    if change is os.utime:  # only touched: the same command sees that
        assert run(path, folder, loaded).resumed > 0
        return
    with pytest.raises(ValueError, match=r"begun with (?:another )?input"):
        run(path, folder, loaded, limit=limit)
    run(path, folder, loaded, limit=limit, overwrite=True)
    run(path, tmp_path / "whole", loaded, limit=limit)
    assert_same(folder, tmp_path / "whole")


@posix
@pytest.mark.parametrize("act", ["replaced", "removed"])
def test_an_input_that_another_takes_the_place_of_is_read_to_its_end(loaded, tmp_path, act):
    path, folder, new = tmp_path / "in.jsonl", tmp_path / "out", tmp_path / "new.jsonl"
    written(path, LONG)
    run(path, tmp_path / "whole", loaded)
    written(new, [text[::-1] for text in LONG])
    with (
        at_a_shard(lambda: new.replace(path) if act == "replaced" else path.unlink()),
        pytest.warns(UserWarning, match=r"in.jsonl' was changed or replaced during the run") as caught,
    ):
        run(path, folder, loaded)
    assert caught[0].filename == run.__code__.co_filename
    assert_same(folder, tmp_path / "whole")


def test_an_input_that_grows_between_two_looks(loaded, tmp_path, monkeypatch):
    path = tmp_path / "in.txt"
    written(path, LONG)
    monkeypatch.setattr(globenc.extraction.run, "model_hash", lambda explainer: appended(path))
    with pytest.raises(OSError, match="was changed since the run began: it had 805 bytes and now has 813"):
        run(path, tmp_path / "out", loaded)
