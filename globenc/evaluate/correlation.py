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
        values: one for each text that has one, in order.
        mean: their mean; NaN if there is none.
        std: their population standard deviation, as the paper gives it.
        undefined: how many texts have none: one token, or a constant row on either side.
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
        Correlation over the texts; those without one are counted and left out, never NaN in a mean.

    Raises:
        ValueError: rows that do not match, or hold NaN or infinity.

    Example:
        >>> found = spearman([[1, 2, 3], [3, 1, 2]], [[10, 20, 40], [5, 5, 5]])
        >>> round(found.mean, 6), found.undefined
        (1.0, 1)
    """
    if len(scores) != len(references) or (mask is not None and len(mask) != len(scores)):
        raise ValueError(
            f"scores, references and mask must have a row for each text, got {len(scores)}, {len(references)}"
        )
    values, undefined = [], 0
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
        if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
            undefined += 1
            continue
        values.append(float(np.corrcoef(stats.rankdata(first), stats.rankdata(second))[0, 1]))
    found = np.clip(np.array(values), -1.0, 1.0)
    mean, std = (float(found.mean()), float(found.std())) if len(found) else (float("nan"), float("nan"))
    return Correlation(found, mean, std, undefined)
