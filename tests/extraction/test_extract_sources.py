"""Inputs of an extraction: every format, every kind of bad row, what cannot be read at all."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from extract_helpers import read, texts_of
from pyarrow import parquet

from globenc.extraction import csv_rows, lines
from globenc.extraction import rows as rows_module
from globenc.extraction.passed_columns import typed
from globenc.extraction.rows import BadRowError, Columns, Plan, Reader
from globenc.extraction.sources import inputs_of

TEXTS = ["a charming journey", "it's slow, very slow", "two\nlines", 'with "quotes"', "naïve café 🎬"]


def rejects_of(shards) -> list[tuple[int, int | None, str]]:
    return [(reject.row, reject.line, reject.reason) for shard in shards for reject in shard.rejects]


def jsonl(texts=TEXTS) -> bytes:
    return "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)).encode()


def as_csv(texts=TEXTS, end="\n") -> bytes:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end)
    writer.writerow(["n", "text"])
    writer.writerows(enumerate(texts))
    return out.getvalue().encode()


def as_parquet(texts=TEXTS) -> bytes:
    out = io.BytesIO()
    parquet.write_table(pa.table({"n": range(len(texts)), "text": texts, "other": [[1]] * len(texts)}), out)
    return out.getvalue()


ONE_LINE = [text for text in TEXTS if "\n" not in text]
FORMATS = {
    "rows.jsonl": (jsonl(), TEXTS),
    "rows.ndjson": (jsonl(), TEXTS),
    "rows.json": (jsonl(), TEXTS),
    "bom.jsonl": (b"\xef\xbb\xbf" + jsonl(), TEXTS),
    "crlf.jsonl": (jsonl().replace(b"\n", b"\r\n"), TEXTS),
    "no-last-line-end.jsonl": (jsonl().rstrip(), TEXTS),
    "blank-lines.jsonl": (jsonl().replace(b"\n", b"\n\n"), TEXTS),
    "rows.csv": (as_csv(), TEXTS),
    "bom.csv": (b"\xef\xbb\xbf" + as_csv(), TEXTS),
    "crlf.csv": (as_csv(end="\r\n"), TEXTS),
    "crlf-inside.csv": (b'text\r\n"two\r\nlines"\r\n', ["two\r\nlines"]),
    "rows.tsv": (("n\ttext\n" + "".join(f"{i}\t{t}\n" for i, t in enumerate(ONE_LINE))).encode(), ONE_LINE),
    "quoted.tsv": (b'text\n"a ""b"" c"\n"un" paired\nopen "quote\n"\n', ['a "b" c', '"un" paired', 'open "quote', '"']),
    "rows.parquet": (as_parquet(), TEXTS),
    "rows.txt": ("\n".join(ONE_LINE).encode(), ONE_LINE),
    "rows.log": (("\r\n".join(ONE_LINE) + "\r\n").encode(), ONE_LINE),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name, packed):
    content, expected = FORMATS[name]
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    shards = read(str(path))
    assert texts_of(shards) == expected
    assert rejects_of(shards) == []
    assert [example.id for shard in shards for example in shard.examples] == list(range(len(expected)))
    assert shards[-1].fraction == pytest.approx(1.0)


def test_format_can_be_said(tmp_path):
    (tmp_path / "rows").write_bytes(as_csv())
    with pytest.raises(ValueError, match="ends in 'nothing' is not known"):
        read(tmp_path / "rows")
    assert texts_of(read(tmp_path / "rows", format_="csv")) == TEXTS
    with pytest.raises(ValueError, match="format must be one of jsonl, csv"):
        read(tmp_path / "rows", format_="xml")


BAD_LINES = [
    (b'{"text": "fine"}', None),
    (b"{'text': 1}", "malformed JSON: Expecting property name"),
    (b'{"text": "cut off', "malformed JSON: Unterminated string"),
    (b'["text"]', "the line is a JSON array, not an object"),
    (b"null", "the line is a JSON null, not an object"),
    (b'{"other": "x"}', "text column 'text' is missing"),
    (b'{"text": null}', "text column 'text' is null"),
    (b'{"text": ""}', "text column 'text' is empty"),
    (b'{"text": " \\n\\t"}', "text column 'text' is empty"),
    (b'{"text": 7}', "text column 'text' holds a value of type int, not text"),
    (b'{"text": ["a"]}', "text column 'text' holds a value of type list, not text"),
    (b'{"text": "\\ud83d"}', "it holds half of a surrogate pair"),
    (b'{"text": "\xff"}', "undecodable bytes: 0xff at byte 10 is not UTF-8"),
    (b"[" * 100_000, "malformed JSON"),
    (b'{"text": "fine too"}', None),
]


def test_bad_json_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(line for line, _ in BAD_LINES))
    shards = read(tmp_path / "rows.jsonl", shard_rows=4)
    assert texts_of(shards) == ["fine", "fine too"]
    expected = [(i, i + 1, reason) for i, (_, reason) in enumerate(BAD_LINES) if reason]
    found = rejects_of(shards)
    assert [reject[:2] for reject in found] == [reject[:2] for reject in expected]
    for (_, _, reason), (_, _, part) in zip(found, expected, strict=True):
        assert part in reason
    assert [(shard.first_row, shard.end_row) for shard in shards] == [(0, 4), (4, 8), (8, 12), (12, 15)]


def test_strict_stops_at_the_first(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(line for line, _ in BAD_LINES))
    with pytest.raises(BadRowError, match=r"^row 1 \(rows.jsonl line 2\): malformed JSON"):
        read(tmp_path / "rows.jsonl", strict=True)


def test_bad_csv_rows(tmp_path):
    lines = [
        b"id,text",
        b"1,fine",
        b"2,too,many",
        b"3",
        b"",
        b'4,"he said "no" twice"',
        b"5,\xe9t\xe9",
        b"6,",
        b'7,"over',
        b'two lines"',
        b'8,"never closed',
        b"9,swallowed",
    ]
    (tmp_path / "rows.csv").write_bytes(b"\n".join(lines))
    shards = read(tmp_path / "rows.csv")
    assert texts_of(shards) == ["fine", "over\ntwo lines"]
    reasons = [
        (1, 3, "the row has 3 fields where the header has 2"),
        (2, 4, "the row has 1 fields where the header has 2"),
        (3, 6, "malformed CSV: ',' expected after '\"'"),
        (4, 7, "undecodable bytes: 0xe9 is not UTF-8"),
        (5, 8, "text column 'text' is empty"),
        (7, 11, "malformed CSV: unexpected end of data (lines 11 to 12)"),
    ]
    assert rejects_of(shards) == reasons


def test_a_quote_never_closed_does_not_swallow_a_whole_file(tmp_path, monkeypatch):
    before = csv.field_size_limit(1000)
    monkeypatch.setattr(csv_rows, "LONGEST_FIELD", 1000)
    try:
        (tmp_path / "rows.csv").write_bytes(b'text\nfine\n"open\n' + b"lost\n" * 300 + b"found\n" * 3)
        shards = read(tmp_path / "rows.csv")
    finally:
        csv.field_size_limit(before)
    assert rejects_of(shards)[0][2].startswith("malformed CSV: field larger than field limit")
    assert texts_of(shards)[0] == "fine"
    assert texts_of(shards)[-3:] == ["found"] * 3


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows.tsv", "rows.csv"])
def test_a_line_without_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr(lines, "LONGEST_LINE", 64)
    head = {"rows.tsv": b"text\n", "rows.csv": b"text\n"}.get(name, b"")
    line = b'{"text": "fine"}\n' if name == "rows.jsonl" else b"fine\n"
    (tmp_path / name).write_bytes(head + line + b"x" * 1000 + b"\n" + line)
    shards = read(tmp_path / name)
    assert texts_of(shards) == ["fine", "fine"]
    ((row, _, reason),) = rejects_of(shards)
    assert row == 1
    assert "longer than" in reason or "field larger than field limit" in reason


def test_bad_tsv_rows(tmp_path):
    (tmp_path / "rows.tsv").write_bytes(b"id\ttext\n1\tfine\n2\n3\t\n4\ta\tb\n\n5\t\xff\n")
    shards = read(tmp_path / "rows.tsv")
    assert texts_of(shards) == ["fine"]
    assert [(row, line) for row, line, _ in rejects_of(shards)] == [(1, 3), (2, 4), (3, 5), (4, 7)]


def test_bad_lines_of_plain_text(tmp_path):
    (tmp_path / "rows.txt").write_bytes(b"fine\n\n  \n\xff\nfine")
    shards = read(tmp_path / "rows.txt")
    assert texts_of(shards) == ["fine", "fine"]
    assert [row for row, _, _ in rejects_of(shards)] == [1, 2, 3]


def test_bad_parquet_values(tmp_path):
    bad = pa.array([b"fine", b"\xff", None, b""], pa.binary())
    parquet.write_table(pa.table({"text": bad}), tmp_path / "binary.parquet")
    offsets = pa.array([0, 4, 5, 9], pa.int32()).buffers()[1]
    strings = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"fine\xfffine"))
    parquet.write_table(pa.table({"text": strings}), tmp_path / "string.parquet")
    parquet.write_table(pa.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    shards = read(tmp_path / "binary.parquet")
    assert texts_of(shards) == ["fine"]
    assert [(row, reason.split(":")[0]) for row, _, reason in rejects_of(shards)] == [
        (1, "undecodable bytes"),
        (2, "text column 'text' is null"),
        (3, "text column 'text' is empty"),
    ]
    shards = read(tmp_path / "string.parquet")
    assert texts_of(shards) == ["fine", "fine"]
    assert rejects_of(shards) == [(1, None, "undecodable bytes: 0xff at byte 0 is not UTF-8")]
    assert [row for row, _, _ in rejects_of(read(tmp_path / "numbers.parquet"))] == [0, 1]


def test_several_inputs_and_a_limit(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.csv").write_text("text\nthree\nfour\n")
    both = [tmp_path / "a.txt", tmp_path / "b.csv"]
    shards = read(both)
    assert texts_of(shards) == ["one", "two", "three", "four"]
    assert [example.id for example in shards[0].examples] == [0, 2, 3, 4]
    assert rejects_of(shards) == [(1, 2, "text column 'text' is empty")]
    assert [shard.rejects[0].input for shard in shards] == ["a.txt"]
    assert texts_of(read(both, limit=4)) == ["one", "two", "three"]
    assert texts_of(read(both, limit=3)) == ["one", "two"]


def test_no_rows_are_one_empty_shard(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (shard,) = read(tmp_path / "empty.jsonl")
    assert (shard.first_row, shard.end_row, shard.examples) == (0, 0, [])
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(ValueError, match="has no header line"):
        read(tmp_path / "empty.csv")


@pytest.mark.parametrize(
    ("values", "kind", "kept"),
    [
        ([3, 4], "int64", [3, 4]),
        (["a", 4, True], "string", ["a", "4", "True"]),
        ([0.5, 2], "float64", [0.5, 2.0]),
        ([0.5, 2, "x"], "string", ["0.5", "2", "x"]),
        ([1, "x", 2**70, 2.5], "string", ["1", "x", str(2**70), "2.5"]),
        ([True, 1], "int64", [1, 1]),
        ([None, 5], "int64", [None, 5]),
        ([None, None], "string", [None, None]),
        ([{"a": 1}, None], "string", ["{'a': 1}", None]),
    ],
)
def test_labels_pass_through(tmp_path, values, kind, kept):
    """As the narrowest type that holds all of them; no label is a reason to lose a text."""
    lines = [json.dumps({"text": "x", "label": value}) for value in values]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (shard,) = read(tmp_path / "rows.jsonl", Columns(label="label"))
    assert shard.gold_type == kind
    assert [typed(example.gold, kind) for example in shard.examples] == kept
    assert shard.rejects == []


def test_ids(tmp_path):
    """An id that is not there is null: the text decides whether a row is good."""
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "key": "k1"}\n{"text": "y"}\n{"text": "z", "key": null}\n')
    (shard,) = read(tmp_path / "rows.jsonl", Columns(id="key"))
    assert (shard.id_type, [example.id for example in shard.examples]) == ("string", ["k1", None, None])
    assert shard.rejects == []
    (shard,) = read(tmp_path / "rows.jsonl")
    assert shard.id_type == "int64"


def test_pairs(tmp_path):
    (tmp_path / "rows.csv").write_text("a,b\nfirst,second\nalone,\n")
    (shard,) = read(tmp_path / "rows.csv", Columns(text="a", pair="b"))
    assert [(example.text, example.pair) for example in shard.examples] == [("first", "second")]
    assert shard.rejects[0].reason == "text column 'b' is empty"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.tsv", "rows.parquet", "rows.txt"])
def test_no_such_column(tmp_path, name):
    (tmp_path / name).write_bytes(FORMATS[name][0])
    with pytest.raises(ValueError, match=rf"{name}' has no column 'review'; its columns are .*text"):
        read(tmp_path / name, Columns(text="review"))


def test_a_column_that_comes_late(tmp_path):
    lines = ['{"other": 1}'] * 5 + ['{"text": "found"}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    shards = read(tmp_path / "rows.jsonl")
    assert texts_of(shards) == ["found"]
    assert len(rejects_of(shards)) == 5


def test_what_is_no_input(tmp_path):
    (tmp_path / "array.json").write_text('[{"text": "x"}]')
    (tmp_path / "utf16.csv").write_bytes("text\nx\n".encode("utf-16"))
    (tmp_path / "no.parquet").write_bytes(b"text\nx\n")
    (tmp_path / "twice.csv").write_text("text,text\na,b\n")
    (tmp_path / "rows.xlsx").write_text("x")
    cases = [
        (tmp_path, OSError, "is a folder"),
        (tmp_path / "none.csv", OSError, "there is no input"),
        (tmp_path / "array.json", ValueError, "one JSON array"),
        (tmp_path / "utf16.csv", ValueError, "UTF-16"),
        (tmp_path / "no.parquet", OSError, "no Parquet file"),
        (tmp_path / "twice.csv", ValueError, "several columns 'text'"),
        (tmp_path / "rows.xlsx", ValueError, r"ends in '.xlsx' is not known"),
        ("s3://bucket/rows.csv", ValueError, "only files and hf://"),
        ("hf://", ValueError, "names no data set"),
        ("hf://glue?splitt=train", ValueError, "unknown option 'splitt'"),
        ([], ValueError, "empty list"),
        (["-", "-"], ValueError, "more than once"),
        (7, TypeError, "got int"),
        ([7], TypeError, "must be a file name, got int"),
        (b"rows.csv", TypeError, "got bytes"),
        (iter(["rows.csv"]), TypeError, "file names in a list"),
    ]
    for given, error, message in cases:
        with pytest.raises(error, match=message):
            read(given)


def test_gzip_that_breaks_off(tmp_path):
    content = gzip.compress(jsonl([f"text {i} {hash(str(i))}" for i in range(20000)]))
    (tmp_path / "cut.jsonl.gz").write_bytes(content[: len(content) // 2])
    source = inputs_of(tmp_path / "cut.jsonl.gz")
    shards = []
    with pytest.raises(OSError, match="is cut off or damaged"):
        shards.extend(Reader(source, Columns(), 100, None, False))
    reader = iter(Reader(inputs_of(tmp_path / "cut.jsonl.gz"), Columns(), 100, None, False))
    assert texts_of([next(reader)])[99].startswith("text 99 ")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (jsonl(), TEXTS),
        (gzip.compress(jsonl()), TEXTS),
        (b"plain\ntext\n", ["plain", "text"]),
        (b"7\n[8]\n", ["7", "[8]"]),
        (b"\xef\xbb\xbfplain\n", ["plain"]),
        (b"", []),
    ],
    ids=["jsonl", "gzip", "text", "json-but-no-object", "bom", "empty"],
)
def test_standard_input(monkeypatch, content, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    assert texts_of(read("-")) == expected


def test_standard_input_of_another_format(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(as_csv())))
    assert texts_of(read("-", format_="csv")) == TEXTS
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(as_parquet())))
    with pytest.raises(ValueError, match="cannot be read from standard input"):
        read("-", format_="parquet")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OSError, match="standard input is closed"):
        read("-")


def test_data_sets(tmp_path):
    """A folder stands for a data set of the hub: the same call of the library loads either."""
    (tmp_path / "train.jsonl").write_bytes(jsonl())
    (tmp_path / "test.jsonl").write_bytes(jsonl(["only one", ""]))
    shards = read(f"hf://{tmp_path}?split=train")
    assert texts_of(shards) == TEXTS
    shards = read(f"hf://{tmp_path}?split=test")
    assert texts_of(shards) == ["only one"]
    assert rejects_of(shards) == [(1, None, "text column 'text' is empty")]
    with pytest.raises(ValueError, match="has the splits train, test: choose one"):
        read(f"hf://{tmp_path}")
    with pytest.raises(ValueError, match="has no column 'review'"):
        read(f"hf://{tmp_path}?split=test", Columns(text="review"))
    with pytest.raises(OSError, match=r"cannot be loaded|neither here nor"):
        read(f"hf://{tmp_path}?split=valid")


def test_names_of_data_sets(monkeypatch):
    """hf://A/B is repository A/B where there is one, else configuration B of A."""
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["x"]}).to_iterable_dataset()
    asked = []

    def load_dataset(path, name=None, **options):
        asked.append((path, name, options["split"], options["revision"], options["streaming"]))
        if path in known:
            return rows
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{path}' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    known = {"glue"}
    assert texts_of(list(Reader(inputs_of("hf://glue/sst2?split=validation"), Columns(), 9, None, False))) == ["x"]
    assert asked == [("glue/sst2", None, "validation", None, True), ("glue", "sst2", "validation", None, True)]
    known, asked[:] = {"nyu-mll/glue"}, []
    read("hf://nyu-mll/glue?split=train&name=sst2&revision=abc")
    assert asked[0] == ("nyu-mll/glue", "sst2", "train", "abc", True)
    known = set()
    with pytest.raises(OSError, match="neither here nor on the Hugging Face hub"):
        read("hf://nobody/nothing?split=train")


