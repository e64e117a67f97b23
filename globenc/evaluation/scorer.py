"""Every method's scores, and saliency, of many texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..batching import pad
from ..encoders import Encoder
from ..errors import in_a_line
from ..explainer import GlobEnc
from ..functional import attribute, compare_methods
from ..layer_maps import contribution_maps
from ..methods import METHODS
from ..metrics.flow import attention_flow
from ..metrics.gradients import hta_maps, saliency_and_logits
from ..model_state import Loan
from ..predictions import by_name, returning_tuples
from ..rollouts import rollout
from ..tokenization import Encoding
from .costs import Costs
from .label_methods import LABEL_METHODS, Batch
from .measurements import COSTLY_ROLLOUTS, PAPER_ORDER, SALIENCY

_TIMED_BATCHES = 4  # on which each method that is rolled out runs alone too


@dataclass(frozen=True)
class TextScores:
    """One text of n tokens under every method.

    Attributes:
        methods: names of those that are rolled out.
        rollouts: the row of the rollout up to every layer, [methods, layers, n].
        layers: the row of every layer alone, likewise.
        signed: scores for the answer, which have no layers, [n] by name.
        saliency: gradient times input, [n].
        predicted: the class with the highest logit.
    """

    methods: Sequence[str]
    rollouts: np.ndarray
    layers: np.ndarray
    signed: dict[str, np.ndarray]
    saliency: np.ndarray
    predicted: int

    def whole_texts(self) -> dict[str, np.ndarray]:
        """Scores [n] by name: the rollout up to the last layer, signed scores, and saliency."""
        rollouts = {name: row[-1].copy() for name, row in zip(self.methods, self.rollouts, strict=True)}
        signed = {name: row.copy() for name, row in self.signed.items()}
        return {**rollouts, **signed, SALIENCY: self.saliency.copy()}


def default_methods(explainer: GlobEnc) -> tuple[list[str], dict[str, str]]:
    """The methods that cost few forward passes and can be computed for a model, and by name why others cannot.

    A head of the user's own may compute what class scores cannot hold: they are tried on a text of one letter.
    """
    meaningful, model, tokenizer = Encoder.of(explainer.model).methods, explainer.model, explainer.tokenizer
    methods = [name for name in PAPER_ORDER if name in meaningful]
    left_out: dict[str, str] = {}
    (encoding,) = explainer.encode_each(["a"], None, explainer.limit(None))
    for name, method in LABEL_METHODS.items():
        if method.costly:
            continue
        try:
            if method.needs_mask_token:
                _check_mask_token(name, explainer)
            if isinstance(encoding, Encoding) and not encoding.empty:
                inputs = pad([encoding], tokenizer, model)
                special = _special_tokens([encoding], inputs["input_ids"])
                method.scores(Batch(model, inputs, "predicted", special, tokenizer.mask_token_id, len(encoding)))
        except (TypeError, ValueError, RuntimeError) as error:
            left_out[name] = in_a_line(error)
        else:
            methods.append(name)
    return methods, left_out


def _check_mask_token(name: str, explainer: GlobEnc) -> None:
    if explainer.tokenizer.mask_token_id is None:
        raise ValueError(f"{name} needs a tokenizer with a mask token, and this one has none")


class MethodScorer:
    """Attributions of many texts under every method, and their saliency.

    Args:
        explainer: of a text classifier.
        methods: of `measurements.ORDER`; flow and HTA for the position "cls" alone.
        position: a single one, as for `globenc.compare_methods`.
        saliency_output: "logit" or "probability".
        batch_tokens: most tokens of a batch, padding included.

    Attributes:
        costs: what the methods have cost so far.

    Raises:
        ValueError: a method cannot be evaluated for this position or this tokenizer.
    """

    def __init__(
        self, explainer: GlobEnc, methods: Sequence[str], position: Any, saliency_output: str, batch_tokens: int
    ):
        self.explainer, self.methods, self.position = explainer, methods, position
        self.saliency_output, self.batch_tokens = saliency_output, batch_tokens
        self.costs = Costs(explainer.device)
        self.rolled_out = [name for name in methods if name not in LABEL_METHODS]
        self._batches_begun = 0
        costly = [name for name in methods if name in COSTLY_ROLLOUTS]
        if costly and (position != "cls" or not Encoder.of(explainer.model).family.has_cls):
            raise ValueError(f"{costly[0]} is evaluated for position 'cls' alone, got {position!r}")
        for name in methods:
            if name in LABEL_METHODS and LABEL_METHODS[name].needs_mask_token:
                _check_mask_token(name, explainer)

    def scores(
        self, encodings: Sequence[Encoding], labels: Sequence[int] | None = None
    ) -> Iterator[tuple[int, TextScores]]:
        """Index and scores of every text, batch by batch; saliency and signed scores are of the labels, or of the
        predicted classes."""
        for indices in self.explainer.batches([len(encoding) for encoding in encodings], self.batch_tokens):
            texts = [encodings[k] for k in indices]
            label: Any = "predicted" if labels is None else torch.tensor([labels[k] for k in indices])
            yield from zip(indices, self._score_batch(texts, label), strict=True)

    def _score_batch(self, encodings: list[Encoding], label: Any) -> list[TextScores]:
        explainer, costs = self.explainer, self.costs
        inputs = pad(encodings, explainer.tokenizer, explainer.model)
        costs.begin(lambda: _forward(explainer.model, inputs))
        rollouts, layers = self._rollouts(inputs)
        batch = Batch(
            explainer.model,
            inputs,
            label,
            _special_tokens(encodings, inputs["input_ids"]),
            explainer.tokenizer.mask_token_id,
            self.batch_tokens,
        )
        signed = {
            name: _array(costs.measure(name, partial(LABEL_METHODS[name].scores, batch)))
            for name in self.methods
            if name in LABEL_METHODS
        }
        gradients, logits = costs.measure(
            SALIENCY,
            lambda: saliency_and_logits(explainer.model, label=label, output=self.saliency_output, **inputs),
        )
        saliency, predicted = _array(gradients), logits.argmax(-1).tolist()
        empty = np.zeros((0, 0, saliency.shape[1]))
        return [
            TextScores(
                self.rolled_out,
                np.stack([rollouts[name][:, k, :n] for name in self.rolled_out]) if rollouts else empty[..., :n],
                np.stack([layers[name][:, k, :n] for name in self.rolled_out]) if layers else empty[..., :n],
                {name: rows[k, :n] for name, rows in signed.items()},
                saliency[k, :n],
                predicted[k],
            )
            for k, n in enumerate(map(len, encodings))
        ]

    def _rollouts(self, inputs: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """By method, the row of the rollout up to every layer and of every layer alone, [layers, batch, n]."""
        model, backend, position = self.explainer.model, self.explainer.backend, self.position
        rollouts: dict[str, np.ndarray] = {}
        layers: dict[str, np.ndarray] = {}
        one_pass = [name for name in self.rolled_out if name in METHODS]
        if one_pass:
            out = compare_methods(model, methods=one_pass, position=position, backend=backend, **inputs)
            rollouts |= {name: _array(rows) for name, rows in out.rollouts.items()}
            layers |= {name: _array(rows) for name, rows in out.layers.items()}
            self._batches_begun += 1
            if self._batches_begun <= _TIMED_BATCHES:  # what each costs alone, which the common pass does not show
                for name in one_pass:
                    alone = {"method": name, "position": position, "backend": backend, **inputs}
                    self.costs.measure(name, partial(attribute, model, **alone))
        for name in self.rolled_out:
            if name in COSTLY_ROLLOUTS:
                rollouts[name], layers[name] = self.costs.measure(name, partial(self._costly_method, name, inputs))
        return rollouts, layers

    def _costly_method(self, name: str, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the first token up to every layer, and of every layer alone, [layers, batch, n]."""
        model = self.explainer.model
        if name != "W-Flow":
            maps = hta_maps(model, times_input=name == "HTA-Input", **inputs)
            mantissa, _ = rollout(maps)
            return _array(mantissa[:, :, 0]), _array(maps[:, :, 0])
        weights = _array(contribution_maps(model, method="W", backend=self.explainer.backend, **inputs))
        depth, batch, n, _ = weights.shape
        lengths = inputs["attention_mask"].sum(-1).tolist()
        flows = np.zeros((depth, batch, n))
        for k, length in enumerate(lengths):
            for layer in range(depth):
                flows[layer, k, :length] = attention_flow(weights[: layer + 1, k, :length, :length])
        return flows, weights[:, :, 0]


def _forward(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    loan = Loan()

    def run() -> None:
        loan.evaluation_mode(list(model.modules()))
        with torch.no_grad(), returning_tuples(model):
            model(**by_name(model, inputs))

    loan.run(run)


def _special_tokens(encodings: Sequence[Encoding], input_ids: torch.Tensor) -> torch.Tensor:
    """1 at special tokens and padding, [batch, n]."""
    special = torch.ones_like(input_ids)
    for row, encoding in zip(special, encodings, strict=True):
        row[: len(encoding)] = torch.from_numpy(encoding.segments < 0)
    return special


def _array(rows: torch.Tensor) -> np.ndarray:
    return rows.cpu().double().numpy()
