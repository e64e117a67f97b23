"""Compile every kernel for GPUs that need not be there, and keep what each takes: registers, stack and shared memory.

    python bench/compile.py                                          the whole matrix, into results/compile.csv
    python bench/compile.py --kernel rollout_rows --dtype bf16 --heads 12 --head-dim 64       some of it, just printed
    python bench/compile.py --kernel rollout_rows --heads 12 --tiles 32,64,8,2                with other tiles

The package's own launchers are called on tensors without memory; what they would launch goes through Triton's own JIT,
for the target instead of a device, as far as the machine code.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import importlib
import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.backends.nvidia
import typer
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "kernels"))

import globenc_kernels as kernels  # noqa: E402
from globenc_kernels.arguments import MAX_HIDDEN_SIZE  # noqa: E402
from globenc_kernels.head_factors import PARTS  # noqa: E402
from globenc_kernels.layouts import factor_shape, lse_shape  # noqa: E402
from globenc_kernels.tiles import Tiles  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "compile.csv"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [(1, 64), (6, 64), (12, 32), (12, 64), (16, 64), (16, 80), (8, 128), (32, 64)]  # H, d_h
BATCH, N = 2, 512
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes of shared memory that one program can have
SMALL_SHARED = 99 * 1024  # the same of sm_86 and sm_89, which run what is compiled for sm_80
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}
SIDES = ["BLOCK_Q", "BLOCK_T", "BLOCK", "BLOCK_K", "BLOCK_C", "BLOCK_H", "BLOCK_W"]  # of a tile, in the order q x k
VARIANTS = {
    "attention": ["", "window"],
    "gram": [""],
    "cholesky": [""],
    "contribution_norms": ["", "window", "weights"],
    "row_sums": ["", "weights"],
    "rollout_rows": ["targets=1", "targets=16", "targets=32", "targets=1 window", "targets=1 weights"],
    "transposed_product": ["", "window"],
    "layer_scales": ["", "bias"],
    "stage_norms": ["norms=0", "norms=2 residual scale"],
}


class Case(NamedTuple):
    """One compilation: a kernel for a dtype, a number and size of heads, in a variant, for a target."""

    kernel: str
    dtype: str
    heads: int
    head_dim: int
    variant: str
    target: str


class Launch(NamedTuple):
    """What a launcher hands to `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    options: dict[str, Any]

    def sizes(self) -> dict[str, str]:
        """Tile, warps and stages as the results have them."""
        return {
            "tile": "x".join(str(self.options[side]) for side in SIDES if side in self.options),
            "warps": str(self.options["num_warps"]),
            "stages": str(self.options["num_stages"]),
        }


class Target:
    """What Triton asks of a device driver before anything runs."""

    def __init__(self, name: str):
        self.capability = int(name.removeprefix("sm_"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton's JIT keeps what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def matrix() -> list[Case]:
    """All that is compiled: every shape as rollouts need it; BERT-base's in every variant and in float16 too."""
    return [
        Case(kernel, dtype, *shape, variant, target)
        for shape in SHAPES
        for kernel, variants in VARIANTS.items()
        for variant in variants
        if shape == (12, 64) or variant == variants[0] or variant == "targets=16"
        for dtype in (DTYPES if shape == (12, 64) else ("bf16", "fp32"))
        for target in SHARED
    ]


def call(case: Case) -> None:
    """The launcher of a case's kernel, on tensors that have no memory."""
    dtype, heads, head_dim = DTYPES[case.dtype], case.heads, case.head_dim
    width = min(heads * head_dim, MAX_HIDDEN_SIZE)

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def states() -> Tensor:
        return tensor(BATCH, N, heads, head_dim, dtype=dtype).transpose(1, 2)

    def hidden() -> Tensor:
        return tensor(BATCH, N, width, dtype=dtype)

    tokens = object.__new__(kernels.TokenRanges)
    tokens.mask, tokens.ranges = tensor(BATCH, N, dtype=torch.int8), tensor(BATCH, 3, dtype=torch.int32)
    window = 64 if "window" in case.variant else None
    if case.kernel == "attention":
        kernels.attention(states(), states(), states(), tokens, 0.125, window)
    elif case.kernel == "transposed_product":
        lse, gradient = tensor(*lse_shape(BATCH, N, heads)), states().transpose(1, 2)
        kernels.transposed_product(states(), states(), lse, gradient, tokens, 0.125, window)
    elif case.kernel in ("gram", "cholesky"):
        part_dtype = torch.float64 if dtype == torch.float32 else dtype
        parts = tensor(PARTS[dtype], heads, heads, head_dim, head_dim, dtype=part_dtype)
        kernels.head_factors(states(), kernels.GramWeight(parts, tensor(heads)), tokens)
    elif case.kernel == "layer_scales":
        bias = hidden()[0, 0] if case.variant == "bias" else None
        direction = tensor(width), tensor(width)
        kernels.layer_scales(hidden(), (hidden(), hidden()), (1e-12, 1e-12), hidden(), direction, bias, tokens)
    elif case.variant == "norms=0":
        kernels.stage_norms(hidden(), None, ())
    elif case.kernel == "stage_norms":
        kernels.stage_norms(hidden(), hidden(), (tensor(width), tensor(width)), tensor(BATCH, N))
    else:
        factor = tensor(*factor_shape(BATCH, N, heads))
        local_map = kernels.LocalMap(
            query=states(),
            key=states(),
            scaling=0.125,
            log_sum_exp=tensor(*lse_shape(BATCH, N, heads)),
            factors=None if "weights" in case.variant else kernels.HeadFactors(factor, tensor(BATCH, N)),
            row_scale=tensor(BATCH, N),
            diagonal=tensor(BATCH, N),
            tokens=tokens,
            window=window,
        )
        if case.kernel == "rollout_rows":
            targets = int(case.variant.split()[0].removeprefix("targets="))
            kernels.rollout_rows(tensor(BATCH, targets, N), local_map)
        else:
            {"contribution_norms": kernels.contribution_norms, "row_sums": kernels.row_sums}[case.kernel](local_map)


def launch_of(case: Case, tiles: Tiles | None = None) -> Launch:
    """What the package launches in a case; `tiles` in place of its choice. Nothing is compiled or run."""
    launches: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if kernel.fn.__name__ == f"_{case.kernel}_kernel":
            launches.append(Launch(kernel, grid, args, options))

    stand_ins: dict[str, Callable] = {
        "launch": launch,
        "capability": lambda device: divmod(int(case.target.removeprefix("sm_")), 10),
        "multiprocessors": lambda device: MULTIPROCESSORS[case.target],
    }
    if tiles is not None:
        tables = ("attention_tiles", "transposed_tiles", "gram_tiles", "map_tiles")
        stand_ins |= dict.fromkeys(tables, lambda *given: tiles)
    with contextlib.ExitStack() as stack:
        for info in pkgutil.iter_modules(kernels.__path__):
            module = importlib.import_module(f"globenc_kernels.{info.name}")
            for name in stand_ins.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, stand_ins[name]))
        call(case)
    (only,) = launches
    return only


def compile_case(case: Case, tiles: Tiles | None = None) -> dict[str, str]:
    """A row of the results, without its circumstances; `tiles` in place of the package's choice."""
    launch = launch_of(case, tiles)
    driver.set_active(Target(case.target))  # and stays: this process has no other device
    start = time.perf_counter()
    usage = resources(launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options))
    row = {
        **case._asdict(),
        **launch.sizes(),
        **usage,
        "fits": "yes" if usage["shared_bytes"] <= SHARED[case.target] else "no",
        "fits_99_kb": "yes" if usage["shared_bytes"] <= SMALL_SHARED else "no",
        "seconds": f"{time.perf_counter() - start:.1f}",
    }
    return {key: str(value) for key, value in row.items()}


def resources(compiled: Any) -> dict[str, int]:
    """What a compiled kernel takes of a multiprocessor; bytes on the stack are registers that did not fit."""
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = dict(word.split(":")[:2] for word in done.stdout.split() if word.startswith(("REG:", "STACK:")))
    return {
        "registers": int(usage["REG"]),
        "stack_bytes": int(usage["STACK"]),
        "shared_bytes": compiled.metadata.shared,
    }


def circumstances() -> dict[str, str]:
    """Version, commit and date of a row."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {
        "triton": triton.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def compile_all(cases: list[Case], tiles: Tiles | None, workers: int) -> Iterable[dict[str, str]]:
    """Rows as they come."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_job, [(case, tiles) for case in cases])


def _job(given: tuple[Case, Tiles | None]) -> dict[str, str]:
    try:
        return compile_case(*given)
    except Exception as error:
        return {**{key: str(value) for key, value in given[0]._asdict().items()}, "error": f"{error!r:.300}"}


def line(row: dict[str, str]) -> str:
    """A row for the eye."""
    head = "{kernel:18} {dtype} {heads:>2}x{head_dim:3} {variant:17} {target}  ".format(**row)
    if "error" in row:
        return head + row["error"]
    tail = "{tile:>10} w{warps:2} s{stages}  {registers:>3} registers {stack_bytes:>6} stack {shared_bytes:>6} shared"
    flags = ("" if row["fits"] == "yes" else "  DOES NOT FIT") + ("" if row["fits_99_kb"] == "yes" else "  > 99 KB")
    return head + tail.format(**row) + f"  {row['seconds']:>5} s" + flags


def main(
    target: Annotated[str | None, typer.Option(help="sm_80 or sm_90")] = None,
    kernel: Annotated[str | None, typer.Option(help=", ".join(VARIANTS))] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES))] = None,
    heads: Annotated[int | None, typer.Option(help="with --head-dim: any shape, not only the matrix's")] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
    variant: Annotated[str | None, typer.Option(help='"targets=1", "window", ...')] = None,
    tiles: Annotated[str | None, typer.Option(help="queries,keys,warps,stages in place of the table's")] = None,
    workers: Annotated[int, typer.Option()] = os.cpu_count() or 1,
) -> None:
    """Without options the whole matrix, written to results/compile.csv; with any, just printed."""
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: its kernels cannot be compiled; unset it")
    if heads is not None and head_dim is not None:
        SHAPES[:] = [(heads, head_dim)]
    wanted = Case(kernel, dtype, heads, head_dim, variant, target)  # type: ignore[arg-type]
    cases = [case for case in matrix() if all(want in (None, given) for want, given in zip(wanted, case, strict=True))]
    if not cases:
        raise SystemExit("no such case: see --help")
    size = None if tiles is None else Tiles(*map(int, tiles.split(",")))
    rows = []
    for row in compile_all(cases, size, workers):
        rows.append(row)
        print(f"{len(rows):4}/{len(cases)} {line(row)}", flush=True)
    failed = [row for row in rows if "error" in row]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(rows)} cases did not compile")
    if size is None and all(want is None for want in wanted):
        write(cases, rows)


def write(cases: list[Case], rows: list[dict[str, str]]) -> None:
    """Rows in the matrix's order into results/compile.csv."""
    by_case = {tuple(row[key] for key in Case._fields): row for row in rows}
    common = circumstances()
    ordered = [{**by_case[tuple(map(str, case))], **common} for case in cases]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in ordered[0] if key != "seconds"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(ordered)
    print(f"wrote {len(ordered)} rows to {RESULTS}")


if __name__ == "__main__":
    typer.run(main)
