"""What one row can do to an extraction: nothing but be rejected itself. Errors of texts, types of what is passed
through, columns that nobody asked for, long rows."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
import torch
from helpers import LETTERS, save_letter_model, tiny_model
from pyarrow import parquet

import globenc
from globenc.errors import short
from globenc.extraction import json_rows, lines, parquet_rows
from globenc.extraction import rows as rows_module
from globenc.extraction import worker as worker_module
from globenc.extraction.options import RunOptions, Settings
from globenc.extraction.passed_columns import typed
from globenc.extraction.rows import Columns, Reader, Reject
from globenc.extraction.sources import inputs_of
from globenc.extraction.store import Store
from globenc.extraction.worker import Worker

TEXTS = [" ".join(LETTERS[k : k + 1 + k % 4]) for k in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny classifier that knows single letters."""
    return save_letter_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model) -> globenc.GlobEnc:
    return globenc.GlobEnc.from_pretrained(model)


@pytest.fixture
def grown(model) -> globenc.GlobEnc:
    """Its tokenizer has a token that the model has no embedding of."""
    explainer = globenc.GlobEnc.from_pretrained(model)
    explainer.tokenizer.add_tokens(["<new>"])
    return explainer


def run(inputs, folder, model, **options):
    return globenc.extract(inputs, folder, model=model, **{"progress": False, "shard_rows": 7, **options})


