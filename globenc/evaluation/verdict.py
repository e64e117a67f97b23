"""An evaluation in a few sentences: which method is best, and what it is told apart from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from .measurements import RANDOM, SALIENCY


class Sentence(NamedTuple):
    """A sentence whose first words may stand out."""

    lead: str
    text: str


def verdict(results: Mapping[str, Any]) -> list[Sentence]:
    """What results.json says in short."""
    return [*_on_correlation(results), *_on_removal(results), *_on_marks(results)]


def _on_correlation(results: Mapping[str, Any]) -> list[Sentence]:
    if "correlation" not in results:
        return []
    correlation = results["correlation"]
    means = {name: layers[-1]["mean"] for name, layers in correlation["rollout"].items()}
    means |= {name: numbers["mean"] for name, numbers in correlation.get("signed", {}).items()}
    ranked = sorted((name for name in means if means[name] is not None), key=lambda name: -means[name])
    if not ranked:
        return [Sentence("", "No text has a correlation: scores or saliency are constant in all of them.")]
    second = f", then {ranked[1]} with {means[ranked[1]]:.2f}." if len(ranked) > 1 else "."
    sentences = [
        Sentence(
            "Correlation with saliency",
            f", whole rollout: {ranked[0]} is highest with {means[ranked[0]]:.2f}{second}",
        )
    ]
    main = results["main_method"]
    if main in ranked and len(ranked) > 1:
        other = ranked[1] if ranked[0] == main else ranked[0]
        sentences += _comparison(main, other, correlation["main_minus"][other])
    return sentences


def _on_removal(results: Mapping[str, Any]) -> list[Sentence]:
    if "faithfulness" not in results:
        return []
    table = _defined(results["faithfulness"]["aopc"])
    names = [name for name in table if name not in (SALIENCY, RANDOM)]
    if not names:
        return []
    best = max(names, key=lambda name: table[name]["mean"])
    under = [name for name in names if table[name]["mean"] <= table[RANDOM]["mean"]]
    text = (
        f": taking the tokens that {best} calls important lowers the answer's probability most, by "
        f"{table[best]['mean']:.3f} on average; {_beside(table, best)}."
    )
    if under:
        text += f" No better than random: {', '.join(under)}."
    return [Sentence("Faithfulness", text), *_comparison_with_best(results, table, best)]


def _on_marks(results: Mapping[str, Any]) -> list[Sentence]:
    if "plausibility" not in results:
        return []
    table = _defined(results["plausibility"]["auprc"])
    names = [name for name in table if name not in (SALIENCY, RANDOM)]
    if not names:
        return []
    best = max(names, key=lambda name: table[name]["mean"])
    text = f": {best} finds the words that people marked best, AUPRC {table[best]['mean']:.3f}; {_beside(table, best)}."
    return [Sentence("Plausibility", text), *_comparison_with_best(results, table, best)]


def _defined(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: numbers for name, numbers in table.items() if numbers["mean"] is not None}


def _comparison_with_best(results: Mapping[str, Any], table: Mapping[str, Any], best: str) -> list[Sentence]:
    main = results["main_method"]
    return [] if best == main else _comparison(main, best, table[best]["main_minus_this"])


def _comparison(main: str, other: str, numbers: Mapping[str, Any]) -> list[Sentence]:
    """How the main method stands to another one on the same texts."""
    if numbers["low99"] is None:
        return []
    verb = "above" if numbers["low99"] > 0 else "below" if numbers["high99"] < 0 else "not told apart from"
    return [
        Sentence(
            "",
            f"Text by text {main} is {verb} {other}: {numbers['mean']:+.3f}, 99 % confidence interval "
            f"{numbers['low99']:+.3f} to {numbers['high99']:+.3f}.",
        )
    ]


def _beside(table: Mapping[str, Any], best: str) -> str:
    """What stands beside the best method in a sentence."""
    names = [name for name in ("N-Enc", SALIENCY, RANDOM) if name in table and name != best]
    return ", ".join(f"{name} {table[name]['mean']:.3f}" for name in names)
