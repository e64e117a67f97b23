"""Extraction with engine "local": what is written, and that whatever happens no row is lost, doubled or changed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
import torch
import transformers
from filelock import FileLock
from helpers import LETTERS, save_letter_model
from pyarrow import parquet

import globenc
from globenc import ModelSource
from globenc.extraction import local, tables
from globenc.extraction.store import Store

GENERATOR = np.random.default_rng(0)


def random_text(words: int) -> str:
    return " ".join("".join(GENERATOR.choice(LETTERS, GENERATOR.integers(1, 4))) for _ in range(words))


TEXTS = [random_text(1 + k * 7 % 11) for k in range(30)]
PAIRS = [random_text(1 + k * 5 % 4) for k in range(30)]
ROWS = [
    {"text": text, "pair": pair, "name": f"row-{k}", "gold": k % 3}
    for k, (text, pair) in enumerate(zip(TEXTS, PAIRS, strict=True))
]
BAD = {3: None, 11: "", 12: 7, 29: "\N{ZERO WIDTH SPACE}"}
SOME_BAD = [{**row, "text": BAD.get(k, row["text"])} for k, row in enumerate(ROWS)]
REASONS = {
    3: "text column 'text' is null",
    11: "text column 'text' is empty",
    12: "text column 'text' holds a value of type int, not text",
    29: "the tokenizer finds no token in the text",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny classifier that knows single letters."""
    return save_letter_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model) -> globenc.GlobEnc:
    return globenc.GlobEnc.from_pretrained(model)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """SOME_BAD as JSONL."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SOME_BAD))
    return path


def run(inputs, folder, model, **options):
    return globenc.extract(inputs, folder, model=model, **{"progress": False, "shard_rows": 7, **options})


@pytest.fixture(scope="module")
def finished(corpus, model, tmp_path_factory) -> Path:
    """An extraction that nothing happened to; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(corpus, folder, model)
    return folder


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of a folder with its time and content."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_same(folder: Path, other: Path) -> None:
    """Two extractions with the same rows in all columns, rejects, and files."""
    assert globenc.load_extract(folder).equals(globenc.load_extract(other), check_metadata=True)
    mine, others = state(folder), state(other)
    assert mine.keys() == others.keys()
    for name in mine:
        if name != "manifest.json":
            assert mine[name][1] == others[name][1], name
    manifests = [json.loads((place / "manifest.json").read_text()) for place in (folder, other)]
    assert manifests[0]["counts"] == manifests[1]["counts"]
    assert manifests[0]["identity"] == manifests[1]["identity"]


def arrays(column, dtype=np.float32) -> list[np.ndarray]:
    return [np.array(value, dtype) for value in column.to_pylist()]


# --- what is written ---


@pytest.mark.parametrize("position", ["cls", "mean", 2, [0, -1], "all"], ids=str)
def test_columns_hold_what_globenc_gives(loaded, tmp_path, position):
    summary = run(ROWS, tmp_path / "out", loaded, position=position, per_layer=True, words=True, keep_text=True)
    assert (summary.rows, summary.input_rows, summary.rejected, summary.shards) == (30, 30, 0, 5)
    table = globenc.load_extract(tmp_path / "out")
    expected = loaded(TEXTS, position=position, per_layer=True)
    assert table["id"].to_pylist() == list(range(30))
    assert table["text"].to_pylist() == TEXTS
    assert table["tokens"].to_pylist() == [result.tokens for result in expected]
    assert table["label"].to_pylist() == [result.label for result in expected]
    assert table["n_tokens"].to_pylist() == [len(result.tokens) for result in expected]
    assert summary.tokens == sum(len(result.tokens) for result in expected)
    np.testing.assert_allclose(table["probability"].to_numpy(), [result.probability for result in expected], rtol=1e-6)
    starts = [[None if o is None else o[0] for o in result.offsets] for result in expected]
    ends = [[None if o is None else o[1] for o in result.offsets] for result in expected]
    assert (table["start"].to_pylist(), table["end"].to_pylist()) == (starts, ends)
    for k, result in enumerate(expected):
        for column in ("scores", "log2_scale", "layer_scores", "layer_log2_scale"):
            actual, wanted = np.array(table[column][k].as_py(), np.float32), np.asarray(getattr(result, column))
            assert actual.shape == wanted.shape
            np.testing.assert_allclose(actual, wanted, rtol=2e-5, atol=1e-6)
        words = [word for word in result.words() if word.segment is not None]
        assert table["words"][k].as_py() == [word.text for word in words] == TEXTS[k].split()
        scores = np.array(table["word_scores"][k].as_py(), np.float32)
        np.testing.assert_allclose(scores, np.stack([word.score for word in words], -1), rtol=2e-5, atol=1e-6)


