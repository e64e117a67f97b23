"""Plausibility: do an attribution's high tokens agree with words that people marked? (ERASER, DeYoung et al. 2020)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Plausibility:
    """Agreement with marks on one text; NaN where no token is marked, or every one.

    Attributes:
        auprc: area under the precision-recall curve of the tokens' scores (average precision, ties together).
        f1: token F1 of the k highest tokens, k the number of marked ones.
        iou: their intersection over union with the marked ones.
    """

    auprc: float
    f1: float
    iou: float


def align(
    marks: Sequence[float], words: Sequence[tuple[int, int]], tokens: Sequence[tuple[int, int] | None]
) -> np.ndarray:
    """Marks on words as marks on word pieces, by character offsets.

    Args:
        marks: one for each word, 0 to 1.
        words: characters (start, end) of the words.
        tokens: characters of the tokens; None for special ones.

    Returns:
        [tokens], the highest mark of the words a token shares characters with; NaN at special tokens.

    Raises:
        ValueError: another number of marks than words, or a mark outside 0..1.
    """
    if len(marks) != len(words):
        raise ValueError(f"marks must be one for each of the {len(words)} words, got {len(marks)}")
    given = np.asarray(marks, dtype=np.float64)
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError("marks must be numbers from 0 to 1")
    token_marks = np.full(len(tokens), np.nan)
    for k, span in enumerate(tokens):
        if span is not None:
            shared = [
                mark for mark, (start, end) in zip(given, words, strict=True) if start < span[1] and span[0] < end
            ]
            token_marks[k] = max(shared, default=0.0)
    return token_marks


def plausibility(scores: Any, marks: Any, threshold: float = 0.5) -> Plausibility:
    """How well a text's scores find the marked tokens.

    Args:
        scores: [n].
        marks: [n], 0 to 1, NaN where a token does not count (special ones); marked is `threshold` or more.
        threshold: share of annotators from which on a token is marked.

    Returns:
        Plausibility; all NaN where no token is marked, or every one.

    Raises:
        ValueError: rows that do not match, or scores that are not finite.

    Example:
        >>> plausibility([0.1, 0.7, 0.2], [0, 1, 0])
        Plausibility(auprc=1.0, f1=1.0, iou=1.0)
    """
    values, wanted = np.asarray(scores, dtype=np.float64), np.asarray(marks, dtype=np.float64)
    if values.shape != wanted.shape or values.ndim != 1:
        raise ValueError(
            f"scores and marks must be rows of one length, got {list(values.shape)} and {list(wanted.shape)}"
        )
    counts = ~np.isnan(wanted)
    values, marked = values[counts], wanted[counts] >= threshold
    if not bool(np.isfinite(values).all()):
        raise ValueError("scores hold NaN or infinity")
    total = int(marked.sum())
    if total == 0 or total == len(marked):
        return Plausibility(math.nan, math.nan, math.nan)
    order = np.argsort(-values, kind="stable")
    ranked, hits = values[order], marked[order].cumsum()
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # tokens of one score come together
    precision, recall = hits[ends] / (ends + 1), hits[ends] / total
    auprc = float((np.diff(recall, prepend=0.0) * precision).sum())
    inside = int(hits[total - 1])  # of the k highest, k marked ones: precision, recall and F1 are one number
    return Plausibility(auprc, inside / total, inside / (2 * total - inside))
