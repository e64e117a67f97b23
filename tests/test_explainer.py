"""Texts in, attributions out: what stands in the result, and one clear sentence for everything that cannot be."""

from __future__ import annotations

import doctest
import importlib
import json
import warnings

import numpy as np
import pytest
import torch
from helpers import METHODS, tiny_model

import globenc

TEXT = "A charming and often affecting journey."


def test_fields(explainer, classifier, wordpiece):
    a = explainer(TEXT)
    assert a.text == TEXT
    assert a.text_pair is None
    assert a.tokens == wordpiece.convert_ids_to_tokens(wordpiece(TEXT)["input_ids"])
    assert a.tokens[0] == "[CLS]"
    assert a.tokens[-1] == "[SEP]"
    assert a.scores.shape == (len(a.tokens),)
    assert a.scores.sum() == pytest.approx(1, rel=1e-12)
    assert (a.scores > 0).all()
    assert a.segments == [None] + [0] * (len(a.tokens) - 2) + [None]
    assert isinstance(a.log2_scale, float)
    assert (a.layer_scores, a.layer_log2_scale) == (None, None)
    assert (a.method, a.position, a.row_normalize, a.truncated) == ("N-Enc", "cls", False, 0)
    assert a.model == "BertForSequenceClassification"
    with torch.no_grad():
        expected = classifier(**wordpiece(TEXT, return_tensors="pt")).logits.softmax(-1)[0]
    assert a.label == ["bad", "good"][int(expected.argmax())]
    assert a.probability == pytest.approx(float(expected.max()), rel=1e-10)
    assert a.label in repr(a)


def test_scores_are_those_of_attribute(explainer, classifier, wordpiece):
    inputs = wordpiece(TEXT, return_tensors="pt")
    for method in METHODS:
        for position in ("cls", "mean", 3, [1, -1], "all"):
            out = globenc.attribute(classifier, method=method, position=position, per_layer=True, **inputs)
            a = explainer(TEXT, method=method, position=position, per_layer=True)
            np.testing.assert_array_equal(a.scores, out.scores[0].numpy())
            np.testing.assert_array_equal(a.log2_scale, out.log2_scale[0].numpy())
            np.testing.assert_array_equal(a.layer_scores, out.layer_scores[:, 0].numpy())
            np.testing.assert_array_equal(a.layer_log2_scale, out.layer_log2_scale[:, 0].numpy())
            assert (a.method, a.position) == (method, position)


def test_offsets_point_into_the_text(explainer):
    a = explainer(TEXT, text_pair="Unflinchingly  bleak!")
    assert {s for s in a.segments if s is not None} == {0, 1}
    for token, span, segment in zip(a.tokens, a.offsets, a.segments, strict=True):
        if segment is None:
            assert span is None
            assert token in ("[CLS]", "[SEP]")
        elif token != "[UNK]":
            source = (a.text, a.text_pair)[segment]
            assert source[span[0] : span[1]].lower() == token.removeprefix("##")


def test_words_merge_pieces(explainer):
    a = explainer(TEXT)
    words = a.words()
    assert [w.text for w in words] == ["[CLS]", "A", "charming", "and", "often", "affecting", "journey", ".", "[SEP]"]
    assert len(words) < len(a.tokens)  # some word is made of pieces
    assert [w.special for w in words] == [True] + [False] * 7 + [True]
    assert sum(w.score for w in words) == pytest.approx(1, rel=1e-12)
    position = 0
    for word in words:
        first, stop = word.tokens
        assert first == position
        position = stop
        assert word.score == pytest.approx(a.scores[first:stop].sum(), rel=1e-12)
        if not word.special:
            assert TEXT[word.start : word.end] == word.text
    assert position == len(a.tokens)


def test_words_of_several_positions(explainer):
    a = explainer(TEXT, position=[0, 2])
    words = a.words()
    assert all(w.score.shape == (2,) for w in words)
    np.testing.assert_allclose(np.sum([w.score for w in words], 0), 1, rtol=1e-12)


def test_words_of_a_pair_do_not_merge(explainer):
    a = explainer("bleak", text_pair="bleak")
    assert [(w.text, w.segment) for w in a.words()] == [
        ("[CLS]", None),
        ("bleak", 0),
        ("[SEP]", None),
        ("bleak", 1),
        ("[SEP]", None),
    ]