def rejects_in(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    return {line["row"]: line["reason"] for line in lines}


def as_rows(texts, **columns):
    return [{"text": text, **{name: values[k] for name, values in columns.items()}} for k, text in enumerate(texts)]


def read(inputs, columns: Columns | None = None, **options):
    """The rows of all shards of some inputs."""
    columns = columns or Columns()
    found = inputs_of(inputs, **options)
    for source in found:
        source.check(columns.names())
    return list(Reader(found, columns, 100, None, False))


def texts_of(shards) -> list[str]:
    return [example.text for shard in shards for example in shard.examples]


# --- a row's error is a reject ---


def test_a_token_beyond_the_vocabulary(grown, loaded, tmp_path):
    with_bad = [*TEXTS[:5], "a <new> b", *TEXTS[5:], "<new>"]
    ids = [*range(5), 100, *range(5, 20), 101]
    summary = run(as_rows(with_bad, n=ids), tmp_path / "out", grown, id_column="n", shard_rows=100)
    assert (summary.rows, summary.rejected) == (20, 2)
    reason = "token id 57 ('<new>') is beyond the model's 57 embeddings: resize the model's embeddings"
    assert [found.startswith(reason) for found in rejects_in(tmp_path / "out").values()] == [True, True]
    assert list(rejects_in(tmp_path / "out")) == [5, 21]
    run(as_rows(TEXTS, n=range(20)), tmp_path / "good", loaded, id_column="n", shard_rows=100)
    assert globenc.load_extract(tmp_path / "out").equals(globenc.load_extract(tmp_path / "good"))
    assert run(as_rows(with_bad, n=ids), tmp_path / "out", grown, id_column="n", shard_rows=100).resumed == 22
    with pytest.raises(ValueError, match=r"^row 5 \(rows\): token id 57 \('<new>'\) is beyond"):
        run(as_rows(with_bad), tmp_path / "strict", grown, strict=True)


def test_a_corpus_of_nothing_but_such_rows(grown, tmp_path):
    assert run(as_rows(["<new>"] * 3), tmp_path / "out", grown, shard_rows=1).rejected == 3


def test_a_list_names_the_text(grown, loaded, monkeypatch):
    with pytest.raises(ValueError, match=r"^text 1: token id 57 \('<new>'\) is beyond the model's 57 embeddings"):
        grown(["a", "<new>", "b"])
    with pytest.raises(ValueError, match=r"^token id 57"):
        grown("<new>")
    z = loaded.tokenizer.convert_tokens_to_ids("z")
    score = globenc.GlobEnc.score

    def fails(self, encodings, **options):
        if any(z in encoding.ids for encoding in encodings):
            raise FloatingPointError("the activations are not finite")
        return score(self, encodings, **options)

    monkeypatch.setattr(globenc.GlobEnc, "score", fails)
    with pytest.raises(FloatingPointError, match=r"^text 2: the activations are not finite"):
        loaded(["a", "b c", "z", "d"])
    with pytest.raises(FloatingPointError, match=r"^the activations are not finite"):
        loaded(["z", "a z"])
    with pytest.raises(ValueError, match=r"^method 'N-ResLN' has no meaning"):
        globenc.GlobEnc(tiny_model("modernbert"), loaded.tokenizer)(["a", "b"], method="N-ResLN")


def test_evaluate_leaves_such_texts_out(grown, tmp_path):
    rows = [{"text": "a b c"}, {"text": "a <new>"}, {"text": ""}, {"text": "c d"}]
    marked = [{"tokens": ["a", "b"], "rationale": [1, 0]}, {"tokens": ["<new>", "b"], "rationale": [0, 1]}]
    options = {"model": grown, "rationales": marked, "methods": ["N"], "progress": False}
    metrics = ["correlation", "plausibility"]
    texts = globenc.evaluate(rows, tmp_path / "out", metrics=metrics, **options).results["texts"]
    assert (texts["read"], texts["rejected"]) == (2, 2)
    assert "row 1: token id 57 ('<new>') is beyond the model's 57 embeddings" in texts["first_rejects"][1]
    with pytest.raises(ValueError, match="no sentence with marks that can be read: token id 57"):
        globenc.evaluate(rows, tmp_path / "none", **{**options, "rationales": marked[1:]})


class PanicException(BaseException):
    """Named as what Rust's tokenizers raise."""


ERRORS = [ValueError("no such word"), KeyError("q"), IndexError(), RuntimeError("shapes differ"), PanicException("oh")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", ["encode", "score"])
def test_whatever_fails_at_one_text(loaded, tmp_path, monkeypatch, stage, error):
    """A batch that fails is taken apart until the text at fault is found."""
    q = loaded.tokenizer.convert_tokens_to_ids("q")
    encode, score = globenc.explainer.encode, globenc.GlobEnc.score

    def failing_encode(tokenizer, texts, *rest):
        if any("q" in text for text in texts):
            raise error
        return encode(tokenizer, texts, *rest)

    def failing_score(self, encodings, **options):
        if any(q in encoding.ids for encoding in encodings):
            raise error
        return score(self, encodings, **options)

    run(as_rows(TEXTS), tmp_path / "good", loaded)
    if stage == "encode":
        monkeypatch.setattr(globenc.explainer, "encode", failing_encode)
    else:
        monkeypatch.setattr(globenc.GlobEnc, "score", failing_score)
    summary = run(as_rows(TEXTS), tmp_path / "out", loaded)
    bad = [k for k, text in enumerate(TEXTS) if "q" in text]
    assert 0 < len(bad) == summary.rejected < 7
    told = {ValueError: "no such word", RuntimeError: "shapes differ", IndexError: "IndexError"}
    assert rejects_in(tmp_path / "out") == {k: told.get(type(error), f"{type(error).__name__}: {error}") for k in bad}
    table, good = (globenc.load_extract(tmp_path / name) for name in ("out", "good"))
    wanted = good.filter(pa.array([k not in bad for k in range(20)]))
    assert (
        table.drop("scores")
        .drop("log2_scale")
        .drop("probability")
        .equals(wanted.drop("scores").drop("log2_scale").drop("probability"))
    )
    for actual, expected in zip(table["scores"].to_pylist(), wanted["scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no such device"),
        KeyboardInterrupt(),
        SystemExit(3),
        ImportError("no protobuf"),
        RuntimeError("CUDA error"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("stage", ["encode", "score"])
def test_errors_of_the_machine_stop_the_run(loaded, tmp_path, monkeypatch, stage, error):
    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((globenc.explainer, "encode") if stage == "encode" else (globenc.GlobEnc, "score")), fails)
        with pytest.raises(type(error)):
            run(as_rows(TEXTS), tmp_path / "out", loaded)
    assert run(as_rows(TEXTS), tmp_path / "out", loaded).rows == 20


@pytest.mark.parametrize("stage", ["encode", "score"])
def test_what_fails_at_every_text_is_no_text(loaded, tmp_path, monkeypatch, stage):
    def fails(*_, **__):
        raise AttributeError("the programme is wrong")

    with monkeypatch.context() as patch:
        patch.setattr(*((globenc.explainer, "encode") if stage == "encode" else (globenc.GlobEnc, "score")), fails)
        with pytest.raises(AttributeError, match=r"^the programme is wrong"):
            run(as_rows(TEXTS), tmp_path / "out", loaded)
    assert run(as_rows(TEXTS), tmp_path / "out", loaded).rows == 20


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 64 bytes: Cannot allocate memory (12)"),
        MemoryError(),
        ValueError("what nobody foresaw"),
    ],
    ids=["primitive", "memory", "bad_alloc", "mmap", "MemoryError", "unknown"],
)
def test_what_fails_at_every_text_from_some_time_on_is_no_text(loaded, tmp_path, monkeypatch, error):
    texts, calls, score = as_rows(["a b c"] * 40), [], globenc.GlobEnc.score

    def fails_later(self, encodings, **options):
        calls.append(len(encodings))
        if len(calls) > 2:
            raise error
        return score(self, encodings, **options)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(globenc.GlobEnc, "score", fails_later)
        with pytest.raises(type(error)):
            run(texts, tmp_path / "out", loaded, shard_rows=8)
    summary = run(texts, tmp_path / "out", loaded, shard_rows=8)
    assert (summary.rows, summary.rejected) == (40, 0)


def test_every_text_cut_to_nothing_is_an_option(loaded, tmp_path):
    with pytest.raises(ValueError, match=r"^max_length must be more than the 2 special tokens, got 2"):
        run(as_rows(TEXTS), tmp_path / "out", loaded, max_length=2)


def test_the_last_row_alone_may_be_bad(loaded, tmp_path, monkeypatch):
    """A run that goes on behind finished shards has scored nothing yet: that is not the model's fault."""
    broken = globenc.GlobEnc.from_pretrained(loaded.model.config._name_or_path)
    with torch.no_grad():
        broken.model.bert.embeddings.word_embeddings.weight[broken.tokenizer.convert_tokens_to_ids("z")] = float("nan")
    rows = as_rows([*LETTERS[:7], "z"])
    run(rows, tmp_path / "out", broken)
    (tmp_path / "out" / "data" / "part-00001.parquet").unlink()
    summary = run(rows, tmp_path / "out", broken)
    assert (summary.rows, summary.rejected, summary.resumed) == (7, 1, 7)


# --- what is passed through ---

DAY = datetime.date(2024, 2, 29)
WIDENED = {
    "numbers": ([5, 4.5, 6], "float64", [5.0, 4.5, 6.0]),
    "numbers-and-text": ([5, 4.5, "neg", None], "string", ["5", "4.5", "neg", None]),
    "text-first": (["neg", 5, 4.5, True], "string", ["neg", "5", "4.5", "True"]),
    "truth-values": ([True, 3, False], "int64", [1, 3, 0]),
    "truth-values-as-text": ([True, 1, 1.0, "x"], "string", ["True", "1", "1.0", "x"]),
    "uint64": ([1, 2**63, 2**64 - 1], "string", ["1", str(2**63), str(2**64 - 1)]),
    "beyond-2-53": ([2**53 + 1, 0.5], "string", [str(2**53 + 1), "0.5"]),
    "int64": ([2**53 + 1, -(2**63)], "int64", [2**53 + 1, -(2**63)]),
    "huge": ([1, 10**5000], "string", ["1", hex(10**5000)]),
    "dates": ([DAY, 1], "string", ["2024-02-29", "1"]),
    "decimals": ([decimal.Decimal("1.10")], "string", ["1.10"]),
    "nested": ([[1, "a"], {"b": None}, 2], "string", ["[1, 'a']", "{'b': None}", "2"]),
    "bytes": ([b"caf\xc3\xa9", b"\xff"], "string", ["café", "\\xff"]),
    "numpy": ([np.int8(3), np.float32(0.5), np.str_("x"), np.bool_(True)], "string", ["3", "0.5", "x", "True"]),
    "numpy-times": ([np.datetime64("2024-02-29T00:00:00", "ns")], "string", ["2024-02-29T00:00:00.000000000"]),
    "pandas-nulls": ([pandas.NA, pandas.NaT, 7], "int64", [None, None, 7]),
    "surrogates": (["\ud83d", "x"], "string", ["\\ud83d", "x"]),
    "nulls": ([None, None, None, 2], "int64", [None, None, None, 2]),
    "nothing-but-nulls": ([None, None], "string", [None, None]),
    "infinite": ([float("inf"), 1, -0.5], "float64", [float("inf"), 1.0, -0.5]),
}


@pytest.mark.parametrize("name", WIDENED)
def test_what_is_passed_through_never_loses_a_row(loaded, tmp_path, name):
    """Every value is in a shard of its own, written before the types behind it were known."""
    values, kind, expected = WIDENED[name]
    options = {"shard_rows": 1, "id_column": "v", "label_column": "v"}
    summary = run(as_rows(TEXTS[: len(values)], v=values), tmp_path / "out", loaded, **options)
    assert (summary.rejected, summary.shards) == (0, len(values))
    table = globenc.load_extract(tmp_path / "out")
    for column in ("id", "gold_label"):
        assert table[column].to_pylist() == expected
        assert str(table.schema.field(column).type).replace("double", "float64") == kind
    schemas = [parquet.read_schema(path) for path in sorted((tmp_path / "out" / "data").glob("*.parquet"))]
    assert len({str(schema.remove_metadata()) for schema in schemas}) == 1
    (shard,) = Reader(inputs_of(as_rows(TEXTS[: len(values)], v=values)), Columns(label="v"), 100, None, False)
    assert (shard.gold_type, [typed(example.gold, kind) for example in shard.examples]) == (kind, expected)


@pytest.mark.parametrize("kind", ["pandas", "arrow", "polars", "torch", "numpy"])
def test_a_data_set_with_a_format(kind):
    rows = datasets.Dataset.from_dict({"text": ["a b", "c"], "label": [1, 0], "id": [0.5, 2.5]})
    for given in (rows.with_format(kind), rows.to_iterable_dataset().with_format(kind)):
        (shard,) = read(given, Columns(id="id", label="label"))
        assert [(e.text, e.id, e.gold) for e in shard.examples] == [("a b", 0.5, 1), ("c", 2.5, 0)]


@pytest.mark.parametrize("value", [torch.tensor(3), np.array(3), np.int64(3)], ids=["torch", "array", "numpy"])
def test_a_tensor_of_a_single_number_is_a_number(value):
    (shard,) = read([{"text": "a", "id": value}], Columns(id="id"))
    assert [(e.id, type(e.id)) for e in shard.examples] == [(3, int)]


def test_columns_named_by_whole_numbers():
    (shard,) = read(pandas.DataFrame([["a b", 5], ["c", 6]]), Columns(text="0", id="1"))
    assert [(e.text, e.id) for e in shard.examples] == [("a b", 5), ("c", 6)]


def test_periods_and_intervals_are_passed_as_their_text():
    frame = pandas.DataFrame({"text": ["a", "b", "c"]})
    frame["id"] = pandas.PeriodIndex(["2020-01", None, "2021-12"], freq="M")
    frame["label"] = pandas.IntervalIndex.from_tuples([(0, 1), (1, 2), (2, 3)])
    for given in (frame, pa.Table.from_pandas(frame)):
        (shard,) = read(given, Columns(id="id", label="label"))
        assert [e.id for e in shard.examples] == ["2020-01", None, "2021-12"]
        assert [e.gold for e in shard.examples] == ["(0, 1]", "(1, 2]", "(2, 3]"]


def test_other_tools_read_what_was_widened(loaded, tmp_path):
    labels = [5, 5, 4.5, 7, "neg", None]
    run(as_rows(TEXTS[:6], v=labels), tmp_path / "out", loaded, shard_rows=2, label_column="v", words=True)
    data = tmp_path / "out" / "data"
    expected = ["5", "5", "4.5", "7", "neg", None]
    assert polars.read_parquet(data / "*.parquet")["gold_label"].to_list() == expected
    assert duckdb.sql(f"select gold_label from '{data}/*.parquet' order by id").fetchall() == [(v,) for v in expected]
    assert pandas.read_parquet(data)["gold_label"].astype(object).where(lambda c: c.notna(), None).tolist() == expected
    assert datasets.load_dataset("parquet", data_dir=str(data), split="train")["gold_label"][:] == expected


def test_a_kill_between_the_rewritten_shards(loaded, tmp_path, monkeypatch):
    rows = as_rows(TEXTS[:8], v=[True, 2, 2, 4.5, 4, 6, "neg", 1])
    options = {"shard_rows": 2, "label_column": "v"}
    run(rows, tmp_path / "whole", loaded, **options)
    replace, written = Store._replace, []

    def stopped(self, path, content):
        if path.suffix == ".parquet":
            written.append(path.name)
            if len(written) == 6:  # the second of those that are written again
                raise KeyboardInterrupt
        replace(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(rows, tmp_path / "out", loaded, **options)
    with pytest.raises(ValueError, match="is incomplete"):
        globenc.load_extract(tmp_path / "out")
    expected = ["True", "2", "2", "4.5", "4", "6", "neg", "1"]
    assert globenc.load_extract(tmp_path / "out", incomplete=True)["gold_label"].to_pylist() == expected
    assert globenc.load_extract(tmp_path / "out", ["gold_label"], incomplete=True)["gold_label"].to_pylist() == expected
    assert run(rows, tmp_path / "out", loaded, **options).resumed == 8
    assert globenc.load_extract(tmp_path / "out").equals(globenc.load_extract(tmp_path / "whole"))
    (tmp_path / "out" / "data" / "part-00000.parquet").unlink()
    assert run(rows, tmp_path / "out", loaded, **options).resumed == 6
    assert globenc.load_extract(tmp_path / "out").equals(globenc.load_extract(tmp_path / "whole"))


def test_types_of_an_unfinished_run(loaded, tmp_path):
    def broken():
        yield from as_rows(TEXTS[:6], v=[5, 6, 4.5, 7, "neg", 1])
        raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        run(broken(), tmp_path / "out", loaded, shard_rows=2, label_column="v")
    table = globenc.load_extract(tmp_path / "out", incomplete=True)
    assert table["gold_label"].to_pylist() == ["5", "6", "4.5", "7", "neg", "1"]


def test_digests_do_not_know_types():
    def digests(values):
        return [w.digest for w in Reader(inputs_of(as_rows("abcd", v=values)), Columns(label="v"), 2, None, False)]

    assert digests([5, "x", 5, 7])[1] == digests([1, 2, 5, 7])[1] == digests([0.5, None, 5, 7])[1]
    assert len({digests([1, 1, value, 1])[1] for value in (5, 5.0, "5", True, None)}) == 5


def test_a_label_column_of_a_csv(loaded, tmp_path):
    (tmp_path / "rows.csv").write_bytes("text,v\na,caf\xe9\nb,\nc,x\n".encode("latin-1"))
    run(tmp_path / "rows.csv", tmp_path / "out", loaded, label_column="v")
    assert globenc.load_extract(tmp_path / "out")["gold_label"].to_pylist() == ["caf\\xe9", "", "x"]


# --- columns that nobody asked for ---


def exotic_parquet(path: Path) -> None:
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    broken = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"\xff\xfe"))
    dates = pa.array([1, 2], pa.timestamp("ns", tz="Europe/Berlin"))
    union = pa.array([{"a": [1]}, None], pa.struct([("a", pa.list_(pa.int8()))]))
    names = ["text", "broken", "broken", "dates", "nested"]
    parquet.write_table(pa.Table.from_arrays([pa.array(["a", "b"]), broken, broken, dates, union], names=names), path)


