"""Class scores and methods that answer the same question, by removed tokens and people's marks, on two models.

    python bench/class_scores.py minilm-sst2 validation.jsonl --costly-texts 200 --rationales sst_by_sentence.jsonl
    python bench/class_scores.py modernbert-sst2 validation.jsonl --texts 200 --position mean
    python bench/table.py

Scores are computed in float32, the changed texts are read in bfloat16, those of all methods alike. Methods that take
many forward passes can be measured on fewer of the texts, and are compared with the others on these. ± is half of the
95 % confidence interval; differences are paired, text by text. Costs are CPU time over that of plain forward passes of
the same batches.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import RESULTS, circumstances

import globenc
from globenc.batching import pad
from globenc.evaluation.label_methods import LABEL_METHODS
from globenc.evaluation.measurements import LOWER_IS_BETTER, MARK_MEASURES, RANDOM, half_interval, told_apart
from globenc.evaluation.rationales import read_rationales
from globenc.evaluation.scorer import MethodScorer
from globenc.extraction.sources import inputs_of
from globenc.metrics import align, plausibility
from globenc.metrics.faithfulness import MEASURES, removal_drops
from globenc.tokenization import Encoding

BASE = "N-Enc"  # which the others are compared with
CHEAP = [BASE, *(name for name, method in LABEL_METHODS.items() if not method.costly)]
COSTLY = [name for name, method in LABEL_METHODS.items() if method.costly]
BATCH = 16  # texts whose changed versions are read together


def scorer_of(explainer: globenc.GlobEnc, methods: list[str], position: str) -> MethodScorer:
    return MethodScorer(explainer, methods, position, "logit", 1024)


def drops(scorer: MethodScorer, encodings: list[Encoding], with_random: int | None) -> dict[str, dict[str, np.ndarray]]:
    """By measure and method the mean drop of every text, [texts]; also of random scores where there is a seed."""
    explainer = scorer.explainer
    scores: list[dict[str, np.ndarray]] = [{}] * len(encodings)
    predicted = torch.zeros(len(encodings), dtype=torch.long)
    for k, text in scorer.scores(encodings):
        scores[k], predicted[k] = {name: text.whole_texts()[name] for name in scorer.methods}, text.predicted
    if with_random is not None:
        rng = np.random.default_rng(with_random)
        for row, encoding in zip(scores, encodings, strict=True):
            row[RANDOM] = rng.random(len(encoding))
    changed = copy.deepcopy(explainer.model).to(torch.bfloat16)
    values = {kind: {name: np.full(len(encodings), np.nan) for name in scores[0]} for kind in MEASURES}
    by_length = sorted(range(len(encodings)), key=lambda k: len(encodings[k]))
    for begin in range(0, len(by_length), BATCH):
        part = by_length[begin : begin + BATCH]
        inputs = pad([encodings[k] for k in part], explainer.tokenizer, explainer.model)
        special = torch.ones_like(inputs["input_ids"])
        padded = {name: np.zeros(special.shape) for name in scores[0]}
        for row, k in enumerate(part):
            special[row, : len(encodings[k])] = torch.from_numpy(encodings[k].segments < 0)
            for name in padded:
                padded[name][row, : len(encodings[k])] = scores[k][name]
        batch_drops = removal_drops(
            changed,
            padded,
            MEASURES,
            mask_token_id=explainer.tokenizer.mask_token_id,
            special_tokens_mask=special,
            label=predicted[part],
            **inputs,
        )
        for name, measures in batch_drops.items():
            for kind, table in measures.items():
                values[kind][name][part] = table.mean(0)
        print(f"{begin + len(part)} of {len(encodings)} texts", flush=True)
    return values


def agreement(scorer: MethodScorer, rationales: str, seed: int) -> dict[str, dict[str, np.ndarray]]:
    """By measure and method the agreement of every sentence with its marks, [sentences]."""
    marked, _ = read_rationales(inputs_of(rationales), "tokens", None)
    explainer = scorer.explainer
    encodings = explainer.encode_each([sentence.text for sentence in marked], None, explainer.limit(None))
    rng = np.random.default_rng(seed)
    values: dict[str, dict[str, np.ndarray]] = {kind: {} for kind in MARK_MEASURES}
    for k, text in scorer.scores(encodings):
        spans = [
            None if segment < 0 else (int(start), int(end))
            for segment, (start, end) in zip(encodings[k].segments, encodings[k].offsets, strict=True)
        ]
        marks = align(marked[k].marks, marked[k].words, spans)
        for name in [*scorer.methods, RANDOM]:
            found = plausibility(rng.random(len(marks)) if name == RANDOM else text.whole_texts()[name], marks)
            for kind in MARK_MEASURES:
                values[kind].setdefault(name, np.full(len(marked), np.nan))[k] = getattr(found, kind)
    return values


def summary(values: dict[str, dict[str, np.ndarray]]) -> dict[str, Any]:
    """Means with half of their 95 % intervals, the same of paired differences to `BASE`, and which method is best."""

    def numbers(row: np.ndarray) -> dict[str, float]:
        there = row[~np.isnan(row)]
        return {"texts": len(there), "mean": float(there.mean()), "half95": half_interval(there, 0.95)}

    return {
        kind: {
            "best": told_apart(table, higher=kind not in LOWER_IS_BETTER),
            "methods": {
                name: {**numbers(row), f"minus {BASE}": numbers(row - table[BASE]) if name != BASE else None}
                for name, row in table.items()
            },
            "class-scores minus": {
                name: numbers(table["class-scores"] - row) for name, row in table.items() if name != "class-scores"
            },
        }
        for kind, table in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--rationales")
    parser.add_argument("--texts", type=int)
    parser.add_argument("--costly-texts", type=int, help="of these, for methods that take many forward passes")
    parser.add_argument("--position", default="cls")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = circumstances() | {"dtype": "float32, changed texts bfloat16"}
    explainer = globenc.GlobEnc.of(globenc.ModelSource(options.model, dtype=torch.float32))
    sentences = [json.loads(line)["sentence"] for line in Path(options.data).read_text().splitlines()]
    chosen = np.random.default_rng(options.seed).permutation(len(sentences))[: options.texts]
    encodings = explainer.encode_each([sentences[k] for k in chosen], None, explainer.limit(None))
    cheap = scorer_of(explainer, CHEAP, options.position)
    costly = scorer_of(explainer, COSTLY, options.position)
    values = drops(cheap, encodings, options.seed)
    for kind, table in drops(costly, encodings[: options.costly_texts], None).items():
        for name, row in table.items():
            values[kind][name] = np.append(row, np.full(len(encodings) - len(row), np.nan))
    row = {
        "model_class": type(explainer.model).__name__,
        "data": Path(options.data).name,
        "position": options.position,
        "seed": options.seed,
        "faithfulness": summary(values),
        "plausibility": summary(agreement(cheap, options.rationales, options.seed)) if options.rationales else None,
        "cost": cheap.costs.in_forward_passes() | costly.costs.in_forward_passes(),
        "circumstances": where,
    }
    path = RESULTS / "class_scores.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    rows[Path(options.model).name] = row
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for kind, table in {**row["faithfulness"], **(row["plausibility"] or {})}.items():
        for name, n in table["methods"].items():
            print(f"{kind:18} {name:26} {n['mean']:.3f} ± {n['half95']:.3f}")
    print(row["cost"])


if __name__ == "__main__":
    main()
