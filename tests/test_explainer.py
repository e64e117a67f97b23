"""Texts in, attributions out: what stands in the result, and one clear sentence for everything that cannot be."""

from __future__ import annotations

import doctest
import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import METHODS, tiny_model

import globenc

TEXT = "A charming and often affecting journey."
DEFAULT = Path(globenc.__file__).parent / "default_model" / "model.safetensors"


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


# A tokenizer without offsets


class SlowTokenizer(transformers.PreTrainedTokenizer):
    vocab_files_names = {}  # noqa: RUF012
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **kwargs):
        self.pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bleak", "charm", "##ing", "and"]
        super().__init__(
            unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", **kwargs
        )

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    def _tokenize(self, text):
        return [piece for word in text.split() for piece in word.replace("charming", "charm ##ing").split()]

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 1)

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def build_inputs_with_special_tokens(self, first, second=None):
        return [2, *first, 3] + ([] if second is None else [*second, 3])

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return [int(i in (0, 2, 3)) for i in token_ids_0]
        mask = [1] + [0] * len(token_ids_0) + [1]
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        types = [0] * (len(token_ids_0) + 2)
        return types if token_ids_1 is None else types + [1] * (len(token_ids_1) + 1)


def test_slow_tokenizer(classifier):
    tokenizer = SlowTokenizer()
    assert not tokenizer.is_fast
    explainer = globenc.GlobEnc(classifier, tokenizer)
    a = explainer("charming and bleak")
    assert a.tokens == ["[CLS]", "charm", "##ing", "and", "bleak", "[SEP]"]
    assert a.offsets == [None] * 6
    assert [w.text for w in a.words()] == ["[CLS]", "charming", "and", "bleak", "[SEP]"]
    assert sum(w.score for w in a.words()) == pytest.approx(1, rel=1e-12)
    pair = explainer("charming", text_pair="bleak and bleak")
    assert pair.segments == [None, 0, 0, None, 1, 1, 1, None]
    with pytest.warns(UserWarning, match="tokens that fit"):
        assert explainer("bleak " * 60).truncated == 14
    assert [b.tokens for b in explainer(["bleak", "charming and"])] == [
        ["[CLS]", "bleak", "[SEP]"],
        ["[CLS]", "charm", "##ing", "and", "[SEP]"],
    ]


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


