"""What an extraction writes: columns, types, rejects, the manifest; and reading it back."""

from __future__ import annotations

import json

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
import torch
import transformers
from extract_helpers import (
    BAD,
    PAIRS,
    REASONS,
    ROWS,
    TEXTS,
    assert_same,
    run,
)
from pyarrow import parquet

import globenc
from globenc import ModelSource


def arrays(column, dtype=np.float32) -> list[np.ndarray]:
    return [np.array(value, dtype) for value in column.to_pylist()]


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
