"""Every method's scores, and saliency, of many texts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..answers import logits_of
from ..encoders import Encoder
from ..errors import in_a_line, short
from ..explainer import GlobEnc
from ..extraction.rows import Example
from ..functional import compare_methods, contribution_maps
from ..methods import METHODS
from ..metrics.flow import attention_flow
from ..metrics.gradients import hta_maps, saliency
from ..rollouts import rollout
from ..tokenization import Encoding, pad
from .measurements import COSTLY_METHODS


@dataclass(frozen=True)
class TextScores:
    """One text's scores: rollouts and layers [methods, layers, n], saliency [n], the class answered."""

    rollouts: np.ndarray
    layers: np.ndarray
    saliency: np.ndarray
    answer: int


class MethodScorer:
    """Attributions of many texts under every method, and their saliency."""

    def __init__(self, explainer: GlobEnc, names: list[str], position: Any, output: str, batch_tokens: int):
        self.explainer, self.names, self.position, self.output = explainer, names, position, output
        self.batch_tokens = batch_tokens
        self.plain = [name for name in names if name in METHODS]
        self.costly = [name for name in names if name in COSTLY_METHODS]
        if self.costly and (position != "cls" or not Encoder.of(explainer.model).family.has_cls):
            raise ValueError(f"{self.costly[0]} is evaluated for position 'cls' alone, got {position!r}")

    def encoded(
        self, examples: Sequence[Example], max_length: int | None
    ) -> tuple[list[Example], list[Encoding], list[str]]:
        """The examples that have tokens, their tokens, and what is wrong with the others."""
        if not examples:
            return [], [], []
        firsts = [example.text for example in examples]
        seconds = [example.pair or "" for example in examples] if examples[0].pair is not None else None
        encodings = self.explainer.encode_each(firsts, seconds, self.explainer.limit(max_length))
        good: list[Example] = []
        found: list[Encoding] = []
        bad: list[str] = []
        for example, encoding in zip(examples, encodings, strict=True):
            if isinstance(encoding, BaseException):
                bad.append(f"row {example.row}: {short(in_a_line(encoding))}")
            elif encoding.empty:
                bad.append(f"row {example.row}: no token")
            else:
                good.append(example)
                found.append(encoding)
        return good, found, bad

    def rows(
        self, encodings: Sequence[Encoding], golds: Sequence[int] | None = None
    ) -> Iterator[tuple[int, TextScores]]:
        """Index and scores of every text, batch by batch."""
        for batch in self.explainer.batches([len(e) for e in encodings], self.batch_tokens):
            inputs = pad([encodings[k] for k in batch], self.explainer.tokenizer, self.explainer.model)
            label: Any = "predicted" if golds is None else torch.tensor([golds[k] for k in batch])
            yield from zip(batch, self._batch(inputs, label), strict=True)

    def _batch(self, inputs: dict[str, torch.Tensor], label: Any) -> list[TextScores]:
        model, backend = self.explainer.model, self.explainer.backend
        out = compare_methods(model, methods=self.plain or ["W"], position=self.position, backend=backend, **inputs)
        rollouts = {name: out.rollouts[name].cpu().double().numpy() for name in self.plain}
        layers = {name: out.layers[name].cpu().double().numpy() for name in self.plain}
        for name in self.costly:
            rollouts[name], layers[name] = self._costly(name, inputs)
        gradients = saliency(model, label=label, output=self.output, **inputs).cpu().double().numpy()
        logits = logits_of(model, out.model_output)
        assert logits is not None  # saliency has looked
        answers = logits.argmax(-1).tolist()
        lengths = inputs["attention_mask"].sum(-1).tolist()
        return [
            TextScores(
                np.stack([rollouts[name][:, k, :n] for name in self.names]),
                np.stack([layers[name][:, k, :n] for name in self.names]),
                gradients[k, :n],
                answers[k],
            )
            for k, n in enumerate(lengths)
        ]

    def _costly(self, name: str, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the first token up to every layer, and of every layer alone, [layers, batch, n]."""
        model = self.explainer.model
        if name != "W-Flow":
            alone = hta_maps(model, times_input=name == "HTA-Input", **inputs)
            mantissa, _ = rollout(alone)
            return mantissa[:, :, 0].cpu().double().numpy(), alone[:, :, 0].cpu().double().numpy()
        maps = contribution_maps(model, method="W", backend=self.explainer.backend, **inputs).cpu().double().numpy()
        depth, batch, n, _ = maps.shape
        lengths = inputs["attention_mask"].sum(-1).tolist()
        flows = np.zeros((depth, batch, n))
        for k, real in enumerate(lengths):
            for layer in range(depth):
                flows[layer, k, :real] = attention_flow(maps[: layer + 1, k, :real, :real])
        return flows, maps[:, :, 0]
