"""The numbers of results.json as rows, and as the main tables for a terminal, a figure and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REMOVAL_COLUMNS = (
    ("aopc", "AOPC, most first ↑"),
    ("aopc-least", "AOPC, least first ↓"),
    ("comprehensiveness", "comprehensiveness ↑"),
    ("sufficiency", "sufficiency ↓"),
)
MARKS_COLUMNS = (("auprc", "AUPRC ↑"), ("f1", "token F1 ↑"), ("iou", "IOU ↑"))


def tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heading and rows of the main tables, for a terminal."""
    made: list[tuple[str, list[str], list[list[str]]]] = []
    if "correlation" in results:
        head, rows, _ = correlation_rows(results)
        made.append(("Spearman correlation with saliency, mean ± std", head, rows))
        made += layer_tables(results)
    for name, title, columns in (
        ("faithfulness", "Faithfulness, mean ± half of the 99 % interval", REMOVAL_COLUMNS),
        ("plausibility", "Plausibility, mean ± half of the 99 % interval", MARKS_COLUMNS),
    ):
        if name in results:
            head, rows, _ = measure_rows(results, name, columns)
            made.append((title, head, rows))
    return made


def correlation_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Heading, cells and which are told apart from all others: whole rollout, best layers, published whole rollout.

    Signed scores have no layers: they stand in the first column.
    """
    correlation, published = results["correlation"], (results.get("published") or {}).get("correlation") or {}
    head = ["method", "whole rollout", "best rollout (layer)", "best single (layer)"]
    head += ["published"] if published else []
    rows: list[list[str]] = []
    for name, rollout in correlation["rollout"].items():
        cells = [name, mean_and_std(rollout[-1])]
        for layers in (rollout, correlation["layer"][name]):
            top = int(np.argmax([_number(layer["mean"]) for layer in layers]))
            cells.append(f"{mean_and_std(layers[top])} ({top + 1})")
        if published:
            cells.append(mean_and_std(published[name]) if name in published else "")
        rows.append(cells)
    for name, numbers in correlation.get("signed", {}).items():
        rows.append([name, mean_and_std(numbers), *[""] * (len(head) - 2)])
    return head, rows, _in_bold(results, rows, ("correlation", "best rollout", "best layer"))


def layer_tables(results: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, heading and rows for the layers of which numbers are published: each method, and below it these."""
    made = []
    for kind, title in (("rollout", "Rollout up to a layer"), ("layer", "A layer alone")):
        published = ((results.get("published") or {}).get("layers") or {}).get(kind) or {}
        measured = {name: numbers for name, numbers in results["correlation"][kind].items() if name in published}
        if not measured:
            continue
        layers = list(dict.fromkeys(layer for name in measured for layer in published[name]))
        rows = []
        for name, numbers in measured.items():
            cells: dict[str, Any] = {str(layer): n for layer, n in enumerate(numbers, 1)}
            cells["max"] = max(numbers, key=lambda n: _number(n["mean"]))
            rows.append([name, *(mean_and_std(cells[layer]) if layer in cells else "" for layer in layers)])
            known = [published_of(results, kind, name, layer) for layer in layers]
            rows.append([f"{name}, published", *("" if n is None else mean_and_std(n) for n in known)])
        head = ["method", *("best layer" if layer == "max" else f"layer {layer}" for layer in layers)]
        made.append((f"{title}, mean ± std", head, rows))
    return made


def measure_rows(
    results: Mapping[str, Any], name: str, columns: Sequence[tuple[str, str]]
) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Heading, cells and which are told apart from all others, of a metric with several measures; the last column is
    the cost."""
    measures, costs = results[name], results.get("cost", {})
    rows = [
        [method, *(mean_and_half(measures[kind][method]) for kind, _ in columns), cost_of(costs, method)]
        for method in measures[columns[0][0]]
    ]
    head = ["method", *(title for _, title in columns), "forward passes"]
    return head, rows, _in_bold(results, rows, [kind for kind, _ in columns])


def _in_bold(results: Mapping[str, Any], rows: Sequence[Sequence[str]], kinds: Sequence[str]) -> set[tuple[int, int]]:
    """Which cells are the best of their column, a paired 95 % interval excluding every other method."""
    names, best = [row[0] for row in rows], results.get("best", {})
    return {(names.index(best[kind]), column) for column, kind in enumerate(kinds, 1) if best.get(kind) is not None}


def cost_of(costs: Mapping[str, float], method: str) -> str:
    """What a method costs in forward passes; "" where it was not measured."""
    return "" if method not in costs else f"{costs[method]:.1f}" if costs[method] < 100 else f"{costs[method]:,.0f}"


def published_notes(results: Mapping[str, Any]) -> list[str]:
    """What is to be known of the published numbers: whose they are, from where, and what is doubtful in them."""
    published = results.get("published")
    if not published:
        return []
    of = [f"they are of {published['of']}"] if published.get("of") else []
    return [f"Published numbers: {published['source']}", *of, *published.get("notes", ())]


def _number(value: float | None) -> float:
    return -2.0 if value is None else value  # below every correlation


def mean_and_std(numbers: Mapping[str, Any]) -> str:
    if numbers["mean"] is None:
        return "none"
    return f"{numbers['mean']:.2f}" + ("" if numbers.get("std") is None else f" ± {numbers['std']:.2f}")


def mean_and_half(numbers: Mapping[str, Any]) -> str:
    if numbers["mean"] is None:
        return "none"
    half = "" if numbers["high99"] is None else f" ± {numbers['high99'] - numbers['mean']:.3f}"
    return f"{numbers['mean']:.3f}{half}"


def published_of(
    results: Mapping[str, Any], kind: str, method: str, layer: int | str
) -> Mapping[str, float | None] | None:
    """The published mean and deviation for a layer, or for "max", the best of them; None where there is none."""
    published = results.get("published") or {}
    if kind == "rollout" and layer == results["model_layers"] and method in published.get("correlation", {}):
        return published["correlation"][method]
    return published.get("layers", {}).get(kind, {}).get(method, {}).get(str(layer))


def as_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """results.json's numbers as rows: metric, setting, method, layer, `summary_statistics`, the cost of the method in
    forward passes, and what was published."""
    rows: list[dict[str, Any]] = []
    columns = ("count", "undefined", "mean", "std", "low99", "high99")
    notes = "; ".join((results.get("published") or {}).get("notes", ()))

    def add(metric: str, setting: str, method: str, layer: int | str, numbers: Mapping[str, Any]) -> None:
        known = published_of(results, setting, method, layer) if metric == "correlation" else None
        there: dict[str, Any] = dict.fromkeys(("published", "published_std", "published_notes"))
        if known is not None:
            there = {"published": known["mean"], "published_std": known["std"], "published_notes": notes or None}
        rows.append(
            {"metric": metric, "setting": setting, "method": method, "layer": layer}
            | {name: numbers[name] for name in columns}
            | {"forward_passes": results.get("cost", {}).get(method)}
            | there
        )

    for kind in ("rollout", "layer"):
        for method, layers in results.get("correlation", {}).get(kind, {}).items():
            for layer, numbers in enumerate(layers, 1):
                add("correlation", kind, method, layer, numbers)
    for method, numbers in results.get("correlation", {}).get("signed", {}).items():
        add("correlation", "signed", method, "", numbers)
    for kind, table in results.get("faithfulness", {}).items():
        for method, numbers in table.items():
            add(kind, results["settings"]["removal"], method, "", numbers)
    for kind, table in results.get("plausibility", {}).items():
        for method, numbers in table.items():
            add(kind, "marks >= 0.5", method, "", numbers)
    return rows
