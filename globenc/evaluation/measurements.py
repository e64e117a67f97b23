"""What an evaluation measures, text by text, and its means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from ..metrics.faithfulness import MEASURES
from .label_methods import LABEL_METHODS

METRICS = ("correlation", "faithfulness", "plausibility")
# in the paper's order, which have a value up to every layer and of every layer
PAPER_ORDER = ("W", "W-FixedRes", "W-Res", "N", "N-FixedRes", "N-Res", "N-ResLN", "N-Enc")
# evaluated where they are asked for; flow and HTA cost minutes a text, the others many forward passes
COSTLY_ROLLOUTS = {
    "W-Flow": "attention flow: maximum flow through the mean attention weights (Abnar and Zuidema 2020)",
    "HTA": "hidden token attribution: norms of the layers' Jacobians, rolled out (Brunner et al. 2020)",
    "HTA-Input": "HTA x Input (18): the paper's upper bound",
}
COSTLY_METHODS = {
    **COSTLY_ROLLOUTS,
    **{name: method.meaning for name, method in LABEL_METHODS.items() if method.costly},
}
ORDER = (
    *PAPER_ORDER,
    *(name for name, method in LABEL_METHODS.items() if not method.costly),
    *COSTLY_METHODS,
)
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
    mean, std, half = float(there.mean()), float(there.std()), half_interval(there, 0.99)
    return {
        "count": len(there),
        "undefined": len(values) - len(there),
        "mean": mean,
        "std": std,
        "low99": None if math.isnan(half) else mean - half,
        "high99": None if math.isnan(half) else mean + half,
    }


def half_interval(values: np.ndarray, level: float) -> float:
    """Half of the confidence interval of a mean (Student's t), of values that are all there; NaN for fewer than two."""
    count = len(values)
    if count < 2:
        return math.nan
    return float(stats.t.ppf((1 + level) / 2, count - 1)) * float(values.std(ddof=1)) / math.sqrt(count)


def told_apart(values: Mapping[str, np.ndarray], higher: bool) -> str | None:
    """The name with the best mean, if the 95 % confidence interval of its paired difference to each other one excludes
    zero, and so there is one that is best.

    Args:
        values: [texts] by name; NaN where a text has no value.
        higher: is better.
    """
    means = {name: float(np.nanmean(row)) for name, row in values.items() if not np.isnan(row).all()}
    if len(means) < 2:
        return None
    best = (max if higher else min)(means, key=lambda name: means[name])
    for name in means:
        difference = (values[best] - values[name]) * (1 if higher else -1)
        there = difference[~np.isnan(difference)]
        if name != best and not there.mean() > half_interval(there, 0.95):
            return None
    return best


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
