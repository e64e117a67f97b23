"""Class scores of a batch: which label of each text or image is explained, and the scores as arrays without padding."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import blames_text, in_a_line, named, warn_caller
from .frozen.explained import TOKEN_HEADS, label_number
from .frozen.references import REFERENCES
from .frozen.scores import class_scores
from .predictions import Prediction, class_count, classifies, head_of, label_names, logits_of
from .printing import short
from .rollouts import Position

Label = str | int | Iterable[str | int] | None
"""As users give it: "predicted", a label's number or name, one for each text, or None."""

KnownLabel = str | int | list[str | int] | None
"""The same with numbers for names, where the configuration has the names; of questions "predicted", "start", "end"."""

PREDICTED = "predicted"
_SPANS = (PREDICTED, "start", "end")  # what is explained of a model that answers questions


@dataclass(frozen=True)
class BatchClassScores:
    """Class scores of a batch, as arrays on the CPU.

    Attributes:
        scores: [batch, n], in logits.
        remainder, logits: [batch].
        names: of the explained labels.
        reference: as in `globenc.class_scores`.
    """

    scores: np.ndarray
    remainder: np.ndarray
    logits: np.ndarray
    names: list[str]
    reference: str

    def of(self, row: int, n: int) -> dict[str, Any]:
        """The fields of one result, whose text has n tokens."""
        return {
            "class_scores": self.scores[row, :n],
            "explained_label": self.names[row],
            "logit": float(self.logits[row]),
            "remainder": float(self.remainder[row]),
            "reference": self.reference,
        }


def known_labels(
    model: Any, tokenizer: Any, label: Label, options: Mapping[str, Any], count: int | None = None
) -> KnownLabel:
    """The labels that a call asks for, checked before any text is read.

    Args:
        model, tokenizer: what they are labels of; the tokenizer names those of a masked language model. None for a
            model of images.
        label: as given; "predicted" also for a model that has no label to explain.
        options: "position" and "reference" as given.
        count: how many texts there are, each of which may have a label of its own; None for a single one.

    Raises:
        TypeError, ValueError: there is no such label or reference, or the model has none to explain.
    """
    if options["reference"] not in REFERENCES:
        raise ValueError(f"reference must be one of {', '.join(REFERENCES)}; got {options['reference']!r}")
    if label is None or (isinstance(label, str) and label == PREDICTED):
        return label
    require_labels(model, options["position"])
    if head_of(model) == "QuestionAnswering":
        if not isinstance(label, str) or label not in _SPANS:
            raise ValueError(
                f'label must be "predicted" (start and end), "start" or "end" for questions, got {label!r}'
            )
        return label
    if isinstance(label, str | Integral):
        return _number(model, tokenizer, label)
    given = label.tolist() if isinstance(label, torch.Tensor | np.ndarray) else label
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping | Set):
        raise TypeError(f'label must be "predicted", a number, a name, one for each text or None, got {label!r}')
    what = "image" if tokenizer is None else "text"
    if count is None:
        raise TypeError(f"label must be one number or name for a single {what}, got {short(repr(label), 80)}")
    listed = list(given)
    if len(listed) != count:
        raise ValueError(f"label must be one for each of the {count} {what}s, got {len(listed)}")
    numbers: list[str | int] = []
    for i, one in enumerate(listed):
        try:
            numbers.append(_number(model, tokenizer, one))
        except (TypeError, ValueError) as error:
            where = f"images[{i}]" if tokenizer is None else f"text {i}"
            raise type(error)(f"{where}: {error}") from None
    return numbers


def require_labels(model: nn.Module, position: Position) -> None:
    """Raises ValueError where a model, as far as its class tells, has no label to explain."""
    head, name = head_of(model), type(model).__name__
    if head is None and not classifies(model):
        raise ValueError(
            f"{name} has no labels to explain: give a model that classifies; another number of its output is explained "
            "by globenc.class_scores(model, answer=...)"
        )
    if head in TOKEN_HEADS and not isinstance(position, Integral):
        raise ValueError(
            f"position must be a token's position for a label of {name}, which answers for each token; got {position!r}"
        )


def labels_of(labels: KnownLabel, batch: Sequence[int]) -> KnownLabel:
    """The labels of the texts of a batch, given by their indices."""
    return [labels[i] for i in batch] if isinstance(labels, list) else labels


