"""Rank correlation of attributions, text by text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Correlation:
    """Spearman correlations of many texts.

    Attributes:
        values: [texts]; NaN for a text of one token, or with a constant row on either side.
        mean: of the values that are there; NaN if there is none.
        std: likewise, the population standard deviation, as the paper gives it.
        undefined: how many texts have no value.
    """

    values: np.ndarray
    mean: float
    std: float
    undefined: int


def spearman(
    scores: Sequence[Any] | np.ndarray,
    references: Sequence[Any] | np.ndarray,
    mask: Sequence[Any] | np.ndarray | None = None,
) -> Correlation:
    """Spearman's rank correlation of two attributions of the same texts; ties get their mean rank.

    Args:
        scores, references: a row of numbers for each text; rows may differ in length.
        mask: True at the tokens that count, rows as above; None counts all.

    Returns:
        Correlation over the texts; those without one are NaN, counted, and in no mean.

    Raises:
        ValueError: rows that do not match, or hold NaN or infinity.

    Example:
        >>> correlation = spearman([[1, 2, 3], [3, 1, 2]], [[10, 20, 40], [5, 5, 5]])
        >>> round(correlation.mean, 6), correlation.undefined
        (1.0, 1)
    """
    if len(scores) != len(references) or (mask is not None and len(mask) != len(scores)):
        raise ValueError(
            f"scores, references and mask must have a row for each text, got {len(scores)}, {len(references)}"
        )
    values = np.full(len(scores), np.nan)
    for k in range(len(scores)):
        first, second = (np.asarray(rows[k], dtype=np.float64) for rows in (scores, references))
        if first.shape != second.shape or first.ndim != 1:
            raise ValueError(f"text {k}: rows must be of one length, got {list(first.shape)} and {list(second.shape)}")
        if mask is not None:
            chosen = np.asarray(mask[k], dtype=bool)
            if chosen.shape != first.shape:
                raise ValueError(f"text {k}: mask must have {len(first)} entries, got {list(chosen.shape)}")
            first, second = first[chosen], second[chosen]
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            raise ValueError(f"text {k}: scores hold NaN or infinity")
        values[k] = rank_correlations(first[None], second)[0]
    defined = values[~np.isnan(values)]
    mean, std = (float(defined.mean()), float(defined.std())) if len(defined) else (float("nan"), float("nan"))
    return Correlation(values, mean, std, len(values) - len(defined))


def rank_correlations(rows: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Spearman correlation of every row [R, n] with a reference [n]; NaN where one of the two has no order, [R]."""
    if len(reference) < 2:
        return np.full(len(rows), np.nan)
    ranks = stats.rankdata(np.vstack([rows, reference]), axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    lengths = np.sqrt((ranks**2).sum(1))
    both = lengths[:-1] * lengths[-1]
    return np.where(both > 0, np.clip(ranks[:-1] @ ranks[-1] / np.where(both > 0, both, 1.0), -1.0, 1.0), np.nan)
