"""The kernels compiled for GPUs that need not be there: nothing spills, all fits into shared memory."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).parent.parent / "bench"
REPRESENTATIVE = [
    ("rollout_rows", "bf16", 12, 64, "targets=1", "sm_90"),
    ("rollout_rows", "bf16", 12, 64, "targets=1", "sm_80"),
    ("attention", "fp16", 12, 64, "", "sm_90"),
    ("gram", "fp32", 12, 64, "", "sm_80"),
    ("transposed_product", "bf16", 12, 64, "", "sm_90"),
    ("transposed_product", "fp32", 12, 64, "window", "sm_80"),
]
# Compiled in a process of its own, since kernels defined for the interpreter cannot be.
COMPILE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import compile
print(json.dumps([compile.compile_case(compile.Case(*case)) for case in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def bench_compile() -> ModuleType:
    """bench/compile.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return importlib.import_module("compile")


@pytest.fixture(scope="module")
def committed() -> list[dict[str, str]]:
    """The rows of bench/results/compile.csv."""
    with (BENCH / "results" / "compile.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_representative_kernels_compile_without_spilling() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(BENCH)],
        input=json.dumps(REPRESENTATIVE),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == len(REPRESENTATIVE)
    for row in rows:
        # the tiles are chosen with triton 3.6; other versions may keep a few bytes of set-up on the stack
        assert int(row["stack_bytes"]) <= 16, row
        assert row["fits"] == "yes", row


def test_committed_rows_cover_the_matrix(bench_compile: ModuleType, committed: list[dict[str, str]]) -> None:
    given = [tuple(row[key] for key in bench_compile.Case._fields) for row in committed]
    assert given == [tuple(map(str, case)) for case in bench_compile.matrix()]


def test_committed_rows_are_of_the_present_tiles(bench_compile: ModuleType, committed: list[dict[str, str]]) -> None:
    for case, row in zip(bench_compile.matrix(), committed, strict=True):
        sizes = bench_compile.launch_of(case).sizes()
        assert sizes == {key: row[key] for key in sizes}, f"run bench/compile.py: {case} has other tiles now"


def test_no_committed_row_needs_more_shared_memory_than_there_is(committed: list[dict[str, str]]) -> None:
    assert not [row for row in committed if row["fits"] != "yes"]


def test_up_to_16_heads_no_committed_row_spills(committed: list[dict[str, str]]) -> None:
    """Four float32 variants keep two to four numbers of their set-up on the stack, whatever their tile."""
    spilling = [row for row in committed if int(row["heads"]) <= 16 and int(row["stack_bytes"]) > 0]
    assert not [row for row in spilling if row["dtype"] != "fp32" or int(row["stack_bytes"]) > 16]
    assert len(spilling) <= 4


LENGTHS = """
import importlib, json, pkgutil, sys
sys.path[:0] = sys.argv[1:3]
import torch
from triton.runtime import driver
import compile
import globenc_kernels as gk

driver.set_active(compile.Target("sm_90"))
compiled = set()

def launch(kernel, grid, *args, **options):
    kernel.warmup(*args, grid=grid, **options)
    compiled.update((kernel.fn.__name__, str(key)) for key in kernel.device_caches[90][0])

for found in pkgutil.iter_modules(gk.__path__):
    module = importlib.import_module(f"globenc_kernels.{found.name}")
    if hasattr(module, "launch"):
        module.launch = launch
H, D, dtype = 2, 16, torch.bfloat16
d = H * D
weight = gk.gram_weight(torch.randn(d, d, dtype=torch.float64), H, dtype)
counts = []
for batch, n in json.load(sys.stdin):
    tokens = gk.TokenRanges(torch.ones(batch, n, dtype=torch.bool))
    query, key, value = torch.zeros(3, batch, n, H, D, dtype=dtype).unbind()
    query, key, value = (tensor.clone().transpose(1, 2) for tensor in (query, key, value))
    x, p = torch.zeros(batch, n, d, dtype=dtype), torch.zeros(d)
    attended = gk.attention(query, key, value, tokens, 0.25)
    scales = gk.layer_scales(x, (x, x), (1e-12, 1e-12), attended.context.flatten(2), (p, p), None, tokens)
    diagonal = gk.stage_norms(x, x, (p, p), scales.scale2)
    factors = gk.head_factors(value, weight, tokens)
    local_map = gk.LocalMap(
        query, key, 0.25, attended.log_sum_exp, factors, scales.scale2, diagonal, tokens
    )
    gk.rollout_rows(torch.zeros(batch, 1, n), local_map)
    gk.rollout_rows(torch.zeros(batch, 3, n), local_map)
    gk.row_sums(local_map)
    gk.contribution_norms(local_map)
    for labels in (1, 2, 16):
        gradient = torch.zeros(batch, n, H, labels * D, dtype=dtype)
        gk.transposed_product(query, key, attended.log_sum_exp, gradient, tokens, 0.25)
    counts.append(len(compiled))
print(json.dumps(counts))
"""


def test_no_compilation_for_another_length_or_batch() -> None:
    shapes = [(1, 64), (1, 128), (1, 65), (1, 66), (3, 7), (2, 130), (1, 1), (4, 33), (1, 511)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LENGTHS, str(BENCH), str(BENCH.parent / "kernels")],
        input=json.dumps(shapes),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts[0] == 10  # attention, two of factors, scales, norms, two rollouts, sums, map, transposed product
    assert counts == counts[:1] * len(shapes), dict(zip(shapes, counts, strict=True))
