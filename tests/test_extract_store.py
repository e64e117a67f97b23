"""The folder of an extraction under damage, kills, strangers and full disks: told or mended, never silently wrong."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import LETTERS, save_letter_model
from pyarrow import parquet

import globenc
from globenc.extraction.checksum import parquet_bytes, parquet_hash

GENERATOR = np.random.default_rng(0)
TEXTS = [" ".join(GENERATOR.choice(LETTERS, GENERATOR.integers(1, 9))) for _ in range(30)]
BAD = {3: None, 11: "", 29: "\N{ZERO WIDTH SPACE}"}
GOOD = [k for k in range(30) if k not in BAD]
PART = "data/part-00002.parquet"
posix = pytest.mark.skipif(os.name != "posix", reason="needs signals and files of POSIX")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    """A folder with a tiny classifier that knows single letters."""
    return save_letter_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model_folder) -> globenc.GlobEnc:
    return globenc.GlobEnc.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """30 rows of JSONL in 5 shards, three of them bad."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": BAD.get(k, text)}) + "\n" for k, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="module")
def other_corpus(tmp_path_factory) -> Path:
    """As many rows and bytes, and other words."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    shifted = [text.translate(dict(zip(map(ord, LETTERS), [*LETTERS[1:], LETTERS[0]], strict=True))) for text in TEXTS]
    path.write_text("".join(json.dumps({"text": BAD.get(k, text)}) + "\n" for k, text in enumerate(shifted)))
    return path


@pytest.fixture(scope="module")
def finished(corpus, loaded, tmp_path_factory) -> Path:
    """An extraction that nothing happened to; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(corpus, folder, loaded)
    return folder


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def run(inputs, folder, model, **options) -> globenc.extraction.run.ExtractSummary:
    return globenc.extract(inputs, folder, model=model, **{"progress": False, "shard_rows": 7, **options})