def batch_class_scores(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
    output: Any,
    predictions: Sequence[Prediction],
    *,
    label: KnownLabel,
    reference: str,
    required: bool,
    position: Position,
    backend: str,
) -> BatchClassScores | None:
    """The class scores of a batch; None where no label is asked for, or "predicted" of a model that predicts none.

    Args:
        model, tokenizer: what scores it.
        inputs: of the model.
        output: what the model returned for them.
        predictions: made of it, one for each text; what is explained as "predicted" is their label.
        label, reference, position: as from `known_labels`.
        required: a model whose head cannot be held is an error; else class scores are left out with a warning where
            nobody has asked for a label or reference.
        backend: as in `globenc.class_scores`.

    Raises:
        as `globenc.class_scores`.
    """
    if label is None or (label == PREDICTED and not _predicts(model, position, predictions)):
        return None
    head = head_of(model)
    by_token = head in TOKEN_HEADS or head == "QuestionAnswering"
    asked: Any = label
    if label == PREDICTED and not by_token:
        # the label that the results name: another pass could round two equal logits differently
        asked = _rows(model, output, len(predictions)).argmax(-1).tolist()
    try:
        found = class_scores(
            model,
            label=asked,
            position=int(position) if by_token and isinstance(position, Integral) else None,
            reference=reference,
            backend=backend,
            mask_token_id=getattr(tokenizer, "mask_token_id", None),
            **inputs,
        )
    except Exception as error:
        by_default = label == PREDICTED and reference == REFERENCES[0] and blames_text(error)
        if by_default and not required and not isinstance(error, FloatingPointError):
            warn_caller(f"class scores are left out (label=None leaves them out without a word): {in_a_line(error)}")
            return None
        if by_default:
            raise named(error, "class scores, which can be left out") from error
        raise
    return BatchClassScores(
        scores=found.scores.cpu().numpy(),
        remainder=found.remainder.cpu().numpy(),
        logits=found.logits.cpu().numpy(),
        names=_names(model, tokenizer, found.labels, found.label_names or [], predictions),
        reference=reference,
    )


def _predicts(model: Any, position: Position, predictions: Sequence[Prediction]) -> bool:
    """Whether there is a predicted label to explain."""
    head = head_of(model)
    if head in TOKEN_HEADS:
        return isinstance(position, Integral)
    return head == "QuestionAnswering" or predictions[0].kind is not None


def _number(model: Any, tokenizer: Any, label: Any) -> str | int:
    """The number of a label; of a head that only its author knows the label as it is, which its logits decide about.

    Raises:
        TypeError, ValueError: there is none.
    """
    head = head_of(model)
    if head == "MaskedLM":
        return _token_number(model, tokenizer, label)
    names = label_names(model, class_count(model))
    if head is None and isinstance(label, str | Integral) and not isinstance(label, bool):
        if isinstance(label, str) and label.isdecimal() and label not in names:
            label = int(label)  # as a command line and a table of text have it
        if label != "all":
            return label if isinstance(label, str) else int(label)
        # globenc.class_scores would explain every label, and a result has one
    return label_number(label, len(names), names)


def _token_number(model: Any, tokenizer: Any, label: Any) -> int:
    """The number of a token, given by its number, its name in the vocabulary, or a text that is one token."""
    if isinstance(label, str):
        vocabulary = tokenizer.get_vocab()
        pieces = [label] if label in vocabulary else tokenizer.tokenize(label)
        if len(pieces) != 1 or (pieces[0] == tokenizer.unk_token and label != pieces[0]):
            made_of = "unknown" if pieces in ([], [tokenizer.unk_token]) else f"{len(pieces)} tokens"
            raise ValueError(f"label must be a token of a masked language model, or its number; {label!r} is {made_of}")
        return int(vocabulary[pieces[0]])
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise TypeError(f"label must be a number or a name, got {label!r}")
    count = model.get_input_embeddings().weight.shape[0]
    if not 0 <= int(label) < count:
        raise ValueError(f"label must be in 0..{count - 1}, a token's number, got {label}")
    return int(label)


def _rows(model: Any, output: Any, count: int) -> np.ndarray:
    """The logits of whole texts, [batch, labels]."""
    logits = logits_of(model, output)
    assert logits is not None  # `predictions_of` has read them
    return logits.detach().double().reshape(count, -1).cpu().numpy()


def _names(
    model: Any, tokenizer: Any, labels: torch.Tensor | None, names: list[str], predictions: Sequence[Prediction]
) -> list[str]:
    """The names of the explained labels, for a reader."""
    head = head_of(model)
    if head == "MaskedLM" and labels is not None:
        return list(tokenizer.convert_ids_to_tokens(labels.tolist()))
    if head == "QuestionAnswering":
        return ["start + end" if name == PREDICTED else name for name in names]
    unnamed = [isinstance(one.value, float) and name == "LABEL_0" for name, one in zip(names, predictions, strict=True)]
    return ["value" if bare else name for name, bare in zip(names, unnamed, strict=True)]