UNASKED = {
    "rows.csv": b"text,other,twice,twice\na,caf\xe9,1,2\nb,\xff\xfe,1,2\n",
    "rows.tsv": b"other\ttext\ncaf\xe9\ta\n\xff\tb\n",
    "rows.jsonl": b'{"text": "a", "other": "caf\xe9"}\n{"\xff": ["\xff", {}], "text": "b"}\n',
    "numbers.jsonl": b'{"text": "a", "n": ' + b"7" * 9000 + b'}\n{"text": "b", "n": 1e999, "m": NaN}\n',
    "rows.parquet": exotic_parquet,
}


@pytest.mark.parametrize("name", UNASKED)
def test_columns_that_nobody_asked_for(tmp_path, name):
    content = UNASKED[name]
    content(tmp_path / name) if callable(content) else (tmp_path / name).write_bytes(content)
    shards = read(tmp_path / name)
    assert texts_of(shards) == ["a", "b"]
    assert [shard.rejects for shard in shards] == [[]]


def test_cells_that_python_has_no_value_for(tmp_path):
    offsets = pa.array([0, 1, 3], pa.int32()).buffers()[1]
    broken = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xffb"))
    columns = {
        "text": broken.dictionary_encode(),
        "view": broken.cast(pa.binary()).cast(pa.binary_view()).view(pa.string_view()),
        "list": pa.ListArray.from_arrays([0, 1, 2], broken),
        "time": pa.array([1, 1_700_000_000_000_000_001], pa.timestamp("ns")),
        "label": pa.array([1, 2], pa.duration("ns")),
    }
    table = pa.table(columns)
    (shard,) = read(table, Columns(label="list"))
    assert [(example.text, example.gold) for example in shard.examples] == [("a", "['a']")]
    assert [reject.reason for reject in shard.rejects] == ["undecodable bytes: 0xff at byte 0 is not UTF-8"]
    (shard,) = read(table, Columns(text="view", label="time"))
    assert [example.gold for example in shard.examples] == ["1970-01-01 00:00:00.000000001"]
    for name in ("list", "time", "label"):
        (shard,) = read(table, Columns(text=name))
        assert shard.examples == []
        assert "not text" in shard.rejects[-1].reason
    texts = pa.array(["x", "y"])
    (shard,) = read(table.set_column(0, "text", texts), Columns(id="view", label="list"))
    assert [(example.id, example.gold) for example in shard.examples] == [
        ("a", "['a']"),
        ("\\xffb", "<list<item: string>>"),
    ]


