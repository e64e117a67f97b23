"""Which number class scores explain: labels by number and name, tokens, spans, answers of questions."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_model, token_batch
from test_class_scores import MASK_TOKEN, assert_sums, classifier

import globenc

LENGTHS = (9, 1, 6)


def test_all_labels_are_each_label():
    model, inputs = classifier(), token_batch(LENGTHS)
    everything = globenc.class_scores(model, label="all", per_layer=True, **inputs)
    assert everything.scores.shape == (3, 3, 9)
    assert everything.labels.tolist() == [0, 1, 2]
    for label in range(3):
        one = globenc.class_scores(model, label=label, per_layer=True, **inputs)
        assert (everything.scores[:, label] - one.scores).abs().max() < 1e-12
        assert (everything.remainder[:, label] - one.remainder).abs().max() < 1e-12
        assert (everything.layer_scores[:, :, label] - one.layer_scores).abs().max() < 1e-12
        assert one.labels.tolist() == [label] * 3
        assert (one.layer_scores[0] == one.scores).all()


def test_labels_by_name_number_and_text():
    model, inputs = classifier(), token_batch((5, 5))
    model.config.id2label = {0: "negative", 1: "neutral", 2: "positive"}
    by_name = globenc.class_scores(model, label="positive", **inputs)
    assert by_name.label_names == ["positive", "positive"]
    for label in (2, "2", "Positive", [2, 2], ["positive", 2], torch.tensor([2, 2])):
        assert (globenc.class_scores(model, label=label, **inputs).scores == by_name.scores).all()
    mixed = globenc.class_scores(model, label=["negative", "neutral"], **inputs)
    assert mixed.label_names == ["negative", "neutral"]


@pytest.mark.parametrize(
    ("label", "kind", "says"),
    [
        ("happy", ValueError, r"label must be one of this model's \(0 negative, 1 neutral, 2 positive\), got 'happy'"),
        (3, ValueError, r"label must be in 0..2 \(0 negative"),
        (-1, ValueError, "label must be in 0..2"),
        (True, TypeError, "label must be"),
        (1.0, TypeError, "label must be"),
        ([0], ValueError, "label must be one for each text, 2 of them, got 1"),
        (torch.tensor([0.0, 1.0]), ValueError, r"label must be integers of shape \[batch\] = \[2\]"),
        (torch.tensor([0]), ValueError, r"label must be integers of shape"),
        (None, TypeError, "label must be"),
    ],
)
def test_labels_that_do_not_exist(label, kind, says):
    model = classifier()
    model.config.id2label = {0: "negative", 1: "neutral", 2: "positive"}
    with pytest.raises(kind, match=says):
        globenc.class_scores(model, label=label, **token_batch((5, 5)))


def test_regression_multilabel_and_one_output():
    inputs = token_batch(LENGTHS)
    for options in ({"num_labels": 1}, {"num_labels": 3, "problem_type": "multi_label_classification"}):
        out = globenc.class_scores(tiny_model("bert", head="SequenceClassification", **options), **inputs)
        assert_sums(out)


def test_tokens_and_spans():
    model, inputs = tiny_model("bert", head="TokenClassification", num_labels=4), token_batch((6, 6))
    with torch.no_grad():
        logits = model(**inputs).logits
    one = globenc.class_scores(model, label=1, position=-1, **inputs)
    assert (one.logits - logits[:, 5, 1]).abs().max() < 1e-12
    span = globenc.class_scores(model, label=1, position=[2, 3], **inputs)
    assert (span.logits - logits[:, 2:4, 1].mean(1)).abs().max() < 1e-12
    assert_sums(span)
    with pytest.raises(ValueError, match="position must say which token of BertForTokenClassification"):
        globenc.class_scores(model, **inputs)
    with pytest.raises(ValueError, match="position must be None for BertForSequenceClassification"):
        globenc.class_scores(classifier(), position=1, **inputs)


def test_the_mask_token_of_a_masked_language_model():
    model, inputs = tiny_model("bert", head="MaskedLM"), token_batch((6, 6))
    with pytest.raises(ValueError, match="position must say which token"):
        globenc.class_scores(model, **inputs)
    with pytest.raises(ValueError, match="text 0 of the batch has not exactly one mask token"):
        globenc.class_scores(model, mask_token_id=MASK_TOKEN, **inputs)
    inputs["input_ids"][0, 2] = inputs["input_ids"][1, 4] = MASK_TOKEN
    out = globenc.class_scores(model, mask_token_id=MASK_TOKEN, **inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    expected = torch.stack([logits[0, 2], logits[1, 4]])
    assert (out.logits - expected.max(-1).values).abs().max() < 1e-12
    assert out.labels.tolist() == expected.argmax(-1).tolist()
    assert out.label_names == [str(number) for number in out.labels.tolist()]
    with pytest.raises(ValueError, match="label must be the number of a token"):
        globenc.class_scores(model, label="good", mask_token_id=MASK_TOKEN, **inputs)


def test_answers_of_questions():
    model, inputs = tiny_model("bert", head="QuestionAnswering"), token_batch((9, 5))
    with torch.no_grad():
        output = model(**inputs)
    start, end = output.start_logits, output.end_logits
    for text, n in enumerate((9, 5)):
        best = max((start[text, i] + end[text, j], i, j) for i in range(n) for j in range(i, n))
        both = globenc.class_scores(model, **inputs)
        assert abs(both.logits[text] - best[0]) < 1e-12
        assert abs(globenc.class_scores(model, label="start", **inputs).logits[text] - start[text, best[1]]) < 1e-12
        assert abs(globenc.class_scores(model, label="end", **inputs).logits[text] - end[text, best[2]]) < 1e-12
    with pytest.raises(ValueError, match='"start" or "end"'):
        globenc.class_scores(model, label=0, **inputs)
