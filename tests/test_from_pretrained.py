"""A model and its tokenizer by name: what is loaded, and what is no model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers import tiny_model

import globenc

TEXT = "A charming and often affecting journey."


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


def test_default_model():
    explainer = globenc.GlobEnc.from_pretrained(device="cpu")
    good, bad = explainer(["a charming and often affecting journey", "unflinchingly bleak and desperate"])
    assert (good.label, bad.label) == ("positive", "negative")
    assert good.model == "globenc-sst2-small"
    assert (
        float(globenc.completeness_gap(explainer.model, **explainer.tokenizer("so good", return_tensors="pt")).max())
        < 1e-4
    )


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
