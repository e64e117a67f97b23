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
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from filelock import FileLock
from helpers import LETTERS, save_letter_model
from pyarrow import parquet
from typer.testing import CliRunner

import globenc
from globenc.cli import app
from globenc.extraction.checksum import json_bytes, parquet_bytes, parquet_hash

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
    told = r"2 shards are damaged, removed, and what is missing is made again; the first: part-00001.parquet is damaged"
    with pytest.warns(UserWarning, match=told):
        assert run(corpus, out, loaded).resumed == 16


def test_the_command_says_what_it_makes_again(finished, out, corpus, model_folder):
    DAMAGE["bit"](out / PART)
    arguments = ["extract", str(corpus), "-o", str(out), "-m", model_folder, "--shard-rows", "7"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    lines = done.stderr.splitlines()
    told = "1 shard is damaged, removed, and what is missing is made again; part-00002.parquet is damaged"
    assert lines[0].endswith(told)
    assert lines[1].startswith(f"globenc: wrote {out}: 27 of 30 rows (23 done before) in ")
    assert_same(out, finished)


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
    with pytest.warns(UserWarning, match=f"1 shard is not of this run, .*again; part-00002.parquet is {reason}"):
        assert run(corpus, out, loaded).resumed == 23
    assert_same(out, finished)


def test_a_shard_of_another_input_in_a_run_that_is_not_done(finished, out, corpus, other_corpus, loaded, tmp_path):
    with contextlib.suppress(KilledError), killed_at(14, "before"):
        run(corpus, out, loaded, overwrite=True)
    run(other_corpus, tmp_path / "other", loaded)
    shutil.copy(tmp_path / "other" / PART, out / PART)
    with pytest.warns(UserWarning, match=r"the first: part-00002.parquet is of another input"):
        assert globenc.load_extract(out, incomplete=True).num_rows == 20
    with pytest.warns(UserWarning, match=r"part-00002.parquet is of another input"):
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
            manifest = globenc.extraction.manifest.read_manifest(out)
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
import builtins, os, shutil, signal, sys, time, warnings
import globenc
warnings.simplefilter("ignore")
corpus, begun, whole, out, model, overwrite, how = sys.argv[1:]
explainer = globenc.GlobEnc.from_pretrained(model)
overwrite = overwrite == "True"


def extract(**options):
    globenc.extract(corpus, out, model=explainer, shard_rows=7, progress=False, **options)


def deadly(number, stage):
    count = 0
    def dying(act, counts=lambda *arguments: True):
        def counted(*arguments, **options):
            nonlocal count
            if not counts(*arguments):
                return act(*arguments, **options)
            count += 1
            mine = count
            if (mine, stage) == (number, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return act(*arguments, **options)
            finally:
                if mine == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        return counted
    for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    builtins.open = dying(open, lambda path, mode="r", *more: mode[0] in "wa")


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
    expected, table = globenc.load_extract(whole), globenc.load_extract(out)
    assert table.equals(expected, check_metadata=True), number
    shutil.rmtree(out)


def fresh():
    if os.path.isdir(begun):
        shutil.copytree(begun, out)


start = time.monotonic()
mended(0)
step = (time.monotonic() - start) / 40
kills = number = 0
while True:
    number += 1
    fresh()
    if how == "time":
        pid = child(lambda: extract(overwrite=overwrite))
        time.sleep(number * step)
        os.kill(pid, signal.SIGKILL)
        if number > 50:
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
@pytest.mark.parametrize(
    ("begun", "how"), [*((begun, "call") for begun in BEGUN), ("nothing", "time"), ("input", "time")]
)
def test_kill_9_at_every_call_and_at_any_time(
    finished, corpus, other_corpus, loaded, model_folder, tmp_path, begun, how
):
    """Before and after every rename, removal, new folder, opened file and flush of a run; and at any time of it."""
    options = {} if begun == "nothing" else begin_with(begun, tmp_path / "begun", corpus, other_corpus, loaded)
    folders = [tmp_path / "begun", finished, tmp_path / "out", model_folder]
    arguments = [corpus, *folders, options.get("overwrite", False), how]
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


# --- inputs that change ---


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


LONG = [" ".join(GENERATOR.choice(LETTERS, 4)) for _ in range(100)]
CHANGES = [(change, "in.jsonl", None) for change in (rewritten, restored, appended, os.utime)]
CHANGES += [(rewritten, name, None) for name in ("in.csv", "in.tsv", "in.txt", "in.jsonl.gz", "in.parquet")]
CHANGES += [(rewritten, "in.jsonl", 60), (appended, "in.txt", None)]


@contextlib.contextmanager
def at_a_shard(act: Callable[[], object], number: int = 2):
    """Something that happens before the model sees a shard; before the first one, nothing writes beside it."""
    score, done = globenc.GlobEnc.score, []

    def acting(self, encodings, **options):
        done.append(1)
        if len(done) == number:
            act()
        return score(self, encodings, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(globenc.GlobEnc, "score", acting)
        yield


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
        pytest.warns(UserWarning, match=r"in.jsonl' was changed or replaced during the run"),
    ):
        run(path, folder, loaded)
    assert_same(folder, tmp_path / "whole")


def test_an_input_that_grows_between_two_looks(loaded, tmp_path, monkeypatch):
    path = tmp_path / "in.txt"
    written(path, LONG)
    monkeypatch.setattr(globenc.extraction.run, "model_hash", lambda explainer: appended(path))
    with pytest.raises(OSError, match="was changed since the run began: it had 805 bytes and now has 813"):
        run(path, tmp_path / "out", loaded)


# --- writing that fails, and others in the folder ---


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
    assert globenc.load_extract(small_disk / "out").num_rows == 27


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
    assert run(corpus, folder, loaded).rows == 27


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
