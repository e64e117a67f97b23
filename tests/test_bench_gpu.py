"""bench/gpu.py where there is no GPU: its counts, budget, CSV and verdicts, and a whole run in the interpreter."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
CEILINGS = (4e12, 8e14)


def _load():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("bench_gpu", ROOT / "bench" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_gpu"] = module
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


gpu = _load()
RESULT = gpu.Result


def test_necessary_work_by_hand():
    """2 layers, d = 64, H = 2, 20 tokens, 2 bytes a number; only the first layer has a whole map."""
    flops, moved = gpu.necessary(gpu.TINY, "forward")
    assert flops == 2 * 20 * (24 * 4096 + 4 * 20 * 64) == 4_136_960
    assert moved == 2 * (20 * 24 * 64 + 12 * 4096) * 2 == 319_488
    more, moved_more = gpu.necessary(gpu.TINY, "triton")
    first = 20 * (2 * 4096 + 3 * 4096 + 20 * (2 * 64 + 2 * 3 + 2 * 2))
    last = 20 * (2 * 4096 + 2 * 64)
    assert more - flops == first + last == 631_200
    assert moved_more - moved == 20 * (10 * 64 * 2 + (3 + 2) * 4 * 2) + 20 * 2 * 64 * 2
    assert gpu.necessary(gpu.TINY, "reference") == (more, moved_more)  # whatever a backend really does


def test_necessary_work_of_class_scores_by_hand():
    """The same layers; of the last one, one token's products of the feed-forward are not counted at all."""
    flops, moved = gpu.necessary(gpu.TINY, "forward")
    origin, moved_origin = gpu.necessary(gpu.TINY, "class scores, origin")
    products = 20 * (20 * 4096 + 4 * 20 * 64)
    assert origin - flops == products + 20 * (2 * 4096 + 4 * 64)
    assert moved_origin - moved == 20 * 26 * 64 * 2 + 10 * 4096 * 2 + (20 * 6 * 64 + 2 * 4096) * 2
    zero, moved_zero = gpu.necessary(gpu.TINY, "class scores, zero")
    assert zero - origin == 2 * products
    assert moved_zero - moved_origin == 2 * (20 * 36 * 64 + 10 * 4096) * 2


@pytest.mark.parametrize(("dtype", "parts", "size"), [("bf16", 3, 2), ("fp16", 2, 2), ("fp32", 1, 4)])
def test_necessary_work_by_dtype(dtype, parts, size):
    case = gpu.BASE._replace(dtype=dtype)
    tokens, d = 32 * 512, 768
    (plain, moved), (flops, _) = gpu.necessary(case, "forward"), gpu.necessary(case, "triton")
    assert plain == 12 * tokens * (24 * d**2 + 4 * 512 * d)
    assert moved == 12 * (24 * tokens * d + 12 * d**2) * size
    layer = tokens * ((2 + parts) * d**2 + 512 * (2 * d + 12 * 13 + 24))
    assert flops - plain == 11 * layer + tokens * (2 * d**2 + 2 * d)


def test_plan_holds_every_case_and_the_targets_first():
    jobs = gpu.plan()
    planned = {(case.name, case.dtype, backend) for case, backends in jobs for backend in backends}
    names = [f"BERT-{size} {shape}" for size in ("base", "large") for shape in ("32x128", "32x512", "1x512", "8x2048")]
    names += [f"12 layers 1x{n}" for n in (8192, 32768, 131072)]
    wanted = {(name, dtype, backend) for name in names for dtype in gpu.DTYPES for backend in ("triton", "torch")}
    wanted |= {(name, dtype, "reference") for name in names if "BERT" in name for dtype in gpu.DTYPES}
    wanted |= {(name, dtype, how) for name in names[:-1] for dtype in gpu.DTYPES for how in gpu.SCORES}
    assert planned == wanted
    needed = {(case, backend) for case, _, backend, *_ in gpu.TARGETS if backend != "forward"}
    needed |= {(case, "triton") for case, *_ in gpu.TARGETS}
    assert needed == {(case, backend) for case, backends in jobs[:4] for backend in backends}


def measured(monkeypatch, deadline, jobs, take=0.0, matmul=8e14):
    """(case, backend) in the order they were measured, and the results."""
    order, results = [], {}

    def measure(case, backend, built):
        order.append((case, backend))
        time.sleep(take)
        return RESULT(10.0, 1e9)

    monkeypatch.setattr(gpu, "measure", measure)
    heard = list(gpu.measure_all(jobs, CPU, matmul, deadline, results))
    assert heard == order == list(results)
    return order


