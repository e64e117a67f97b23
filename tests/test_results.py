"""What results have in common: a length, pairs of token and score, data frames, and a base below both."""

from __future__ import annotations

import builtins
import json

import numpy as np
import pytest
from helpers import tiny_vision

import globenc

TEXT = "Unflinchingly bleak."


class Pixels:
    """An image processor that gives the same pixels whatever the image."""

    do_normalize, do_rescale = False, True

    def __call__(self, image, return_tensors):
        import torch

        return {"pixel_values": torch.linspace(0, 1, 3 * 12 * 12).reshape(1, 3, 12, 12)}


@pytest.fixture(scope="module")
def image() -> globenc.ImageAttribution:
    explainer = globenc.GlobEnc(tiny_vision("vit"), Pixels())
    return explainer(np.zeros((12, 12, 3), np.uint8))


def test_length_and_pairs(explainer, image):
    for a in (explainer(TEXT), image):
        assert len(a) == len(a.tokens) == len(a.scores)
        assert list(a) == list(zip(a.tokens, a.scores.tolist(), strict=True))
    several = explainer(TEXT, position=[0, -1])
    for k, (token, score) in enumerate(several):
        assert token == several.tokens[k]
        np.testing.assert_array_equal(score, several.scores[:, k])


def test_a_text_as_a_data_frame(explainer):
    a = explainer(TEXT, text_pair="A film")
    frame = a.to_pandas()
    assert list(frame) == ["position", "token", "score", "class_score", "word", "word_id", "segment", "start", "end"]
    assert frame.token.tolist() == a.tokens
    np.testing.assert_array_equal(frame.score.to_numpy(), a.scores)
    np.testing.assert_array_equal(frame.class_score.to_numpy(), a.class_scores)
    assert frame.score.dtype == a.scores.dtype
    special = frame.segment.isna()
    assert special.tolist() == [segment is None for segment in a.segments]
    assert frame.start.isna().equals(special)
    words = [word for word in a.words() if not word.special]
    assert frame[~special].groupby(["segment", "word_id"]).score.sum().tolist() == pytest.approx(
        [w.score for w in words]
    )
    for text, start, end, segment, word in frame[~special][
        ["token", "start", "end", "segment", "word"]
    ].values.tolist():
        assert (a.text, a.text_pair)[segment][start:end].lower() == text.removeprefix("##")
        assert text.removeprefix("##") in word.lower()


def test_several_positions_as_a_data_frame(explainer):
    a = explainer(TEXT, position=[0, 1, -1])
    frame = a.to_pandas()
    assert len(frame) == 3 * len(a)
    assert frame.position.tolist() == [k for k in range(3) for _ in range(len(a))]
    for k, rows in frame.groupby("position"):
        assert rows.token.tolist() == a.tokens
        np.testing.assert_array_equal(rows.score.to_numpy(), a.scores[k])


def test_an_image_as_a_data_frame(image):
    frame = image.to_pandas()
    assert list(frame) == ["position", "token", "score", "row", "column"]
    patches = frame[frame.row.notna()]
    assert [f"{r},{c}" for r, c in zip(patches.row, patches.column, strict=True)] == patches.token.tolist()
    np.testing.assert_array_equal(patches.score.to_numpy().reshape(image.grid), image.patches())


def test_without_pandas(explainer, monkeypatch):
    whole = builtins.__import__

    def missing(name, *arguments, **options):
        if name == "pandas":
            raise ImportError("No module named 'pandas'")
        return whole(name, *arguments, **options)

    a = explainer(TEXT)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="to_pandas needs pandas, which is not installed"):
        a.to_pandas()


def test_both_say_the_same_of_how_scores_came_about(explainer, image):
    text, patches = explainer(TEXT).to_dict(), image.to_dict()
    assert {"tokens", "scores", "log2_scale", "method", "position", "model", "label", "labels"} <= {*text} & {*patches}
    assert json.loads(image.to_json()) == patches
