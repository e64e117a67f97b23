"""Columns of tables, frames and data sets, also those that no run asks for."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
from extract_helpers import (
    read,
    rejects_in,
    run,
    texts_of,
)
from helpers import LETTERS
from pyarrow import parquet

from globenc.extraction.rows import Columns

LETTER_TEXTS = [" ".join(LETTERS[k : k + 1 + k % 4]) for k in range(20)]


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
    assert run(np.array(LETTER_TEXTS), tmp_path / "out", loaded).rows == 20


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