def test_nothing_is_measured_twice(monkeypatch):
    first, second = gpu.TINY, gpu.TINY._replace(dtype="fp32")
    jobs = [(first, ("triton",)), (second, ("triton",)), (first, ("torch", "triton"))]
    assert measured(monkeypatch, math.inf, jobs) == [
        (first, "forward"),
        (first, "triton"),
        (second, "forward"),
        (second, "triton"),
        (first, "torch"),
    ]


def test_what_does_not_fit_is_left_out_and_said_once(monkeypatch, capsys):
    small, large = gpu.TINY, gpu.LONGEST._replace(dtype="fp32")
    deadline = time.monotonic() + 60
    jobs = [(large, ("triton",)), (small, ("triton", "torch")), (large, ("triton", "torch"))]
    assert measured(monkeypatch, deadline, jobs) == [(small, backend) for backend in ("forward", "triton", "torch")]
    lines = capsys.readouterr().out.splitlines()
    assert sum("12 layers 1x131072 fp32 triton: not measured, might not end" in line for line in lines) == 1
    assert any(line.endswith("tiny 1x20 bf16 triton: 10.000 ms") for line in lines)


def test_no_time_no_measurement(monkeypatch):
    assert measured(monkeypatch, time.monotonic(), [(gpu.TINY, ("triton",))]) == []


def test_estimates():
    known = {(gpu.BASE, "forward"): RESULT(100.0), (gpu.BASE, "triton"): RESULT(150.0)}
    unknown = {(gpu.BASE, "forward"): RESULT(100.0)}
    fused = gpu.estimate_s(gpu.BASE, "triton", known, 8e14)
    assert fused == pytest.approx(2 + 10 * 3 * 0.1)
    assert gpu.estimate_s(gpu.BASE, "triton", unknown, 8e14) == pytest.approx(fused + gpu.COMPILE_S)
    # the same heads in the same dtype are compiled already, others are not
    assert gpu.estimate_s(gpu.LONG, "triton", known, 8e14) < gpu.COMPILE_S
    assert gpu.estimate_s(gpu.BASE_FP32, "triton", known, 8e14) > gpu.COMPILE_S
    # the direct sum is in float32 always: the model's dtype says nothing of its time
    assert gpu.estimate_s(gpu.BASE_FP32, "reference", {}, 8e14) == gpu.estimate_s(gpu.BASE, "reference", known, 8e14)
    assert gpu.estimate_s(gpu.LONGEST, "forward", {}, 8e14) < gpu.estimate_s(gpu.LONGEST, "torch", {}, 8e14)


COMMON = {"device": "one", "commit": "abc", "date": "2026-01-01"}


def row(case, backend, results, common=COMMON):
    return gpu.as_row(results, case, backend, CEILINGS, common)


def test_row():
    results = {(gpu.BASE, "forward"): RESULT(8.0, 1e9), (gpu.BASE, "triton"): RESULT(10.0, 1.5e9, 2e-7)}
    plain, ours = (row(gpu.BASE, backend, results) for backend in ("forward", "triton"))
    assert (plain["position"], plain["ratio_to_forward"], plain["peak_gb_above_forward"]) == ("", "1", "0")
    assert (ours["case"], ours["batch"], ours["n"], ours["dtype"]) == ("BERT-base 32x512", "32", "512", "bf16")
    assert (ours["position"], ours["ms"], ours["ratio_to_forward"]) == ("cls", "10", "1.25")
    assert (ours["peak_gb"], ours["peak_gb_above_forward"], ours["relative_error"]) == ("1.5", "0.5", "2e-07")
    flops, moved = gpu.necessary(gpu.BASE, "triton")
    assert float(ours["share_of_matmul"]) == pytest.approx(flops / 8e14 / 10e-3, rel=1e-4)
    assert float(ours["share_of_copy_bandwidth"]) == pytest.approx(moved / 4e12 / 10e-3, rel=1e-4)
    assert (ours["copy_gb_per_s"], ours["matmul_tflop_per_s"], ours["commit"]) == ("4000", "800", "abc")


def test_row_without_a_measurement():
    results = {(gpu.BASE, "forward"): RESULT(note="out of memory"), (gpu.BASE, "torch"): RESULT(5.0)}
    failed, alone = (row(gpu.BASE, backend, results) for backend in ("forward", "torch"))
    assert (failed["ms"], failed["share_of_matmul"], failed["note"]) == ("", "", "out of memory")
    assert (alone["ms"], alone["ratio_to_forward"], alone["peak_gb"]) == ("5", "", "")
    assert "out of memory" in gpu.table([failed, alone])