def test_byte_level_words(byte_bpe):
    model = tiny_model("roberta", head="SequenceClassification", vocab_size=330, max_position_embeddings=120)
    a = globenc.GlobEnc(model, byte_bpe)(TEXT, text_pair="très bleak")
    assert a.tokens[0] == "<s>"
    words = [w for w in a.words() if not w.special]
    assert [w.text for w in words] == [
        "A", "charming", "and", "often", "affecting", "journey", ".", "très", "bleak",
    ]  # fmt: skip
    for word in words:
        assert (a.text, a.text_pair)[word.segment][word.start : word.end] == word.text
    assert sum(w.score for w in a.words()) == pytest.approx(1, rel=1e-12)


def test_raw_scores(explainer, classifier, wordpiece):
    """The rollout's own numbers: a product of maps, row [CLS]."""
    maps = globenc.contribution_maps(classifier, **wordpiece(TEXT, return_tensors="pt"))[:, 0]
    product = maps[0]
    for local in maps[1:]:
        product = local @ product
    np.testing.assert_allclose(explainer(TEXT).raw_scores(), product[0].numpy(), rtol=1e-11)
    np.testing.assert_allclose(explainer(TEXT, position="all").raw_scores(), product.numpy(), rtol=1e-11)


def test_raw_scores_that_do_not_fit(explainer):
    from dataclasses import replace

    a = explainer(TEXT)
    assert np.isfinite(replace(a, log2_scale=1000.0).raw_scores()).all()
    with pytest.raises(OverflowError, match=r"2\*\*1500 do not fit into float64; use scores and log2_scale"):
        replace(a, log2_scale=1500.0).raw_scores()


@pytest.mark.parametrize("position", ["cls", [0, 1], "all", "weights"], ids=str)
def test_to_json(explainer, position):
    a = explainer(TEXT, text_pair="très bleak", per_layer=True)
    if position == "weights":
        position = torch.ones(len(a.tokens))
    a = explainer(TEXT, text_pair="très bleak", per_layer=True, position=position)
    read = json.loads(a.to_json())
    assert {"tokens", "scores", "words", "label", "probability", "method", "position", "model"} <= set(read)
    assert read["tokens"] == a.tokens
    assert read["text_pair"] == "très bleak"
    np.testing.assert_array_equal(read["scores"], a.scores)
    np.testing.assert_array_equal(read["layer_scores"], a.layer_scores)
    np.testing.assert_array_equal(read["log2_scale"], a.log2_scale)
    assert [w["text"] for w in read["words"]] == [w.text for w in a.words()]
    assert json.loads(a.to_json(indent=2)) == read
    assert read == json.loads(json.dumps(a.to_dict()))


# What the model answers


def answer(head="SequenceClassification", wordpiece=None, **config):
    model = tiny_model("bert", head=head, **config)
    return model, globenc.GlobEnc(model, wordpiece)(TEXT)


def test_multi_label_answer(wordpiece):
    model, a = answer(wordpiece=wordpiece, num_labels=3, problem_type="multi_label_classification")
    with torch.no_grad():
        expected = model(**wordpiece(TEXT, return_tensors="pt")).logits.sigmoid()[0]
    assert a.label == f"LABEL_{int(expected.argmax())}"
    assert a.probability == pytest.approx(float(expected.max()), rel=1e-10)


@pytest.mark.parametrize("config", [{"num_labels": 1}, {"num_labels": 3, "problem_type": "regression"}], ids=str)
def test_regression_has_no_label(wordpiece, config):
    _, a = answer(wordpiece=wordpiece, **config)
    assert (a.label, a.probability) == (None, None)
    assert json.loads(a.to_json())["label"] is None


@pytest.mark.parametrize(
    "head", ["Model", "TokenClassification", "QuestionAnswering", "MaskedLM", "NextSentencePrediction", "PreTraining"]
)
def test_other_heads_have_no_label(wordpiece, head):
    _, a = answer(head, wordpiece)
    assert (a.label, a.probability) == (None, None)
    assert a.scores.sum() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("family", ["roberta", "electra", "distilbert", "albert"])