def test_schema(finished, tmp_path, model):
    def kind(name):
        return table.schema.field(name).type

    table = globenc.load_extract(finished)
    assert table.schema.names == [
        "id", "tokens", "scores", "start", "end", "label", "probability", "n_tokens", "truncated", "log2_scale",
    ]  # fmt: skip
    assert (kind("id"), kind("label"), kind("probability")) == (pa.int64(), pa.string(), pa.float64())
    assert kind("tokens").value_type == pa.string()
    assert kind("scores").value_type == kind("log2_scale") == pa.float32()
    assert kind("start").value_type == kind("end").value_type == kind("n_tokens") == kind("truncated") == pa.int32()
    meta = parquet.ParquetFile(finished / "data" / "part-00000.parquet").metadata
    codecs = {meta.row_group(0).column(k).compression for k in range(meta.num_columns)}
    assert codecs == {"ZSTD"}
    run(ROWS, tmp_path / "all", model, position="all", per_layer=True, id_column="name", label_column="gold")
    table = globenc.load_extract(tmp_path / "all")
    assert (kind("id"), kind("gold_label")) == (pa.string(), pa.int64())
    assert kind("layer_scores").value_type.value_type.value_type == pa.float32()
    assert table["id"].to_pylist() == [row["name"] for row in ROWS]
    assert table["gold_label"].to_pylist() == [row["gold"] for row in ROWS]


def test_pairs(loaded, tmp_path):
    run(ROWS, tmp_path / "out", loaded, pair_column="pair", words=True, keep_text=True)
    table = globenc.load_extract(tmp_path / "out")
    expected = loaded(TEXTS, PAIRS)
    assert table["segment"].to_pylist() == [result.segments for result in expected]
    assert table["text_pair"].to_pylist() == PAIRS
    for k, result in enumerate(expected):
        assert table["words"][k].as_py() == TEXTS[k].split() + PAIRS[k].split()
        np.testing.assert_allclose(table["scores"][k].as_py(), result.scores, rtol=2e-5)


def test_base_model_has_no_label(loaded, tmp_path):
    base = globenc.GlobEnc(loaded.model.bert, loaded.tokenizer)
    run(ROWS[:3], tmp_path / "out", base)
    table = globenc.load_extract(tmp_path / "out")
    assert table["label"].to_pylist() == table["probability"].to_pylist() == [None] * 3


def test_tokenizer_without_offsets(tmp_path, loaded, model):
    """A slow tokenizer knows no characters: words are put together from word pieces."""
    vocabulary = loaded.tokenizer.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)))
    slow = transformers.models.bert.tokenization_bert_legacy.BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert not slow.is_fast
    run(ROWS, tmp_path / "out", globenc.GlobEnc(loaded.model, slow), words=True)
    table = globenc.load_extract(tmp_path / "out")
    assert table["words"].to_pylist() == [text.split() for text in TEXTS]
    assert set(table["start"].combine_chunks().flatten().to_pylist()) == {None}


def test_truncated_and_unknown_are_counted(loaded, tmp_path):
    texts = ["a b c d e f", "a", "\N{SNOWMAN} \N{COMET}"]
    summary = run([{"text": text} for text in texts], tmp_path / "out", loaded, max_length=6, words=True)
    assert (summary.truncated, summary.unknown, summary.rows) == (1, 1, 3)
    table = globenc.load_extract(tmp_path / "out")
    assert table["truncated"].to_pylist() == [2, 0, 0]
    assert table["n_tokens"].to_pylist() == [6, 3, 4]
    assert table["words"].to_pylist() == [["a", "b", "c", "d"], ["a"], ["\N{SNOWMAN}", "\N{COMET}"]]


