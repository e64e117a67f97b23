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
LOWER_IS_BETTER = ("aopc-least", "sufficiency")


@dataclass
class Measurements:
    """Everything that was measured, text by text.

    Attributes:
        methods: names, the costly ones last.
        layers: how many the model has.
        ids: of the texts.
        correlations: "rollout" and "layer", [texts, methods, layers] each, of the methods that are rolled out; NaN
            where there is none.
        signed_correlations: [texts] by name, of the methods that have signed scores for a label; NaN likewise.
        right: whether the model's answer is the gold label, where there are labels.
        removed: which texts were changed for faithfulness.
        drops: by scorer and measure, [shares, removed texts].
        plausible: by scorer, [sentences, 3]: AUPRC, F1, IOU.
        examples: a few texts with every method's scores.
        costs: of the methods, in forward passes.
        left_out: why a method is not measured that would be by default, by name.
    """

    methods: list[str]
    layers: int = 0
    ids: list[Any] = field(default_factory=list)
    correlations: dict[str, np.ndarray] = field(default_factory=dict)
    signed_correlations: dict[str, np.ndarray] = field(default_factory=dict)
    right: list[bool] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    drops: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    plausible: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    costs: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def rolled_out(self) -> list[str]:
        """The methods with a value up to every layer."""
        return [name for name in self.methods if name not in LABEL_METHODS]

    @property
    def main_method(self) -> str:
        """The method that the others are compared with: N-Enc, or else the last."""
        return "N-Enc" if "N-Enc" in self.methods else self.methods[-1]

    def whole_correlation(self, method: str) -> np.ndarray:
        """The correlation of every text, [texts]: of the rollout up to the last layer, or of signed scores."""
        if method in LABEL_METHODS:
            return self.signed_correlations[method]
        return self.correlations["rollout"][:, self.rolled_out.index(method), -1]


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
        if name != best and (len(there) < 2 or not there.mean() > half_interval(there, 0.95)):
            return None
    return best


def summary(measurements: Measurements, asked: Iterable[str]) -> dict[str, Any]:
    """What results.json says of every metric."""
    main = measurements.main_method
    made: dict[str, Any] = {"main_method": main, "cost": {name: round(n, 2) for name, n in measurements.costs.items()}}
    best: dict[str, str | None] = {}
    if "correlation" in asked:
        made["correlation"] = _correlation(measurements)
        best["correlation"] = told_apart(
            {name: measurements.whole_correlation(name) for name in measurements.methods}, higher=True
        )
        for kind, table in measurements.correlations.items():
            best[f"best {kind}"] = told_apart(_best_layers(table, measurements.rolled_out), higher=True)
    if "faithfulness" in asked:
        made["faithfulness"] = {}
        for kind, measure in MEASURES.items():
            values = {name: drops[kind].mean(0) for name, drops in measurements.drops.items()}
            best[kind] = told_apart(values, higher=kind not in LOWER_IS_BETTER)
            made["faithfulness"][kind] = {
                name: {
                    **summary_statistics(row),
                    "main_minus_this": summary_statistics(values[main] - row),
                    "shares": list(measure.shares),
                    "drops": [summary_statistics(drops)["mean"] for drops in measurements.drops[name][kind]],
                }
                for name, row in values.items()
            }
    if "plausibility" in asked:
        made["plausibility"] = {}
        for column, kind in enumerate(MARK_MEASURES):
            values = {name: table[:, column] for name, table in measurements.plausible.items()}
            best[kind] = told_apart(values, higher=True)
            made["plausibility"][kind] = {
                name: {**summary_statistics(row), "main_minus_this": summary_statistics(values[main] - row)}
                for name, row in values.items()
            }
    return {**made, "best": best}


def _best_layers(table: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Of [texts, methods, layers] each method's layer with the highest mean, [texts]."""
    there = {name: table[:, m] for m, name in enumerate(names) if not np.isnan(table[:, m]).all()}
    return {name: rows[:, int(np.argmax(np.nanmean(rows, axis=0)))] for name, rows in there.items()}


def _correlation(measurements: Measurements) -> dict[str, Any]:
    rolled_out, main = measurements.rolled_out, measurements.main_method
    found: dict[str, Any] = {
        kind: {
            name: [summary_statistics(table[:, m, layer]) for layer in range(measurements.layers)]
            for m, name in enumerate(rolled_out)
        }
        for kind, table in measurements.correlations.items()
    }
    found["signed"] = {name: summary_statistics(row) for name, row in measurements.signed_correlations.items()}
    found["main_minus"] = {
        name: summary_statistics(measurements.whole_correlation(main) - measurements.whole_correlation(name))
        for name in measurements.methods
        if name != main
    }
    return found
