"""Faithfulness: how much of the answer goes away with the tokens that an attribution calls important.

AOPC: Samek et al. 2017, with the shares of tokens used for text classifiers since (10 to 90 %). Comprehensiveness and
sufficiency: ERASER, DeYoung et al., ACL 2020, with its shares (1, 5, 10, 20 and 50 %).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..answers import by_name, kind_of, logits_of, returning_tuples
from ..encoders import Encoder
from ..inputs import check_inputs
from ..model_state import Loan
from ..tokenization import by_length
from .gradients import classes_of

AOPC_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ERASER_SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
REMOVALS = ("mask", "delete")
ORDERS = ("most", "least")
BATCH_TOKENS = 2048

_COLUMNS = ("input_ids", "attention_mask", "token_type_ids")


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
    return _one(
        model, scores, Measure(order, tuple(shares)), removal, mask_token_id, special_tokens_mask, label, model_inputs
    )


def comprehensiveness(
    model: nn.Module,
    scores: Any,
    *,
    shares: Sequence[float] = ERASER_SHARES,
    removal: str = "mask",
    mask_token_id: int | None = None,
    special_tokens_mask: Tensor | None = None,
    label: str | Tensor = "predicted",
    **model_inputs: Any,
) -> Faithfulness:
    """Mean drop of the answer's probability without the most important tokens; higher is better. (ERASER)

    Arguments, result and errors as for `aopc`.
    """
    measure = Measure("most", tuple(shares))
    return _one(model, scores, measure, removal, mask_token_id, special_tokens_mask, label, model_inputs)


def sufficiency(
    model: nn.Module,
    scores: Any,
    *,
    shares: Sequence[float] = ERASER_SHARES,
    removal: str = "mask",
    mask_token_id: int | None = None,
    special_tokens_mask: Tensor | None = None,
    label: str | Tensor = "predicted",
    **model_inputs: Any,
) -> Faithfulness:
    """Mean drop of the answer's probability with the most important tokens alone; lower is better. (ERASER)

    Arguments, result and errors as for `aopc`.
    """
    measure = Measure("keep", tuple(shares))
    return _one(model, scores, measure, removal, mask_token_id, special_tokens_mask, label, model_inputs)


def _one(
    model: nn.Module,
    scores: Any,
    measure: Measure,
    removal: str,
    mask_token_id: int | None,
    special_tokens_mask: Tensor | None,
    label: str | Tensor,
    model_inputs: dict[str, Any],
) -> Faithfulness:
    drops = removal_drops(
        model,
        {"scores": scores},
        {"measure": measure},
        removal=removal,
        mask_token_id=mask_token_id,
        special_tokens_mask=special_tokens_mask,
        label=label,
        **model_inputs,
    )
    return summed_up(measure.shares, drops["scores"]["measure"])


def summed_up(shares: tuple[float, ...], drops: np.ndarray) -> Faithfulness:
    """Drops [shares, batch] with their means."""
    values = drops.mean(0)
    there = values[~np.isnan(values)]
    mean, std = (float(there.mean()), float(there.std())) if len(there) else (float("nan"), float("nan"))
    return Faithfulness(shares, drops, values, mean, std, int(np.isnan(values).sum()))


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
    advance: Callable[[int], None] | None = None,
    **model_inputs: Any,
) -> dict[str, dict[str, np.ndarray]]:
    """Drops [shares, batch] of several scores under several measures; a changed text that occurs twice is read once.

    Args:
        scores, measures: by name.
        batch_tokens: most tokens of a forward pass, padding included.
        advance: told how many of the changed texts of this batch have been read.
        The others: as for `aopc`.
    """
    encoder = Encoder.of(model)
    eager: Any = encoder.model
    real = check_inputs(encoder, model_inputs).cpu().numpy()
    batch, n = real.shape
    _check(eager, model_inputs, removal, mask_token_id)
    for measure in measures.values():
        if not measure.shares or not all(0 < share <= 1 for share in measure.shares):
            raise ValueError(f"shares must be numbers above 0 and up to 1, got {list(measure.shares)}")
    stays = ~real
    if special_tokens_mask is not None:
        if tuple(special_tokens_mask.shape) != (batch, n):
            raise ValueError(
                f"special_tokens_mask must have shape [batch, n] = {[batch, n]}, got {list(special_tokens_mask.shape)}"
            )
        stays = stays | special_tokens_mask.bool().cpu().numpy()
    rows = {name: _checked_scores(name, given, (batch, n)) for name, given in scores.items()}
    variants: dict[tuple[int, bytes], int] = {}
    removed: list[tuple[int, np.ndarray]] = []

    def variant(text: int, gone: np.ndarray) -> int:
        key = (text, gone.tobytes())
        if key not in variants:
            variants[key] = len(removed)
            removed.append((text, gone))
        return variants[key]

    whole = [variant(text, np.zeros(n, bool)) for text in range(batch)]
    wanted: dict[tuple[str, str], list[list[int | None]]] = {}
    for name, values in rows.items():
        places = [np.flatnonzero(~stays[text]) for text in range(batch)]
        ranked = [places[text][np.argsort(-values[text, places[text]], kind="stable")] for text in range(batch)]
        for kind, measure in measures.items():
            wanted[name, kind] = [
                [
                    None
                    if not len(ranked[text])
                    else variant(text, _gone(ranked[text], measure.order, share, real[text], removal))
                    for text in range(batch)
                ]
                for share in measure.shares
            ]
    loan = Loan()

    def run() -> np.ndarray:
        loan.evaluation_mode(list(eager.modules()))
        return _probabilities(
            eager, model_inputs, real, removed, whole, removal, mask_token_id, label, batch_tokens, advance
        )

    probabilities = loan.run(run)
    full = probabilities[whole]
    drops: dict[str, dict[str, np.ndarray]] = {name: {} for name in rows}
    for (name, kind), table in wanted.items():
        drops[name][kind] = np.array(
            [[np.nan if k is None else full[text] - probabilities[k] for text, k in enumerate(row)] for row in table]
        )
    return drops


def _check(model: Any, inputs: dict[str, Any], removal: str, mask_token_id: int | None) -> None:
    if removal not in REMOVALS:
        raise ValueError(f"removal must be one of {', '.join(REMOVALS)}; got {removal!r}")
    if removal == "mask":
        if mask_token_id is None:
            raise ValueError("mask_token_id is needed for removal 'mask': give the tokenizer's, or removal='delete'")
        rows = model.get_input_embeddings().weight.shape[0]
        if not 0 <= mask_token_id < rows:
            raise ValueError(f"mask_token_id must be in 0..{rows - 1} for this model, got {mask_token_id}")
    others = [name for name in inputs if name not in _COLUMNS]
    if others or "input_ids" not in inputs:
        raise ValueError(
            f"texts are changed token by token: give {', '.join(_COLUMNS)} alone, got "
            f"{', '.join(others or inputs) or 'nothing'}"
        )
    if kind_of(model) == "value":
        raise ValueError(f"{type(model).__name__} does not choose between classes: there is no probability to drop")


def _checked_scores(name: str, given: Any, shape: tuple[int, int]) -> np.ndarray:
    values = given.detach().cpu().double().numpy() if isinstance(given, Tensor) else np.asarray(given, np.float64)
    if values.shape != shape:
        raise ValueError(f"{name} must have shape [batch, n] = {list(shape)}, got {list(values.shape)}")
    if not bool(np.isfinite(values).all()):
        raise ValueError(f"{name} hold NaN or infinity")
    return values


def _gone(ranked: np.ndarray, order: str, share: float, real: np.ndarray, removal: str) -> np.ndarray:
    """Which tokens of a text go; `ranked` are the places of the removable ones, most important first."""
    count = max(1, int(share * len(ranked) + 0.5))
    picked = {"most": ranked[:count], "least": ranked[::-1][:count], "keep": ranked[count:]}[order]
    if removal == "delete" and len(picked) == real.sum():
        picked = picked[:-1]  # nothing would be left to read
    gone = np.zeros(len(real), bool)
    gone[picked] = True
    return gone


def _probabilities(
    model: Any,
    inputs: dict[str, Any],
    real: np.ndarray,
    removed: list[tuple[int, np.ndarray]],
    whole: list[int],
    removal: str,
    mask_token_id: int | None,
    label: str | Tensor,
    batch_tokens: int,
    advance: Callable[[int], None] | None,
) -> np.ndarray:
    """p(class of the text | variant) for every variant."""
    device = next(model.parameters()).device
    ids = inputs["input_ids"].cpu().numpy()
    types = None if inputs.get("token_type_ids") is None else inputs["token_type_ids"].cpu().numpy()
    if types is not None:
        types = np.broadcast_to(types, ids.shape)
    filler = getattr(model.config, "pad_token_id", None) or 0
    kept = [real[text] & ~gone if removal == "delete" else real[text] for text, gone in removed]
    lengths = [int(keep.sum()) for keep in kept]
    several = kind_of(model) == "labels"
    classes: np.ndarray | None = None
    found = np.full(len(removed), np.nan)
    # the whole texts first: what they are answered decides the class
    rest = sorted(set(range(len(removed))) - set(whole))
    with torch.no_grad(), returning_tuples(model):
        for part in (whole, rest):
            rows: list[np.ndarray] = [np.empty(0)] * len(part)
            for batch in by_length(
                [lengths[k] for k in part], batch_tokens, Encoder.of(model).family.padding_invariant
            ):
                longest = max(lengths[part[k]] for k in batch)
                columns = {
                    "input_ids": np.full((len(batch), longest), filler, np.int64),
                    "attention_mask": np.zeros((len(batch), longest), np.int64),
                }
                if types is not None:
                    columns["token_type_ids"] = np.zeros((len(batch), longest), np.int64)
                for row, k in enumerate(batch):
                    text, gone = removed[part[k]]
                    keep, length = kept[part[k]], lengths[part[k]]
                    changed = np.where(gone, mask_token_id, ids[text]) if removal == "mask" else ids[text]
                    columns["input_ids"][row, :length] = changed[keep]
                    columns["attention_mask"][row, :length] = 1
                    if types is not None:
                        columns["token_type_ids"][row, :length] = types[text][keep]
                tensors = {name: torch.from_numpy(column).to(device) for name, column in columns.items()}
                logits = logits_of(model, model(**by_name(model, tensors)))
                if logits is None or logits.ndim != 2:
                    raise ValueError(f"{type(model).__name__} has no class logits: give a model that classifies texts")
                for k, row in zip(batch, logits.double().cpu().numpy(), strict=True):
                    rows[k] = row
                if advance is not None:
                    advance(len(batch))
            if not len(part):
                continue
            answers = torch.from_numpy(np.stack(rows))
            if not bool(torch.isfinite(answers).all()):
                raise FloatingPointError("the model's logits are not finite: its weights hold NaN or infinity")
            shares = (answers.sigmoid() if several else answers.softmax(-1)).numpy()
            if classes is None:
                classes = classes_of(label, answers).numpy()
            found[part] = shares[np.arange(len(part)), classes[[removed[k][0] for k in part]]]
    return found
