"""Methods that give every token of a text one signed score for a label: what speaks for it, and what against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..frozen.scores import class_scores
from ..metrics.gradients import gradient_times_input
from ..metrics.integrated import integrated_gradients
from ..metrics.occlusion import occlusion


@dataclass(frozen=True)
class Batch:
    """Texts to be explained.

    Attributes:
        model, inputs: as in `globenc.attribute`.
        label: "predicted", or classes [batch].
        special: 1 at special tokens, [batch, n].
        mask_token_id: the tokenizer's; None where it has none.
        batch_tokens: most tokens of a forward pass, padding included.
    """

    model: Any
    inputs: dict[str, Any]
    label: Any
    special: Tensor
    mask_token_id: int | None
    batch_tokens: int


@dataclass(frozen=True)
class LabelMethod:
    """One of them.

    Attributes:
        meaning: one line for readers.
        scores: of a batch, [batch, n].
        costly: it takes many forward passes and is evaluated where it is asked for.
        needs_mask_token: it cannot be computed without the tokenizer's mask token.
    """

    meaning: str
    scores: Callable[[Batch], Tensor]
    costly: bool = False
    needs_mask_token: bool = False


def _class_scores(batch: Batch, reference: str) -> Tensor:
    return class_scores(
        batch.model, label=batch.label, reference=reference, mask_token_id=batch.mask_token_id, **batch.inputs
    ).scores


def _integrated_gradients(batch: Batch, baseline: str) -> Tensor:
    return integrated_gradients(
        batch.model,
        label=batch.label,
        baseline=baseline,
        mask_token_id=batch.mask_token_id,
        special_tokens_mask=batch.special,
        **batch.inputs,
    )


def _occlusion(batch: Batch) -> Tensor:
    return occlusion(
        batch.model,
        label=batch.label,
        mask_token_id=batch.mask_token_id,
        special_tokens_mask=batch.special,
        batch_tokens=batch.batch_tokens,
        **batch.inputs,
    )


LABEL_METHODS = {
    "class-scores": LabelMethod(
        "signed class scores of the frozen network, slopes from its answer to empty input",
        lambda batch: _class_scores(batch, "zero"),
    ),
    "class-scores-model": LabelMethod(
        "the same, slopes from a text of mask tokens, read once for a model",
        lambda batch: _class_scores(batch, "model"),
        needs_mask_token=True,
    ),
    "class-scores-origin": LabelMethod(
        "the same, slopes from the origin: DecompX without redistribution of biases",
        lambda batch: _class_scores(batch, "origin"),
    ),
    "gradient-x-input": LabelMethod(
        "gradient times input of the answer, with its sign",
        lambda batch: gradient_times_input(batch.model, label=batch.label, **batch.inputs),
    ),
    "integrated-gradients-zero": LabelMethod(
        "integrated gradients from zero embeddings, 20 steps (Sundararajan et al. 2017)",
        lambda batch: _integrated_gradients(batch, "zero"),
        costly=True,
    ),
    "integrated-gradients-mask": LabelMethod(
        "integrated gradients from a text of mask tokens, 20 steps",
        lambda batch: _integrated_gradients(batch, "mask"),
        costly=True,
        needs_mask_token=True,
    ),
    "occlusion": LabelMethod(
        "how much the answer's logit falls with one token masked", _occlusion, costly=True, needs_mask_token=True
    ),
}
