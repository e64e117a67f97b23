"""The texts of an evaluation, their tokens and their gold labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import in_a_line
from ..explainer import GlobEnc
from ..extraction.rows import Columns, Example, Reader
from ..extraction.sources import Input
from ..predictions import kind_of
from ..printing import short
from ..tokenization import Encoding


@dataclass(frozen=True)
class Corpus:
    """The texts that are evaluated.

    Attributes:
        examples: rows with a text that has tokens.
        encodings: their tokens, in the same order.
        labels: their gold labels as classes of the model; None where no column is named.
        rejects: what is wrong with the rows that are left out; `str` of each is a sentence.
    """

    examples: list[Example] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    labels: list[int] | None = None
    rejects: list[Any] = field(default_factory=list)

    @property
    def truncated(self) -> int:
        """How many texts were longer than the model takes."""
        return sum(encoding.lost > 0 for encoding in self.encodings)


def check_model(explainer: GlobEnc, with_labels: bool) -> None:
    """Whether a model can be evaluated.

    Raises:
        ValueError: it cannot, or not with gold labels.
    """
    model = explainer.model
    if explainer.reads_images:
        raise ValueError("model must read texts to be evaluated; this one reads images")
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
    if kind == "labels" and with_labels:
        raise ValueError(
            f"label_column must be left out for {type(model).__name__}: it gives each of its labels a probability of "
            "its own (multi_label_classification), and a text may have several; its highest label is evaluated"
        )


def read_examples(sources: list[Input], columns: Columns, limit: int | None) -> tuple[list[Example], list[Any]]:
    """The rows that have a text, and what is wrong with the others.

    Raises:
        OSError, ValueError: a source cannot be read, or lacks a column.
    """
    for source in sources:
        source.check(columns.names())
    examples: list[Example] = []
    rejects: list[Any] = []
    for work in Reader(sources, columns, 2000, limit, strict=False):
        examples += work.examples
        rejects += work.rejects
    return examples, rejects


def read_tokens(
    explainer: GlobEnc, examples: list[Example], rejects: list[Any], max_length: int | None, with_labels: bool
) -> Corpus:
    """The examples with their tokens and labels; those without a token join the rejects.

    Raises:
        ValueError: no example is left, or a label is none of the model's.
    """
    firsts = [example.text for example in examples]
    seconds = [example.pair or "" for example in examples] if examples and examples[0].pair is not None else None
    encodings = explainer.encode_each(firsts, seconds, explainer.limit(max_length)) if examples else []
    corpus = Corpus(rejects=[*rejects])
    for example, encoding in zip(examples, encodings, strict=True):
        if isinstance(encoding, BaseException):
            corpus.rejects.append(f"row {example.row}: {short(in_a_line(encoding))}")
        elif encoding.empty:
            corpus.rejects.append(f"row {example.row}: no token")
        else:
            corpus.examples.append(example)
            corpus.encodings.append(encoding)
    if not corpus.examples:
        raise ValueError(
            f"there is no text to evaluate on: all {len(corpus.rejects)} rows are bad, the first because "
            f"{corpus.rejects[0]}"
            if corpus.rejects
            else "there is no text to evaluate on: the input has no row"
        )
    if not with_labels:
        return corpus
    return replace(corpus, labels=[gold_class(explainer.model, example) for example in corpus.examples])


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
