"""Every method's scores, and saliency, of many texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..batching import pad
from ..encoders import Encoder
from ..explainer import GlobEnc
from ..functional import compare_methods
from ..layer_maps import contribution_maps
from ..methods import METHODS
from ..metrics.flow import attention_flow
from ..metrics.gradients import hta_maps, saliency_and_logits
from ..rollouts import rollout
from ..tokenization import Encoding
from .measurements import COSTLY_METHODS, SALIENCY


@dataclass(frozen=True)
class TextScores:
    """One text of n tokens under every method.

    Attributes:
        methods: their names.
        rollouts: the row of the rollout up to every layer, [methods, layers, n].
        layers: the row of every layer alone, likewise.
        saliency: gradient times input, [n].
        predicted: the class with the highest logit.
    """

    methods: Sequence[str]
    rollouts: np.ndarray
    layers: np.ndarray
    saliency: np.ndarray
    predicted: int

    def whole_rollouts(self) -> dict[str, np.ndarray]:
        """Scores [n] by name: the rollout up to the last layer of every method, and saliency."""
        rollouts = {name: row[-1].copy() for name, row in zip(self.methods, self.rollouts, strict=True)}
        return {**rollouts, SALIENCY: self.saliency.copy()}


class MethodScorer:
    """Attributions of many texts under every method, and their saliency.

    Args:
        explainer: of a text classifier.
        methods: of METHODS and COSTLY_METHODS; these for the position "cls" alone.
        position: a single one, as for `globenc.compare_methods`.
        saliency_output: "logit" or "probability".
        batch_tokens: most tokens of a batch, padding included.
    """

    def __init__(
        self, explainer: GlobEnc, methods: Sequence[str], position: Any, saliency_output: str, batch_tokens: int
    ):
        self.explainer, self.methods, self.position = explainer, methods, position
        self.saliency_output, self.batch_tokens = saliency_output, batch_tokens
        costly = [name for name in methods if name in COSTLY_METHODS]
        if costly and (position != "cls" or not Encoder.of(explainer.model).family.has_cls):
            raise ValueError(f"{costly[0]} is evaluated for position 'cls' alone, got {position!r}")

    def scores(
        self, encodings: Sequence[Encoding], labels: Sequence[int] | None = None
    ) -> Iterator[tuple[int, TextScores]]:
        """Index and scores of every text, batch by batch; saliency is of the labels, or of the predicted classes."""
        for batch in self.explainer.batches([len(encoding) for encoding in encodings], self.batch_tokens):
            inputs = pad([encodings[k] for k in batch], self.explainer.tokenizer, self.explainer.model)
            label: Any = "predicted" if labels is None else torch.tensor([labels[k] for k in batch])
            yield from zip(batch, self._score_batch(inputs, label), strict=True)

    def _score_batch(self, inputs: dict[str, torch.Tensor], label: Any) -> list[TextScores]:
        model, backend = self.explainer.model, self.explainer.backend
        rollouts: dict[str, np.ndarray] = {}
        layers: dict[str, np.ndarray] = {}
        one_pass = [name for name in self.methods if name in METHODS]
        if one_pass:
            out = compare_methods(model, methods=one_pass, position=self.position, backend=backend, **inputs)
            rollouts |= {name: _array(rows) for name, rows in out.rollouts.items()}
            layers |= {name: _array(rows) for name, rows in out.layers.items()}
        for name in self.methods:
            if name in COSTLY_METHODS:
                rollouts[name], layers[name] = self._costly_method(name, inputs)
        gradients, logits = saliency_and_logits(model, label=label, output=self.saliency_output, **inputs)
        saliency, predicted = _array(gradients), logits.argmax(-1).tolist()
        lengths = inputs["attention_mask"].sum(-1).tolist()
        return [
            TextScores(
                self.methods,
                np.stack([rollouts[name][:, k, :n] for name in self.methods]),
                np.stack([layers[name][:, k, :n] for name in self.methods]),
                saliency[k, :n],
                predicted[k],
            )
            for k, n in enumerate(lengths)
        ]

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


def _array(rows: torch.Tensor) -> np.ndarray:
    return rows.cpu().double().numpy()
