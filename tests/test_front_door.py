"""Every text family from a saved checkpoint through `GlobEnc`, with whatever head the hub has it with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers import CONFIGS, FAMILIES, NO_CLS, positions_of, tiny_model

import globenc

HEADLESS = {"nomic_bert", "jina_embeddings_v3"}


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints(family, tmp_path, wordpiece):
    if family in NO_CLS:  # the hub has them with their decoders
        whole = {"t5": transformers.T5ForConditionalGeneration, "umt5": transformers.UMT5ForConditionalGeneration}
        make, options = CONFIGS[family]
        model = whole[family](make(**options)).eval()
    else:
        model = tiny_model(family, torch.float32, head="Model" if family in HEADLESS else "SequenceClassification")
    model.save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    explainer = globenc.GlobEnc.from_pretrained(tmp_path)
    assert type(explainer.model).__name__.endswith("EncoderModel") == (family in NO_CLS)
    (position, *_) = positions_of(explainer.model)
    a = explainer("a charming journey", position=position)
    assert a.tokens[0] == "[CLS]"
    assert float(a.scores.sum()) == pytest.approx(1, abs=1e-5)
    assert (a.label is not None) == (family not in HEADLESS and family not in NO_CLS)
    several = explainer(["a charming journey", "it 's slow -- very , very slow ."], position=position)
    np.testing.assert_allclose(several[0].scores, a.scores, atol=2e-6)
    if family not in NO_CLS:
        inputs = wordpiece("a charming journey", return_tensors="pt", return_token_type_ids=False)
        expected = globenc.attribute(model, position=position, **inputs).scores[0]
        np.testing.assert_allclose(a.scores, expected.numpy(), atol=2e-6)


@pytest.mark.parametrize("family", ["nomic_bert", "modernbert", "deberta-v3", "bert"])
def test_texts_longer_than_the_model_was_made_for(family, wordpiece):
    """Cut by default; where positions are relative, an explicit length goes beyond."""
    explainer = globenc.GlobEnc(tiny_model(family, torch.float32), wordpiece)
    text = "a charming journey " * 40
    with pytest.warns(UserWarning, match="longer than the 48 tokens that fit"):
        assert len(explainer(text).tokens) == 48
    if family == "bert":
        with pytest.warns(UserWarning, match="longer than the 48 tokens that fit"):
            assert len(explainer(text, max_length=100).tokens) == 48
    else:
        with pytest.warns(UserWarning, match="longer than the 100 tokens that fit"):
            assert len(explainer(text, max_length=100).tokens) == 100


def test_extract_takes_other_families(tmp_path, wordpiece):
    explainer = globenc.GlobEnc(tiny_model("modernbert", torch.float32), wordpiece)
    rows = [{"text": "a charming journey"}, {"text": "it 's slow"}]
    globenc.extract(rows, tmp_path / "out", model=explainer)
    table = globenc.load_extract(tmp_path / "out").to_pylist()
    np.testing.assert_allclose(table[0]["scores"], explainer("a charming journey").scores, atol=2e-6)


@pytest.mark.parametrize("family", NO_CLS)
def test_heads_on_an_encoder_alone(family):
    make, options = CONFIGS[family]
    model_class = {"t5": transformers.T5ForTokenClassification, "umt5": transformers.UMT5ForTokenClassification}[family]
    model = model_class(make(**options)).eval()
    ids = torch.randint(5, 80, (1, 7))
    out = globenc.attribute(model, position="mean", input_ids=ids)
    assert out.model_output.logits.shape[:2] == (1, 7)
    assert float(globenc.completeness_gap(model, input_ids=ids).max()) < 1e-5
