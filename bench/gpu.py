"""Time and memory of attribution on a GPU against the plain forward pass, in one command, without installing anything.

    python bench/gpu.py                       the GPU tests, then rows in bench/results/gpu.csv, a table, the targets
    python bench/gpu.py --only "x512$" --dtype bf16                                            some of the cases
    python bench/gpu.py --tiles --profile     tile sizes of the rollout kernel; where the time goes; no rows
    TRITON_INTERPRET=1 python bench/gpu.py --quick --skip-tests --minutes 60             the script itself, on a CPU

A row is in the CSV as soon as it is measured; the targets' cases come first, and what might not end within --minutes is
not begun. Times are medians of `triton.testing.do_bench`, of three calls where one takes half a second. Peak memory is
what a call needs above what was allocated before it, in 1e9 bytes; of attribution the first call's, with what it keeps
for the next. The direct sum (backend "reference") takes as many texts at a time as n n d = 2^28 numbers allow, one of
512 tokens. Errors are the largest relative ones of a score, against the direct sum in float64; of class scores, which
have signs, in terms of the largest score.

Shares are of the two ceilings measured here: the part of a row's time that its *necessary* work would take at the speed
of copying, or of a bfloat16 matrix product, whatever its backend really did. With width d, H heads, intermediate width
4 d and s bytes a number, a layer of the forward is 24 d^2 + 4 n d operations a token, 24 d s bytes a token (its input
read; q, k, v, context, both LayerNorms' inputs, the first one's output and the 4 d between the feed-forward's products
written and read; its output written) and 12 d^2 s of weights. Attribution adds to each layer but the last 2 d^2
operations a token for its own part, d^2 for each matrix that P is a sum of (3 in bfloat16, 2 in float16, 1 in float32)
and 2 d + H (H + 1) + 2 H a pair of tokens for scores and quadratic form; and 10 d s + 4 H (H + 3) bytes a token (q, k,
v, residual and both LayerNorms' inputs read again; own context, own part, factors, log-sum-exps written and read). The
last layer has one row: 2 d^2 + 2 d operations and 2 d s bytes a token.

Class scores are those of a number of the first token's state, by the kernels, for reference "origin" or "zero". Their
pull-back adds to each layer but the last 20 d^2 + 4 n d operations a token (all products but those of queries and keys;
scores and transposed product), 26 d s bytes a token (q, k, h and phi(h) read again; gradients of the layer's output, of
what the feed-forward's products read, of contexts and values written and read) and 10 d^2 s of weights, and to the last
2 d^2 + 4 d operations and 6 d s bytes a token and 2 d^2 s of weights. The zero reference's second pass is a forward's
without queries and keys, with as many bytes again for slopes as for h and phi(h): 20 d^2 + 4 n d operations and 36 d s
bytes a token, and 10 d^2 s of weights.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import functools
import gc
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
import triton
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

START = time.monotonic()
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import globenc_kernels as kernels  # noqa: E402

import globenc  # noqa: E402

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}  # the most important first
PARTS = {"bf16": 3, "fp32": 1, "fp16": 2}
# layers, width, heads
MODELS = {"BERT-base": (12, 768, 12), "BERT-large": (24, 1024, 16), "12 layers": (12, 768, 12), "tiny": (2, 64, 2)}
LONGEST_DIRECT_SUM, LONGEST_EXACT, EXACT_TEXTS = 2048, 512, 4
SLOW_MS = 500  # from here do_bench would repeat a call too often
# guesses for the budget alone: a backend's time over a forward's, and seconds to compile a shape's kernels
SCORES = {f"class scores, {reference}": reference for reference in ("origin", "zero")}
SLOWER, COMPILE_S = {"forward": 1, "triton": 3, "torch": 100, "reference": 500, **dict.fromkeys(SCORES, 10)}, 20


class Case(NamedTuple):
    """A model's shape and its inputs'."""

    shape: str
    batch: int
    n: int
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.shape} {self.batch}x{self.n}"


class Result(NamedTuple):
    """What was measured, in ms, bytes and a relative error; `note` says why it was not."""

    ms: float = math.nan
    peak: float = math.nan
    error: float = math.nan
    note: str = ""


Key = tuple[Case, str]  # and a backend
Results = dict[Key, Result]
Jobs = list[tuple[Case, tuple[str, ...]]]  # cases and their backends beside the forward
BASE, LONG = Case("BERT-base", 32, 512, "bf16"), Case("12 layers", 1, 8192, "bf16")
BASE_FP32, LONGEST = BASE._replace(dtype="fp32"), LONG._replace(n=131_072)
TINY = Case("tiny", 1, 20, "bf16")
# of backend "triton" on a case: the quantity, beside which other backend, its limit and goal
TARGETS = (
    (BASE, "time /", "forward", "at most", 1.5, 1.25),
    (BASE, "times faster than", "reference", "at least", 100, 100),
    (BASE, "times faster than", "torch", "at least", 3, 3),
    (LONG, "time /", "forward", "at most", 2.5, 2.0),
    (LONG, "GB above", "forward", "at most", 1.5, 1.5),
    (LONGEST, "GB above", "forward", "at most", 20, 20),
    (BASE_FP32, "time /", "forward", "at most", 1.5, 1.5),
    (BASE_FP32, "error /", "reference", "at most", 2, 2),
)


def plan(quick: bool = False) -> Jobs:
    """What is measured, the most important first; a case may come again with other backends."""
    if quick:
        return [(TINY._replace(dtype=dtype), ("triton", "torch", "reference", *SCORES)) for dtype in DTYPES]
    shapes = [*itertools.product(("BERT-base", "BERT-large"), ((32, 512), (32, 128), (1, 512), (8, 2048)))]
    shapes += [("12 layers", (1, n)) for n in (8192, 32_768, 131_072)]
    cases = [Case(shape, *size, dtype) for dtype in DTYPES for shape, size in shapes]
    targets: Jobs = [(BASE, ("triton", "reference", "torch")), (LONG, ("triton",))]
    targets += [(BASE_FP32, ("triton", "reference")), (LONGEST, ("triton",))]
    fused = [(case, ("triton",)) for case in cases if case.n < LONGEST.n]
    scored: Jobs = [(case, tuple(SCORES)) for case in cases if case.n < LONGEST.n]
    short = [(case, ("torch", "reference")) for case in cases if case.n <= LONGEST_DIRECT_SUM]
    return targets + scored[:1] + fused + scored + short + [(case, ("triton", "torch")) for case in cases]


def necessary(case: Case, backend: str) -> tuple[float, float]:
    """Operations and bytes of a row's work, counted as at the top of this file."""
    layers, d, heads = MODELS[case.shape]
    tokens, size = case.batch * case.n, DTYPES[case.dtype].itemsize
    flops = layers * tokens * (24 * d**2 + 4 * case.n * d)
    moved = layers * (tokens * 24 * d + 12 * d**2) * size
    if backend in SCORES:
        product, weights = tokens * (20 * d**2 + 4 * case.n * d), 10 * d**2 * size
        flops += (layers - 1) * product + tokens * (2 * d**2 + 4 * d)
        moved += (layers - 1) * (tokens * 26 * d * size + weights) + (tokens * 6 * d + 2 * d**2) * size
        if SCORES[backend] == "zero":
            flops += layers * product
            moved += layers * (tokens * 36 * d * size + weights)
    elif backend != "forward":
        pairs = case.n * (2 * d + heads * (heads + 1) + 2 * heads)
        flops += (layers - 1) * tokens * ((2 + PARTS[case.dtype]) * d**2 + pairs) + tokens * (2 * d**2 + 2 * d)
        moved += (layers - 1) * tokens * (10 * d * size + 4 * heads * (heads + 3)) + tokens * 2 * d * size
    return flops, moved