class Stranger:
    """A value that no library knows."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_mixed_columns_of_data_frames():
    mixed = [1, "a", Stranger()]
    frame = pandas.DataFrame({"text": ["a", None, "c"], "label": pandas.Series([1, "x", 2.5], dtype=object)})
    frame["mixed"] = pandas.Series(mixed, dtype=object)
    frame["empty"] = [np.nan, "x", pandas.NaT]
    (shard,) = read(frame, Columns(label="label"))
    assert [(example.text, example.gold) for example in shard.examples] == [("a", 1), ("c", 2.5)]
    assert [reject.reason for reject in shard.rejects] == ["text column 'text' is null"]
    (shard,) = read(frame, Columns(label="mixed"))
    assert [example.gold for example in shard.examples] == [1, "<Stranger>"]
    (shard,) = read(frame.assign(text=["a", "b", "c"]), Columns(label="empty"))
    assert [example.gold for example in shard.examples] == [None, "x", None]
    others = polars.DataFrame({"text": ["a", "b"], "object": polars.Series([Stranger(), 1], dtype=polars.Object)})
    assert texts_of(read(others)) == ["a", "b"]
    with pytest.raises(ValueError, match="has several columns 'text'"):
        read(pandas.DataFrame([["a", "b"]], columns=["text", "text"]))
    with pytest.raises(ValueError, match="has no column 'text'; its columns are 0, 1"):
        read(pandas.DataFrame([["a", "b"]]))


def test_a_stream_of_batches_comes_only_once():
    table = pa.table({"text": ["a", "b", "c"]})
    reader = pa.RecordBatchReader.from_batches(table.schema, table.to_batches())
    assert texts_of(read(reader)) == ["a", "b", "c"]
    assert texts_of(read(table.to_batches()[0])) == ["a", "b", "c"]


def test_pictures_beside_the_text_are_not_opened():
    rows = datasets.Dataset.from_dict({"text": ["a"], "picture": [{"bytes": b"none", "path": None}]})
    assert texts_of(read(rows.cast_column("picture", datasets.Image()))) == ["a"]


COLUMNS = {
    "pandas": pandas.Series(["a", None, "b"], name="review"),
    "pandas-object": pandas.Series(["a", np.nan, "b"], dtype=object),
    "polars": polars.Series("review", ["a", None, "b"]),
    "arrow": pa.array(["a", None, "b"]),
    "arrow-large": pa.array(["-", "a", None, "b"], pa.large_string())[1:],
    "arrow-dictionary": pa.array(["a", None, "b"]).dictionary_encode(),
    "arrow-chunks": pa.chunked_array([["a"], [None, "b"]]),
    "numpy": np.array(["a", None, "b"]),
    "datasets": datasets.Dataset.from_dict({"text": ["a", None, "b"]})["text"],
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_texts(name):
    (shard,) = read(COLUMNS[name])
    assert [(example.id, example.text) for example in shard.examples] == [(0, "a"), (2, "b")]
    assert [reject.reason for reject in shard.rejects] == ["text column 'text' is null"]


def test_a_column_goes_by_its_own_name_too(loaded, tmp_path):
    assert texts_of(read(COLUMNS["polars"], Columns(text="review"))) == ["a", "b"]
    with pytest.raises(ValueError, match="has no column 'label'; its columns are text, review"):
        read(COLUMNS["pandas"], Columns(label="label"))
    assert run(np.array(TEXTS), tmp_path / "out", loaded).rows == 20


def test_a_row_that_is_no_mapping_among_others(loaded, tmp_path):
    run([{"text": "a"}, "a", None, ["b"], {"text": "b"}], tmp_path / "out", loaded)
    kinds = {1: "str", 2: "NoneType", 3: "list"}
    told = {row: f"the row is a {kind}, not a mapping from columns to values" for row, kind in kinds.items()}
    assert rejects_in(tmp_path / "out") == told


def test_what_is_no_column_of_texts():
    for given, message in [
        ({"text": ["a"]}, "got a dict of text: give one of its values"),
        (datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": []})), "got a DatasetDict of train: give one"),
        (np.zeros((2, 2)), r"where it is an array, got one of shape \(2, 2\)"),
        (polars.LazyFrame({"text": ["a"]}), "got LazyFrame"),
        (iter(["a good film"]), r"rows as mappings such as \{'text': ...\}; got 'a good film' as a row"),
    ]:
        with pytest.raises(TypeError, match=message):
            read(given)
    with pytest.raises(OSError, match=r"no input 'a good film'; texts themselves are rows such as \{'text': ...\}"):
        read(["a good film", "a bad one"])
    with pytest.raises(OSError, match="there is no input"):
        read(["x" * 100_000])


def test_no_column_name_is_attributed(loaded):
    frame = pandas.DataFrame({"review": ["a"], "b": ["c"]})
    tables = [
        frame,
        polars.from_pandas(frame),
        pa.table(frame),
        pa.record_batch(frame),
        datasets.Dataset.from_pandas(frame),
    ]
    for table in [*tables, frame.to_dict("list")]:
        with pytest.raises(TypeError, match=r"of 'review', 'b': choose one, texts\['review'\]"):
            loaded(table)
    with pytest.raises(TypeError, match=r"text_pair must be .* got DataFrame of 'review', 'b': choose one, text_pair"):
        loaded(["a"], frame)
    with pytest.raises(TypeError, match=r"got set$"):
        loaded({"a", "b"})
    with pytest.raises(TypeError, match=r"got DatasetDict of 'train': choose one, texts\['train'\]"):
        loaded(datasets.DatasetDict(train=tables[-1]))
    for column in [frame["review"], tables[1]["review"], tables[2]["review"], pa.array(["a"]), tables[-1]["review"]]:
        assert [result.text for result in loaded(column)] == ["a"]


# --- long rows, long reasons ---


def test_reasons_are_short_and_can_be_printed(tmp_path, loaded):
    reject = Reject(0, "n" * 500 + "\udcff", None, "bad \x1b[2J\u202e value " + "x" * 10**6)
    assert (len(reject.input), len(reject.reason)) == (200, 200)
    assert reject.reason.startswith("bad \\x1b[2J\\u202e value xxx")
    assert reject.reason.endswith("...")
    assert short("café 映画") == "café 映画"
    assert short("a\nb") == "a\\nb"
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("\n")
    run(path, tmp_path / "out", loaded)
    (line,) = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    assert json.loads(line)["input"] == path.name
    assert run(path, tmp_path / "out", loaded).resumed == 1


def test_a_shard_has_room_for_the_reasons_of_all_its_rows(tmp_path, monkeypatch, loaded):
    monkeypatch.setattr(rows_module, "CHARACTERS", 2000)
    monkeypatch.setattr(rows_module, "MOST_ROWS", 15)
    (tmp_path / "rows.jsonl").write_text("{\n" * 40)
    shards = list(Reader(inputs_of(tmp_path / "rows.jsonl"), Columns(), 10**6, None, False))
    assert max(len(shard.rejects) for shard in shards) < 15
    (tmp_path / "rows.txt").write_text("a\n" * 40)
    shards = list(Reader(inputs_of(tmp_path / "rows.txt"), Columns(), 10**6, None, False))
    assert [shard.end_row for shard in shards] == [15, 30, 40]
    monkeypatch.undo()
    summary = run([{"text": 7}] * 4000, tmp_path / "out", loaded, shard_rows=10**6)
    assert (summary.rejected, summary.shards) == (4000, 1)
    assert run([{"text": 7}] * 4000, tmp_path / "out", loaded, shard_rows=10**6).resumed == 4000
    assert len(rejects_in(tmp_path / "out")) == 4000


LONG = {
    "plain": "it was a long film. " * 1000,
    "escapes": 'a "quoted"\n\\ line\t' * 1000,
    "pairs-without-blanks": "🎬映é" * 4000,
    "backslashes": "\\" * 15_000,
    "one-wide": "a" * 15_000 + "🎬",
}


def read_in_pieces(monkeypatch, size: int) -> None:
    """Long lines and long texts of JSON are those of more than so many bytes."""
    for module, name in ((lines, "PIECE"), (json_rows, "PIECE"), (json_rows, "LONG_TEXT")):
        monkeypatch.setattr(module, name, size)


@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "raw"])
@pytest.mark.parametrize("name", LONG)
def test_long_texts_in_json_come_out_as_they_are(tmp_path, monkeypatch, name, ascii_only):
    read_in_pieces(monkeypatch, 3000)
    text = LONG[name]
    row = {"html": text[::-1], "text": text, "label": [text[:12_000], {"deep": 1}], "n": 1}
    lines = [json.dumps(row, ensure_ascii=ascii_only), '{"text": "short"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    shards = read(tmp_path / "rows.jsonl", Columns(label="label"))
    assert texts_of(shards) == [text, "short"]
    assert shards[0].examples[0].gold == str(row["label"])


BAD_LONG = {
    "unterminated": ('{"text": "' + "a" * 20_000, "malformed JSON: Unterminated string"),
    "control": ('{"text": "' + "a" * 20_000 + '\t"}', "malformed JSON: Invalid control character"),
    "escape": ('{"text": "' + "a" * 20_000 + '\\x"}', "malformed JSON: Invalid \\escape"),
    "surrogate": ('{"text": "' + "a" * 20_000 + '\\ud83d"}', "half of a surrogate pair"),
    "behind": ('{"text": "' + "a" * 20_000 + '" "b"}', "malformed JSON: Expecting ',' delimiter"),
    "array": ('{"a": 1}\n["' + "a" * 20_000 + '"]', "the line is a JSON array, not an object"),
}


@pytest.mark.parametrize("name", BAD_LONG)
def test_bad_long_lines_of_json(tmp_path, monkeypatch, name):
    read_in_pieces(monkeypatch, 3000)
    line, reason = BAD_LONG[name]
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + '\n{"text": "fine"}\n')
    shards = read(tmp_path / "rows.jsonl")
    assert texts_of(shards) == ["fine", "fine"]
    assert reason in [reject.reason for shard in shards for reject in shard.rejects][-1]


def test_bytes_that_are_no_text_in_a_long_line(tmp_path, monkeypatch):
    read_in_pieces(monkeypatch, 3000)
    bad, long = b'{"text": "' + b"a" * 20_000, b'{"text": "' + b"a" * 20_000 + b'", "other": "'
    content = bad + b'\xff"}\n' + long + b'\xff"}\n' + long + b"b" * 20_000 + b'\xff"}\n'
    (tmp_path / "rows.jsonl").write_bytes(content)
    shards = read(tmp_path / "rows.jsonl")
    assert [len(text) for text in texts_of(shards)] == [20_000] * 2
    assert [r.reason for shard in shards for r in shard.rejects] == ["undecodable bytes: 0xff is not UTF-8"]


def test_a_long_first_line_of_standard_input(monkeypatch, tmp_path):
    import io

    content = json.dumps({"text": "a" * 3_000_000}).encode() + b'\n{"text": "b"}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert [len(text) for text in texts_of(read("-"))] == [3_000_000, 1]
    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 20)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    (shard,) = read("-")
    assert [reject.row for reject in shard.rejects] == [0]
    assert texts_of([shard]) == ['{"text": "b"}']  # plain text: the first line says nothing


def test_a_packed_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "LONGEST_LINE", 1 << 21)
    (tmp_path / "rows.txt.gz").write_bytes(gzip.compress(b"fine\n" + b"x" * (5 << 20) + b"\nfine\n" + b"y" * (3 << 20)))
    shards = read(tmp_path / "rows.txt.gz")
    assert texts_of(shards) == ["fine", "fine"]
    assert [(r.row, r.line) for shard in shards for r in shard.rejects] == [(1, 2), (3, 4)]


def test_long_fields_of_tsv(tmp_path):
    """Python's reader of CSV stops at 131,072 characters unless it is told otherwise."""
    field = 'he said "no" ' * 20_000
    (tmp_path / "rows.tsv").write_text('n\ttext\n1\t"' + field.replace('"', '""') + '"\n')
    assert texts_of(read(tmp_path / "rows.tsv")) == [field]


