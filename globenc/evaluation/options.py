"""What an evaluation is asked for, checked before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..extraction.rows import Columns
from ..methods import get_method
from ..metrics.gradients import OUTPUTS
from ..rollouts import Position
from .label_methods import LABEL_METHODS
from .measurements import COSTLY_ROLLOUTS, METRICS, ORDER

REMOVAL_TEXTS = 200


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """The options of `globenc.evaluate` that are neither data, model nor folder, in its words.

    `metrics` and `methods` are in their order in the report; no methods are all that have a meaning for the model.

    Raises:
        ValueError: an option is out of its range, or needs another one.
    """

    metrics: tuple[str, ...]
    methods: tuple[str, ...] | None
    columns: Columns
    format: str | None
    tokens_column: str
    marks_column: str | None
    limit: int | None
    max_length: int | None
    position: Position
    saliency_of: str
    saliency_output: str
    drop_special: bool
    removal: str
    removal_texts: int
    batch_tokens: int | None
    seed: int
    published: Mapping[str, Any] | None
    title: str | None

    def __post_init__(self) -> None:
        for name in ("limit", "max_length", "removal_texts", "batch_tokens"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise ValueError(f"{name} must be a positive whole number, got {number!r}")
        for name, allowed in (
            ("saliency_of", ("predicted", "gold")),
            ("saliency_output", OUTPUTS),
            ("removal", ("auto", "mask", "delete")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.saliency_of == "gold" and self.columns.label is None:
            raise ValueError("saliency_of 'gold' needs label_column: the column of the gold labels")


def checked_metrics(metrics: Sequence[str] | None, has_texts: bool, has_rationales: bool) -> tuple[str, ...]:
    """The metrics in their order; None is every one that there is data for.

    Raises:
        TypeError, ValueError: a name is unknown, or there is no data for it.
    """
    if isinstance(metrics, str):
        raise TypeError(f"metrics must be a list of names, got the string {metrics!r}")
    if metrics is None:
        possible = tuple(name for name in METRICS if (has_rationales if name == "plausibility" else has_texts))
        if not possible:
            raise ValueError("inputs are needed: texts to evaluate on")
        return possible
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}; got {name!r}")
    if not metrics:
        raise ValueError("metrics is an empty list: give at least one name")
    if "plausibility" in metrics and not has_rationales:
        raise ValueError("plausibility needs rationales: a file of texts with marked words")
    if not has_texts and set(metrics) - {"plausibility"}:
        raise ValueError("inputs are needed: correlation and faithfulness read texts")
    return tuple(name for name in METRICS if name in metrics)


def checked_methods(methods: Sequence[str] | None) -> tuple[str, ...] | None:
    """The methods in the paper's order, the costly ones last.

    Raises:
        TypeError, ValueError: a name is unknown, or there is none.
    """
    if methods is None:
        return None
    if isinstance(methods, str):
        raise TypeError(f"methods must be a list of names, got the string {methods!r}")
    for name in methods:
        if name in LABEL_METHODS or name in COSTLY_ROLLOUTS:
            continue
        try:
            get_method(name)
        except ValueError as error:
            raise ValueError(f"{error}; besides these {', '.join([*LABEL_METHODS, *COSTLY_ROLLOUTS])}") from None
    if not methods:
        raise ValueError("methods is an empty list: give at least one name")
    return tuple(sorted(set(methods), key=ORDER.index))
