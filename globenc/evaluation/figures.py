"""An evaluation drawn: figures as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .measurements import RANDOM, SALIENCY, Measurements
from .tables import correlation_rows

# weights in warm, norms in cool colours, what is no method in greys; N-Enc is the darkest
_COLOURS = {
    "W": "#f59e0b",
    "W-FixedRes": "#ea580c",
    "W-Res": "#b91c1c",
    "N": "#a3e635",
    "N-FixedRes": "#10b981",
    "N-Res": "#06b6d4",
    "N-ResLN": "#818cf8",
    "N-Enc": "#1e3a8a",
    "W-Flow": "#a16207",
    "HTA": "#a21caf",
    "HTA-Input": "#db2777",
    "class-scores": "#15803d",
    "class-scores-model": "#22c55e",
    "class-scores-origin": "#86efac",
    "gradient-x-input": "#f472b6",
    "integrated-gradients-zero": "#c084fc",
    "integrated-gradients-mask": "#7e22ce",
    "occlusion": "#000000",
    SALIENCY: "#374151",
    RANDOM: "#9ca3af",
}


def write_figures(folder: Path, measurements: Measurements, results: Mapping[str, Any]) -> None:
    """Draw what was measured, each figure as .png and .svg."""
    drawn: dict[str, Figure] = {}
    if "correlation" in results:
        if measurements.rolled_out:
            drawn["correlation_per_layer"] = _per_layer(measurements, results["correlation"])
        drawn["correlation_boxes"] = _boxes(measurements)
        drawn["correlation_table"] = _table_picture(results)
    if "faithfulness" in results:
        drawn["faithfulness_curves"] = _curves(results["faithfulness"])
    for name, figure in drawn.items():
        for ending in ("png", "svg"):
            figure.savefig(folder / f"{name}.{ending}", dpi=150, bbox_inches="tight")


def _per_layer(measurements: Measurements, correlation: Mapping[str, Any]) -> Figure:
    """The paper's Figure 3: mean correlation with its 99 % confidence band, for rollouts and single layers."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    layers = np.arange(1, measurements.layers + 1)
    for axes, kind, title in (
        (panels[0], "rollout", "rollout up to the layer"),
        (panels[1], "layer", "the layer alone"),
    ):
        for name, numbers in correlation[kind].items():
            mean, low, high = (
                np.array([np.nan if n[key] is None else n[key] for n in numbers]) for key in ("mean", "low99", "high99")
            )
            axes.plot(
                layers,
                mean,
                color=_COLOURS[name],
                label=name,
                linewidth=2.6 if name == "N-Enc" else 1.6,
                linestyle="--" if name.startswith("W") else "-",
                marker="o",
                markersize=3,
            )
            axes.fill_between(layers, low, high, color=_COLOURS[name], alpha=0.18, linewidth=0)
        axes.axhline(0, color="#9ca3af", linewidth=0.8)
        axes.set_xticks(layers if measurements.layers <= 24 else layers[:: measurements.layers // 12])
        axes.set_xlabel("layer")
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(max(low, -1.05), min(high, 1.05))  # intervals of few texts reach beyond what there is
    panels[0].set_ylabel("Spearman correlation with saliency")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    return figure


def _boxes(measurements: Measurements) -> Figure:
    """How the correlations of single texts are spread, for the whole rollout."""
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(measurements.methods)), layout="constrained")
    axes = figure.subplots()
    values = [measurements.whole_correlation(name) for name in measurements.methods]
    made = axes.boxplot(
        [v[~np.isnan(v)] for v in values],
        orientation="horizontal",
        patch_artist=True,
        widths=0.62,
        showmeans=True,
        flierprops={"markersize": 2, "alpha": 0.5},
        medianprops={"color": "#111827"},
        meanprops={"marker": "D", "markersize": 4, "markerfacecolor": "#ffffff", "markeredgecolor": "#111827"},
    )
    for box, name in zip(made["boxes"], measurements.methods, strict=True):
        box.set(facecolor=_COLOURS[name], alpha=0.75)
    axes.set_yticks(range(1, len(measurements.methods) + 1), measurements.methods)
    axes.invert_yaxis()
    axes.axvline(0, color="#9ca3af", linewidth=0.8)
    axes.set_xlim(-1.02, 1.02)
    axes.set_xlabel("Spearman correlation with saliency of each text, whole rollout")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    return figure


def _table_picture(results: Mapping[str, Any]) -> Figure:
    """The paper's Tables 1 and 2 in form: a row for each method, mean and deviation."""
    head, rows, best = correlation_rows(results)
    figure = Figure(figsize=(2.1 * len(head), 0.42 * (len(rows) + 1)), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    table = axes.table(cellText=rows, colLabels=head, loc="center", cellLoc="right", edges="horizontal")
    table.auto_set_font_size(False)
    table.set_fontsize(11)
    table.scale(1, 1.5)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("#d1d5db")
        cell.set_text_props(ha="right" if column else "left")
        if row == 0 or (row - 1, column) in best:
            cell.set_text_props(weight="bold")
    return figure


def _curves(faithfulness: Mapping[str, Any]) -> Figure:
    """Drop of the answer's probability by share of removed tokens."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, title in (
        (panels[0], "aopc", "most important first (higher is better)"),
        (panels[1], "aopc-least", "least important first (lower is better)"),
    ):
        for name, numbers in faithfulness[kind].items():
            drops = [np.nan if drop is None else drop for drop in numbers["drops"]]
            axes.plot(
                [100 * share for share in numbers["shares"]],
                drops,
                color=_COLOURS[name],
                label=name,
                linewidth=2.6 if name == "N-Enc" else 1.6,
                linestyle=":" if name in (SALIENCY, RANDOM) else "--" if name.startswith("W") else "-",
            )
        axes.set_xlabel("tokens removed, %")
        axes.set_title(title, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("drop of the answer's probability")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False)
    return figure
