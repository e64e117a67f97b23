"""What an evaluation is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods import get_method
from .measurements import COSTLY_METHODS, METRICS, PAPER_ORDER


def checked_metrics(metrics: Sequence[str] | None, data: bool, rationales: bool) -> tuple[str, ...]:
    if isinstance(metrics, str):
        raise TypeError(f"metrics must be a list of names, got the string {metrics!r}")
    if metrics is None:
        asked = tuple(name for name in METRICS if (rationales if name == "plausibility" else data))
        if not asked:
            raise ValueError("inputs are needed: texts to evaluate on")
        return asked
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}; got {name!r}")
    if not metrics:
        raise ValueError("metrics is an empty list: give at least one name")
    if "plausibility" in metrics and not rationales:
        raise ValueError("plausibility needs rationales: a file of texts with marked words")
    if not data and set(metrics) - {"plausibility"}:
        raise ValueError("inputs are needed: correlation and faithfulness read texts")
    return tuple(name for name in METRICS if name in metrics)


def checked_methods(methods: Sequence[str]) -> list[str]:
    if isinstance(methods, str):
        raise TypeError(f"methods must be a list of names, got the string {methods!r}")
    known = [name if name in COSTLY_METHODS else None for name in methods]
    for name, costly in zip(methods, known, strict=True):
        if costly is None:
            try:
                get_method(name)
            except ValueError as error:
                raise ValueError(f"{error}; besides these {', '.join(COSTLY_METHODS)}") from None
    if not known:
        raise ValueError("methods is an empty list: give at least one name")
    order = [*PAPER_ORDER, *COSTLY_METHODS]
    return sorted(set(methods), key=order.index)
