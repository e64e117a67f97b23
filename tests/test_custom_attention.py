"""Families that compute their attention in code of their own, or in windows."""

from __future__ import annotations

import pytest
import torch
from helpers import METHODS, assert_rows_close, tiny_model, token_batch
from torch import nn

import globenc


def test_deberta_is_complete_but_for_its_layer_norm():
    """What is left of its gap is its own LayerNorm, which rounds to float32: with torch's there is none."""
    model = tiny_model("deberta")
    for layer in model.encoder.layer:
        for output in (layer.attention.output, layer.output):
            norm = nn.LayerNorm(24, eps=output.LayerNorm.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(output.LayerNorm.state_dict())
            output.LayerNorm = norm
    assert float(globenc.completeness_gap(model, **token_batch((9, 4))).max()) < 1e-12


@pytest.fixture
def exact_longformer(monkeypatch):
    """Longformer with its softmax in the model's dtype."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))
    return tiny_model("longformer")


@pytest.mark.parametrize("lengths", [(5,), (19,), (31, 4, 18)], ids=str)
@pytest.mark.parametrize("where", [(), (0,), (0, 2), (3,)], ids=str)
def test_longformer_with_global_tokens(exact_longformer, where, lengths):
    inputs = token_batch(lengths)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][:, list(where)] = 1
    inputs["global_attention_mask"][0, 4] = 1  # texts have different ones
    assert float(globenc.completeness_gap(exact_longformer, **inputs).max()) < 1e-12
    for method in METHODS:
        maps = [
            globenc.contribution_maps(exact_longformer, method=method, backend=b, **inputs)
            for b in ("torch", "reference")
        ]
        assert_rows_close(*maps, 1e-12)
    for options in ({}, {"position": "mean"}, {"position": [0, 3, -1]}, {"row_normalize": True}, {"position": "all"}):
        fast, direct = (
            globenc.attribute(exact_longformer, per_layer=True, backend=b, **options, **inputs)
            for b in ("torch", "reference")
        )
        assert_rows_close(fast.layer_scores, direct.layer_scores, 1e-12)
    with torch.no_grad():
        own = exact_longformer(**inputs).last_hidden_state
    assert torch.equal(globenc.attribute(exact_longformer, **inputs).model_output.last_hidden_state, own)


def test_longformer_sees_no_further_than_its_window():
    maps = globenc.contribution_maps(tiny_model("longformer"), **token_batch((19,)))[:, 0]
    distance = (torch.arange(19)[:, None] - torch.arange(19)).abs()
    assert bool((maps[:, distance > 3] == 0).all())
    assert bool((maps[:, distance <= 3] > 0).all())


@pytest.mark.parametrize("lengths", [(8,), (19,), (24, 15)], ids=str)
def test_bigbird_sparse_and_full(lengths):
    """Texts of more than 14 tokens go through sparse attention here, shorter ones through full attention."""
    model, inputs = tiny_model("big_bird"), token_batch(lengths)
    assert float(globenc.completeness_gap(model, **inputs).max()) < 1e-12
    maps = [globenc.contribution_maps(model, backend=b, **inputs) for b in ("torch", "reference")]
    assert_rows_close(*maps, 1e-12)
    weights = globenc.contribution_maps(model, method="W", **inputs)
    torch.testing.assert_close(weights.sum(-1), inputs["attention_mask"].double().expand(3, -1, -1))
    assert model.attention_type == "block_sparse"
    assert bool((weights[:, 0, lengths[0] // 2] == 0).any()) == (lengths[0] > 14)


def test_bigbird_itself_depends_on_the_batch():
    """Its blocks count from the end of the padded batch: why its attribution is not that of the text alone."""
    model = tiny_model("big_bird")
    with torch.no_grad():
        together = model(**token_batch((30, 21))).last_hidden_state[1, :21]
        alone = model(**token_batch((21,))).last_hidden_state[0]
    assert float((together - alone).abs().max()) > 0.01


@pytest.mark.parametrize("lengths", [(1200,), (1200, 700, 3)], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
def test_windows_of_modernbert(lengths, left):
    """Several blocks of queries; what the model itself computes with transformers' masks is the same."""
    model = tiny_model("modernbert", num_hidden_layers=2, global_attn_every_n_layers=2, local_attention=60)
    inputs = token_batch(lengths, left=left, position_ids=left)
    out = globenc.attribute(model, position="mean", **inputs)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        own = model(**inputs).last_hidden_state
    torch.testing.assert_close(out.model_output.last_hidden_state[real], own[real], rtol=0, atol=1e-12)
    assert float(globenc.completeness_gap(model, **inputs).max()) < 1e-12
    if len(lengths) == 1:
        maps = [globenc.contribution_maps(model, backend=b, **inputs) for b in ("torch", "reference")]
        assert_rows_close(*maps, 1e-12)
        distance = (torch.arange(1200)[:, None] - torch.arange(1200)).abs()
        assert bool((maps[0][1, 0, distance > 30] == 0).all())
        assert bool((maps[0][1, 0, distance <= 30] > 0).all())
        assert bool((maps[0][0] > 0).all())
        direct = globenc.attribute(model, position="mean", backend="reference", **inputs)
        assert_rows_close(out.scores, direct.scores, 1e-12)
