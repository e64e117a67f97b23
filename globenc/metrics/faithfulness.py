"""Faithfulness: how much of the answer goes away with the tokens that an attribution calls important.

AOPC: Samek et al. 2017, with the shares of tokens used for text classifiers since (10 to 90 %). Comprehensiveness and
sufficiency: ERASER, DeYoung et al., ACL 2020, with its shares (1, 5, 10, 20 and 50 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..encoders import Encoder
from ..inputs import check_inputs
from ..model_state import Loan
from ..predictions import kind_of
from .changed_texts import BATCH_TOKENS, NO_CHANGE, ChangedTexts, check_removal, logits_of_rows, removable_tokens
from .gradients import classes_of

AOPC_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ERASER_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
ORDERS = ("most", "least")


@dataclass(frozen=True)
class Faithfulness:
    """What the removal of tokens did to the probability of the answer.

    Attributes:
        shares: of the tokens, one after another.
        drops: p(answer | text) - p(answer | changed text), [shares, batch]; NaN for a text without removable tokens.
        values: mean over the shares, [batch]; NaN likewise.
        mean, std: of the values that are there; population standard deviation; NaN if there is none.
        undefined: how many texts have no removable token.
    """

    shares: tuple[float, ...]
    drops: np.ndarray
    values: np.ndarray
    mean: float
    std: float
    undefined: int


@dataclass(frozen=True)
class Measure:
    """Which tokens go: `order` "most" or "least" important first, or all but the most important ("keep")."""

    order: str
    shares: tuple[float, ...]


MEASURES = {
    "aopc": Measure("most", AOPC_SHARES),
    "aopc-least": Measure("least", AOPC_SHARES),
    "comprehensiveness": Measure("most", ERASER_SHARES),
    "sufficiency": Measure("keep", ERASER_SHARES),
}


def aopc(
    model: nn.Module,
    scores: Any,
    *,
    order: str = "most",
    shares: Sequence[float] = AOPC_SHARES,
    removal: str = "mask",
    mask_token_id: int | None = None,
    special_tokens_mask: Tensor | None = None,
    label: str | Tensor = "predicted",
    **model_inputs: Any,
) -> Faithfulness:
    """Area over the perturbation curve: mean drop of the answer's probability as 10 to 90 % of the tokens are removed.

    With order "most" higher is better: the tokens called important mattered. With "least" lower is.

    Args:
        model: a text classifier of a known family; run in evaluation mode and left as it was.
        scores: [batch, n], as from `globenc.attribute` or `saliency`; of equal ones the first goes first.
        order: "most" or "least" important first.
        shares: of the removable tokens, 0 to 1; at least one token goes.
        removal: "mask" puts `mask_token_id` in a token's place, "delete" takes it out and closes the gap.
        mask_token_id: the tokenizer's, needed for "mask".
        special_tokens_mask: 1 at tokens that always stay, [batch, n], as tokenizers return it; None: all may go.
        label: "predicted" for the answer to the whole text, or classes [batch].
        **model_inputs: input_ids, attention_mask and token_type_ids, [batch, n].

    Returns:
        Faithfulness.

    Raises:
        TypeError, ValueError: a model that does not choose between classes, inputs or options that cannot be used.

    Example:
        >>> import globenc
        >>> explainer = globenc.GlobEnc.from_pretrained()
        >>> inputs = explainer.tokenizer("a charming journey", return_tensors="pt")
        >>> scores = globenc.attribute(explainer.model, **inputs).scores
        >>> mask = explainer.tokenizer.mask_token_id
        >>> globenc.metrics.aopc(explainer.model, scores, mask_token_id=mask, **inputs).drops.shape
        (9, 1)
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    options = {"removal": removal, "mask_token_id": mask_token_id, "special_tokens_mask": special_tokens_mask}
    return _faithfulness(model, scores, Measure(order, tuple(shares)), {**options, "label": label, **model_inputs})


def comprehensiveness(
    model: nn.Module, scores: Any, *, shares: Sequence[float] = ERASER_SHARES, **options: Any
) -> Faithfulness:
    """Mean drop of the answer's probability without the most important tokens; higher is better. (ERASER)

    The other arguments, result and errors as for `aopc`, which has an `order` besides.
    """
    return _faithfulness(model, scores, Measure("most", tuple(shares)), options)


def sufficiency(
    model: nn.Module, scores: Any, *, shares: Sequence[float] = ERASER_SHARES, **options: Any
) -> Faithfulness:
    """Mean drop of the answer's probability with the most important tokens alone; lower is better. (ERASER)

    The other arguments, result and errors as for `aopc`, which has an `order` besides.
    """
    return _faithfulness(model, scores, Measure("keep", tuple(shares)), options)


