"""Texts with words that people marked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..extraction.sources import Input

MARKS_COLUMNS = ("rationale", "rationale_mean", "rationales", "marks")


@dataclass(frozen=True)
class Rationale:
    """A text with the marks of its words; `words` are their characters (start, end)."""

    text: str
    words: list[tuple[int, int]]
    marks: list[float]


def read_rationales(sources: list[Input], tokens_column: str, marks_column: str | None) -> tuple[list[Rationale], int]:
    """Texts with marked words, and how many rows have no marks that can be used.

    Raises:
        OSError, ValueError: the file cannot be read, lacks a column, or has no usable row.
    """
    source, *others = sources
    if others:
        raise ValueError("rationales must be one file")
    name = marks_column
    if name is None:
        for name in MARKS_COLUMNS:
            try:
                source.check([tokens_column, name])
            except ValueError as error:
                if f"no column {tokens_column!r}" in str(error):
                    raise
                continue
            break
        else:
            raise ValueError(
                f"rationales {source.name!r} have none of the columns {', '.join(MARKS_COLUMNS)}: name the one with "
                "the marks with marks_column"
            )
    rationales, left_out, first = [], 0, ""
    for number, raw in enumerate(source.rows([tokens_column, name])):
        try:
            rationales.append(_rationale(raw.values or {}, raw.reason, tokens_column, name))
        except (ValueError, TypeError) as error:
            left_out += 1
            first = first or f"row {number}: {error}"
    if not rationales:
        raise ValueError(f"rationales {source.name!r} have no usable row; {first or 'they are empty'}")
    return rationales, left_out


def _rationale(values: Mapping[str, Any], reason: str | None, tokens_column: str, marks_column: str) -> Rationale:
    if reason is not None:
        raise ValueError(reason)
    tokens, marks = values.get(tokens_column), values.get(marks_column)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(f"{tokens_column} must be a list of words")
    if not isinstance(marks, list) or not marks:
        raise ValueError(f"{marks_column} must be a list of marks, one for each word")
    if isinstance(marks[0], list):  # annotators
        marks = np.mean(np.array(marks, dtype=np.float64), axis=0).tolist()
    if len(marks) != len(tokens):
        raise ValueError(f"{marks_column} has {len(marks)} marks for {len(tokens)} words")
    numbers = [float(mark) for mark in marks]
    if not all(0 <= mark <= 1 for mark in numbers):
        raise ValueError(f"{marks_column} must be numbers from 0 to 1")
    words, start = [], 0
    for token in tokens:
        words.append((start, start + len(token)))
        start += len(token) + 1
    return Rationale(" ".join(tokens), words, numbers)