def build(case: Case, device: torch.device) -> tuple[Any, dict[str, Tensor]]:
    """A random-weight encoder with SDPA attention, made on the device in its dtype, and texts without padding."""
    torch.manual_seed(0)
    layers, d, heads = MODELS[case.shape]
    config = transformers.BertConfig(
        num_hidden_layers=layers, hidden_size=d, num_attention_heads=heads, intermediate_size=4 * d,
        max_position_embeddings=max(512, case.n), attn_implementation="sdpa",
    )  # fmt: skip
    with device:
        model = transformers.AutoModel.from_config(config, dtype=DTYPES[case.dtype], add_pooling_layer=False)
        tokens = torch.randint(1000, 30000, (case.batch, case.n))
        return model.to(device).eval(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def run(backend: str, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The work of a row: scores [batch, n] for position "cls" or of classes, or the plain forward's hidden states."""
    if backend == "forward":  # transformers drops a mask of ones: nothing is n x n, and SDPA takes a fused kernel
        with torch.no_grad():
            return model(**inputs).last_hidden_state
    if backend in SCORES:
        return class_scores(SCORES[backend], "triton", model, inputs)
    batch, n = inputs["input_ids"].shape
    size = max(1, 2**28 // (n * n * model.config.hidden_size)) if backend == "reference" else batch
    parts = [{name: tensor[i : i + size] for name, tensor in inputs.items()} for i in range(0, batch, size)]
    return torch.cat([globenc.attribute(model, backend=backend, position="cls", **part).scores for part in parts])


def class_scores(reference: str, backend: str, model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Class scores [batch, n] of the first number of the first token's state."""

    def answer(output: Any) -> Tensor:
        return output.last_hidden_state[:, 0, 0]

    return globenc.class_scores(model, answer=answer, reference=reference, backend=backend, **inputs).scores


def relative_error(backend: str, model: Any, inputs: dict[str, Tensor]) -> float:
    """The largest one of a score against the direct sum; of signed scores, in terms of the largest score."""
    found, exact_model = run(backend, model, inputs).double(), copy.deepcopy(model).double()
    if backend in SCORES:
        exact = class_scores(SCORES[backend], "reference", exact_model, inputs)
        return float((found - exact).abs().max() / exact.abs().max())
    return float((found / run("reference", exact_model, inputs) - 1).abs().max())


def median_ms(function: Callable[[], object]) -> float:
    """Median time of a call that has been made before."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def once() -> float:
        wait()
        start = time.perf_counter()
        function()
        wait()
        return (time.perf_counter() - start) * 1e3

    first = once()
    if not torch.cuda.is_available():
        return first
    if first >= SLOW_MS:
        return sorted([first, once(), once()])[1]
    return triton.testing.do_bench(function, warmup=100, rep=400, return_mode="median")


def measure_ceilings(device: torch.device) -> tuple[float, float]:
    """Bytes a second of copying 1 GiB, and operations of a bfloat16 product of random 8192 x 8192 matrices."""
    side, size = (8192, 2**29) if device.type == "cuda" else (128, 2**20)  # a CPU only checks the script
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16)
    source = torch.randn(size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    a @ b
    copy_ms, matmul_ms = median_ms(lambda: target.copy_(source)), median_ms(lambda: a @ b)
    return 2 * source.nbytes / copy_ms * 1e3, 2 * side**3 / matmul_ms * 1e3


def measure(case: Case, backend: str, built: Callable[[], tuple[Any, dict]]) -> Result:
    """One row's numbers; what goes wrong is its note."""
    try:
        gc.collect()  # the model before
        model, inputs = built()
        function = functools.partial(run, backend, model, inputs)
        if backend == "forward":
            function()  # what the libraries allocate once for all is nobody's
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        peak = torch.cuda.max_memory_allocated() - before or math.nan  # a CPU counts none
        error = math.nan
        if backend != "forward" and case.dtype == "fp32" and case.n <= LONGEST_EXACT:
            few = {name: tensor[:EXACT_TEXTS] for name, tensor in inputs.items()}
            error = relative_error(backend, model, few)
        return Result(median_ms(function), peak, error)
    except torch.OutOfMemoryError:
        return Result(note="out of memory")
    except Exception as error:
        traceback.print_exc()
        return Result(note=f"failed: {type(error).__name__}: {error}".splitlines()[0][:200])


def estimate_s(case: Case, backend: str, results: Results, matmul: float) -> float:
    """About how long a row will take, rather too long than too short."""
    ms = 5 + necessary(case, "forward")[0] / matmul / 0.3 * 1e3  # in half precision
    if backend in ("forward", "triton"):  # the others compute in float32 whatever the model does
        known = results.get((case, "forward"), Result()).ms
        ms = (10 * ms if case.dtype == "fp32" else ms) if math.isnan(known) else known
    ms *= SLOWER[backend]
    calls = 5 if ms >= SLOW_MS else 10
    compiled = {(done.dtype, MODELS[done.shape][1:]) for done, how in results if how == "triton"}
    compiles = backend == "triton" and (case.dtype, MODELS[case.shape][1:]) not in compiled
    return 2 + calls * ms / 1e3 + compiles * COMPILE_S


def measure_all(jobs: Jobs, device: torch.device, matmul: float, deadline: float, results: Results) -> Iterator[Key]:
    """Measure what fits until the deadline, of `time.monotonic`; what is new in `results` is said at once."""
    left_out = set()
    for case, backends in jobs:
        built = functools.cache(functools.partial(build, case, device))
        for backend in ("forward", *backends):
            if (case, backend) in results or (case, backend) in left_out:
                continue
            if time.monotonic() + estimate_s(case, backend, results, matmul) > deadline:
                left_out.add((case, backend))
                done = "not measured, might not end within --minutes"
            else:
                result = results[case, backend] = measure(case, backend, built)
                yield case, backend
                done = result.note or f"{result.ms:.3f} ms"
            print(f"{time.monotonic() - START:5.0f} s  {case.name} {case.dtype} {backend}: {done}", flush=True)


def as_row(results: Results, case: Case, backend: str, ceilings: tuple[float, float], common: dict) -> dict[str, str]:
    """A row of the CSV; what was not measured is empty."""
    result, plain = results[case, backend], results.get((case, "forward"), Result())
    flops, moved = necessary(case, backend)
    numbers = {
        "ms": result.ms, "ratio_to_forward": result.ms / plain.ms,
        "peak_gb": result.peak / 1e9, "peak_gb_above_forward": (result.peak - plain.peak) / 1e9,
        "relative_error": result.error,
        "share_of_copy_bandwidth": moved / ceilings[0] / result.ms * 1e3,
        "share_of_matmul": flops / ceilings[1] / result.ms * 1e3,
        "copy_gb_per_s": ceilings[0] / 1e9, "matmul_tflop_per_s": ceilings[1] / 1e12,
    }  # fmt: skip
    return {
        "case": case.name, "batch": str(case.batch), "n": str(case.n), "dtype": case.dtype, "backend": backend,
        "position": "" if backend == "forward" else "cls",
        **{name: "" if math.isnan(number) else f"{number:.5g}" for name, number in numbers.items()},
        "note": result.note, **common,
    }  # fmt: skip


def write_row(path: Path, row: dict[str, str]) -> None:
    """Put a row into the CSV, in place of an older one of the same case; the file is whole at every moment."""
    rows = [*csv.DictReader(path.read_text().splitlines())] if path.exists() else []
    kept = {tuple(map(old.get, ("case", "dtype", "backend", "position", "device"))): old for old in [*rows, row]}
    with path.with_suffix(".part").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row), restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(kept.values())
    path.with_suffix(".part").replace(path)


def circumstances(device: torch.device) -> dict[str, str]:
    """Device, versions, commit and date of a row."""

    def first_line(command: str) -> str:
        status, output = subprocess.getstatusoutput(command)
        return output.splitlines()[0] if status == 0 else "unknown"

    gpu, commit = device.type == "cuda", f"git -C '{ROOT}' describe --always --dirty --exclude='*'"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else "cpu, interpreted",
        "torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "driver": first_line("nvidia-smi --query-gpu=driver_version --format=csv,noheader") if gpu else "",
        "commit": os.environ.get("GLOBENC_COMMIT") or first_line(commit), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def verdict(case: Case, quantity: str, backend: str, side: str, limit: float, goal: float, results: Results) -> str:
    """PASS, FAIL or not measured, and by how much."""
    ours, other = (results.get((case, key), Result()) for key in ("triton", backend))
    value = {
        "time /": ours.ms / other.ms,
        "times faster than": other.ms / ours.ms,
        "GB above": (ours.peak - other.peak) / 1e9,
        "error /": ours.error / (other.error or math.nan),
    }[quantity]
    passed = value <= limit if side == "at most" else value >= limit
    word = "PASS" if passed else "FAIL" if ours.note or not math.isnan(value) else "not measured"
    number = ours.note or other.note or ("" if math.isnan(value) else f"{value:.3g}")
    limits = f"{side} {limit:g}" + (f", goal {goal:g}" if goal != limit else "")
    return f"{word:12}  {case.name} {case.dtype}: {quantity} {backend}: {number} ({limits})"


def table(rows: list[dict[str, str]]) -> str:
    """The rows for the eye."""
    line = "{:22} {:5} {:9} {:>9} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8}  {}"
    heads = ("", "dtype", "backend", "ms", "/forward", "peak GB", "above", "error", "of copy", "of mul", "")
    names = ["case", "dtype", "backend", "ms", "ratio_to_forward", "peak_gb", "peak_gb_above_forward", "relative_error"]
    names += ["share_of_copy_bandwidth", "share_of_matmul", "note"]
    return "\n".join([line.format(*heads), *(line.format(*(row[name] for name in names)) for row in rows)])


def gpu_tests(seconds: float) -> bool:
    """Whether the GPU tests pass within a time; the project's own options name a plugin that need not be there."""
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += [
        *sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_kernel_*.py")),
        "tests/test_gpu.py",
    ]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the GPU tests took more than {seconds:.0f} s")
        return False


def layer_steps(case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """What attribution does in one layer, step by step, on random tensors; torch's attention for comparison."""
    torch.manual_seed(0)
    _, d, heads = MODELS[case.shape]
    dtype, texts, scaling = DTYPES[case.dtype], (case.batch, case.n), (d // heads) ** -0.5
    q, k, v = torch.randn(3, *texts, heads, d // heads, device=device).to(dtype).transpose(2, 3)
    x, y1, y2 = torch.randn(3, *texts, d, device=device).to(dtype)
    weight = (torch.randn(d, d, device=device) / d**0.5).to(dtype)
    gamma, ones, rows = (torch.ones(*shape, device=device) for shape in ((d,), texts, (case.batch, 1, case.n)))
    bias, real = x[0, 0].clone(), kernels.TokenRanges(ones.bool())
    attended = kernels.attention(q, k, v, real, scaling)
    gram = kernels.gram_weight(weight.double().T.contiguous(), heads, dtype)
    factors = kernels.head_factors(v, gram, real)
    context, diagonal_context = attended.context.flatten(2), attended.diagonal_context.flatten(2)
    diagonal = linear(diagonal_context, weight)
    local_map = kernels.LocalMap(q, k, scaling, attended.log_sum_exp, factors, ones, ones, real)
    flash = torch.ops.aten._scaled_dot_product_flash_attention  # gives log-sum-exps too; a GPU's half precision only
    return {
        "torch: attention": lambda: scaled_dot_product_attention(q, k, v, scale=scaling),
        **({"torch: aten flash": lambda: flash(q, k, v, 0.0, scale=scaling)} if device.type == "cuda" else {}),
        "attention": lambda: kernels.attention(q, k, v, real, scaling),
        "head_factors": lambda: kernels.head_factors(v, gram, real),
        "own part": lambda: linear(diagonal_context, weight),
        "layer_scales": lambda: kernels.layer_scales(x, (y1, y2), (1e-12, 1e-12), context, (gamma, gamma), bias, real),
        "stage_norms": lambda: kernels.stage_norms(diagonal, x, (gamma, gamma), ones),
        "rollout_rows": lambda: kernels.rollout_rows(rows, local_map),
        "scores: transposed": lambda: kernels.transposed_product(
            q, k, attended.log_sum_exp, attended.context, real, scaling
        ),
    }


def profile(case: Case, device: torch.device) -> None:
    """Print one attribution's kernels by time, and each step of a layer beside that layer's forward."""
    model, inputs = build(case, device)
    run("triton", model, inputs)
    with torch.profiler.profile() as profiler:
        run("triton", model, inputs).cpu()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    layer = median_ms(functools.partial(run, "forward", model, inputs)) / MODELS[case.shape][0]
    steps = layer_steps(case, device)
    times = {name: (step(), median_ms(step))[1] for name, step in steps.items()}
    ours = sum(ms for name, ms in times.items() if not name.startswith(("torch", "scores")))
    print(f"{case.name} {case.dtype}: ms, and share of the {layer:.4f} ms that a layer's forward takes")
    for name, ms in (*times.items(), ("added to the forward", ours - times["torch: attention"])):
        print(f"  {name:20} {ms:9.4f} {ms / layer:7.1%}")


def rollout_ms(cases: list[Case], device: torch.device, size: Any) -> list[float] | str:
    """Times of rollout_rows with local maps in tiles of this size, or why there are none."""
    module = sys.modules["globenc_kernels.contribution_norms"]  # a function of that name hides it
    try:
        with mock.patch.object(module, "map_tiles", return_value=size):
            steps = [layer_steps(case, device)["rollout_rows"] for case in cases]
            return [(step(), median_ms(step))[1] for step in steps]
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def sweep_tiles(cases: list[Case], device: torch.device, deadline: float) -> None:
    """Print the time of rollout_rows alone by tile size, neighbours of the present one first, then sorted."""
    _, d, heads = MODELS[cases[0].shape]
    present = kernels.tiles.map_tiles(DTYPES[cases[0].dtype], heads, d // heads, "row", device)
    sizes = [type(present)(*size) for size in itertools.product((16, 32, 64), (16, 32, 64), (4, 8, 16), (1, 2, 3))]
    sizes.sort(key=lambda size: sum(abs(math.log2(a / b)) for a, b in zip(size, present, strict=True)))
    if device.type == "cpu":
        del sizes[2:]
    else:  # one process compiles one kernel at a time: many leave them on the disk, on a short text
        with multiprocessing.get_context("spawn").Pool() as pool:
            pool.starmap(rollout_ms, [([cases[0]._replace(batch=1)], device, size) for size in sizes], chunksize=1)
    found = []
    for size in itertools.takewhile(lambda size: time.monotonic() < deadline, sizes):
        times, label = rollout_ms(cases, device, size), f"{size}{' present' if size == present else ''}"
        print(f"{label}: {times}", flush=True)
        found.append((times, label))
    names = ", ".join(f"{case.name} {case.dtype}" for case in cases)
    print(f"rollout_rows alone, {len(found)} of {len(sizes)} sizes tried, ms of {names}")
    for times, label in sorted(entry for entry in found if isinstance(entry[0], list)):
        print(*(f"{ms:9.4f}" for ms in times), "", label)


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, 1 where a test or a measurement failed, 2 where there is no GPU or no such case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", default="", help='cases by name, such as "BERT-base 32x512"')
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="may be given again; default: all")
    parser.add_argument("--minutes", type=float, default=8.0, help="what might not end by then is not begun; default 8")
    parser.add_argument("--out", metavar="DIR", type=Path, default=ROOT / "bench" / "results", help="where gpu.csv is")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, also in Triton's interpreter")
    parser.add_argument("--tiles", action="store_true", help="time tile sizes of the rollout kernel instead")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    given = parser.parse_args(arguments)
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    reason = kernels.unavailable_reason(device) if gpu or given.quick else "there is no CUDA GPU"
    if reason:
        parser.exit(2, f"bench/gpu.py cannot run here: {reason}\n")
    dtypes = given.dtype or DTYPES
    jobs = [job for job in plan(given.quick) if re.search(given.only, job[0].name) and job[0].dtype in dtypes]
    if not jobs:
        parser.exit(2, f"--only {given.only} matches none of {sorted({case.name for case, _ in plan(given.quick)})}\n")
    deadline = START + given.minutes * 60
    if not given.skip_tests and not gpu_tests(min(300, deadline - time.monotonic())):
        parser.exit(1, "the GPU tests are not green: nothing is measured\n")
    if given.tiles:
        sweep_tiles([TINY] if given.quick else [BASE, LONG], device, deadline)
    if given.profile:
        profile(TINY if given.quick else BASE, device)
    if given.tiles or given.profile:
        return 0
    common, ceilings = circumstances(device), measure_ceilings(device)
    print(common, f"copy {ceilings[0] / 1e9:,.0f} GB/s, bf16 matmul {ceilings[1] / 1e12:,.1f} TFLOP/s", flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    rows, results = [], {}
    for case, backend in measure_all(jobs, device, ceilings[1], deadline, results):
        rows.append(as_row(results, case, backend, ceilings, common))
        write_row(given.out / "gpu.csv", rows[-1])
    print("", table(rows), "", *(verdict(*target, results) for target in TARGETS), sep="\n")
    return int(any(result.note.startswith("failed") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
