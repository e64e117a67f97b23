"""Damage in shards, the manifest and the rejects: told, and made again by the same command."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from extract_helpers import (
    PART,
    KilledError,
    assert_same,
    flipped,
    killed_at,
    posix,
    quietly,
    run,
)
from pyarrow import parquet
from typer.testing import CliRunner

import globenc
from globenc.cli import app
from globenc.extraction.checksum import json_bytes, parquet_bytes, parquet_hash


def test_no_bit_of_a_shard_can_change(finished):
    content = (finished / PART).read_bytes()
    assert len(parquet_hash(content)) == 64
    for place in range(len(content)):
        with pytest.raises(ValueError, match="is damaged"):
            parquet_hash(flipped(content, place, place % 8))


def test_texts_that_look_like_the_hash():
    """The field's own bytes, before and behind it, are only bytes."""
    field = b"globenc.sha256\x18@" + b"0" * 64
    table = pa.table({"a": pa.array([field, b"globenc.sha256"], pa.binary())})
    content = parquet_bytes(table.replace_schema_metadata({"aaa": field, "zzz": field}))
    assert parquet_hash(content).encode() in content
    assert parquet.read_table(pa.BufferReader(content))["a"].to_pylist() == [field, b"globenc.sha256"]
    with pytest.raises(ValueError, match="is damaged"):
        parquet_hash(flipped(content, content.index(field)))


def test_other_readers_can_check_pages(finished):
    assert parquet.read_table(finished / PART, page_checksum_verification=True).num_rows == 7


def without_hash(path: Path) -> None:
    parquet.write_table(parquet.read_table(path), path)


def changed_value(path: Path) -> None:
    """One score, written anew by another tool, with all the metadata of the file."""
    metadata = parquet.read_metadata(path).metadata
    table = parquet.read_table(path)
    tokens = table.column_names.index("n_tokens")
    table = table.set_column(tokens, "n_tokens", pa.array([1] * table.num_rows, pa.int32()))
    with parquet.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({b"globenc.sha256": metadata[b"globenc.sha256"]})


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit": lambda path: path.write_bytes(flipped(path.read_bytes(), 900)),
    "block": lambda path: path.write_bytes(path.read_bytes()[:512] + bytes(512) + path.read_bytes()[1024:]),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "text": lambda path: path.write_text("not Parquet"),
    "missing": lambda path: path.unlink(),
    "dangling": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "neighbour": lambda path: shutil.copy(path.with_name("part-00001.parquet"), path),
    "no-hash": without_hash,
    "changed": changed_value,
}


CASES = [(kind, True) for kind in DAMAGE] + [(kind, False) for kind in ("bit", "empty", "neighbour", "changed")]


@pytest.mark.parametrize(("kind", "complete"), CASES, ids=lambda value: {True: "complete", False: "begun"}.get(value))
def test_a_damaged_shard_is_told_left_out_and_made_again(finished, out, corpus, loaded, kind, complete):
    if not complete:
        with contextlib.suppress(KilledError), killed_at(14, "before"):
            run(corpus, out, loaded, overwrite=True)
        assert not json.loads((out / "manifest.json").read_text())["complete"]
    DAMAGE[kind](out / PART)
    with pytest.raises((OSError, ValueError), match=r"part-00002.parquet' is missing or damaged|is incomplete"):
        globenc.load_extract(out)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ids = globenc.load_extract(out, ["id"], incomplete=True)["id"].to_pylist()
    assert not set(ids) & set(range(14, 21))
    assert any("part-00002.parquet is missing or damaged" in str(warning.message) for warning in told) or not complete
    summary = quietly(corpus, out, loaded)
    assert summary.input_rows - summary.resumed >= 7
    assert_same(out, finished)


def test_a_rerun_says_what_it_makes_again(out, corpus, loaded):
    for k in (1, 3):
        DAMAGE["bit"](out / f"data/part-0000{k}.parquet")
    told = r"2 shards are damaged, removed, and what is missing is made again; the first: part-00001.parquet is damaged"
    with pytest.warns(UserWarning, match=told):
        assert run(corpus, out, loaded).resumed == 16


