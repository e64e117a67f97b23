"""Which number of a model's output is explained: the logit of a label, at a token where a head answers for tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..predictions import class_count, head_of, label_names, logits_of
from ..rollouts import Position, requested_rows

Label = str | int | Sequence[str | int] | Tensor
Answer = Callable[[Any], Tensor]

SHOWN = 20  # labels that an error lists
MOST_LABELS = 1000  # that "all" explains
TOKEN_HEADS = ("TokenClassification", "MaskedLM")


class Explained:
    """A model's output -> the number that is explained, for each text or for each text and label.

    The first output that it reads decides what "predicted" means; later ones are read at the same labels.

    Attributes:
        labels: numbers of the labels, [B], or [labels] for "all"; None for an answer of the caller's own.
        names: their names.
    """

    labels: Tensor | None = None
    names: list[str] | None = None

    def __call__(self, output: Any) -> Tensor:
        """[B], or [B, labels]."""
        raise NotImplementedError


def explained(
    model: nn.Module,
    mask: Tensor,
    label: Label = "predicted",
    position: Position | None = None,
    answer: Answer | None = None,
    masked: Tensor | None = None,
) -> Explained:
    """What a call asks for, by the model's head.

    Args:
        masked: True at mask tokens, [B, n], where they are known.

    Raises:
        TypeError, ValueError: the model's head has no such label, or needs a position or an answer.
    """
    if answer is not None:
        if not callable(answer):
            raise TypeError(f"answer must be a function of the model's output, got {type(answer).__name__}")
        if position is not None or not (isinstance(label, str) and label == "predicted"):
            raise ValueError(
                "answer says what is explained, and so do label and position: give one of them (a function such as "
                "lambda output: output.logits[:, 1] explains label 1)"
            )
        return _OwnAnswer(answer, len(mask))
    head = head_of(model)
    if head == "QuestionAnswering":
        return _AnswerSpan(mask, label, position)
    if head in TOKEN_HEADS:
        masked = masked if head == "MaskedLM" else None
        return _TokenLogits(model, _token_weights(model, mask, position, masked), label)
    if position is not None:
        raise ValueError(
            f"position must be None for {type(model).__name__}: it answers about whole texts; a base model is asked "
            "about a token by answer="
        )
    return _TextLogits(model, label, *mask.shape)


class _OwnAnswer(Explained):
    """What the caller's function makes of the output."""

    def __init__(self, answer: Answer, batch: int):
        self.answer, self.batch = answer, batch

    def __call__(self, output: Any) -> Tensor:
        value = self.answer(output)
        if not isinstance(value, Tensor) or value.shape != (self.batch,):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"answer must return one number for each text, as lambda output: output.logits[:, 1] does: a tensor "
                f"[batch] = [{self.batch}], got {got}"
            )
        if not value.is_floating_point():
            raise TypeError(f"answer must return floating point numbers, got {value.dtype}")
        return value


class _TextLogits(Explained):
    """Logits of whole texts, [B, labels]."""

    def __init__(self, model: nn.Module, label: Label, batch: int, n: int | None = None):
        self.model, self.label, self.batch, self.n = model, label, batch, n

    def logits(self, output: Any) -> Tensor:
        logits = logits_of(self.model, output)
        name = type(self.model).__name__
        if logits is None:
            raise ValueError(
                f"{name} has no labels to explain: give a model that classifies, or answer=, a function of its output "
                "that gives one number for each text"
            )
        if logits.ndim == 1 and len(logits) == self.batch:
            logits = logits[:, None]
        if logits.ndim != 2 or len(logits) != self.batch:
            raise ValueError(
                f"{name} gives logits of shape {list(logits.shape)}: give answer=, a function of its output that gives "
                "one number for each text"
            )
        # of a head that only its author knows
        if head_of(self.model) is None and logits.shape[1] == self.n and self.n not in (1, class_count(self.model)):
            raise ValueError(
                f"{name} gives logits of shape {list(logits.shape)}, as many as a text has tokens, and its "
                f"configuration names {class_count(self.model)} labels: give answer=, or config.num_labels if they are "
                "labels"
            )
        return logits

    def __call__(self, output: Any) -> Tensor:
        logits = self.logits(output)
        if self.labels is None:
            tokens = head_of(self.model) == "MaskedLM"  # the labels are the vocabulary, which only a tokenizer names
            names = [] if tokens else label_names(self.model, logits.shape[1])
            self.labels = _numbers(self.label, logits.detach(), names)
            self.names = [str(k) if tokens else names[k] for k in self.labels.tolist()]
        if isinstance(self.label, str) and self.label == "all":
            return logits
        return logits.gather(1, self.labels[:, None])[:, 0]


class _TokenLogits(_TextLogits):
    """Logits of one token, or the mean of a span's, [B, labels]."""

    def __init__(self, model: nn.Module, weights: Tensor, label: Label):
        super().__init__(model, label, len(weights))
        self.weights = weights

    def logits(self, output: Any) -> Tensor:
        logits = logits_of(self.model, output)
        if logits is None or logits.ndim != 3:
            raise ValueError(
                f"{type(self.model).__name__} gives no logits for each token{_by_name_hint(output)}: give answer="
            )
        weights = self.weights.to(logits.dtype)
        return (logits[:, : weights.shape[1]] * weights[..., None]).sum(1)


