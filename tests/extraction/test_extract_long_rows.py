"""Long rows and long reasons: bounded in memory, and whole where they are asked for."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from extract_helpers import (
    read,
    rejects_in,
    run,
    texts_of,
)
from pyarrow import parquet

from globenc.extraction import json_rows, lines, parquet_rows
from globenc.extraction import rows as rows_module
from globenc.extraction import worker as worker_module
from globenc.extraction.options import RunOptions, Settings
from globenc.extraction.rows import Columns, Reader, Reject
from globenc.extraction.sources import inputs_of
from globenc.extraction.worker import Worker
from globenc.printing import short


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


PEAKS = """
import os, sys, globenc
explainer = globenc.GlobEnc.from_pretrained()
for line in sys.stdin:
    corpus, out, kept = line.rstrip("\\n").split("\\t")
    pid = os.fork()
    if pid == 0:
        globenc.extract(corpus, out, model=explainer, progress=False, words=True, keep_text=kept == "kept")
        print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], flush=True)
        os._exit(0)
    os.waitpid(pid, 0)
"""
UNITS = {"ascii": "a charming film and more ", "cjk": "この映画は良い 良い ", "mixed": "a charming film and more 🎬 "}


@pytest.fixture(scope="module")
def program():
    """A program that has loaded everything, and whose children extract."""
    with subprocess.Popen(
        [sys.executable, "-c", PEAKS],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


def peak_mb(program: subprocess.Popen, folder: Path, ending: str, text: str, kept: bool) -> float:
    """Of an extraction of 40 short texts and this one, if it is one."""
    texts = [*["a good film"] * 20, *[text] * (text != ""), *["a bad film"] * 20]
    corpus = folder / f"{len(text)}.{ending}"
    if ending == "parquet":
        parquet.write_table(pa.table({"text": texts}), corpus)
    elif ending == "jsonl":
        corpus.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    else:
        corpus.write_text("text\n" * (ending == "csv") + "".join(f"{text}\n" for text in texts))
    print(corpus, folder / f"out-{len(text)}", "kept" * kept, sep="\t", file=program.stdin, flush=True)
    return float(program.stdout.readline()) / 1024


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
def test_peak_memory_with_a_long_row(tmp_path_factory, program, ending, unit, megabytes, kept):
    """Within 300 MB of the same run without it."""
    folder = tmp_path_factory.mktemp("peak")
    text = UNITS[unit] * (megabytes * 1_000_000 // len(UNITS[unit].encode()))
    without = peak_mb(program, folder, ending, "", kept)
    assert peak_mb(program, folder, ending, text, kept) <= without + 300