def test_shards_close_at_many_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "CHARACTERS", 50)
    (tmp_path / "rows.txt").write_text("\n".join(["x" * 20] * 7))
    shards = read(tmp_path / "rows.txt", shard_rows=100)
    assert [(shard.first_row, shard.end_row) for shard in shards] == [(0, 3), (3, 6), (6, 7)]


def test_digests_tell_inputs_apart(tmp_path):
    digests = set()
    for content in (["a", "b"], ["a b"], ["b", "a"], ["a", ""], ["a", "b", "c"]):
        (tmp_path / "rows.txt").write_text("\n".join(content))
        digests.add(read(tmp_path / "rows.txt")[0].digest)
    assert len(digests) == 5
    (tmp_path / "rows.txt").write_text("a\nb")
    shards = read(tmp_path / "rows.txt")
    (tmp_path / "moved.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    assert read(tmp_path / "moved.jsonl")[0].digest == shards[0].digest


def test_a_plan_leaves_out_what_is_done(tmp_path):
    (tmp_path / "rows.txt").write_text("\n".join("abcdefg"))
    reader = Reader(inputs_of(tmp_path / "rows.txt"), Columns(), 3, None, False)
    shards = list(reader)
    skipped = []
    done = {1: (3, 6, shards[1].digest, 0)}
    plan = Plan(reader, done, lambda *values: skipped.append(values[:2]))
    assert [shard.index for shard in plan] == [0, 2]
    assert (plan.end_row, skipped) == (7, [(3, 6)])
    with pytest.raises(ValueError, match="begun with another input: rows 3 to 5"):
        list(Plan(reader, {1: (3, 6, shards[0].digest, 0)}))
    with pytest.raises(BadRowError, match="2 of the rows 3 to 5 were rejected before"):
        list(Plan(Reader(reader.inputs, Columns(), 3, None, True), {1: (3, 6, shards[1].digest, 2)}))


def test_sources_name_no_machine(tmp_path):
    """What goes into rejects.jsonl is a file's name, not where it lies."""
    (tmp_path / "rows.txt").write_text("\n")
    (shard,) = read(tmp_path / "rows.txt")
    assert shard.rejects[0].input == "rows.txt"
    assert Path(tmp_path).name not in str(shard.rejects[0])