IDS = torch.tensor([[5, 6, 7]])
BAD_INPUTS = {
    "nothing": ({}, ValueError, "give input_ids .* or inputs_embeds"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.ones(1, 3, 24)}, ValueError, "one of the two"),
    "unknown-input": (
        {"input_ids": IDS, "pixel_values": 1},
        TypeError,
        "takes no input 'pixel_values'; it takes input_ids",
    ),
    "misspelt": ({"input_ids": IDS, "row_normalise": True}, TypeError, "takes no input 'row_normalise'"),
    "list": ({"input_ids": [[5, 6]]}, TypeError, "input_ids must be a tensor, got list"),
    "flat": ({"input_ids": IDS[0]}, ValueError, r"input_ids must have shape \[batch, n\] .* got \[3\]"),
    "no-text": ({"input_ids": IDS[:0]}, ValueError, r"no empty dimension, got \[0, 3\]"),
    "no-token": ({"input_ids": IDS[:, :0]}, ValueError, r"no empty dimension, got \[1, 0\]"),
    "floats": ({"input_ids": IDS.float()}, TypeError, "input_ids must be int64 or int32, got torch.float32"),
    "beyond-vocabulary": ({"input_ids": IDS + 90}, ValueError, r"input_ids must be in 0..89, got 97"),
    "negative-id": ({"input_ids": IDS - 6}, ValueError, r"input_ids must be in 0..89, got -1"),
    "too-long": ({"input_ids": IDS.repeat(1, 17)}, ValueError, "input_ids has 51 tokens, and BertForSeq.* at most 48"),
    "mask-zero": (
        {"input_ids": IDS.repeat(2, 1), "attention_mask": torch.tensor([[1, 1, 0], [0, 0, 0]])},
        ValueError,
        "attention_mask is all zero for text 1 of the batch",
    ),
    "mask-shape": ({"input_ids": IDS, "attention_mask": torch.ones(1, 4)}, ValueError, r"= \[1, 3\], got \[1, 4\]"),
    "mask-4d": ({"input_ids": IDS, "attention_mask": torch.ones(1, 1, 3, 3)}, ValueError, r"got \[1, 1, 3, 3\]"),
    "mask-list": ({"input_ids": IDS, "attention_mask": [[1, 1, 1]]}, ValueError, "got list"),
    "mask-additive": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[0.0, 0, -1e9]])},
        ValueError,
        "1 at real tokens",
    ),
    "mask-nan": (
        {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, torch.nan]])},
        ValueError,
        "1 at real tokens",
    ),
    "other-device": (
        {"input_ids": IDS.to("meta")},
        ValueError,
        r"input_ids is on meta and the model on cpu: move it with",
    ),
    "mask-other-device": (
        {"input_ids": IDS, "attention_mask": torch.ones(1, 3, device="meta")},
        ValueError,
        "attention_mask is on meta and the model on cpu",
    ),
    "attentions": ({"input_ids": IDS, "output_attentions": True}, ValueError, "output_attentions must not be set"),
    "method": ({"input_ids": IDS, "method": "GlobEnc"}, ValueError, "method must be one of"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_tensors(classifier, case):
    inputs, error, message = BAD_INPUTS[case]
    for call in (globenc.attribute, globenc.contribution_maps):
        with pytest.raises(error, match=message) as raised:
            call(classifier, **inputs)
        assert "\n" not in str(raised.value)


def test_model_without_weights():
    with torch.device("meta"):
        model = transformers.BertModel(tiny_model("bert").config)
    with pytest.raises(ValueError, match="meta device: load them first"):
        globenc.attribute(model, input_ids=IDS.to("meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("position", ["cls", "mean", "all"])
def test_activations_that_are_not_finite(value, position):
    model = tiny_model("bert", torch.float32)
    model.embeddings.word_embeddings.weight.data[6] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        globenc.attribute(model, position=position, input_ids=IDS)
    globenc.attribute(model, position=position, input_ids=torch.tensor([[5, 7]]))


@pytest.mark.parametrize("kind", ["no-config", "no-folder", "no-weights", "no-encoder", "no-safetensors"])
def test_paths_that_are_no_model(tmp_path, monkeypatch, kind, wordpiece):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path, error = tmp_path / "model", OSError
    if kind != "no-folder":
        path.mkdir()
    if kind == "no-weights":
        tiny_model("bert").config.save_pretrained(path)
    if kind == "no-encoder":
        config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2)
        transformers.GPT2Model(config).save_pretrained(path)
        error = ValueError
    if kind == "no-safetensors":
        model = tiny_model("bert")
        model.config.save_pretrained(path)
        torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(error, match="model") as raised:
        globenc.GlobEnc.from_pretrained(path)
    assert str(path) in str(raised.value) or kind == "no-encoder"
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.float64], ids=str)
def test_from_pretrained(tmp_path, wordpiece, stored):
    model = tiny_model("bert", stored, head="SequenceClassification")
    model.save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    explainer = globenc.GlobEnc.from_pretrained(tmp_path, device="cpu")
    assert type(explainer.model) is type(model)
    assert not explainer.model.training
    expected = torch.float32 if stored == torch.float16 else stored  # half precision only where asked for on a CPU
    assert explainer.model.dtype == expected
    a = explainer(TEXT)
    np.testing.assert_allclose(a.scores, globenc.GlobEnc(model.to(expected), wordpiece)(TEXT).scores, rtol=1e-6)
    assert a.model == str(tmp_path)
    assert globenc.GlobEnc.from_pretrained(str(tmp_path), dtype="float64").model.dtype == torch.float64
    assert globenc.GlobEnc.from_pretrained(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16
    for wrong in ("float65", "int64", "nn"):
        with pytest.raises(ValueError, match=f"dtype must be float64, .*got '{wrong}'"):
            globenc.GlobEnc.from_pretrained(tmp_path, dtype=wrong)


@pytest.mark.parametrize("head", ["MaskedLM", "TokenClassification", "QuestionAnswering", "MultipleChoice", "Model"])
def test_from_pretrained_takes_any_head(tmp_path, wordpiece, head):
    """The encoder of a multiple-choice model is loaded without its head, which reads several texts at once."""
    model = tiny_model("bert", torch.float32, head=head)
    model.save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    explainer = globenc.GlobEnc.from_pretrained(tmp_path, device="cpu")
    assert type(explainer.model).__name__ == ("BertModel" if head in ("Model", "MultipleChoice") else f"BertFor{head}")
    expected = globenc.GlobEnc(model.base_model, wordpiece)(TEXT).scores
    np.testing.assert_allclose(explainer(TEXT).scores, expected, rtol=1e-6)


def test_tokenizer_is_needed():
    explainer = globenc.GlobEnc(tiny_model("bert"))
    with pytest.raises(ValueError, match="tokenizer is needed"):
        explainer("a")


def test_tokenizer_of_another_model(wordpiece):
    explainer = globenc.GlobEnc(tiny_model("bert", vocab_size=10), wordpiece)
    with pytest.raises(ValueError, match="is the tokenizer this model's"):
        explainer(TEXT)


needs_default = pytest.mark.skipif(not DEFAULT.exists(), reason="the default model is not in this checkout yet")


@needs_default
def test_default_model():
    explainer = globenc.GlobEnc.from_pretrained(device="cpu")
    good, bad = explainer(["a charming and often affecting journey", "unflinchingly bleak and desperate"])
    assert (good.label, bad.label) == ("positive", "negative")
    assert good.model == "globenc-sst2-small"
    assert (
        float(globenc.completeness_gap(explainer.model, **explainer.tokenizer("so good", return_tensors="pt")).max())
        < 1e-4
    )


@needs_default
@pytest.mark.parametrize(
    "module",
    [
        "globenc",
        "globenc.attribution",
        "globenc.encoders.encoder",
        "globenc.encoders.registry",
        "globenc.explainer",
        "globenc.functional",
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


def test_a_source_holds_what_loading_needs():
    source = globenc.ModelSource(dtype="float64", backend="reference", device="cpu")
    explainer = globenc.GlobEnc.from_pretrained(source)
    assert (explainer.model.dtype, explainer.backend, explainer.device.type) == (torch.float64, "reference", "cpu")
    assert globenc.GlobEnc.of(explainer) is explainer
    assert globenc.GlobEnc.of(source).model.dtype == torch.float64
    with pytest.raises(TypeError, match="belong into the ModelSource"):
        globenc.GlobEnc.from_pretrained(source, dtype="float32")
    with pytest.raises(TypeError, match="name"):
        globenc.GlobEnc.from_pretrained(globenc.ModelSource(3))