def _faithfulness(model: nn.Module, scores: Any, measure: Measure, options: dict[str, Any]) -> Faithfulness:
    """The drops of one measure with their means; options are those of `removal_drops`."""
    drops = removal_drops(model, {"scores": scores}, {"measure": measure}, **options)["scores"]["measure"]
    values = drops.mean(0)
    defined = values[~np.isnan(values)]
    mean, std = (float(defined.mean()), float(defined.std())) if len(defined) else (float("nan"), float("nan"))
    return Faithfulness(measure.shares, drops, values, mean, std, len(values) - len(defined))


def removal_drops(
    model: nn.Module,
    scores: Mapping[str, Any],
    measures: Mapping[str, Measure],
    *,
    removal: str = "mask",
    mask_token_id: int | None = None,
    special_tokens_mask: Tensor | None = None,
    label: str | Tensor = "predicted",
    batch_tokens: int = BATCH_TOKENS,
    **model_inputs: Any,
) -> dict[str, dict[str, np.ndarray]]:
    """Drops [shares, batch] of several scores under several measures; a changed text that occurs twice is read once.

    Args:
        scores, measures: by name.
        batch_tokens: most tokens of a forward pass, padding included.
        The others: as for `aopc`.
    """
    encoder = Encoder.of(model)
    real = check_inputs(encoder, model_inputs)
    mask = real.cpu().numpy()
    check_removal(encoder.model, model_inputs, removal, mask_token_id)
    if kind_of(encoder.model) == "value":
        raise ValueError(
            f"{type(encoder.model).__name__} does not choose between classes: there is no probability to drop"
        )
    for measure in measures.values():
        if not measure.shares or not all(0 < share <= 1 for share in measure.shares):
            raise ValueError(f"shares must be numbers above 0 and up to 1, got {list(measure.shares)}")
    removable = removable_tokens(real, special_tokens_mask).cpu().numpy()
    variants = ChangedTexts(mask, removal)
    indices: dict[tuple[str, str], np.ndarray] = {}
    for name, given in scores.items():
        values = _checked_scores(name, given, mask.shape)
        ranked = [_most_important_first(row, may_go) for row, may_go in zip(values, removable, strict=True)]
        for kind, measure in measures.items():
            indices[name, kind] = np.array(
                [
                    [variants.without(text, ranked[text], measure.order, share) for text in range(len(mask))]
                    for share in measure.shares
                ]
            )
    ids, types = variants.tokens(model_inputs, mask_token_id)
    loan = Loan()

    def run() -> np.ndarray:
        loan.evaluation_mode(list(encoder.model.modules()))
        return _probabilities(encoder, ids, types, variants.texts, label, batch_tokens)

    probabilities = loan.run(run)
    full = probabilities[: len(mask)]
    drops: dict[str, dict[str, np.ndarray]] = {name: {} for name in scores}
    for (name, kind), table in indices.items():
        drops[name][kind] = np.where(table == NO_CHANGE, np.nan, full - probabilities[table])
    return drops


def _checked_scores(name: str, given: Any, shape: tuple[int, int]) -> np.ndarray:
    values = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else np.asarray(given, np.float64)
    if values.shape != shape:
        raise ValueError(f"{name} must have shape [batch, n] = {list(shape)}, got {list(values.shape)}")
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"{name} hold NaN or infinity")
    return values


def _most_important_first(scores: np.ndarray, removable: np.ndarray) -> np.ndarray:
    positions = np.flatnonzero(removable)
    return positions[np.argsort(-scores[positions], kind="stable")]


def _probabilities(
    encoder: Encoder,
    ids: list[np.ndarray],
    types: list[np.ndarray] | None,
    texts: list[int],
    label: str | Tensor,
    batch_tokens: int,
) -> np.ndarray:
    """p(class of the text | variant) for every variant; the first ones are the whole texts, whose answers decide the
    class."""
    batch = max(texts) + 1
    whole = logits_of_rows(encoder, ids[:batch], None if types is None else types[:batch], batch_tokens)
    classes = classes_of(label, whole)
    logits = whole
    if len(ids) > batch:
        changed = logits_of_rows(encoder, ids[batch:], None if types is None else types[batch:], batch_tokens)
        logits = torch.cat([whole, changed])
    probabilities = logits.sigmoid() if kind_of(encoder.model) == "labels" else logits.softmax(-1)
    return probabilities[torch.arange(len(ids)), classes[texts]].numpy()