def test_rejects(finished, corpus):
    lines = [json.loads(line) for line in (finished / "rejects.jsonl").read_text().splitlines()]
    assert lines == [
        {"row": row, "input": corpus.name, "line": row + 1, "reason": reason} for row, reason in REASONS.items()
    ]
    assert globenc.load_extract(finished)["id"].to_pylist() == [k for k in range(30) if k not in BAD]
    counts = json.loads((finished / "manifest.json").read_text())["counts"]
    assert (counts["input_rows"], counts["rows"], counts["rejected"], counts["shards"]) == (30, 26, 4, 5)


def test_manifest_and_file_metadata(finished, model, corpus):
    manifest = json.loads((finished / "manifest.json").read_text())
    metadata = json.loads(parquet.read_schema(finished / "data" / "part-00004.parquet").metadata[b"globenc"])
    for about in (manifest, {**manifest, **metadata}):
        assert about["model_name"] == model
        assert about["versions"]["globenc"] == globenc.__version__
        assert about["versions"]["torch"] == torch.__version__
    for identity in (manifest["identity"], metadata):
        assert (identity["method"], identity["position"], identity["shard_rows"]) == ("N-Enc", "cls", 7)
        assert len(identity["model"]["weights"]) == 64
        assert identity["input"] == [{"format": "jsonl", "bytes": corpus.stat().st_size}]
    assert manifest["complete"] is True
    assert manifest["inputs"] == [str(corpus)]
    assert manifest["started"] <= manifest["finished"]


def test_a_model_source_says_what_is_loaded(corpus, model, tmp_path):
    source = ModelSource(model, device="cpu", dtype="float64", backend="torch", revision="v1")
    run(corpus, tmp_path / "out", source)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["model_name"], manifest["model_revision"]) == (model, "v1")
    assert manifest["identity"]["model"]["dtype"] == "float64"


def test_other_tools_open_it(finished):
    expected = globenc.load_extract(finished).to_pylist()
    data = finished / "data"
    assert polars.read_parquet(data / "*.parquet").to_dicts() == expected
    assert polars.scan_parquet(data).collect().to_dicts() == expected
    found = duckdb.sql(f"from read_parquet('{data}/*.parquet') order by id").fetchall()
    assert found == [tuple(row.values()) for row in expected]
    assert datasets.load_dataset("parquet", data_dir=str(data), split="train").to_list() == expected
    frame = pandas.read_parquet(data)
    assert frame["id"].tolist() == [row["id"] for row in expected]
    assert [list(scores) for scores in frame["scores"]] == [row["scores"] for row in expected]


def test_datasets_opens_the_folder_itself(finished):
    assert datasets.load_dataset(str(finished), split="train").num_rows == 26


def test_nothing_but_bad_rows(model, tmp_path):
    summary = run([{"text": ""}] * 9, tmp_path / "out", model, position="all", per_layer=True, words=True)
    assert (summary.rows, summary.rejected, summary.shards) == (0, 9, 2)
    table = globenc.load_extract(tmp_path / "out")
    assert table.num_rows == 0
    full = run(ROWS, tmp_path / "full", model, position="all", per_layer=True, words=True)
    assert full.rows == 30
    assert table.schema == globenc.load_extract(tmp_path / "full").schema


def test_one_forward_pass_a_text(loaded, tmp_path):
    seen: list[int] = []
    watch = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    run(ROWS, tmp_path / "out", loaded, batch_tokens=64, words=True, per_layer=True)
    watch.remove()
    assert sum(seen) == 30
    assert max(seen) > 1


def test_batches_are_of_like_length(loaded, tmp_path, monkeypatch):
    padded: list[float] = []
    score = globenc.GlobEnc.score

    def watched(self, encodings, **options):
        lengths = [len(encoding) for encoding in encodings]
        padded.append(sum(lengths) / (len(lengths) * max(lengths)))
        assert len(lengths) == 1 or len(lengths) * max(lengths) <= 64
        return score(self, encodings, **options)

    monkeypatch.setattr(globenc.GlobEnc, "score", watched)
    run(ROWS, tmp_path / "out", loaded, batch_tokens=64, shard_rows=30)
    assert np.mean(padded) > 0.85


