"""The texts of an evaluation, their tokens and their gold labels."""

from __future__ import annotations

from typing import Any

from ..answers import kind_of
from ..explainer import GlobEnc
from ..extraction.rows import Columns, Example, Reader
from ..extraction.sources import Input


def check_model(explainer: GlobEnc, gold: bool) -> None:
    model = explainer.model
    if explainer.reads_pictures:
        raise ValueError("model must read texts to be evaluated; this one reads pictures")
    kind = kind_of(model)
    if kind is None:
        raise ValueError(
            f"model must be a text classifier to be evaluated, got {type(model).__name__}: saliency and faithfulness "
            "ask for its answers"
        )
    if kind == "value":
        raise ValueError(
            f"model must choose between classes to be evaluated; {type(model).__name__} answers with a number, whose "
            "probability cannot drop"
        )
    if kind == "labels" and gold:
        raise ValueError(
            f"label_column must be left out for {type(model).__name__}: it gives each of its labels a probability of "
            "its own (multi_label_classification), and a text may have several; its highest label is evaluated"
        )


def read_examples(sources: list[Input], columns: Columns, limit: int | None) -> tuple[list[Example], list[Any]]:
    """The rows that have a text, and what is wrong with the others."""
    for source in sources:
        source.check(columns.names())
    examples: list[Example] = []
    rejects: list[Any] = []
    for work in Reader(sources, columns, 2000, limit, strict=False):
        examples += work.examples
        rejects += work.rejects
    return examples, rejects


def gold_class(model: Any, example: Example) -> int:
    """The gold label as a class: a number, or a name of the model's configuration."""
    count, gold = model.config.num_labels, example.gold
    named = {str(name).lower(): k for name, k in (model.config.label2id or {}).items()}
    written = str(gold).strip()
    if isinstance(gold, float) and gold.is_integer():
        written = str(int(gold))
    if written.lower() in named:
        return int(named[written.lower()])
    if written.isdigit() and int(written) < count:
        return int(written)
    raise ValueError(
        f"row {example.row}: label {gold!r} is none of the model's: a number from 0 to {count - 1}, or "
        f"{', '.join(str(name) for name in (model.config.label2id or {}))}"
    )