def test_parquet_of_long_rows_is_read_a_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "BATCH_BYTES", 10_000)
    texts = [f"{k} {np.random.default_rng(k).bytes(1500).hex()}" for k in range(20)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "rows.parquet", row_group_size=7)
    seen = []
    arrow_rows = parquet_rows._arrow_rows
    monkeypatch.setattr(parquet_rows, "_arrow_rows", lambda batch: seen.append(batch.num_rows) or arrow_rows(batch))
    assert texts_of(read(tmp_path / "rows.parquet")) == texts
    assert max(seen) < 5


@pytest.mark.parametrize("options", [{}, {"words": True}, {"keep_text": True}], ids=["scores", "words", "text"])
def test_a_long_text_goes_no_further_than_it_is_needed(loaded, monkeypatch, options):
    monkeypatch.setattr(worker_module, "LEAN", 1000)
    text = "a b c d " * 1000
    names = {"text_column": "text", "pair_column": None, "id_column": None, "label_column": None, "limit": None}
    method = {"method": "N-Enc", "position": "cls", "per_layer": False, "row_normalize": False, "max_length": 20}
    asked = {"words": False, "keep_text": False, "shard_rows": 10, **options}
    settings = Settings(RunOptions(**names, **method, **asked), batch_tokens=64, strict=False, provenance="{}")
    worker = Worker(loaded, settings)
    (rows,) = Reader(inputs_of([{"text": text}, {"text": "a"}]), Columns(), 10, None, False)
    shard = worker.encode(rows)
    assert rows.examples == []
    assert len(shard.examples[0].text) == pytest.approx(1000, abs=100)
    _, content = worker.build(worker.score(shard))
    table = parquet.read_table(pa.BufferReader(content))
    assert table["text"].to_pylist() == [text, "a"] if "keep_text" in options else "text" not in table.column_names
    if "words" in options:
        assert table["words"][0].as_py() == ["a", "b", "c", "d"] * 4 + ["a", "b"]


