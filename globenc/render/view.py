"""One row of scores for every rendering: its position in words, its words, the scale of its colours."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..text_spans import Word
from .protocols import TextResult
from .token_labels import token_labels

MOST_TOKENS = 64  # more columns than this are no longer readable in a heat map


@dataclass(frozen=True)
class View:
    """One row of scores of an attribution.

    Attributes:
        position: whose scores they are, in words: "[CLS]", "bleak (token 13)".
        words: in order of the text, special tokens included; each score is a float.
        scores: [n], of the tokens.
        layer_scores: [layers, n], or None.
        position_token: the position itself, where it is one token.
    """

    position: str
    words: list[Word]
    scores: np.ndarray
    layer_scores: np.ndarray | None
    position_token: int | None = None

    def ranked(self) -> list[Word]:
        """The words of the text, highest score first."""
        return sorted((word for word in self.words if not word.special), key=lambda word: -word.score)

    def full_scale(self) -> float:
        """The score that is drawn in full colour: that of the highest word but special tokens and the position itself.

        They may have nearly everything, so that no word could be told from another.
        """
        return self._full_scale

    @functools.cached_property
    def _full_scale(self) -> float:
        words = [word for word in self.words if not word.special]
        others = [word.score for word in words if not self._holds_position(word)]
        return full_scale(others if any(others) else [word.score for word in words])

    def token_scale(self) -> float:
        """The same for single tokens."""
        words = [word for word in self.words if not word.special]
        scores = {k: float(self.scores[k]) for word in words for k in range(*word.tokens)}
        others = [score for k, score in scores.items() if k != self.position_token]
        return full_scale(others if any(others) else list(scores.values()))

    def aside(self) -> str:
        """What to add to "the highest word" for a reader."""
        shown = any(self._holds_position(word) and not word.special for word in self.words)
        return " besides the position" if shown else ""

    def _holds_position(self, word: Word) -> bool:
        return self.position_token is not None and word.tokens[0] <= self.position_token < word.tokens[1]

    def percent(self, share: float) -> str:
        """A share for the eye: 12.3%, or 0.42% where the words have little each, as in a long text."""
        scale = self.full_scale()
        if scale < 1e-7:
            return f"{share:.1%}" if share >= 5e-4 or not share else f"{100 * share:.1e}%"
        digits = 1 if scale >= 0.05 else max(2, -1 - math.floor(math.log10(scale)))
        return f"{share:.{digits}%}"

    def special_share(self) -> float:
        """What went to special tokens; the words have the rest of 1."""
        return float(sum(word.score for word in self.words if word.special))


def full_scale(scores: Sequence[float] | np.ndarray) -> float:
    """The highest of some scores as a divisor: 1 where there is none above zero."""
    return float(max(scores, default=0.0)) or 1.0


def heat_scale(attribution: TextResult) -> float:
    """The share that is drawn in full colour where several rows share a scale: the highest that a token of the text
    has in another token. Special tokens, and what a token keeps for itself, can lie above it."""
    scores = np.atleast_2d(attribution.scores).copy()
    positions = _positions(attribution)
    if positions is not None:
        scores[np.arange(len(scores)), positions] = 0
    return full_scale(scores[:, ~special_tokens(attribution)].ravel())


def views(attribution: TextResult) -> list[View]:
    """One view a position; one only, the mean over all tokens, for position "all"."""
    words, scores, layers = attribution.words(), attribution.scores, attribution.layer_scores
    positions = _positions(attribution)
    if scores.ndim == 1:
        return [
            View(position_names(attribution)[0], words, scores, layers, None if positions is None else positions[0])
        ]
    if is_whole(attribution):
        averaged = [replace(word, score=float(word.score.mean())) for word in words]
        return [View("all tokens on average", averaged, scores.mean(0), None if layers is None else layers.mean(1))]
    return [
        View(
            name,
            [replace(word, score=float(word.score[k])) for word in words],
            scores[k],
            None if layers is None else layers[:, k],
            None if positions is None else positions[k],
        )
        for k, name in enumerate(position_names(attribution))
    ]


def is_whole(attribution: TextResult) -> bool:
    """Whether every token was a position, so that the scores are a square matrix."""
    return isinstance(attribution.position, str) and attribution.position == "all"


def position_names(attribution: TextResult) -> list[str]:
    """What was asked for in words, one for each row of the scores."""
    position, labels = attribution.position, token_labels(attribution)
    if isinstance(position, str):
        named = {"cls": labels[:1], "mean": ["the mean of all tokens"], "all": labels}
        return named[position]
    rows = 1 if attribution.scores.ndim == 1 else len(attribution.scores)
    positions = _positions(attribution)
    if positions is not None:
        return [f"{labels[p]} (token {p})" for p in positions]
    return ["the weighted tokens"] if rows == 1 else [f"weights {k}" for k in range(rows)]


def _positions(attribution: TextResult) -> list[int] | None:
    """The token that each row of scores is for; None where a position is not one token."""
    position, n = attribution.position, len(attribution.tokens)
    if isinstance(position, str):
        return {"cls": [0], "all": list(range(n))}.get(position)
    positions = [position] if isinstance(position, int) else position
    return [p % n for p in positions] if all(isinstance(position, int) for position in positions) else None


def shown_tokens(attribution: TextResult, scores: np.ndarray) -> np.ndarray:
    """The tokens that a heat map has room for: all, or the MOST_TOKENS highest ones; in order of the text."""
    if len(attribution.tokens) <= MOST_TOKENS:
        return np.arange(len(attribution.tokens))
    return np.sort(np.argsort(-scores, kind="stable")[:MOST_TOKENS])


def special_tokens(attribution: TextResult) -> np.ndarray:
    """[n], True at special tokens."""
    return np.array([segment is None for segment in attribution.segments])
