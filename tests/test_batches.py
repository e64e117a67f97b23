"""A text's result is its own: alone, in a batch, padded on either side, whatever its neighbours."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import FAMILIES, METHODS, NO_CLS, assert_rows_close, positions_of, raw, tiny_model, token_batch

import globenc

LENGTHS = (9, 1, 4, 6)
POSITIONED = ("roberta", "xlm-roberta", "camembert")  # their position ids start behind pad_token_id and skip padding


def inputs_for(model, lengths, left=False):
    inputs = token_batch(lengths, left=left, position_ids=True)
    inputs["input_ids"][inputs["attention_mask"] == 0] = model.config.pad_token_id
    if model.config.model_type in POSITIONED or model.config.model_type in NO_CLS:
        del inputs["position_ids"]
    return inputs


def check_alone_and_in_batch(model, left, tolerance, **options):
    inputs = inputs_for(model, LENGTHS, left)
    options = {"position": positions_of(model)[0], **options}
    together = globenc.attribute(model, **options, **inputs)
    for row, length in enumerate(LENGTHS):
        alone = globenc.attribute(model, **options, **inputs_for(model, (length,)))
        real = inputs["attention_mask"][row].bool()
        scores = together.scores[row]
        if options.get("position") == "all":
            scores = scores[real]
        assert_rows_close(scores[..., real], alone.scores[0], tolerance)
        assert bool((scores[..., ~real] == 0).all())
        values = raw(together.scores, together.log2_scale)[row]
        expected = raw(alone.scores, alone.log2_scale)[0]
        assert_rows_close(
            (values[real] if options.get("position") == "all" else values)[..., real], expected, tolerance
        )


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [pytest.param(torch.float64, 1e-12, id="float64"), pytest.param(torch.float32, 1e-5, id="float32")],
)
@pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_in_batch(family, left, dtype, tolerance):
    check_alone_and_in_batch(tiny_model(family, dtype), left, tolerance)


@pytest.mark.parametrize("position", ["mean", -1, "all"], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
@pytest.mark.parametrize("method", METHODS)
def test_alone_and_in_batch_by_method(method, left, position):
    check_alone_and_in_batch(tiny_model("bert"), left, 1e-12, method=method, position=position)


def test_the_comparison_can_fail():
    """A text read at shifted positions is another text, which is what the warning of left padding says."""
    model = tiny_model("bert")
    with pytest.warns(UserWarning, match="padded on the left"):
        shifted = globenc.attribute(model, **token_batch((9, 4), left=True)).scores[1:, 5:]
    alone = globenc.attribute(model, **token_batch((4,))).scores
    with pytest.raises(AssertionError, match="row error"):
        assert_rows_close(shifted, alone, 1e-3)


def test_warning_of_left_padding_points_at_the_caller():
    model = tiny_model("bert")
    for call in (globenc.attribute, globenc.contribution_maps, globenc.mixing_ratios, globenc.completeness_gap):
        with pytest.warns(UserWarning, match="pass position_ids = attention_mask.cumsum") as caught:
            call(model, **token_batch((9, 4), left=True))
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        globenc.attribute(model, **token_batch((9, 4), left=True, position_ids=True))
        globenc.attribute(model, **token_batch((9, 4)))
        inputs = inputs_for(tiny_model("roberta"), (9, 4), left=True)
        globenc.attribute(tiny_model("roberta"), **inputs)


def test_gaps_in_the_mask():
    """Any tokens may be masked, not only an end."""
    model = tiny_model("bert")
    inputs = token_batch((7,), position_ids=True)
    kept = torch.tensor([0, 1, 3, 6])
    inputs["attention_mask"] = torch.zeros(1, 7, dtype=torch.long).index_fill(1, kept, 1)
    out = globenc.attribute(model, position="all", **inputs)
    alone = globenc.attribute(
        model, position="all", input_ids=inputs["input_ids"][:, kept], position_ids=inputs["position_ids"][:, kept]
    )
    assert_rows_close(out.scores[:, kept][..., kept], alone.scores, 1e-12)


def test_neighbours_do_not_matter():
    model = tiny_model("bert")
    first = globenc.attribute(model, **token_batch((5, 9))).scores[0, :5]
    inputs = token_batch((5, 12, 2, 12))
    inputs["input_ids"][0, 5:] = 33  # what stands at padding
    assert_rows_close(globenc.attribute(model, **inputs).scores[:1, :5], first[None], 1e-12)


TEXTS = [
    "a charming and often affecting journey .",
    "bleak",
    "it 's slow -- very , very slow .",
    "unflinchingly bleak and desperate",
    "a",
    "the acting , costumes , music and sound are all astounding .",
    "unflinchingly bleak and desperate",
]


@pytest.mark.parametrize("batch_tokens", [1, 20, None])
@pytest.mark.parametrize("layers", [False, True], ids=["last", "layers"])
@pytest.mark.parametrize("position", ["cls", "mean", "all", [0, -1]], ids=str)
def test_explainer_batches(explainer, batch_tokens, layers, position):
    alone = [explainer(text, position=position, per_layer=layers) for text in TEXTS]
    together = explainer(TEXTS, position=position, per_layer=layers, batch_tokens=batch_tokens)
    assert [a.text for a in together] == TEXTS
    for a, b in zip(together, alone, strict=True):
        assert a.tokens == b.tokens
        assert a.offsets == b.offsets
        assert a.label == b.label
        assert a.probability == pytest.approx(b.probability, rel=1e-12)
        assert a.scores.shape == b.scores.shape
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-11)
        np.testing.assert_allclose(a.log2_scale, b.log2_scale, rtol=1e-11)
        if layers:
            np.testing.assert_allclose(a.layer_scores, b.layer_scores, rtol=1e-11)
            np.testing.assert_allclose(a.layer_log2_scale, b.layer_log2_scale, rtol=1e-11, atol=1e-12)


def test_explainer_pairs_in_batches(explainer):
    pairs = [("bleak", text) for text in TEXTS]
    together = explainer([a for a, _ in pairs], text_pair=[b for _, b in pairs], batch_tokens=30)
    for (first, second), a in zip(pairs, together, strict=True):
        alone = explainer(first, text_pair=second)
        assert (a.text, a.text_pair) == (first, second)
        assert a.tokens == alone.tokens
        np.testing.assert_allclose(a.scores, alone.scores, rtol=1e-11)


@pytest.mark.parametrize("batch_tokens", [1, 16, 4096])
def test_budget_is_kept(explainer, monkeypatch, batch_tokens):
    sizes = []
    whole = globenc.batch_results.attribute

    def counted(*args, **kwargs):
        sizes.append(kwargs["input_ids"].shape)
        return whole(*args, **kwargs)

    monkeypatch.setattr(globenc.batch_results, "attribute", counted)
    explainer(TEXTS, batch_tokens=batch_tokens)
    assert sum(rows for rows, _ in sizes) == len(TEXTS)
    assert all(rows * n <= batch_tokens or rows == 1 for rows, n in sizes)
    assert len(sizes) == {1: 7, 4096: 1}.get(batch_tokens, len(sizes))


def test_roberta_explainer_batches(byte_bpe):
    model = tiny_model("roberta", head="SequenceClassification", vocab_size=330, max_position_embeddings=120)
    explainer = globenc.GlobEnc(model, byte_bpe)
    for a, text in zip(explainer(TEXTS), TEXTS, strict=True):
        np.testing.assert_allclose(a.scores, explainer(text).scores, rtol=1e-11)
