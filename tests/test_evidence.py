"""Class scores in words: sums that are right as printed, digits that tell, questions that say what was asked."""

from __future__ import annotations

import re
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest
from render_cases import attribution, printed

from globenc.render.evidence import Evidence, text_evidence


def explained(scores: list[float], **fields: object) -> Evidence:
    """Of a text of as many words as there are scores but two, between [CLS] and [SEP]."""
    a = attribution(" ".join("w" * (len(scores) - 2)), class_scores=scores)
    found = text_evidence(replace(a, **fields))
    assert found is not None
    return found


def sum_as_printed(equation: str) -> tuple[Decimal, Decimal]:
    """Both sides of an equation as it stands."""
    left, right = equation.replace(",", "").split(" = ")
    total = Decimal(0)
    for sign, digits in re.findall(r"(^|[+-] )[a-z][a-z ]*(-?[\d.]+)", right):
        total += Decimal(digits) * (-1 if sign == "- " else 1)
    return Decimal(left.split()[-1]), total


def test_nothing_to_say_without_class_scores():
    assert text_evidence(attribution()) is None


def test_the_equation_counts_special_tokens_among_the_words():
    found = explained([0.5, 2.0, -1.5, 0.25])
    assert found.equation() == "logit 1.75 = words for 2.75 - words against 1.50 + rest 0.50"
    assert explained([0.5, 2.0, -1.5, 0.25], remainder=-0.5, logit=0.75).equation().endswith("against 1.50 - rest 0.50")


@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.07, 1.0, 30.0, 4e3, 2e6])
def test_a_printed_sum_is_never_false(size):
    random = np.random.default_rng(0)
    for _ in range(200):
        scores, rest = (random.normal(size=6) * size).tolist(), float(random.normal() * size)
        found = explained(scores, remainder=rest, logit=sum(scores) + rest)
        left, right = sum_as_printed(found.equation())
        assert left == right, found.equation()
        unit = 10.0**-found.decimals
        _, terms = found.terms()
        true = sum(s for s in scores if s > 0), sum(-s for s in scores if s < 0), abs(rest)
        for term, value in zip(terms, true, strict=True):
            assert abs(float(term.digits.replace(",", "")) - value) < unit * (1 + 1e-6)


def test_what_half_precision_leaves_open_is_a_term():
    found = explained([0.0, 2.0, -1.0, 0.0], remainder=0.5, logit=1.54)
    assert found.equation() == "logit 1.54 = words for 2.00 - words against 1.00 + rest 0.50 + rounding 0.04"
    assert sum_as_printed(found.equation()) == (Decimal("1.54"), Decimal("1.54"))


@pytest.mark.parametrize(
    ("largest", "shown"),
    [(1.5834, "+1.58"), (0.7, "+0.70"), (0.0123, "+0.012"), (12.34, "+12.3"), (1234.5, "+1,234"), (1e-5, "+0.000010")],
)
def test_as_many_digits_as_tell_something(largest, shown):
    found = explained([0.0, largest, 0.0], remainder=0.0, logit=largest)
    assert found.signed(largest) == shown
    assert found.signed(-largest) == shown.replace("+", "-")


def test_what_rounds_to_zero_has_no_sign():
    found = explained([0.0, 1.0, 0.0])
    assert [found.signed(score) for score in (0.001, -0.001, 0.0)] == ["0.00"] * 3


def test_all_zero_is_drawn():
    found = explained([0.0, 0.0, 0.0], remainder=0.0, logit=0.0)
    assert found.scale == 1.0
    assert found.equation() == "logit 0.00 = words for 0.00 - words against 0.00 + rest 0.00"


def test_strongest_words_come_first_whichever_way_they_speak():
    found = explained([9.0, 1.0, -2.0, 0.5, -9.0])
    assert [word.score for word in found.ranked()] == [-2.0, 1.0, 0.5]
    assert [word.score for word in found.special()] == [9.0, -9.0]
    assert found.scale == 2.0


def test_questions_say_what_was_asked():
    a = attribution("one", class_scores=[0.0, 1.0, 0.0])

    def question(**fields: object) -> str:
        found = text_evidence(replace(a, **fields))
        assert found is not None
        return found.question

    assert question() == 'Which words speak for "positive", and which against it?'
    assert question(explained_label="negative").endswith('against it? (The model says "positive".)')
    number = {"value": 3.0, "label": None, "explained_label": "value"}
    assert question(**number) == "Which words raise the value, and which lower it?"
    token = {"label": None, "probability": None, "explained_label": "B-PER", "position": 1}
    assert question(**token) == 'Which words speak for "B-PER" at token 1, and which against it?'
    several = {"labels": [("positive", 0.9), ("long", 0.8)], "explained_label": "long"}
    assert question(**several) == 'Which words speak for "long", and which against it?'
    assert "\x1b" not in question(explained_label="a\x1b[31mb")


def test_a_value_is_called_so():
    a = replace(attribution("one", class_scores=[0.0, 1.0, 0.0]), value=1.5, label=None, explained_label="value")
    out = printed(a, color_system=None)
    assert "value 1.50 = words for 1.00 - words against 0.00 + rest 0.50" in out
    assert "logit" not in out
