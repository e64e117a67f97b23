"""Whatever stops an extraction, no row is lost, doubled or changed."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from extract_helpers import (
    ROWS,
    assert_same,
    run,
)
from helpers import LETTERS

import globenc
from globenc.extraction import local, tables
from globenc.extraction.store import Store


def arrays(column, dtype=np.float32) -> list[np.ndarray]:
    return [np.array(value, dtype) for value in column.to_pylist()]


def test_strict_stops_at_the_first_bad_row(finished, corpus, model, tmp_path):
    with pytest.raises(ValueError, match=r"^row 3 \(rows.jsonl line 4\): text column 'text' is null$"):
        run(corpus, tmp_path / "out", model, strict=True)
    assert run(corpus, tmp_path / "out", model).rows == 26  # not an option of the output
    assert_same(tmp_path / "out", finished)
    hidden = [{"text": "a"}, {"text": "\N{ZERO WIDTH SPACE}"}]
    with pytest.raises(ValueError, match=r"^row 1 .*: the tokenizer finds no token in the text$"):
        run(hidden, tmp_path / "hidden", model, strict=True)
    run(hidden, tmp_path / "hidden", model)
    with pytest.raises(ValueError, match=r"^1 of the rows 0 to 1 were rejected before"):
        run(hidden, tmp_path / "hidden", model, strict=True)


def test_a_position_outside_a_text_is_a_bad_row(model, tmp_path):
    rows = [{"text": "a b c d"}, {"text": "a"}]
    summary = run(rows, tmp_path / "out", model, position=4)
    assert (summary.rows, summary.rejected) == (1, 1)
    assert "got 4 for 3 tokens" in json.loads((tmp_path / "out" / "rejects.jsonl").read_text())["reason"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_budget(loaded, corpus, finished, tmp_path, monkeypatch, error):
    score, sizes = globenc.GlobEnc.score, []

    def small(self, encodings, **options):
        sizes.append(len(encodings) * max(len(encoding) for encoding in encodings))
        if sizes[-1] > 50:
            raise error
        return score(self, encodings, **options)

    monkeypatch.setattr(globenc.GlobEnc, "score", small)
    with pytest.warns(UserWarning, match="out of memory: going on with batches of") as caught:
        run(corpus, tmp_path / "out", loaded, batch_tokens=200)
    assert caught[0].filename == run.__code__.co_filename
    assert 25 < max(size for size in sizes if size <= 50) <= 50
    assert sum(size > 50 for size in sizes) <= 3  # not tried again in every shard
    actual, expected = globenc.load_extract(tmp_path / "out"), globenc.load_extract(finished)
    assert actual.drop_columns(["scores", "probability", "log2_scale"]).equals(
        expected.drop_columns(["scores", "probability", "log2_scale"])
    )
    for mine, other in zip(arrays(actual["scores"]), arrays(expected["scores"]), strict=True):
        np.testing.assert_allclose(mine, other, rtol=2e-5)


def test_a_text_that_does_not_fit_at_all_is_a_bad_row(loaded, tmp_path, monkeypatch):
    score = globenc.GlobEnc.score

    def small(self, encodings, **options):
        if len(encodings) * max(len(encoding) for encoding in encodings) > 12:
            raise MemoryError
        return score(self, encodings, **options)

    monkeypatch.setattr(globenc.GlobEnc, "score", small)
    rows = [{"text": "a b c"}, {"text": " ".join(LETTERS)}, {"text": "c"}]
    with pytest.warns(UserWarning, match="out of memory"):
        summary = run(rows, tmp_path / "out", loaded)
    assert (summary.rows, summary.rejected) == (2, 1)
    reject = json.loads((tmp_path / "out" / "rejects.jsonl").read_text())
    assert (reject["row"], reject["reason"]) == (1, "out of memory: its 28 tokens do not fit; lower max_length")


def test_other_runtime_errors_are_not_taken_for_full_memory(loaded, corpus, tmp_path, monkeypatch):
    def broken(self, encodings, **options):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(globenc.GlobEnc, "score", broken)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        run(corpus, tmp_path / "out", loaded)


def test_texts_without_finite_numbers_are_bad_rows(model, tmp_path):
    broken = globenc.GlobEnc.from_pretrained(model)
    z = broken.tokenizer.convert_tokens_to_ids("z")
    with torch.no_grad():
        broken.model.bert.embeddings.word_embeddings.weight[z] = float("nan")
    rows = [{"text": text} for text in ("a b", "c", "z", "d e", "a z", "f")]
    summary = run(rows, tmp_path / "out", broken)
    assert (summary.rows, summary.rejected) == (4, 2)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == [2, 4]
    assert all("finite" in reject["reason"] for reject in rejects)
    with torch.no_grad():
        broken.model.bert.embeddings.word_embeddings.weight[:] = float("nan")
    with pytest.raises(FloatingPointError, match="finite"):
        run(ROWS, tmp_path / "none", broken)


def test_a_full_disk_loses_nothing(finished, corpus, model, tmp_path, monkeypatch):
    replace = Store._replace

    def full(self, path, content):
        if path.name == "part-00003.parquet":
            path.with_name(f".{path.name}.tmp").write_bytes(content[:100])
            raise OSError(f"cannot write {str(path)!r}: {os.strerror(errno.ENOSPC)}")
        replace(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_replace", full)
        with pytest.raises(OSError, match=r"cannot write .*: No space left on device"):
            run(corpus, tmp_path / "out", model)
    with pytest.raises(ValueError, match="is incomplete: 21 rows of the input are done"):
        globenc.load_extract(tmp_path / "out")
    assert globenc.load_extract(tmp_path / "out", incomplete=True).num_rows == 18
    assert run(corpus, tmp_path / "out", model).resumed == 21
    assert_same(tmp_path / "out", finished)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_message_of_a_real_full_disk(tmp_path):
    folder = tmp_path / "out"
    with Store.opened(folder) as store:
        os.symlink("/dev/full", folder / ".manifest.json.tmp")
        with pytest.raises(OSError, match=r"cannot write '.*manifest.json': No space left on device"):
            store._write("manifest.json", {"format": "globenc-extract-1"})
        assert [path.name for path in folder.iterdir()] == [".lock"]


def test_an_input_that_breaks_off_loses_nothing(model, tmp_path):
    def broken():
        yield from ROWS[:25]
        raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        run(broken(), tmp_path / "out", model)
    assert globenc.load_extract(tmp_path / "out", incomplete=True)["id"].to_pylist() == list(range(21))
    assert run(iter(ROWS), tmp_path / "out", model).resumed == 21
    assert globenc.load_extract(tmp_path / "out")["id"].to_pylist() == list(range(30))


def test_an_interrupt_drops_the_shard_in_hand_whole(finished, corpus, loaded, tmp_path, monkeypatch):
    score, calls = globenc.GlobEnc.score, []

    def interrupted(self, encodings, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score(self, encodings, **options)

    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(globenc.GlobEnc, "score", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "out", loaded)
    names = sorted(path.name for path in (tmp_path / "out" / "data").iterdir())
    assert names == [f"part-0000{k}.parquet" for k in range(3)]
    assert run(corpus, tmp_path / "out", loaded).resumed == 21
    assert_same(tmp_path / "out", finished)
    for thread in threading.enumerate():
        if thread.name.startswith("globenc-"):
            thread.join(5)
    assert threading.active_count() <= before


def test_left_over_parts_of_a_killed_run_go_away(finished, corpus, model, tmp_path):
    run(corpus, tmp_path / "out", model)
    data = tmp_path / "out" / "data"
    (data / "part-00004.parquet").rename(data / ".part-00004.parquet.tmp")
    (tmp_path / "out" / ".manifest.json.tmp").write_text("{")
    with open(tmp_path / "out" / "rejects.jsonl", "a") as file:
        file.write('{"row": 29, "inp')
    assert run(corpus, tmp_path / "out", model).resumed == 28
    assert_same(tmp_path / "out", finished)


def test_reading_and_writing_overlap_with_the_model():
    """`ahead` makes the next item while one is used, and no more than needed."""
    made: list[int] = []
    second = threading.Event()

    def items():
        for k in range(6):
            made.append(k)
            if k == 1:
                second.set()
            yield k

    each = local.ahead(items())
    assert next(each) == 0
    assert second.wait(5)
    assert len(made) <= 3
    assert list(each) == [1, 2, 3, 4, 5]


def test_a_text_of_many_scores_names_the_way_out():
    with pytest.raises(ValueError, match="is more than a Parquet list holds: lower shard_rows"):
        tables._lists([2**30, 2**30], pa.array([], pa.int32()))


def deadly(replace, stage: str, k: int):
    """`Store._replace` in a process that dies in the middle of the file of shard `k`, or just behind it."""

    def killed(self, path, content):
        if path.name == f"part-{k:05d}.parquet" and stage == "before":
            path.with_name(f".{path.name}.tmp").write_bytes(content[:50])
            os.kill(os.getpid(), signal.SIGKILL)
        replace(self, path, content)
        if path.name == f"part-{k:05d}.parquet":
            os.kill(os.getpid(), signal.SIGKILL)

    return killed


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_while_writing(finished, corpus, loaded, tmp_path):
    """kill -9 in the middle of a shard's file, and just behind it."""
    for stage, k, done in (("before", 1, 7), ("after", 3, 28)):
        pid = os.fork()
        if pid == 0:
            signal.alarm(60)
            Store._replace = deadly(Store._replace, stage, k)
            try:
                run(corpus, tmp_path / "out", loaded)
            finally:
                os._exit(1)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGKILL
        with pytest.raises(ValueError, match=f"is incomplete: {done} rows of the input are done"):
            globenc.load_extract(tmp_path / "out")
    assert run(corpus, tmp_path / "out", loaded).resumed == 28
    assert_same(tmp_path / "out", finished)