def test_other_families_have_labels(wordpiece, family):
    """DistilBERT takes no token types, which a BERT tokenizer gives all the same."""
    model = tiny_model(family, head="SequenceClassification")
    a = globenc.GlobEnc(model, wordpiece)(TEXT)
    assert a.label in ("LABEL_0", "LABEL_1")


# Long texts


def test_long_text_is_cut_with_a_warning(explainer):
    text = " ".join(["bleak and charming"] * 40)
    with pytest.warns(UserWarning, match="tokens that fit") as caught:
        a = explainer(text)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    message = str(caught[0].message)
    assert "longer than the 48 tokens that fit" in message
    assert len(a.tokens) == 48
    full = len(explainer.tokenizer(text)["input_ids"])
    assert a.truncated == full - 48
    assert f"the text lost {a.truncated:,} of its {full:,} tokens" in message
    assert a.tokens[-1] == "[SEP]"
    assert a.scores.sum() == pytest.approx(1, rel=1e-12)
    assert json.loads(a.to_json())["truncated"] == a.truncated


def test_long_texts_of_a_list_are_named(explainer):
    with pytest.warns(UserWarning, match=r"text 1 lost 2 of its 7 tokens \(29%\)"):
        a, b, c = explainer(["a", "a a a a a", "a a a"], max_length=5)
    assert (a.truncated, b.truncated, c.truncated) == (0, 2, 0)
    with pytest.warns(UserWarning, match="text 4 lost .*; and 3 more$"):
        explainer(["a a a a"] * 8, max_length=3)


