"""What an evaluation measures, text by text, and its means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from ..metrics.faithfulness import MEASURES

METRICS = ("correlation", "faithfulness", "plausibility")
# in the paper's order; HTA and flow cost minutes a text and are evaluated where they are asked for
PAPER_ORDER = ("W", "W-FixedRes", "W-Res", "N", "N-FixedRes", "N-Res", "N-ResLN", "N-Enc")
COSTLY_METHODS = {
    "W-Flow": "attention flow: maximum flow through the mean attention weights (Abnar and Zuidema 2020)",
    "HTA": "hidden token attribution: norms of the layers' Jacobians, rolled out (Brunner et al. 2020)",
    "HTA-Input": "HTA x Input (18): the paper's upper bound",
}
SALIENCY, RANDOM = "saliency", "random"
MARK_MEASURES = ("auprc", "f1", "iou")  # attributes of `globenc.metrics.Plausibility`
RANDOM_DRAWS = 5


@dataclass
class Measurements:
    """Everything that was measured, text by text.

    Attributes:
        methods: names, the costly ones last.
        layers: how many the model has.
        ids: of the texts.
        correlations: "rollout" and "layer", [texts, methods, layers] each; NaN where there is none.
        right: whether the model's answer is the gold label, where there are labels.
        removed: which texts were changed for faithfulness.
        drops: by scorer and measure, [shares, removed texts].
        plausible: by scorer, [sentences, 3]: AUPRC, F1, IOU.
        examples: a few texts with every method's scores.
    """

    methods: list[str]
    layers: int = 0
    ids: list[Any] = field(default_factory=list)
    correlations: dict[str, np.ndarray] = field(default_factory=dict)
    right: list[bool] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    drops: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    plausible: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


def summary_statistics(values: np.ndarray) -> dict[str, Any]:
    """Mean, population standard deviation and 99 % confidence interval of the mean (Student's t), of values that are
    there."""
    there = values[~np.isnan(values)]
    if not len(there):
        return {"count": 0, "undefined": len(values), "mean": None, "std": None, "low99": None, "high99": None}
    mean, std = float(there.mean()), float(there.std())
    half = math.nan
    if len(there) > 1:
        half = float(stats.t.ppf(0.995, len(there) - 1)) * float(there.std(ddof=1)) / math.sqrt(len(there))
    return {
        "count": len(there),
        "undefined": len(values) - len(there),
        "mean": mean,
        "std": std,
        "low99": None if math.isnan(half) else mean - half,
        "high99": None if math.isnan(half) else mean + half,
    }


def main_method(methods: Sequence[str]) -> int:
    """Which of the methods the others are compared with: N-Enc, or else the last."""
    return methods.index("N-Enc") if "N-Enc" in methods else len(methods) - 1


def summary(measurements: Measurements, asked: Iterable[str]) -> dict[str, Any]:
    """What results.json says of every metric."""
    main_index = main_method(measurements.methods)
    main = measurements.methods[main_index]
    made: dict[str, Any] = {"main_method": main}
    if "correlation" in asked:
        made["correlation"] = {
            kind: {
                name: [summary_statistics(table[:, m, layer]) for layer in range(measurements.layers)]
                for m, name in enumerate(measurements.methods)
            }
            for kind, table in measurements.correlations.items()
        }
        last = measurements.correlations["rollout"][:, :, -1]
        made["correlation"]["main_minus"] = {
            name: summary_statistics(last[:, main_index] - last[:, m])
            for m, name in enumerate(measurements.methods)
            if m != main_index
        }
    if "faithfulness" in asked:
        made["faithfulness"] = {
            kind: {
                name: {
                    **summary_statistics(drops[kind].mean(0)),
                    "main_minus_this": summary_statistics((measurements.drops[main][kind] - drops[kind]).mean(0)),
                    "shares": list(measure.shares),
                    "drops": [summary_statistics(row)["mean"] for row in drops[kind]],
                }
                for name, drops in measurements.drops.items()
            }
            for kind, measure in MEASURES.items()
        }
    if "plausibility" in asked:
        made["plausibility"] = {
            kind: {
                name: {
                    **summary_statistics(table[:, column]),
                    "main_minus_this": summary_statistics((measurements.plausible[main] - table)[:, column]),
                }
                for name, table in measurements.plausible.items()
            }
            for column, kind in enumerate(MARK_MEASURES)
        }
    return made