class _AnswerSpan(Explained):
    """The start logit, the end logit or the sum of both, at the answer that the model predicts."""

    def __init__(self, mask: Tensor, label: Label, position: Position | None):
        if label not in ("predicted", "start", "end"):
            raise ValueError(
                f'label must be "predicted" (start and end), "start" or "end" for questions, got {label!r}'
            )
        self.label, self.mask, self.position = label, mask, position
        self.tokens: Tensor | None = None

    def __call__(self, output: Any) -> Tensor:
        if not (hasattr(output, "start_logits") and hasattr(output, "end_logits")):
            raise ValueError(
                f"the model gives no start_logits and end_logits{_by_name_hint(output)}: give answer=, a function of "
                "its output that gives one number for each text"
            )
        scores = torch.stack([output.start_logits, output.end_logits], 1)[:, :, : self.mask.shape[1]]
        if self.tokens is None:
            self.tokens = self._span(scores.detach())
            self.names = [str(self.label)] * len(self.mask)
        chosen = scores.gather(2, self.tokens[:, :, None])[..., 0]
        return chosen.sum(1) if self.label == "predicted" else chosen[:, 0 if self.label == "start" else 1]

    def _span(self, scores: Tensor) -> Tensor:
        """First and last token of the answer, [B, 2]: the highest sum of both with the first not behind the last."""
        if self.position is not None:
            token = _token_weights(None, self.mask, self.position, None).argmax(1)
            return torch.stack([token, token], 1)
        start, end = scores.masked_fill(~self.mask[:, None], -torch.inf).unbind(1)
        best_end, where = end.flip(1).cummax(1)  # the best end from every token on
        best_end, where = best_end.flip(1), (end.shape[1] - 1 - where).flip(1)
        first = (start + best_end).argmax(1)
        return torch.stack([first, where.gather(1, first[:, None])[:, 0]], 1)


def _by_name_hint(output: Any) -> str:
    return " by name (leave return_dict out)" if isinstance(output, tuple) else ""


def _token_weights(model: Any, mask: Tensor, position: Position | None, masked: Tensor | None) -> Tensor:
    """Weights of the tokens whose logits are explained, [B, n]."""
    if position is None and masked is not None:
        if not bool((masked.sum(1) == 1).all()):
            raise ValueError(
                f"position must say which token is explained: text {int((masked.sum(1) != 1).nonzero()[0])} "
                "of the batch has not exactly one mask token"
            )
        return masked.double()
    if position is None:
        raise ValueError(
            f"position must say which token of {type(model).__name__} is explained: a token's place among the text's "
            "real tokens, or a list of them for the mean over a span"
        )
    if isinstance(position, str) and position == "all":
        raise ValueError('position must be a token or a span here, got "all"')
    return requested_rows(position, mask, torch.float64).weights.mean(1)


def _numbers(label: Any, logits: Tensor, names: list[str]) -> Tensor:
    """Numbers of the labels that a `label` argument means, [B], or [labels] for "all"."""
    batch, count = logits.shape
    if isinstance(label, str) and label == "predicted":
        return logits.argmax(-1)
    if isinstance(label, str) and label == "all":
        if count > MOST_LABELS:
            raise ValueError(
                f'label must be a label of this model, got "all" of {count}: name those that are asked for'
            )
        return torch.arange(count, device=logits.device)
    if isinstance(label, Tensor):
        if label.shape != (batch,) or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(
                f"label must be integers of shape [batch] = [{batch}], got {label.dtype} {list(label.shape)}"
            )
        given = label.tolist()
    elif isinstance(label, str | Integral):
        given = [label] * batch
    elif isinstance(label, Sequence):
        given = list(label)
        if len(given) != batch:
            raise ValueError(f"label must be one for each text, {batch} of them, got {len(given)}")
    else:
        raise TypeError(f'label must be "predicted", "all", a number, a name, or one for each text, got {label!r}')
    return torch.tensor([label_number(one, count, names) for one in given], device=logits.device)


def label_number(label: Any, count: int, names: list[str]) -> int:
    """The number of one of `count` labels, by number, by name, or by a number written as text.

    Args:
        names: of the labels; empty for a masked language model, whose labels are its vocabulary.

    Raises:
        TypeError, ValueError: there is none.
    """
    known = ", ".join(f"{k} {name}" for k, name in enumerate(names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
    if isinstance(label, str) and not names:
        raise ValueError(
            f"label must be the number of a token, 0..{count - 1}, for a masked language model, got {label!r}"
        )
    if isinstance(label, str):
        alike = [k for k, name in enumerate(names) if name == label]
        alike = alike or [k for k, name in enumerate(names) if name.lower() == label.lower()]
        if len(alike) == 1:
            return alike[0]
        if alike:
            raise ValueError(f"label {label!r} is the name of several of this model's labels; give its number: {known}")
        if not label.isdecimal():
            raise ValueError(f"label must be one of this model's ({known}), got {label!r}")
        label = int(label)  # as a command line and a table of text have it
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise TypeError(f"label must be a number or a name, got {label!r}")
    if not 0 <= int(label) < count:
        named = f" ({known})" if names else ""
        raise ValueError(f"label must be in 0..{count - 1}{named}, got {label}")
    return int(label)