def test_csv_replaces_rows_of_the_same_case(tmp_path):
    path = tmp_path / "gpu.csv"
    results = {(gpu.BASE, "triton"): RESULT(10.0), (gpu.BASE, "torch"): RESULT(50.0)}
    gpu.write_row(path, row(gpu.BASE, "triton", results))
    gpu.write_row(path, row(gpu.BASE, "torch", results))
    gpu.write_row(path, row(gpu.BASE, "triton", results, {**COMMON, "device": "two, too"}))
    newer = {(gpu.BASE, "triton"): RESULT(9.0, note='a "quoted", note')}
    gpu.write_row(path, row(gpu.BASE, "triton", newer, {**COMMON, "commit": "def"}))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["backend"], r["device"], r["ms"], r["commit"]) for r in rows] == [
        ("triton", "one", "9", "def"),
        ("torch", "one", "50", "abc"),
        ("triton", "two, too", "10", "abc"),
    ]
    assert rows[0]["note"] == 'a "quoted", note'
    assert [p.name for p in tmp_path.iterdir()] == ["gpu.csv"]


def test_csv_of_older_columns_is_kept(tmp_path):
    path = tmp_path / "gpu.csv"
    path.write_text("case,dtype,backend,position,device,ms,colour\nold,bf16,triton,cls,one,3,red\n")
    gpu.write_row(path, row(gpu.BASE, "torch", {(gpu.BASE, "torch"): RESULT(50.0)}))
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["ms"], r["note"]) for r in rows] == [("old", "3", ""), ("BERT-base 32x512", "50", "")]
    assert "colour" not in rows[0]


RATIO, FASTER, MEMORY, ERROR = (gpu.TARGETS[i] for i in (0, 1, 4, 7))


@pytest.mark.parametrize(
    ("target", "ours", "other", "begins", "holds"),
    [
        (RATIO, RESULT(15.0), RESULT(10.0), "PASS", "time / forward: 1.5 (at most 1.5, goal 1.25)"),
        (RATIO, RESULT(15.1), RESULT(10.0), "FAIL", "1.51"),
        (FASTER, RESULT(1.0), RESULT(100.0), "PASS", "times faster than reference: 100 (at least 100)"),
        (FASTER, RESULT(1.0), RESULT(99.0), "FAIL", "99"),
        (MEMORY, RESULT(1.0, 3e9), RESULT(1.0, 1e9), "FAIL", "GB above forward: 2 (at most 1.5)"),
        (MEMORY, RESULT(1.0, 2e9), RESULT(1.0, 1e9), "PASS", "1"),
        (ERROR, RESULT(1.0, 0.0, 4e-7), RESULT(1.0, 0.0, 2e-7), "PASS", "error / reference: 2"),
        (ERROR, RESULT(1.0, 0.0, 5e-7), RESULT(1.0, 0.0, 2e-7), "FAIL", "2.5"),
        (ERROR, RESULT(1.0, 0.0, 5e-7), RESULT(1.0, 0.0, 0.0), "not measured", "error / reference"),
        (RATIO, None, RESULT(10.0), "not measured", "BERT-base 32x512 bf16"),
        (RATIO, RESULT(10.0), None, "not measured", "BERT-base 32x512 bf16"),
        (RATIO, RESULT(note="out of memory"), RESULT(10.0), "FAIL", "out of memory"),
        (FASTER, RESULT(1.0), RESULT(note="out of memory"), "not measured", "out of memory"),
    ],
)
def test_verdict(target, ours, other, begins, holds):
    case, _, backend, *_ = target
    results = {(case, key): result for key, result in (("triton", ours), (backend, other)) if result}
    line = gpu.verdict(*target, results)
    assert line.startswith(begins)
    assert holds in line


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("no such thing\nin the second line"), "failed: RuntimeError: no such thing"),
    ],
)
def test_a_failure_is_a_note(monkeypatch, error, note):
    def run(*given):
        raise error

    monkeypatch.setattr(gpu, "run", run)
    assert gpu.measure(gpu.TINY, "triton", lambda: (None, {})).note == note


