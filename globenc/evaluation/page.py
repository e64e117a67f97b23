"""An evaluation told: one web page that needs neither the paper nor other files."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..render.page import render_page
from .folder import FIGURES, REPORT, RESULTS
from .label_methods import LABEL_METHODS
from .measurements import COSTLY_ROLLOUTS, RANDOM, RANDOM_DRAWS, SALIENCY
from .tables import (
    MARKS_COLUMNS,
    REMOVAL_COLUMNS,
    correlation_rows,
    layer_tables,
    mean_and_std,
    measure_rows,
    published_notes,
)
from .verdict import verdict

_MEANING = {
    "W": "attention weights, mean over heads",
    "W-FixedRes": "attention weights, half identity for the residual (attention rollout)",
    "W-Res": "attention weights, mixed with the identity as much as the layer really mixes",
    "N": "norms of the value vectors that attention sums up",
    "N-FixedRes": "the same, half identity for the residual",
    "N-Res": "norms with the residual added as it is",
    "N-ResLN": "norms behind the first LayerNorm",
    "N-Enc": "norms behind the whole layer: with rollout, GlobEnc",
    **COSTLY_ROLLOUTS,
    **{name: method.meaning for name, method in LABEL_METHODS.items()},
    SALIENCY: "gradient times input of the answer, no method of attention",
    RANDOM: f"random numbers, mean of {RANDOM_DRAWS} draws",
}
_BLUE, _RED, _GREY = "37,99,235", "220,38,38", "128,128,128"
_AGREEMENT = {"most": "Most agreement", "middle": "In the middle", "least": "Least agreement"}


def redraw_report(folder: str | Path) -> Path:
    """Write report.html of an evaluation's folder anew, from its results.json and figures.

    Raises:
        OSError: a file cannot be read or written.
    """
    output = Path(folder)
    results = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    write_report(output / REPORT, output / FIGURES, results)
    return output / REPORT


def write_report(path: Path, figures: Path, results: Mapping[str, Any]) -> None:
    """Write the web page of results.json's content; the figures are taken into it."""
    page = render_page(
        "evaluation.html",
        results=results,
        read=_how_many(results),
        source=_source(results),
        methods=[(name, _MEANING[name]) for name in [*results["settings"]["methods"], SALIENCY, RANDOM]],
        verdict=verdict(results),
        images={image.stem: base64.b64encode(image.read_bytes()).decode() for image in figures.glob("*.svg")},
        correlation=_correlation(results) if "correlation" in results else None,
        faithfulness=_measures(results, "faithfulness", REMOVAL_COLUMNS) if "faithfulness" in results else None,
        plausibility=_measures(results, "plausibility", MARKS_COLUMNS) if "plausibility" in results else None,
        marked=results["plausibility"]["auprc"][SALIENCY]["count"] if "plausibility" in results else 0,
        examples=_examples(results) if "correlation" in results else [],
        circumstances=_circumstances(results),
    )
    path.write_text(page, encoding="utf-8")


def _how_many(results: Mapping[str, Any]) -> str:
    texts = results["texts"]
    return f"{texts['read']:,} texts" if texts["read"] else f"{texts['with_rationales']:,} sentences"


def _source(results: Mapping[str, Any]) -> str:
    """The names of the inputs; what has no name is left out."""
    known = {"-": "standard input", "rows": "", "table": ""}
    return ", ".join(filter(None, (known.get(name, Path(name).name) for name in results["data"])))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], best: set[tuple[int, int]]) -> dict[str, Any]:
    return {"head": head, "rows": rows, "best": best}


def _measures(results: Mapping[str, Any], name: str, columns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return _table(*measure_rows(results, name, columns))


def _correlation(results: Mapping[str, Any]) -> dict[str, Any]:
    """The section on correlation with saliency."""
    correlation = results["correlation"]
    undefined = {name: layers[-1]["undefined"] for name, layers in correlation["rollout"].items()}
    source, *notes = published_notes(results) or [""]
    differences = [
        [name, _signed(n["mean"]), f"{_signed(n['low99'])} to {_signed(n['high99'])}"]
        for name, n in correlation["main_minus"].items()
    ]
    return {
        "table": _table(*correlation_rows(results)),
        "layer_tables": [(title, _table(head, rows, set())) for title, head, rows in layer_tables(results)],
        "source": source,
        "notes": notes,
        "undefined": ", ".join(f"{name} {count}" for name, count in undefined.items() if count),
        "differences": _table(["method", "mean difference", "99 % confidence"], differences, set()),
        "rollout": _heat(correlation["rollout"]),
        "layer": _heat(correlation["layer"]),
    }


def _signed(value: float | None) -> str:
    return "none" if value is None else f"{value:+.3f}"


def _heat(methods: Mapping[str, Any]) -> dict[str, list[dict[str, str]]]:
    """A coloured cell for every layer of every method."""
    return {
        name: [
            {
                "hue": _BLUE if (n["mean"] or 0) > 0 else _RED,
                "alpha": f"{0.55 * abs(n['mean'] or 0):.2f}",
                "title": f"{mean_and_std(n)}, {n['count']} texts",
                "text": "none" if n["mean"] is None else f"{n['mean']:.2f}",
            }
            for n in layers
        ]
        for name, layers in methods.items()
    }


def _examples(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A few texts, each under saliency, the main method, attention rollout and class scores."""
    methods, main = results["settings"]["methods"], results["main_method"]
    names = [SALIENCY, main, *(name for name in ("W-FixedRes", "class-scores") if name in methods and name != main)]
    return [
        {
            "title": f"{_AGREEMENT[example['agreement']]}: {example['correlation']:.2f}",
            "lines": [(name, _coloured_tokens(example, name)) for name in names],
        }
        for example in results["examples"]
    ]


def _coloured_tokens(example: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    scores, special = np.array(example["scores"][name]), np.array(example["special"])
    top = max(float(np.abs(scores[~special]).max(initial=0.0)), 1e-30)
    return [
        {
            "text": token,
            "special": bool(is_special),
            "hue": _GREY if is_special else _BLUE if score >= 0 else _RED,
            "alpha": f"{0.6 * min(abs(float(score)) / top, 1.0):.3f}",
            "title": f"{score:.4f}",
        }
        for token, score, is_special in zip(example["tokens"], scores, special, strict=True)
    ]


def _circumstances(results: Mapping[str, Any]) -> list[str]:
    texts, settings, versions = results["texts"], results["settings"], results["versions"]
    facts = [
        f"position {settings['position']}, seed {settings['seed']}, {settings['device']}, {settings['dtype']}",
        ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in results["seconds"].items()),
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    facts += [f"{name} was left out: {reason}" for name, reason in settings.get("methods_left_out", {}).items()]
    if texts["rejected"]:
        facts.append(f"{texts['rejected']:,} rows were left out; the first: {texts['first_rejects'][0]}")
    if texts["truncated"]:
        facts.append(f"{texts['truncated']:,} texts were longer than the model takes, and cut")
    if texts["rationales_left_out"]:
        facts.append(f"{texts['rationales_left_out']:,} rows of the rationales have no marks that can be used")
    return facts
