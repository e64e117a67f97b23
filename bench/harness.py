"""What the benchmarks share: models of known shapes, interleaved timing, peak memory, a row's circumstances."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import BertConfig, BertModel

import globenc

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "BERT-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "MiniLM-L6": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "2 layers, d=768": {
        "num_hidden_layers": 2,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
    },
}
LONG = {"num_hidden_layers": 4, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 30000, "pad_token_id": 0}
LONG_SHAPES = {
    "NomicBERT, 4 layers": (transformers.NomicBertConfig, {**LONG, "intermediate_size": 3072, "head_dim": 64}),
    "ModernBERT, 4 layers": (transformers.ModernBertConfig, {**LONG, "intermediate_size": 1152}),
    "4 local layers of ModernBERT": (
        transformers.ModernBertConfig,
        {**LONG, "intermediate_size": 1152, "layer_types": ["sliding_attention"] * 4},
    ),
}


def build(shape: str, n: int) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """A random-weight encoder of a shape, in float32 with SDPA attention, and one text of n tokens for it."""
    torch.manual_seed(0)
    if shape in LONG_SHAPES:
        make, options = LONG_SHAPES[shape]
        config = make(**options, max_position_embeddings=n)
        model = transformers.AutoModel.from_config(config, attn_implementation="sdpa").eval()
    else:
        config = BertConfig(**SHAPES[shape], max_position_embeddings=max(512, n), attn_implementation="sdpa")
        model = BertModel(config, add_pooling_layer=False).eval()
    tokens = torch.randint(1000, 30000, (1, n))
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def work(what: str, model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    """The thing measured: "forward" (plain SDPA), "globenc" (N-Enc, position cls), "direct sum" (the equations), or
    "class scores" of a number of the first token by a reference, such as "class scores, zero"."""

    def forward() -> object:
        with torch.no_grad():
            return model(**inputs)

    def class_scores() -> object:
        reference = what.removeprefix("class scores, ")
        return globenc.class_scores(model, answer=lambda output: output[0][:, 0, 0], reference=reference, **inputs)

    return {
        "forward": forward,
        "globenc": lambda: globenc.attribute(model, **inputs),
        "direct sum": lambda: globenc.attribute(model, backend="reference", **inputs),
        **{f"class scores, {reference}": class_scores for reference in ("zero", "origin")},
    }[what]


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def ratio(function: Callable[[], object], base: Callable[[], object], rounds: int) -> float:
    """Median time of `function` over that of `base`, run in turn so that both meet the same machine."""
    function(), base()  # warm
    pairs = [(seconds(function), seconds(base)) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


def peak_mb(shape: str, n: int, what: str) -> float:
    """Peak resident memory of one warm call above the loaded model, in MB, measured in a process of its own."""
    command = [sys.executable, __file__, shape, str(n), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def _status_mb(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _measure_peak(shape: str, n: int, what: str) -> float:
    model, inputs = build(shape, n)
    work(what, model, {name: tensor[:, :16] for name, tensor in inputs.items()})()  # one-time memory does not count
    before = _status_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    work(what, model, inputs)()
    return _status_mb("VmHWM") - before


def circumstances() -> dict[str, str]:
    """Device, versions, commit and date of a row."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    return {
        "dtype": "float32",
        "device": _processor(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0]}, {os.cpu_count()} cores" if names else platform.processor()


KEYS = ("shape", "model", "batch", "n", "rows", "what")


def write_rows(name: str, rows: list[dict[str, str]]) -> Path:
    """Put rows into `results/<name>.csv`, in place of older ones of the same case."""
    path = RESULTS / f"{name}.csv"
    cases = {tuple(row.get(key) for key in KEYS): row for row in _read_rows(path) + rows}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(cases.values())
    return path


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    print(_measure_peak(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