# --- reading back ---


def test_load_extract(finished, tmp_path):
    assert globenc.load_extract(str(finished), ["id", "scores"]).column_names == ["id", "scores"]
    with pytest.raises(ValueError, match=r"has no column 'word'; its columns are \['id', 'tokens'"):
        globenc.load_extract(finished, columns=["word"])
    with pytest.raises(OSError, match=r"holds no extraction: it has no manifest.json"):
        globenc.load_extract(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "other"}')
    with pytest.raises(OSError, match="is no manifest of this version's extractions: its format is 'other'"):
        globenc.load_extract(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(OSError, match="cannot be read"):
        globenc.load_extract(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "truncated", "swapped"])
def test_load_extract_sees_damage_and_a_rerun_mends_it(finished, corpus, model, tmp_path, damage):
    folder = tmp_path / "out"
    run(corpus, folder, model)
    part, other = (folder / "data" / f"part-0000{k}.parquet" for k in (2, 1))
    if damage == "missing":
        part.unlink()
    elif damage == "truncated":
        part.write_bytes(part.read_bytes()[:-100])
    else:
        part.write_bytes(other.read_bytes())
    with pytest.raises(OSError, match=r"part-00002.parquet' is missing or damaged: run the same command"):
        globenc.load_extract(folder)
    there = globenc.load_extract(folder, ["id"], incomplete=True)["id"].to_pylist()
    assert there == [k for k in range(30) if k not in BAD and not 14 <= k < 21]
    summary = run(corpus, folder, model)
    assert (summary.rows, summary.resumed) == (26, 23)
    assert_same(folder, finished)


# --- resumed, refused, overwritten ---


def test_a_complete_extraction_is_left_alone(finished, corpus, model):
    before = state(finished)
    summary = run(corpus, finished, model)
    assert (summary.rows, summary.rejected, summary.resumed) == (26, 4, 30)
    assert state(finished) == before


DIFFERENT = {
    "method": ({"method": "N-ResLN"}, 'method "N-Enc", and now it is "N-ResLN"'),
    "position": ({"position": [0, 1]}, r'position "cls", and now it is \[0, 1\]'),
    "layers": ({"per_layer": True}, "per_layer false, and now it is true"),
    "max-length": ({"max_length": 20}, "max_length null, and now it is 20"),
    "words": ({"words": True}, "words false, and now it is true"),
    "label": ({"label_column": "gold"}, 'label_column null, and now it is "gold"'),
    "limit": ({"limit": 9}, "limit null, and now it is 9"),
    "shard-rows": ({"shard_rows": 8}, "shard_rows 7, and now it is 8"),
    "dtype": (ModelSource, 'model dtype "float32", and now it is "float64"'),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_options_are_refused(finished, corpus, model, name):
    options, sentence = DIFFERENT[name]
    if options is ModelSource:
        model, options = ModelSource(model, dtype="float64"), {}
    before = state(finished)
    with pytest.raises(ValueError, match=f"was begun with {sentence}; name another folder, or overwrite it$"):
        run(corpus, finished, model, **options)
    assert state(finished) == before


def test_another_model_is_refused(finished, corpus, loaded, model):
    other = globenc.GlobEnc.from_pretrained(model)
    with torch.no_grad():
        other.model.classifier.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r'was begun with model weights "[0-9a-f]{64}", and now it is "'):
        run(corpus, finished, other)
    words = globenc.GlobEnc(loaded.model, transformers.AutoTokenizer.from_pretrained(model, model_max_length=30))
    with pytest.raises(ValueError, match="was begun with model tokenizer "):
        run(corpus, finished, words)


def test_another_input_is_refused(finished, corpus, model, tmp_path):
    before = state(finished)
    changed = tmp_path / "rows.jsonl"
    changed.write_text(corpus.read_text() + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match=r'was begun with input .*"bytes": '):
        run(changed, finished, model)
    content = corpus.read_text()
    changed.write_text(content.replace(TEXTS[20], TEXTS[20][::-1]))
    assert changed.stat().st_size == corpus.stat().st_size
    with pytest.raises(ValueError, match="begun with another input: rows 14 to 20 are not what they were"):
        run(changed, finished, model)
    assert state(finished) == before


