"""Class scores in results: words and passages sum their pieces, JSON and data frames hold them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from render_cases import attribution


def explained(text: str = "A charming film. It drags!", pair: str | None = None, **options):
    a = attribution(text, pair, **options)
    scores = np.random.default_rng(1).normal(size=len(a))
    logit = float(scores.sum()) + 0.25
    return replace(a, class_scores=scores, explained_label="positive", logit=logit, remainder=0.25, reference="zero")


@pytest.mark.parametrize("pair", [None, "Its pair. And more."])
@pytest.mark.parametrize("positions", [None, 2])
def test_words_and_passages_sum_their_pieces(pair, positions):
    a = explained(pair=pair, positions=positions, position="cls" if positions is None else [0, 1])
    words = a.words()
    assert sum(word.class_score for word in words) + a.remainder == pytest.approx(a.logit)
    for word in words:
        assert word.class_score == pytest.approx(a.class_scores[slice(*word.tokens)].sum())
    for passages in (a.sentences(), a.paragraphs()):
        within = sum(word.class_score for word in words if not word.special)
        assert sum(passage.class_score for passage in passages) == pytest.approx(within)
    first = a.sentences()[0]
    inside = [word.class_score for word in words if word.segment == 0 and word.end <= first.end]
    assert first.class_score == pytest.approx(sum(inside))


def test_json_holds_them():
    a = explained()
    told = json.loads(a.to_json())
    assert told["class_scores"] == a.class_scores.tolist()
    assert (told["explained_label"], told["logit"]) == ("positive", a.logit)
    assert (told["remainder"], told["reference"]) == (0.25, "zero")
    assert [word["class_score"] for word in told["words"]] == [word.class_score for word in a.words()]
    assert [one["class_score"] for one in told["sentences"]] == [one.class_score for one in a.sentences()]


def test_a_data_frame_holds_them():
    a = explained(positions=2, position=[0, 1])
    frame = a.to_pandas()
    assert list(frame)[:4] == ["position", "token", "score", "class_score"]
    for _, rows in frame.groupby("position"):
        np.testing.assert_array_equal(rows.class_score.to_numpy(), a.class_scores)


def test_without_a_label_they_are_absent():
    a = attribution("A charming film. It drags!")
    assert [a.class_scores, a.explained_label, a.logit, a.remainder, a.reference] == [None] * 5
    assert {word.class_score for word in a.words()} == {one.class_score for one in a.sentences()} == {None}
    told = json.loads(a.to_json())
    assert {told[name] for name in ("class_scores", "explained_label", "logit", "remainder", "reference")} == {None}
    assert {word["class_score"] for word in told["words"]} == {None}
    assert "class_score" not in a.to_pandas()
