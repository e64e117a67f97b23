"""What class scores cost, in CPU time of the plain forward pass, on one thread.

`python -m pytest bench/test_class_score_speed.py --benchmark-only` writes bench/results/class_scores_cpu.csv. Rounds of
all measured functions are taken in turn, so that a noisy machine meets all alike; a row is the ratio of medians.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import transformers
from harness import SHAPES
from pytest_benchmark.fixture import BenchmarkFixture

import globenc

RESULTS = "class_scores_cpu"
CASES = [("MiniLM-L6", 32, 25), ("MiniLM-L6", 8, 128), ("BERT-base", 32, 25), ("BERT-base", 8, 128)]
LABELS = 5
MASK_TOKEN = 103


@pytest.mark.parametrize(("shape", "batch", "n"), CASES)
def test_class_score_speed(
    benchmark: BenchmarkFixture, record: list[dict[str, str]], shape: str, batch: int, n: int
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        medians = _medians(_functions(shape, batch, n), rounds=5 if shape == "BERT-base" else 9)
    finally:
        torch.set_num_threads(threads)
    benchmark.pedantic(lambda: None)
    forward = medians.pop("forward")
    ratios = {what: seconds / forward for what, seconds in medians.items()}
    for reference in ("origin", "zero"):
        extra = ratios.pop(f"class scores, {reference}, {LABELS} labels") - ratios[f"class scores, {reference}"]
        ratios[f"class scores, {reference}, each further label"] = extra / (LABELS - 1)
    for what, ratio in ratios.items():
        case = {"shape": shape, "batch": str(batch), "n": str(n), "what": what}
        case["timing"] = "CPU time, 1 thread"
        record.append({**case, "forward_ms": f"{forward * 1e3:.0f}", "ratio_to_forward": f"{ratio:.2f}"})


def _functions(shape: str, batch: int, n: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPES[shape], num_labels=LABELS, attn_implementation="sdpa")
    model = transformers.BertForSequenceClassification(config).eval()
    tokens = torch.randint(1000, 30000, (batch, n))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    def forward() -> object:
        with torch.no_grad():
            return model(**inputs)

    def scores(reference: str, label: str) -> Callable[[], object]:
        options = {"reference": reference, "label": label, "mask_token_id": MASK_TOKEN}
        return lambda: globenc.class_scores(model, **options, **inputs)

    return {
        "forward": forward,
        "N-Enc": lambda: globenc.attribute(model, **inputs),
        "gradient x input": lambda: globenc.metrics.saliency(model, **inputs),
        **{f"class scores, {name}": scores(name, "predicted") for name in ("origin", "model", "zero")},
        **{f"class scores, {name}, {LABELS} labels": scores(name, "all") for name in ("origin", "zero")},
    }


def _medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, all taken in turn."""
    taken: dict[str, list[float]] = {what: [] for what in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for what, function in functions.items():
            start = time.process_time()
            function()
            taken[what].append(time.process_time() - start)
    return {what: statistics.median(seconds) for what, seconds in taken.items()}
