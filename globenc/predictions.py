"""A model's prediction for a whole text or image: one class, independent labels, or a number."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

THRESHOLD = 0.5  # of a multi-label model's labels

_KNOWN_HEAD = re.compile(
    "For(SequenceClassification|ImageClassification|TokenClassification|QuestionAnswering|MultipleChoice|"
    "NextSentencePrediction|MaskedLM|PreTraining)"
)

Kind = Literal["class", "labels", "value"]


@dataclass(frozen=True)
class Prediction:
    """A prediction; all None where a model makes none, as a token classifier or a bare encoder.

    Attributes:
        label, probability: the class, of a multi-label model its highest label; None for a number.
        value: the number of a regression model or a reranker, as the model gives it; a list where it gives several.
        labels: of a multi-label model, (label, probability) of those above THRESHOLD, highest first; may be empty.
    """

    label: str | None = None
    probability: float | None = None
    value: float | list[float] | None = None
    labels: list[tuple[str, float]] | None = None

    @property
    def kind(self) -> Kind | None:
        """What kind of prediction it is."""
        if self.value is not None:
            return "value"
        if self.labels is not None:
            return "labels"
        return None if self.label is None else "class"


def head_of(model: Any) -> str | None:
    """The head of a transformers class or of a subclass of one, such as "TokenClassification"; None for a bare encoder
    and for a class that only its author knows."""
    for cls in type(model).__mro__:
        found = _KNOWN_HEAD.search(cls.__name__)
        if found is None and cls.__module__.startswith("transformers."):
            found = re.search(r"For([A-Z]\w*)$", cls.__name__)
        if found is not None:
            return found[1]
    return None


def classifies(model: Any) -> bool:
    """Whether a model is made to predict something of whole texts or images, as far as its class tells."""
    head = head_of(model)
    if head is None:
        # a head of the user's own over an encoder, which its logits must show
        return not type(model).__module__.startswith("transformers.") and model.base_model is not model
    return head in ("SequenceClassification", "ImageClassification")


def kind_of(model: Any, outputs: int | None = None) -> Kind | None:
    """The kind of a model's predictions; None for other heads.

    Args:
        model: any transformers model.
        outputs: how many logits it gives for a text; None goes by its configuration.
    """
    if not classifies(model):
        return None
    problem = getattr(model.config, "problem_type", None)
    if problem == "multi_label_classification":
        return "labels"
    outputs = class_count(model) if outputs is None else outputs
    # a softmax over one logit is 1 whatever the text
    return "value" if problem == "regression" or outputs == 1 else "class"


def predictions_of(model: Any, output: Any, count: int) -> list[Prediction]:
    """The predictions for the `count` texts or images of a batch.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    logits = logits_of(model, output)
    if logits is None or not _one_for_each(model, logits, count):
        return [Prediction()] * count
    rows = logits.detach().double().reshape(count, -1)  # a head of the user's own may squeeze [batch, 1]
    if not bool(torch.isfinite(rows).all()):
        raise FloatingPointError("the model's logits are not finite: its classification head holds NaN or infinity")
    kind = kind_of(model, rows.shape[1])
    if kind == "value":
        return [Prediction(value=row[0] if len(row) == 1 else row) for row in rows.tolist()]
    names = label_names(model, rows.shape[1])
    probabilities = rows.sigmoid() if kind == "labels" else rows.softmax(-1)
    predictions = []
    for row in probabilities.tolist():
        order = sorted(range(len(row)), key=row.__getitem__, reverse=True)
        ranked = [(names[k], row[k]) for k in order]
        above = [pair for pair in ranked if pair[1] > THRESHOLD] if kind == "labels" else None
        predictions.append(Prediction(*ranked[0], labels=above))
    return predictions


def logits_of(model: Any, output: Any) -> Tensor | None:
    """The logits of what a model returned: by name; of a classifier's tuple the first, as transformers orders them."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and classifies(model):
        tensors = [part for part in (output if isinstance(output, tuple | list) else [output]) if _is_tensor(part)]
        if head_of(model) is None:  # its embeddings may come first
            tensors = [part for part in tensors if _named(model) and part.shape[-1:] == (class_count(model),)]
        found = tensors[0] if tensors else None
    return found if isinstance(found, Tensor) else None


def by_name(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of a model with which it returns its outputs by name, where it would return a tuple and can be asked."""
    if getattr(model.config, "return_dict", True) or "return_dict" in inputs:
        return inputs
    forward = type(model).forward
    asked = "return_dict" in inspect.signature(forward).parameters or forward.__module__.startswith("transformers.")
    return {**inputs, "return_dict": True} if asked else inputs


@contextlib.contextmanager
def returning_tuples(model: Any) -> Iterator[None]:
    """Around a forward pass: several classes of transformers cannot run with return_dict=False.

    Raises:
        ValueError: this is such a one.
    """
    try:
        yield
    except AttributeError as error:
        if getattr(model.config, "return_dict", True) or "'tuple' object" not in str(error):
            raise
        raise ValueError(
            f"{type(model).__name__} cannot run with config.return_dict=False ({error}): set model.config.return_dict "
            "= True"
        ) from error


def class_count(model: Any) -> int:
    """How many classes a model's configuration names."""
    return max(_names(model), default=-1) + 1


def in_words(prediction: Any) -> str | None:
    """A prediction, or what has the attributes of one, for a reader: "positive 98.2%"; None where there is none."""
    if prediction.value is not None:
        values = prediction.value if isinstance(prediction.value, list) else [prediction.value]
        return f"value{'s' if len(values) > 1 else ''} {', '.join(_number(value) for value in values)}"
    if prediction.labels:
        return ", ".join(f"{label} {probability:.1%}" for label, probability in prediction.labels)
    if prediction.label is None or prediction.probability is None:
        return None
    text = f"{prediction.label} {prediction.probability:.1%}"
    return text if prediction.labels is None else f"no label above {THRESHOLD:.0%}, highest: {text}"


def in_code(prediction: Any) -> str:
    """The same for a `repr`: ", label='positive', probability=0.982"; nothing where there is none."""
    if prediction.value is not None:
        return f", value={prediction.value!r}"
    above = "" if prediction.labels is None else f", labels={[label for label, _ in prediction.labels]}"
    if prediction.label is None:
        return above
    return f"{above}, label={prediction.label!r}, probability={prediction.probability:.3f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e12 else f"{value:.4g}"


def label_names(model: Any, count: int) -> list[str]:
    """The names of a model's labels 0..count - 1, as its configuration gives them."""
    names = _names(model)
    return [names.get(k) or f"LABEL_{k}" for k in range(count)]


def _names(model: Any) -> dict[int, str]:
    """Names of the classes by number, whatever form the configuration keeps them in; a missing one is ""."""
    given = getattr(model.config, "id2label", None) or {}
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    return {int(k): "" if name is None else str(name) for k, name in pairs if str(k).isdigit()}


def _named(model: Any) -> bool:
    """Whether the configuration names classes or a kind of problem; by default it has two classes without names."""
    told = getattr(model.config, "problem_type", None)
    return bool(told) or any(name != f"LABEL_{k}" for k, name in _names(model).items())


def _is_tensor(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim > 0


def _one_for_each(model: Any, logits: Tensor, count: int) -> bool:
    """Whether logits are one row, or one number, for each text."""
    fits = len(logits) == count if logits.ndim == 2 else logits.ndim < 2 and logits.numel() % count == 0
    if not fits or not classifies(model):
        return False
    # of a head that only its author knows, [batch, n] may be one number for each token
    return head_of(model) is not None or logits.numel() // count in (1, class_count(model))