def test_an_input_that_became_shorter_is_refused(model, tmp_path):
    run(ROWS, tmp_path / "out", model)
    with pytest.raises(ValueError, match="rows up to 30, and the input only 28"):
        run(ROWS[:28], tmp_path / "out", model, shard_rows=7)


def test_a_moved_input_and_model_go_on(finished, corpus, model, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(corpus.read_bytes())
    before = state(finished)
    assert run(moved, finished, save_letter_model(tmp_path / "model")).resumed == 30
    assert state(finished) == before


def test_overwrite(finished, corpus, model, tmp_path):
    folder = tmp_path / "out"
    run(ROWS, folder, model, words=True, shard_rows=3)
    summary = run(corpus, folder, model, overwrite=True)
    assert (summary.rows, summary.resumed) == (26, 0)
    assert_same(folder, finished)


def test_a_foreign_folder_is_refused(corpus, model, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OSError, match=r"holds 'thesis.tex' and no manifest.json: it is no extraction"):
            run(corpus, tmp_path, model, overwrite=overwrite)
    with pytest.raises(OSError, match="is a file: name a folder"):
        run(corpus, tmp_path / "thesis.tex", model)
    with pytest.raises(OSError, match="cannot be written to"):
        run(corpus, tmp_path / "thesis.tex" / "out", model)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_a_second_run_beside_the_first_is_refused(finished, corpus, model):
    before = state(finished)
    with FileLock(finished / ".lock"), pytest.raises(OSError, match="is being written by another run"):
        run(corpus, finished, model)
    assert state(finished) == before


def test_wrong_options_make_no_folder(corpus, model, loaded, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'N-Ence'"):
        run(corpus, folder, model, method="N-Ence")
    with pytest.raises(ValueError, match=r"shard_rows must be a positive whole number, got 0"):
        run(corpus, folder, model, shard_rows=0)
    with pytest.raises(ValueError, match="engine must be one of local, ray; got 'spark'"):
        run(corpus, folder, model, engine="spark")
    with pytest.raises(TypeError, match="position weights belong to one text"):
        run(corpus, folder, model, position=torch.ones(3))
    with pytest.raises(ValueError, match="has no column 'review'"):
        run(corpus, folder, model, text_column="review")
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        run(corpus, folder, loaded, dtype="float64")
    with pytest.raises(OSError, match="there is no folder"):
        run(corpus, folder, tmp_path / "no-model")
    assert not folder.exists()


# --- whatever happens on the way ---


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
    with pytest.warns(UserWarning, match="out of memory: going on with batches of"):
        run(corpus, tmp_path / "out", loaded, batch_tokens=200)
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


KILL = """
import os, signal, sys, threading
import globenc
from globenc.extraction.store import Store

stage, k = sys.argv[4], int(sys.argv[5])
replace = Store._replace

def killed(self, path, content):
    if path.name == f"part-{k:05d}.parquet" and stage == "before":
        path.with_name(f".{path.name}.tmp").write_bytes(content[:50])
        os.kill(os.getpid(), signal.SIGKILL)
    replace(self, path, content)
    if path.name == f"part-{k:05d}.parquet":
        os.kill(os.getpid(), signal.SIGKILL)

Store._replace = killed
globenc.extract(sys.argv[1], sys.argv[2], model=sys.argv[3], shard_rows=7, progress=False)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_killed_while_writing(finished, corpus, model, tmp_path):
    """kill -9 in the middle of a shard's file, and just behind it."""
    for stage, k, done in (("before", 1, 7), ("after", 3, 28)):
        command = [sys.executable, "-c", KILL, str(corpus), str(tmp_path / "out"), model, stage, str(k)]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        assert subprocess.run(command, env=one_thread, capture_output=True).returncode == -9
        with pytest.raises(ValueError, match=f"is incomplete: {done} rows of the input are done"):
            globenc.load_extract(tmp_path / "out")
    assert run(corpus, tmp_path / "out", model).resumed == 28
    assert_same(tmp_path / "out", finished)