def test_the_command_says_what_it_makes_again(finished, out, corpus, model):
    DAMAGE["bit"](out / PART)
    arguments = ["extract", str(corpus), "-o", str(out), "-m", model, "--shard-rows", "7"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    told = "1 shard is damaged, removed, and what is missing is made again; part-00002.parquet is damaged"
    assert lines[0].endswith(told)
    assert lines[1].startswith(f"globenc: wrote {out}: 26 of 30 rows (23 done before) in ")
    assert_same(out, finished)


def other_model(loaded: globenc.GlobEnc, model: str) -> globenc.GlobEnc:
    other = globenc.GlobEnc.from_pretrained(model)
    with torch.no_grad():
        other.model.classifier.bias[0] += 1e-3
    return other


@pytest.mark.parametrize("kind", ["method", "model", "option", "input"])
def test_a_shard_of_another_run_is_told_and_made_again(
    finished, out, corpus, other_corpus, loaded, model, tmp_path, kind
):
    model = other_model(loaded, model) if kind == "model" else loaded
    options = {"method": {"method": "N-Res"}, "option": {"words": True}}.get(kind, {})
    run(other_corpus if kind == "input" else corpus, tmp_path / "other", model, **options)
    shutil.copy(tmp_path / "other" / PART, out / PART)
    reason = {
        "method": r'of another run: its method is "N-Res", not "N-Enc"',
        "model": 'of another run: its model weights is "',
        "option": "of another run: its words is true, not false",
        "input": "not what the run wrote",
    }[kind]
    with pytest.raises(OSError, match=f"part-00002.parquet' is {reason}.*: run the same command again to mend it"):
        globenc.load_extract(out)
    left_out = f"1 of its shards are left out, the first: part-00002.parquet is {reason}"
    with pytest.warns(UserWarning, match=left_out) as caught:
        assert globenc.load_extract(out, incomplete=True).num_rows == 19
    assert caught[0].filename == __file__
    with pytest.warns(
        UserWarning, match=f"1 shard is not of this run, .*again; part-00002.parquet is {reason}"
    ) as caught:
        assert run(corpus, out, loaded).resumed == 23
    assert caught[0].filename == run.__code__.co_filename
    assert_same(out, finished)


def test_a_shard_of_another_input_in_a_run_that_is_not_done(finished, out, corpus, other_corpus, loaded, tmp_path):
    with contextlib.suppress(KilledError), killed_at(14, "before"):
        run(corpus, out, loaded, overwrite=True)
    run(other_corpus, tmp_path / "other", loaded)
    shutil.copy(tmp_path / "other" / PART, out / PART)
    with pytest.warns(UserWarning, match=r"the first: part-00002.parquet is of another input"):
        assert globenc.load_extract(out, incomplete=True).num_rows == 19
    with pytest.warns(UserWarning, match=r"part-00002.parquet is of another input"):
        assert run(corpus, out, loaded).resumed == 23
    assert_same(out, finished)


def test_a_shard_behind_the_end(finished, out, corpus, loaded, tmp_path):
    run(corpus, tmp_path / "other", loaded, shard_rows=5)
    shutil.copy(tmp_path / "other" / "data" / "part-00005.parquet", out / "data")
    with pytest.warns(UserWarning, match="1 of its shards are left out, the first: part-00005.parquet is behind"):
        assert globenc.load_extract(out).num_rows == 26
    with pytest.warns(UserWarning, match="part-00005.parquet is of another run"):
        assert run(corpus, out, loaded).resumed == 30
    assert_same(out, finished)


def test_nothing_but_shards_of_another_run(finished, out, corpus, loaded, tmp_path):
    """Whatever the manifest says, a whole other extraction is not thrown away but where that is asked for."""
    run(corpus, tmp_path / "other", loaded, method="N-Res")
    shutil.copy(tmp_path / "other" / "manifest.json", out)
    with pytest.raises(OSError, match=r'part-00000.parquet\' is of another run: its method is "N-Enc"'):
        globenc.load_extract(out)
    told = r'no shard of this run: part-00000.parquet is of another run: its method is "N-Enc"'
    with pytest.raises(ValueError, match=f'{told}, not "N-Res"; name another folder, or overwrite it'):
        run(corpus, out, loaded, method="N-Res")
    assert len(list((out / "data").iterdir())) == 5
    run(corpus, out, loaded, method="N-Res", overwrite=True)
    assert_same(out, tmp_path / "other")


def test_versions_of_libraries_do_not_tell_runs_apart(finished, out, corpus, loaded, monkeypatch):
    (out / PART).unlink()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert run(corpus, out, loaded).resumed == 23
    assert globenc.load_extract(out).equals(globenc.load_extract(finished))


def test_what_is_no_file_is_left_to_the_user(out, corpus, loaded):
    (out / PART).unlink()
    (out / PART).mkdir()
    for overwrite in (False, True):
        with pytest.raises(OSError, match=r"part-00002.parquet' is a folder where a shard belongs: move it away"):
            run(corpus, out, loaded, overwrite=overwrite)
    with pytest.raises(OSError, match="is a folder where a shard belongs: move it away"):
        globenc.load_extract(out)


@posix
def test_a_linked_shard_is_read_and_the_link_replaced(finished, out, corpus, loaded, tmp_path):
    elsewhere = tmp_path / "elsewhere.parquet"
    (out / PART).rename(elsewhere)
    (out / PART).symlink_to(elsewhere)
    assert run(corpus, out, loaded).resumed == 30
    elsewhere.write_bytes(damaged := flipped(elsewhere.read_bytes(), 700))
    quietly(corpus, out, loaded)
    assert_same(out, finished)
    assert elsewhere.read_bytes() == damaged


def test_a_shard_that_may_not_be_read(out, corpus, loaded, monkeypatch):
    opened = Path.open

    def denied(path, *mode, **options):
        if path.name == "part-00002.parquet":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(path, *mode, **options)

    monkeypatch.setattr(Path, "open", denied)
    for use in (lambda: run(corpus, out, loaded), lambda: globenc.load_extract(out)):
        with pytest.raises(OSError, match=r"part-00002.parquet' cannot be read: Permission denied"):
            use()
    assert len(list((out / "data").iterdir())) == 5


def edited(name: str, value: object) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        manifest = json.loads(path.read_text())
        manifest[name] = value
        path.write_text(json.dumps(manifest))

    return edit


MANIFESTS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "short": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "not-utf8": lambda path: path.write_bytes(path.read_bytes().replace(b"N-Enc", b"N\xffEnc")),
    "list": lambda path: path.write_text("[1]"),
    "incomplete": edited("complete", False),
    "counts": edited("counts", {"input_rows": 30, "rows": 30}),
    "identity": edited("identity", {}),
    "method": lambda path: path.write_text(path.read_text().replace("N-Enc", "N-Res")),
    "hashes": edited("shard_hashes", ["0" * 64] * 5),
    "format": edited("format", "globenc-extract-3"),
    "batch": edited("batch_tokens", 1),
    "own-hash": edited("sha256", None),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_damaged_manifest_is_told_and_written_again(finished, out, corpus, loaded, kind):
    MANIFESTS[kind](out / "manifest.json")
    told = "cannot be read|is damaged|has lost its manifest|no manifest of this version"
    with pytest.raises(OSError, match=f"(?:{told}).*: run the same command again to mend it"):
        globenc.load_extract(out)
    assert globenc.load_extract(out, incomplete=True).equals(globenc.load_extract(finished))
    with pytest.raises(ValueError, match='was begun with method "N-Enc", and now it is "N-Res"; name another folder'):
        run(corpus, out, loaded, method="N-Res")
    assert run(corpus, out, loaded).resumed == 30
    assert_same(out, finished)
    MANIFESTS[kind](out / "manifest.json")
    assert run(corpus, out, loaded, overwrite=True).resumed == 0
    assert_same(out, finished)


def test_no_bit_of_the_manifest_can_change(finished, out):
    content = (out / "manifest.json").read_bytes()
    whole = json.loads(content)
    for place in range(0, len(content), 3):
        (out / "manifest.json").write_bytes(flipped(content, place, place % 8))
        try:
            manifest = globenc.extraction.manifest.read_manifest(out)
        except OSError:
            continue
        assert {**manifest, "sha256": whole["sha256"]} == whole  # white space


def test_a_lost_manifest_and_a_damaged_shard(finished, out, corpus, loaded):
    (out / "manifest.json").unlink()
    for k in (0, 2):
        DAMAGE["bit"](out / f"data/part-0000{k}.parquet")
    with pytest.warns(UserWarning, match="2 of its shards are left out"):
        assert globenc.load_extract(out, incomplete=True).num_rows == 13
    assert quietly(corpus, out, loaded).resumed == 16
    assert_same(out, finished)


def test_a_lost_manifest_keeps_the_size_of_batches(out, corpus, loaded, tmp_path):
    run(corpus, tmp_path / "small", loaded, batch_tokens=20)
    (tmp_path / "small" / "manifest.json").unlink()
    run(corpus, tmp_path / "small", loaded)
    assert json.loads((tmp_path / "small" / "manifest.json").read_text())["batch_tokens"] == 20


@pytest.mark.parametrize("kind", ["lost", "short", "changed", "empty"])
def test_rejects_come_back(finished, out, corpus, loaded, kind):
    path = out / "rejects.jsonl"
    lines = path.read_bytes()
    assert lines.count(b"\n") == 4
    if kind == "lost":
        path.unlink()
    else:
        path.write_bytes({"short": lines[:-9], "changed": lines.replace(b"null", b"good"), "empty": b""}[kind])
    assert globenc.load_extract(out).num_rows == 26
    assert run(corpus, out, loaded).resumed == 30
    assert_same(out, finished)


def test_a_lost_data_folder(finished, out, corpus, loaded):
    shutil.rmtree(out / "data")
    with pytest.raises(OSError, match=r"part-00000.parquet' is missing or damaged"):
        globenc.load_extract(out)
    assert run(corpus, out, loaded).resumed == 0
    assert_same(out, finished)
    shutil.rmtree(out / "data")
    (out / "data").write_text("mine")
    with pytest.raises(OSError, match=r"data' is a file where the folder of the shards belongs: move it away"):
        run(corpus, out, loaded)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version(finished, out, corpus, loaded, version):
    manifest = {"format": f"globenc-extract-{version}", "complete": True, "identity": {}, "counts": {}}
    content = json.dumps(manifest).encode() if version == 1 else json_bytes(manifest)  # the first had no hash
    (out / "manifest.json").write_bytes(content)
    for use in (lambda: run(corpus, out, loaded), lambda: globenc.load_extract(out)):
        with pytest.raises(OSError, match=f"-extract-{version}'; name another folder, or overwrite"):
            use()
    run(corpus, out, loaded, overwrite=True)
    assert_same(out, finished)


@posix
def test_a_name_that_is_not_utf8(corpus, loaded, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9.jsonl")
    path.write_bytes(corpus.read_bytes())
    run(path, tmp_path / "out", loaded)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"] == [str(path)]
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert {json.loads(line)["input"] for line in lines} == {path.name}
    assert run(path, tmp_path / "out", loaded).resumed == 30


@pytest.mark.slow
def test_300_flips_and_60_zeroed_blocks(finished, corpus, loaded, tmp_path):
    """Every one told by load_extract, and mended by the same command."""
    generator, folder = np.random.default_rng(0), tmp_path / "out"
    shutil.copytree(finished, folder)
    parts = sorted((finished / "data").iterdir())
    for number in range(360):
        part = parts[generator.integers(len(parts))]
        content = part.read_bytes()
        if number < 300:
            damaged = flipped(content, int(generator.integers(len(content))), int(generator.integers(8)))
        else:
            size = int(generator.choice([16, 128, 512, 4096]))
            start = int(generator.integers(max(1, len(content) - size)))
            damaged = content[:start] + bytes(min(size, len(content) - start)) + content[start + size :]
        if damaged == content:
            continue
        (folder / "data" / part.name).write_bytes(damaged)
        with pytest.raises(OSError, match=rf"{part.name}' is missing or damaged"):
            globenc.load_extract(folder)
        assert quietly(corpus, folder, loaded).resumed < 30
        assert_same(folder, finished)
