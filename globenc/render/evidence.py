"""Class scores for every rendering: what was asked, the sum that answers it, signs and digits, the scale of colours."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from ..printing import printable
from ..text_spans import Word
from .protocols import ImageResult, Result, TextResult
from .view import View, full_scale

MINUS = "\N{MINUS SIGN}"  # where a font sets it as wide as the plus; a terminal has "-", which other programs read
Kind = Literal["for", "against", "rest", "rounding"]

UNITS = {"word": "words", "patch": "patches"}

_REFERENCES = {
    "zero": "what the model, held as it is for this input, gives for an empty one",
    "model": "the share of all biases and constants",
    "origin": "the share of all biases",
}


class Term(NamedTuple):
    """A term of the sum that is the logit: its sign, "+" or "-", its name, and its digits without a sign."""

    sign: str
    name: str
    digits: str
    kind: Kind


@dataclass(frozen=True)
class Evidence:
    """The class scores of a result.

    Attributes:
        quantity: "logit", or "value" of a model that predicts a number.
        question: what was asked, in words.
        logit, remainder: as in `globenc.Attribution`.
        scores: [n], of the tokens.
        words: of a text, in its order, special tokens included; the `score` of each is its class score. Of an image
            none.
        scale: the size of score that is drawn in full colour: that of the strongest word of the text, or patch.
        unit: "word" or "patch".
    """

    quantity: Literal["logit", "value"]
    question: str
    logit: float
    remainder: float
    reference: str
    scores: np.ndarray
    words: list[Word]
    scale: float
    unit: Literal["word", "patch"]

    def view(self) -> View:
        """The class scores as one row of scores, of which percentages make no sense."""
        return View("", self.words, self.scores, None)

    def ranked(self) -> list[Word]:
        """The words of the text, strongest first, whichever way they speak."""
        return sorted((word for word in self.words if not word.special), key=lambda word: -abs(word.score))

    def special(self) -> list[Word]:
        """The special tokens."""
        return [word for word in self.words if word.special]

    @functools.cached_property
    def token_scale(self) -> float:
        """The same for single tokens of a text."""
        tokens = [k for word in self.words if not word.special for k in range(*word.tokens)]
        return full_scale(np.abs(self.scores[tokens]))

    @functools.cached_property
    def decimals(self) -> int:
        """Digits behind the point of every score and sum: two, fewer for large scores, more for small ones."""
        size = max(self.scale, 1e-4 * abs(self.logit), 1e-300)
        exponent = math.floor(math.log10(size))
        return min(max(2 - exponent, 0), 2) if size >= 0.1 else min(1 - exponent, 12)

    def signed(self, score: float, minus: str = "-") -> str:
        """A score with its sign: "+1.58", "-0.70"; one that rounds to zero has none."""
        digits = f"{abs(score):,.{self.decimals}f}"
        if not digits.strip("0.,"):
            return digits
        return f"{minus if score < 0 else '+'}{digits}"

    def terms(self) -> tuple[str, list[Term]]:
        """The logit's digits, with its sign, and the terms that sum to it digit by digit, as printed.

        Each printed number is the true one rounded up or down; which way is chosen so that the sum is right. What the
        model's rounding leaves open, in half precision, is a term.
        """
        unit = 10.0**-self.decimals
        scores = [word.score for word in self.words] if self.words else self.scores.tolist()
        speaks_for, against = sum(s for s in scores if s > 0), sum(s for s in scores if s < 0)
        named: list[tuple[Kind, str, float]] = [
            ("for", f"{UNITS[self.unit]} for", speaks_for),
            ("against", f"{UNITS[self.unit]} against", against),
            ("rest", "rest", self.remainder),
        ]
        gap = self.logit - speaks_for - against - self.remainder
        if abs(gap) >= unit / 2:
            named.append(("rounding", "rounding", gap))
        total = round(self.logit / unit)
        counts = _rounded_to([value / unit for _, _, value in named], total)
        terms = []
        for (kind, name, _), count in zip(named, counts, strict=True):
            sign = "-" if count < 0 or kind == "against" else "+"
            terms.append(Term(sign, name, self._digits(abs(count)), kind))
        return f"{'-' if total < 0 else ''}{self._digits(abs(total))}", terms

    def equation(self) -> str:
        """The sum in words: "logit 2.07 = words for 2.40 - words against 1.08 + rest 0.75"."""
        logit, terms = self.terms()
        shown = " ".join(f"{term.sign} {term.name} {term.digits}" for term in terms)
        return f"{self.quantity} {logit} = {shown.removeprefix('+ ')}"

    def meaning(self) -> str:
        """What a class score says, in two sentences."""
        return (
            f"A class score is what a {self.unit} adds to the {self.quantity}, + for and - against; special tokens "
            f"are counted among the {UNITS[self.unit]}. The rest is {_REFERENCES[self.reference]} (reference "
            f"{self.reference})."
        )

    def _digits(self, count: int) -> str:
        """So many of the smallest printed unit."""
        return f"{count / 10**self.decimals:,.{self.decimals}f}"


def text_evidence(attribution: TextResult) -> Evidence | None:
    """The class scores of a text; None where no label is explained."""
    if attribution.class_scores is None:
        return None
    words = [replace(word, score=float(word.class_score or 0.0)) for word in attribution.words()]
    scale = full_scale([abs(word.score) for word in words if not word.special])
    return _evidence(attribution, attribution.class_scores, words, scale, "word")


def image_evidence(attribution: ImageResult) -> Evidence | None:
    """The class scores of an image; None where no label is explained."""
    if attribution.class_scores is None:
        return None
    scale = full_scale(np.abs(class_patches(attribution, attribution.class_scores)).ravel())
    return _evidence(attribution, attribution.class_scores, [], scale, "patch")


def class_patches(attribution: ImageResult, class_scores: np.ndarray) -> np.ndarray:
    """The patches' class scores, [rows, columns]; without the special tokens'."""
    rows, columns = attribution.grid
    return class_scores[len(class_scores) - rows * columns :].reshape(rows, columns)


def _evidence(
    attribution: Result, scores: np.ndarray, words: list[Word], scale: float, unit: Literal["word", "patch"]
) -> Evidence:
    logit, remainder = attribution.logit, attribution.remainder
    assert logit is not None  # both come with class scores
    assert remainder is not None
    return Evidence(
        quantity="value" if isinstance(attribution.value, float) else "logit",
        question=_question(attribution, UNITS[unit]),
        logit=logit,
        remainder=remainder,
        reference=attribution.reference or "zero",
        scores=scores,
        words=words,
        scale=scale,
        unit=unit,
    )


def _question(attribution: Result, units: str) -> str:
    """What was asked, and which label the model predicts where another one was asked for."""
    if isinstance(attribution.value, float):
        return f"Which {units} raise the value, and which lower it?"
    label = attribution.explained_label
    named = "the answer" if label is None else f'"{printable(label)}"'
    predicted = attribution.label
    if predicted is None and isinstance(attribution.position, int):
        named += f" at token {attribution.position}"
    asked = f"Which {units} speak for {named}, and which against it?"
    if predicted is None or label is None or label == predicted or attribution.labels is not None:
        return asked
    return f'{asked} (The model says "{printable(predicted)}".)'


def _rounded_to(values: list[float], total: int) -> list[int]:
    """Whole numbers that sum to `total`, each next to its value; `total` is the rounded sum of the values."""
    counts = [math.floor(value) for value in values]
    up = sorted(range(len(values)), key=lambda k: counts[k] - values[k])[: total - sum(counts)]
    return [count + (k in up) for k, count in enumerate(counts)]
