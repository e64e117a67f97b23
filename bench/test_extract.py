"""Extraction of a corpus against what it cannot do without, and its memory over the number of rows.

`python -m pytest bench/test_extract.py --benchmark-only` writes bench/results/extract.csv; `python bench/table.py` puts
the table into the README. The corpus is AG News (7,600 descriptions, 41 tokens each on average), from shared/.
"""

from __future__ import annotations

import gzip
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import globenc
from globenc.batching import by_length, pad
from globenc.extraction.run import SHARD_ROWS
from globenc.tokenization import encode

RESULTS = "extract"
SHARED = Path(__file__).parents[2] / "shared"
AG_NEWS = SHARED / "data" / "ag_news" / "test.jsonl.gz"
MODELS = {"sst2-small (embedded)": None, "MiniLM-L6 SST-2": SHARED / "models" / "minilm-sst2"}
MOST_OVERHEAD = {"sst2-small (embedded)": 1.10, "MiniLM-L6 SST-2": 1.05}
ONE_AT_A_TIME = 500  # rows

pytestmark = pytest.mark.skipif(not AG_NEWS.exists(), reason="needs shared/data/ag_news")


def read() -> list[str]:
    with gzip.open(AG_NEWS, "rt", encoding="utf-8") as file:
        return [json.loads(line)["description"] for line in file]


def seconds_of_bare_loop(explainer: globenc.GlobEnc, batches: list[dict]) -> float:
    start = time.perf_counter()
    for inputs in batches:
        globenc.attribute(explainer.model, **inputs)
    return time.perf_counter() - start


@pytest.mark.parametrize("name", MODELS)
def test_throughput(benchmark: BenchmarkFixture, record: list[dict[str, str]], tmp_path: Path, name: str) -> None:
    """Reading, tokenising, batching and writing beside the model; and one text at a time."""
    if MODELS[name] is not None and not MODELS[name].is_dir():
        pytest.skip("needs shared/models")
    explainer, texts = globenc.GlobEnc.from_pretrained(MODELS[name], dtype="float32"), read()
    budget, batches = explainer.budget(), []
    for begin in range(0, len(texts), SHARD_ROWS):
        encodings = encode(explainer.tokenizer, texts[begin : begin + SHARD_ROWS], None, explainer.limit())
        for batch in by_length([len(encoding) for encoding in encodings], budget):
            batches.append(pad([encodings[i] for i in batch], explainer.tokenizer, explainer.model))
    bare: list[float] = []
    ours: list[float] = []

    def extract(k: int) -> None:
        start = time.perf_counter()
        summary = globenc.extract(
            AG_NEWS,
            tmp_path / str(k),
            model=explainer,
            text_column="description",
            batch_tokens=budget,
            progress=False,
        )
        ours.append(time.perf_counter() - start)
        assert (summary.rows, summary.rejected) == (len(texts), 0)

    def loop() -> tuple[tuple[int], dict]:
        bare.append(seconds_of_bare_loop(explainer, batches))
        return (len(bare),), {}

    seconds_of_bare_loop(explainer, batches[:5])  # warm
    benchmark.pedantic(extract, setup=loop, rounds=3 if MODELS[name] is None else 2, iterations=1)
    bare.append(seconds_of_bare_loop(explainer, batches))  # every run stands between two loops
    around = [(bare[k] + bare[k + 1]) / 2 for k in range(len(ours))]
    overhead = statistics.median(mine / loop for mine, loop in zip(ours, around, strict=True))
    record.append(
        {
            "model": name,
            "what": "extract / bare loop",
            "rows": str(len(texts)),
            "value": f"{statistics.median(ours):.1f}",
            "base": f"{statistics.median(bare):.1f}",
            "unit": "s",
            "ratio": f"{overhead:.3f}",
        }
    )
    some = random.Random(0).sample(texts, ONE_AT_A_TIME)
    start = time.perf_counter()
    for text in some:
        explainer(text)
    single = ONE_AT_A_TIME / (time.perf_counter() - start)
    whole = len(texts) / ours[-1]
    record.append(
        {
            "model": name,
            "what": "extract / one text at a time",
            "rows": str(ONE_AT_A_TIME),
            "value": f"{whole:.0f}",
            "base": f"{single:.0f}",
            "unit": "rows/s",
            "ratio": f"{whole / single:.2f}",
        }
    )
    print(json.dumps(record[-2:], indent=1), [round(a / b, 3) for a, b in zip(ours, around, strict=True)])
    assert overhead <= MOST_OVERHEAD[name]
    assert MODELS[name] is not None or whole >= 3 * single


PEAK = """
import resource, sys
import globenc
globenc.extract(sys.argv[1], sys.argv[2], max_length=16, shard_rows=int(sys.argv[3]), progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_memory(benchmark: BenchmarkFixture, record: list[dict[str, str]], tmp_path: Path) -> None:
    """Peak memory of a whole process over 1,000 and 50,000 rows, of 16 tokens each, in shards of 500."""
    texts, peaks = read(), {}

    def peak(rows: int) -> None:
        corpus = tmp_path / f"{rows}.jsonl"
        with corpus.open("w") as file:
            file.writelines(json.dumps({"text": texts[k % len(texts)]}) + "\n" for k in range(rows))
        command = [sys.executable, "-c", PEAK, str(corpus), str(tmp_path / f"out-{rows}"), "500"]
        peaks[rows] = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    peak(1000)
    benchmark.pedantic(peak, (50000,), rounds=1, iterations=1)
    record.append(
        {
            "model": "sst2-small (embedded)",
            "what": "peak memory / that of 1,000 rows",
            "rows": "50000",
            "value": f"{peaks[50000]:.0f}",
            "base": f"{peaks[1000]:.0f}",
            "unit": "MB",
            "ratio": f"{peaks[50000] / peaks[1000]:.3f}",
        }
    )
    assert peaks[50000] <= 1.1 * peaks[1000]