def quietly(*arguments, **options):
    """`run`, whatever it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run(*arguments, **options)


def assert_same(folder: Path, other: Path) -> None:
    """Two extractions with the same rows, and the same bytes in every file but the times in the manifests."""
    assert globenc.load_extract(folder).equals(globenc.load_extract(other), check_metadata=True)
    names, others = (
        sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file() and path.name != ".lock")
        for place in (folder, other)
    )
    assert names == others
    for name in names:
        if name.name != "manifest.json":
            assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (folder, other)]
    for manifest in manifests:
        for name in ("started", "finished", "sha256", "inputs"):
            del manifest[name]
    assert manifests[0] == manifests[1]


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


# --- damage in a shard ---


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
    told = r"2 of its files are no shards of this run .* the first: part-00001.parquet is missing or damaged"
    with pytest.warns(UserWarning, match=told):
        assert run(corpus, out, loaded).resumed == 16


def other_model(loaded: globenc.GlobEnc, model_folder: str) -> globenc.GlobEnc:
    other = globenc.GlobEnc.from_pretrained(model_folder)
    with torch.no_grad():
        other.model.classifier.bias[0] += 1e-3
    return other


@pytest.mark.parametrize("kind", ["method", "model", "option", "input"])
def test_a_shard_of_another_run_is_told_and_made_again(
    finished, out, corpus, other_corpus, loaded, model_folder, tmp_path, kind
):
    model = other_model(loaded, model_folder) if kind == "model" else loaded
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
    with pytest.warns(UserWarning, match=f"1 of its shards are left out, the first: part-00002.parquet is {reason}"):
        assert globenc.load_extract(out, incomplete=True).num_rows == 20
    with pytest.warns(UserWarning, match=f"the first: part-00002.parquet is {reason}"):
        assert run(corpus, out, loaded).resumed == 23
    assert_same(out, finished)


def test_a_shard_behind_the_end(finished, out, corpus, loaded, tmp_path):
    run(corpus, tmp_path / "other", loaded, shard_rows=5)
    shutil.copy(tmp_path / "other" / "data" / "part-00005.parquet", out / "data")
    with pytest.warns(UserWarning, match="1 of its shards are left out, the first: part-00005.parquet is behind"):
        assert globenc.load_extract(out).num_rows == 27
    with pytest.warns(UserWarning, match="part-00005.parquet is of another run"):
        assert run(corpus, out, loaded).resumed == 30
    assert_same(out, finished)


def test_nothing_but_shards_of_another_run(finished, out, corpus, loaded, tmp_path):
    """Whatever the manifest says, a whole other extraction is not thrown away but where that is asked for."""
    run(corpus, tmp_path / "other", loaded, method="N-Res")
    shutil.copy(tmp_path / "other" / "manifest.json", out)
    with pytest.raises(OSError, match=r'part-00000.parquet\' is of another run: its method is "N-Enc"'):
        globenc.load_extract(out)
    with pytest.raises(ValueError, match='was begun with method "N-Enc", and now it is "N-Res"; name another folder'):
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
    read = Path.read_bytes

    def denied(path):
        if path.name == "part-00002.parquet":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", denied)
    for use in (lambda: run(corpus, out, loaded), lambda: globenc.load_extract(out)):
        with pytest.raises(OSError, match=r"part-00002.parquet' cannot be read: Permission denied"):
            use()
    assert len(list((out / "data").iterdir())) == 5


# --- the manifest and the rejects ---


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
            manifest = globenc.extraction.store.read_manifest(out)
        except OSError:
            continue
        assert {**manifest, "sha256": whole["sha256"]} == whole  # white space


def test_a_lost_manifest_and_a_damaged_shard(finished, out, corpus, loaded):
    (out / "manifest.json").unlink()
    for k in (0, 2):
        DAMAGE["bit"](out / f"data/part-0000{k}.parquet")
    with pytest.warns(UserWarning, match="2 of its shards are left out"):
        assert globenc.load_extract(out, incomplete=True).num_rows == 14
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
    assert lines.count(b"\n") == 3
    if kind == "lost":
        path.unlink()
    else:
        path.write_bytes({"short": lines[:-9], "changed": lines.replace(b"null", b"good"), "empty": b""}[kind])
    assert globenc.load_extract(out).num_rows == 27
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
    with pytest.raises(OSError, match=r"cannot write '.*data': File exists"):
        run(corpus, out, loaded)


def test_an_older_version(finished, out, corpus, loaded):
    manifest = {"format": "globenc-extract-1", "complete": True, "identity": {}, "counts": {}}
    (out / "manifest.json").write_text(json.dumps(manifest))
    for use in (lambda: run(corpus, out, loaded), lambda: globenc.load_extract(out)):
        with pytest.raises(OSError, match="its format is 'globenc-extract-1'; name another folder, or overwrite it"):
            use()
    run(corpus, out, loaded, overwrite=True)
    assert_same(out, finished)


# --- what a killed run leaves ---


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


class KilledError(BaseException):
    """As if the program ended."""


@contextlib.contextmanager
def killed_at(number: int, stage: str):
    """The end of the program before or after one of its renames and removals; `assert` that it came, if it must."""
    count = 0

    def dying(act):
        def counted(path, *arguments, **options):
            nonlocal count
            count += 1
            if count > number or (count, stage) == (number, "before"):
                raise KilledError
            found = act(path, *arguments, **options)
            if count == number:
                raise KilledError
            return found

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(Path, "unlink", dying(Path.unlink))
        yield


BEGUN = ("nothing", "method", "input", "damaged")  # of these the first and the third are quick


def begin_with(kind: str, folder: Path, corpus: Path, other: Path, model: globenc.GlobEnc) -> dict[str, bool]:
    """A folder as a run may find it, and the options of that run."""
    if kind == "method":
        run(corpus, folder, model, method="N-Res")
    elif kind == "input":  # of the same size, so that only its rows tell
        run(other, folder, model)
    elif kind == "damaged":
        run(corpus, folder, model)
        DAMAGE["bit"](folder / PART)
        DAMAGE["missing"](folder / "data" / "part-00004.parquet")
        (folder / "rejects.jsonl").unlink()
    return {"overwrite": kind in ("method", "input")}


@pytest.mark.parametrize("begun", ["nothing", "input", *(pytest.param(k, marks=pytest.mark.slow) for k in BEGUN[1::2])])
def test_killed_before_and_after_every_rename(finished, corpus, other_corpus, loaded, tmp_path, begun):
    options = begin_with(begun, tmp_path / "begun", corpus, other_corpus, loaded) if begun != "nothing" else {}
    number, killed = 0, True
    while killed:
        number += 1
        for stage in ("before", "after"):
            folder = tmp_path / f"{number}-{stage}"
            if begun != "nothing":
                shutil.copytree(tmp_path / "begun", folder)
            killed = False
            try:
                with killed_at(number, stage):
                    quietly(corpus, folder, loaded, **options)
            except KilledError:
                killed = True
            began = number > 1 or stage == "after"  # else nothing was done yet
            again = options if number % 2 or not began else {}
            quietly(corpus, folder, loaded, **again)
            assert_same(folder, finished)
            shutil.rmtree(folder)
    assert number > 6


DRIVER = """
import os, signal, sys, time, pathlib, warnings, shutil
import globenc
warnings.simplefilter("ignore")
corpus, begun, out, model, overwrite, how = sys.argv[1:]
explainer = globenc.GlobEnc.from_pretrained(model)
overwrite = overwrite == "True"
names = ("replace", "unlink", "mkdir", "rename", "fsync", "open")