@pytest.mark.parametrize(("n", "batch", "sizes"), [(512, 3, [1, 1, 1]), (128, 32, [21, 11]), (2048, 2, [1, 1])])
def test_texts_a_direct_sum_takes_at_a_time(monkeypatch, n, batch, sizes):
    seen = []

    def attribute(model, *, input_ids, backend, position):
        seen.append((backend, position, len(input_ids)))
        return SimpleNamespace(scores=input_ids.float())

    monkeypatch.setattr(gpu.globenc, "attribute", attribute)
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=768))
    inputs = {"input_ids": torch.arange(batch)[:, None].expand(batch, n)}
    assert torch.equal(gpu.run("reference", model, inputs), inputs["input_ids"].float())
    assert seen == [("reference", "cls", size) for size in sizes]
    gpu.run("triton", model, inputs)
    assert seen[-1] == ("triton", "cls", batch)


def test_timer(monkeypatch):
    calls = []
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.median_ms(lambda: calls.append(1)) > 0
    assert len(calls) == 1
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu.triton.testing, "do_bench", lambda function, **options: options["return_mode"])
    assert gpu.median_ms(lambda: calls.append(1)) == "median"
    monkeypatch.setattr(gpu, "SLOW_MS", 20)
    pauses = iter([0.03, 0.2, 0.05])
    assert 50 <= gpu.median_ms(lambda: time.sleep(next(pauses))) < 190


def test_circumstances(monkeypatch):
    monkeypatch.setenv("GLOBENC_COMMIT", "1234567")
    found = gpu.circumstances(CPU)
    assert (found["commit"], found["torch"], found["driver"]) == ("1234567", torch.__version__, "")
    monkeypatch.delenv("GLOBENC_COMMIT")
    monkeypatch.setenv("PATH", "")  # no git
    assert gpu.circumstances(CPU)["commit"] == "unknown"


@pytest.mark.parametrize(("code", "green"), [(0, True), (1, False), (5, False)])
def test_gpu_tests(monkeypatch, code, green):
    commands = []

    def run(command, cwd, timeout):
        commands.append((command, cwd, timeout))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.gpu_tests(7.0) is green
    (command, cwd, timeout) = commands[0]
    assert command[1:3] == ["-m", "pytest"]
    assert {"tests/test_kernel_attention.py", "tests/test_kernel_rollout.py", "tests/test_gpu.py"} < set(command)
    assert (cwd, timeout) == (ROOT, 7.0)


def test_gpu_tests_that_hang(monkeypatch, capsys):
    def run(command, timeout, **options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.gpu_tests(7.0) is False
    assert "more than 7 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "cannot run here: there is no CUDA GPU\n"),
        (["--quick", "--only", "nothing"], 2, "--only nothing matches none of ['tiny 1x20']"),
        (["--quick"], 1, "the GPU tests are not green: nothing is measured"),
    ],
)
def test_what_stops_it(monkeypatch, capsys, tmp_path, arguments, code, says):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu.kernels, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(gpu, "gpu_tests", lambda seconds: False)
    with pytest.raises(SystemExit) as stop:
        gpu.main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == code
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_measurement_fails_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu.kernels, "unavailable_reason", lambda device: None)
    monkeypatch.setattr(gpu, "measure", lambda case, backend, built: RESULT(note=f"failed: {backend}"))
    arguments = ["--quick", "--skip-tests", "--dtype", "fp16", "--minutes", "inf", "--out", str(tmp_path / "new")]
    assert gpu.main(arguments) == 1
    assert "failed: torch" in (tmp_path / "new" / "gpu.csv").read_text()
    assert "not measured  BERT-base 32x512 bf16: time / forward" in capsys.readouterr().out


def test_it_runs_where_only_torch_triton_and_transformers_are(tmp_path):
    """The whole way in the interpreter: rows, tile sizes and profile."""
    code = f"""
import sys
for name in ("typer", "rich", "matplotlib", "pytest_benchmark", "datasets", "pyarrow", "scipy.stats"):
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT / "bench")!r})
import gpu
assert gpu.main(["--quick", "--skip-tests", "--dtype", "fp32", "--minutes", "inf", "--out", {str(tmp_path)!r}]) == 0
gpu.TINY = gpu.TINY._replace(n=3)
assert gpu.main(["--quick", "--skip-tests", "--tiles", "--profile", "--minutes", "inf"]) == 0
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "gpu.csv").open(newline="") as file:
        rows = {r["backend"]: r for r in csv.DictReader(file)}
    assert list(rows) == ["forward", "triton", "torch", "reference", *gpu.SCORES]
    assert all(r["note"] == "" and float(r["ms"]) > 0 for r in rows.values())
    assert all(0 < float(rows[name]["relative_error"]) < 1e-5 for name in rows if name != "forward")
    assert "rollout_rows alone, 2 of 2 sizes tried" in done.stdout
    assert "added to the forward" in done.stdout
