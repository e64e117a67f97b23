"""Ids and labels that are passed through, whatever they hold."""

from __future__ import annotations

import datetime
import decimal

import datasets
import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pytest
import torch
from extract_helpers import (
    as_rows,
    read,
    run,
)
from helpers import LETTERS
from pyarrow import parquet

import globenc
from globenc.extraction.passed_columns import typed
from globenc.extraction.rows import Columns, Reader
from globenc.extraction.sources import inputs_of
from globenc.extraction.store import Store

LETTER_TEXTS = [" ".join(LETTERS[k : k + 1 + k % 4]) for k in range(20)]


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
    summary = run(as_rows(LETTER_TEXTS[: len(values)], v=values), tmp_path / "out", loaded, **options)
    assert (summary.rejected, summary.shards) == (0, len(values))
    table = globenc.load_extract(tmp_path / "out")
    for column in ("id", "gold_label"):
        assert table[column].to_pylist() == expected
        assert str(table.schema.field(column).type).replace("double", "float64") == kind
    schemas = [parquet.read_schema(path) for path in sorted((tmp_path / "out" / "data").glob("*.parquet"))]
    assert len({str(schema.remove_metadata()) for schema in schemas}) == 1
    (shard,) = Reader(inputs_of(as_rows(LETTER_TEXTS[: len(values)], v=values)), Columns(label="v"), 100, None, False)
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
    run(as_rows(LETTER_TEXTS[:6], v=labels), tmp_path / "out", loaded, shard_rows=2, label_column="v", words=True)
    data = tmp_path / "out" / "data"
    expected = ["5", "5", "4.5", "7", "neg", None]
    assert polars.read_parquet(data / "*.parquet")["gold_label"].to_list() == expected
    assert duckdb.sql(f"select gold_label from '{data}/*.parquet' order by id").fetchall() == [(v,) for v in expected]
    assert pandas.read_parquet(data)["gold_label"].astype(object).where(lambda c: c.notna(), None).tolist() == expected
    assert datasets.load_dataset("parquet", data_dir=str(data), split="train")["gold_label"][:] == expected


def test_a_kill_between_the_rewritten_shards(loaded, tmp_path, monkeypatch):
    rows = as_rows(LETTER_TEXTS[:8], v=[True, 2, 2, 4.5, 4, 6, "neg", 1])
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
        yield from as_rows(LETTER_TEXTS[:6], v=[5, 6, 4.5, 7, "neg", 1])
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