def test_max_length(explainer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(explainer("a a a", max_length=5).tokens) == 5
        assert len(explainer("a a a", max_length=5000).tokens) == 5
    with pytest.warns(UserWarning, match="tokens that fit"):
        assert len(explainer("a a a", max_length=4).tokens) == 4
    with pytest.warns(UserWarning, match="tokens that fit"):
        assert len(explainer("a a a", text_pair="a a a", max_length=5).tokens) == 5
    for no_length in (0, -3):
        with pytest.raises(ValueError, match=f"max_length must be a positive whole number, got {no_length}"):
            explainer("a a a", max_length=no_length)
    for too_short in (2, 1):
        with pytest.raises(ValueError, match=f"max_length must be more than the 2 special tokens, got {too_short}"):
            explainer("a a a", max_length=too_short)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_model_limit(byte_bpe, wordpiece, family):
    """RoBERTa's positions start behind the padding id: two fewer tokens fit than positions."""
    model = tiny_model(family, vocab_size=330)
    tokenizer = {"roberta": byte_bpe, "bert": wordpiece}[family]
    with pytest.warns(UserWarning, match="tokens that fit"):
        a = globenc.GlobEnc(model, tokenizer)("a " * 100)
    assert len(a.tokens) == {"roberta": 46, "bert": 48}[family]


# Bad input


BAD_CALLS = {
    "empty": (("",), {}, ValueError, "^texts is empty: there is no token"),
    "whitespace": ((" \t\n\u00a0",), {}, ValueError, "^texts is empty"),
    "empty-in-list": ((["good", ""],), {}, ValueError, r"^texts\[1\] is empty"),
    "no-text": (([],), {}, ValueError, "^texts is an empty list"),
    "none": ((None,), {}, TypeError, "^texts must be a string or a list of strings, got NoneType"),
    "none-in-list": ((["good", None, "bad"],), {}, TypeError, r"^texts\[1\] must be a string, got None$"),
    "number": ((3,), {}, TypeError, "^texts must be a string or a list of strings, got int"),
    "number-in-list": (([3],), {}, TypeError, r"^texts\[0\] must be a string, got int"),
    "bytes": ((b"good",), {}, TypeError, "^texts must be a string or a list of strings, got bytes"),
    "bytes-in-list": (([b"good"],), {}, TypeError, r"^texts\[0\] must be a string, got bytes"),
    "mapping": (({"a": "good"},), {}, TypeError, "^texts must be a string or a list of strings, got dict"),
    "tuples": (([("good", "bad")],), {}, TypeError, "second texts of pairs go to text_pair"),
    "surrogate": (("good \ud800",), {}, ValueError, "half of a surrogate pair"),
    "no-budget": (("good",), {"batch_tokens": 0}, ValueError, "^batch_tokens must be a positive whole number, got 0"),
    "half-a-length": (("good",), {"max_length": 2.5}, ValueError, "^max_length must be a positive whole number"),
    "control-characters": (("\u0000\u0001",), {}, ValueError, "text has no token: the tokenizer finds nothing"),
    "control-characters-in-list": ((["a", "\u0000"],), {}, ValueError, "text 1 has no token"),
    "empty-pair": (("good",), {"text_pair": " "}, ValueError, "^text_pair is empty"),
    "pair-none-in-list": ((["a", "b"],), {"text_pair": ["a", None]}, TypeError, r"^text_pair\[1\] must be a string"),
    "pair-of-list": ((["a"],), {"text_pair": "b"}, TypeError, "^text_pair must be a string for a text and a list"),
    "pair-list-of-text": (("a",), {"text_pair": ["b"]}, TypeError, "^text_pair must be a string for a text and a list"),
    "pairs-too-few": ((["a", "b"],), {"text_pair": ["c"]}, ValueError, "one text for each of the 2 texts, got 1"),
    "method": (("a",), {"method": "globenc"}, ValueError, "method must be one of N-Enc, .*W-Res; got 'globenc'"),
    "method-case": (("a",), {"method": "n-enc"}, ValueError, "method must be one of .*; got 'n-enc'"),
    "position": (("a",), {"position": "sep"}, ValueError, 'position must be "cls", "mean", "all".*got \'sep\''),
    "position-type": (("a",), {"position": 1.5}, TypeError, "position must be .*got 1.5"),
    "position-outside": (
        ("a",),
        {"position": 3},
        ValueError,
        "^position must be a token position inside the text, got 3",
    ),
    "position-outside-of-one": (
        (["a a", "a"],),
        {"position": 3},
        ValueError,
        "^text 1: position must be .* got 3 for 3 tokens",
    ),
    "position-none": (("a",), {"position": None}, TypeError, "position must be"),
    "weights-of-many": ((["a", "a"],), {"position": torch.ones(3)}, ValueError, "weights belong to one text"),
    "weights-length": (("a",), {"position": torch.ones(4)}, ValueError, "must end in the text's 3 tokens"),
    "unknown-option": (("a",), {"layer": True}, TypeError, "layer"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls(explainer, case):
    args, options, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message) as raised:
        explainer(*args, **options)
    assert "\n" not in str(raised.value)


def test_backends(classifier, wordpiece):
    with pytest.raises(ValueError, match="backend must be one of auto, reference, torch, triton; got 'cuda'"):
        globenc.GlobEnc(classifier, wordpiece, backend="cuda")
    with pytest.raises(ValueError, match="backend must be one of auto, reference, torch, triton; got 'Torch'"):
        globenc.attribute(classifier, input_ids=torch.tensor([[5]]), backend="Torch")
    auto, direct = (globenc.GlobEnc(classifier, wordpiece, backend=b)(TEXT) for b in ("auto", "reference"))
    np.testing.assert_allclose(auto.scores, direct.scores, rtol=1e-11)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_triton_without_a_gpu(classifier, wordpiece, monkeypatch):
    monkeypatch.setattr("globenc_kernels.capability.interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run here: .*; use backend='torch'"):
        globenc.GlobEnc(classifier, wordpiece, backend="triton")
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here"):
        globenc.contribution_maps(classifier, input_ids=torch.tensor([[5]]), backend="triton")


@pytest.mark.parametrize(
    "module",
    [
        "globenc",
        "globenc.attribution",
        "globenc.encoders.encoder",
        "globenc.encoders.registry",
        "globenc.explainer",
        "globenc.functional",
        "globenc.layer_maps",
        "globenc.loading.source",
        "globenc.rollouts",
    ],
)
def test_docstring_examples(module):
    from globenc.encoders.table import FAMILIES

    before = dict(FAMILIES)
    try:
        result = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS)
    finally:
        FAMILIES.clear()
        FAMILIES.update(before)
    assert result.attempted > 0
    assert result.failed == 0