def extract(**options):
    globenc.extract(corpus, out, model=explainer, shard_rows=7, progress=False, **options)


def deadly(number, stage):
    count = 0
    def dying(act):
        def counted(*arguments, **options):
            nonlocal count
            count += 1
            if (count, stage) == (number, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            found = act(*arguments, **options)
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return found
        return counted
    for owner, name in [(os, n) for n in names] + [(pathlib.Path, n) for n in ("replace", "unlink", "mkdir")]:
        setattr(owner, name, dying(getattr(owner, name)))


def child(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def mended(number):
    _, status = os.waitpid(child(lambda: extract(overwrite=overwrite and number % 2 == 0)), 0)
    if status:
        _, status = os.waitpid(child(lambda: extract(overwrite=overwrite)), 0)
    assert not status, number
    expected, table = globenc.load_extract(sys.argv[2] + "/../whole"), globenc.load_extract(out)
    assert table.equals(expected, check_metadata=True), number
    shutil.rmtree(out)


def fresh():
    if os.path.isdir(begun):
        shutil.copytree(begun, out)


kills = number = 0
while True:
    number += 1
    fresh()
    if how == "time":
        pid = child(lambda: extract(overwrite=overwrite))
        time.sleep(number * 0.01)
        os.kill(pid, signal.SIGKILL)
        if number > 100:
            break
    else:
        stage = ("before", "after")[number % 2]
        def act():
            deadly((number + 1) // 2, stage)
            extract(overwrite=overwrite)
        pid = child(act)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or status == 0, number
    kills += os.WIFSIGNALED(status)
    mended(number)
    if how != "time" and not os.WIFSIGNALED(status):
        break
print(kills)
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("how", ["call", "time"])
@pytest.mark.parametrize("begun", BEGUN)
def test_kill_9_at_every_call_and_in_the_first_second(
    finished, corpus, other_corpus, loaded, model_folder, tmp_path, begun, how
):
    """Before and after every rename, removal, new folder, opened file and flush of a run; and every 10 ms."""
    options = {} if begun == "nothing" else begin_with(begun, tmp_path / "begun", corpus, other_corpus, loaded)
    shutil.copytree(finished, tmp_path / "whole")
    (tmp_path / "begun").mkdir(exist_ok=True)
    if begun == "nothing":
        (tmp_path / "begun").rmdir()
    arguments = [corpus, tmp_path / "begun", tmp_path / "out", model_folder, options.get("overwrite", False), how]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = int(done.stdout)
    print(f"{begun}, {how}: {kills} kills")
    assert kills > 20