PEAK = """
import sys, globenc
globenc.extract(sys.argv[1], sys.argv[2], progress=False, words=True, keep_text=sys.argv[3] == "kept")
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
UNITS = {"ascii": "a charming film and more ", "cjk": "この映画は良い 良い ", "mixed": "a charming film and more 🎬 "}


def peak_mb(folder: Path, ending: str, text: str, kept: bool) -> float:
    """Of an extraction of 40 short texts and this one, if it is one."""
    texts = [*["a good film"] * 20, *[text] * (text != ""), *["a bad film"] * 20]
    corpus = folder / f"{len(text)}.{ending}"
    if ending == "parquet":
        parquet.write_table(pa.table({"text": texts}), corpus)
    elif ending == "jsonl":
        corpus.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    else:
        corpus.write_text("text\n" * (ending == "csv") + "".join(f"{text}\n" for text in texts))
    command = [sys.executable, "-c", PEAK, str(corpus), str(folder / f"out-{len(text)}"), "kept" * kept]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    return float(subprocess.run(command, env=one_thread, capture_output=True, text=True, check=True).stdout) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("ending", "unit", "megabytes", "kept"),
    [
        ("jsonl", "ascii", 50, False),
        ("jsonl", "mixed", 50, True),
        ("txt", "cjk", 50, False),
        ("parquet", "ascii", 50, False),
        ("csv", "mixed", 12, False),
        ("csv", "ascii", 50, False),  # is rejected
    ],
)
def test_peak_memory_with_a_long_row(tmp_path, ending, unit, megabytes, kept):
    """Within 300 MB of the same run without it."""
    text = UNITS[unit] * (megabytes * 1_000_000 // len(UNITS[unit].encode()))
    assert peak_mb(tmp_path, ending, text, kept) <= peak_mb(tmp_path, ending, "", kept) + 300
