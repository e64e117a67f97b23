"""Time and peak memory of attribution against the plain forward pass and the direct sum, on a CPU.

`python -m pytest bench --benchmark-only` runs it and writes bench/results/cpu.csv; `python bench/table.py` puts the
table into the README. A ratio is the median of runs taken in turn with the forward pass, so that a noisy machine
meets both alike.
"""

from __future__ import annotations

import pytest
import torch
from harness import LONG_SHAPES, build, peak_mb, ratio, work
from pytest_benchmark.fixture import BenchmarkFixture

import globenc

RESULTS = "cpu"
CASES = [("BERT-base", n) for n in (32, 64, 128, 256, 512)]
CASES += [("MiniLM-L6", n) for n in (32, 128, 256, 512)]
CASES += [("2 layers, d=768", 4096)]
CASES += [(shape, 16000) for shape in LONG_SHAPES]
LONGEST_DIRECT_SUM = 256


@pytest.mark.parametrize("what", ["forward", "globenc", "direct sum"])
@pytest.mark.parametrize(("shape", "n"), CASES, ids=lambda value: str(value).replace(" ", ""))
def test_speed(benchmark: BenchmarkFixture, record: list[dict[str, str]], shape: str, n: int, what: str) -> None:
    if what == "direct sum" and n > LONGEST_DIRECT_SUM:
        pytest.skip("the direct sum is measured up to 256 tokens")
    model, inputs = build(shape, n)
    if what == "globenc" and n <= LONGEST_DIRECT_SUM:  # nothing is reported of a wrong result
        scores, direct = (globenc.attribute(model, backend=b, **inputs).scores for b in ("torch", "reference"))
        torch.testing.assert_close(scores, direct, rtol=1e-4, atol=1e-6)
    function = work(what, model, inputs)
    rounds = max(5, 1280 // n)
    if what == "direct sum" or n > 512:
        rounds = 2 if n <= 4096 else 1
    benchmark.group = f"{shape} n={n}"
    benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=1)
    row = {
        "shape": shape,
        "batch": "1",
        "n": str(n),
        "what": what,
        "median_ms": f"{benchmark.stats['median'] * 1e3:.2f}",
        "ratio_to_forward": f"{ratio(function, work('forward', model, inputs), rounds):.2f}",
        "peak_mb": f"{peak_mb(shape, n, what):.0f}",
    }
    benchmark.extra_info.update(row)
    record.append(row)
