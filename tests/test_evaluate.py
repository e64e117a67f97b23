"""Every measure on cases whose answer is known by reasoning, and gradients against finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import assert_rows_close, attention_state, tiny_model, token_batch
from scipy import stats

import globenc
from globenc.metrics import align, attention_flow, hta, hta_maps, plausibility, saliency, spearman

FAMILIES = ("bert", "electra-projected", "albert", "distilbert", "modernbert", "deberta-v3", "longformer", "esm")


def classifier(family="bert", **options):
    return tiny_model(family, head="SequenceClassification", **options)


def states_of(model, inputs):
    """The embedding block's output, from the model itself."""
    with torch.no_grad():
        return model(**inputs, output_hidden_states=True).hidden_states[0]


def answer_from(model, inputs, states, column, output):
    """y_c with the embedding block's output replaced."""
    base = model.base_model
    layer = next(m for m in base.modules() if type(m).__name__.endswith(("Layer", "Block", "TransformerBlock")))
    first = []

    def enter(module, args, kwargs):
        if first:
            return None
        first.append(True)
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    handle = layer.register_forward_pre_hook(enter, with_kwargs=True)
    with torch.no_grad():
        logits = model(**inputs).logits
    handle.remove()
    answers = logits if output == "logit" else logits.softmax(-1)
    return answers[0, column]


@pytest.mark.parametrize("output", ["logit", "probability"])
# not ModernBERT: its rotation rounds to float32, which finite differences magnify
@pytest.mark.parametrize("family", ["bert", "roberta-prelayernorm"])
def test_saliency_by_finite_differences(family, output):
    model, inputs = classifier(family), token_batch((4,))
    found = saliency(model, output=output, **inputs)[0]
    states = states_of(model, inputs)
    with torch.no_grad():
        column = int(model(**inputs).logits.argmax())
    step = 1e-5
    gradient = torch.zeros_like(states[0])
    for i in range(4):
        for k in range(states.shape[2]):
            moved = [states.clone() for _ in range(2)]
            moved[0][0, i, k] += step
            moved[1][0, i, k] -= step
            above, below = (answer_from(model, inputs, m, column, output) for m in moved)
            gradient[i, k] = (above - below) / (2 * step)
    torch.testing.assert_close(found, (gradient * states[0]).norm(dim=-1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_saliency_in_a_batch(family):
    model = classifier(family)
    together = saliency(model, **token_batch((9, 4, 6)))
    for row, length in enumerate((9, 4, 6)):
        alone = saliency(model, **token_batch((length,)))
        assert_rows_close(together[row : row + 1, :length], alone, 1e-9)
        assert bool((together[row, length:] == 0).all())


def test_saliency_of_chosen_classes():
    model, inputs = classifier(num_labels=3), token_batch((9, 4))
    with torch.no_grad():
        predicted = model(**inputs).logits.argmax(-1)
    assert torch.equal(saliency(model, label=predicted, **inputs), saliency(model, **inputs))
    other = saliency(model, label=(predicted + 1) % 3, **inputs)
    assert not torch.allclose(other, saliency(model, **inputs))


def test_saliency_of_a_linear_model_is_weight_times_input():
    """A model whose logits read the first token's states as they enter: all other tokens have none."""
    model, inputs = classifier(num_hidden_layers=1), token_batch((5,))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.self.value.weight.zero_()
            layer.attention.self.value.bias.zero_()
    found = saliency(model, **inputs)[0]
    assert float(found[0]) > 0
    assert bool((found[1:] == 0).all())


def test_saliency_leaves_the_model_as_it_was():
    model = classifier().train()
    before = attention_state(model)
    saliency(model, **token_batch((5,)))
    assert attention_state(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "loss"}, "output must be one of logit, probability; got 'loss'"),
        ({"label": "gold"}, 'label must be "predicted" or a tensor of classes'),
        ({"label": torch.tensor([0, 1])}, r"label must be integers of shape \[batch\] = \[1\], got torch.int64 \[2\]"),
        ({"label": torch.tensor([0.5])}, "got torch.float32"),
        ({"label": torch.tensor([7])}, "label must be in 0..1, got"),
    ],
)
def test_saliency_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        saliency(classifier(), **options, **token_batch((5,)))


def test_saliency_needs_a_classifier():
    with pytest.raises(ValueError, match="BertModel has no logits"):
        saliency(tiny_model("bert"), **token_batch((5,)))
    with pytest.raises(ValueError, match="give a model that classifies whole texts"):
        saliency(tiny_model("bert", head="TokenClassification"), **token_batch((5,)))


@pytest.mark.parametrize("times_input", [True, False])
@pytest.mark.parametrize("family", ["bert", "albert", "roberta-prelayernorm"])
def test_hta_by_finite_differences(family, times_input):
    model, inputs = tiny_model(family), token_batch((4,))
    maps = hta_maps(model, times_input=times_input, **inputs)
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
    entered, step = states[0][0], 1e-5
    jacobian = torch.zeros(4, 24, 4, 24, dtype=torch.float64)

    def first_layer(moved):
        block = next(
            m for m in model.modules() if type(m).__name__ in ("BertLayer", "AlbertLayer", "RobertaPreLayerNormLayer")
        )
        out = []
        handles = [
            block.register_forward_pre_hook(lambda m, a, k: None if out else ((moved, *a[1:]), k), with_kwargs=True),
            block.register_forward_hook(lambda m, a, o: out.append(o[0] if isinstance(o, tuple) else o)),
        ]
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
        return out[0][0]

    for j in range(4):
        for k in range(24):
            moved = [entered[None].clone() for _ in range(2)]
            moved[0][0, j, k] += step
            moved[1][0, j, k] -= step
            jacobian[:, :, j, k] = (first_layer(moved[0]) - first_layer(moved[1])) / (2 * step)
    if times_input:
        jacobian = jacobian * entered
    expected = jacobian.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(maps[0, 0], expected, rtol=1e-6, atol=1e-8)


def test_hta_in_a_batch_and_rolled_out():
    model, inputs = tiny_model("bert"), token_batch((6, 3))
    maps = hta_maps(model, **inputs)
    assert maps.shape == (3, 2, 6, 6)
    assert_rows_close(maps[:, 1:, :3, :3], hta_maps(model, **token_batch((3,))), 1e-9)
    assert bool((maps[:, 1, 3:] == 0).all())
    assert bool((maps[:, 1, :, 3:] == 0).all())
    mantissa, scale = hta(model, **inputs)
    expected = torch.stack([maps[0], maps[1] @ maps[0], maps[2] @ maps[1] @ maps[0]])
    assert_rows_close(mantissa * torch.exp2(scale)[..., None], expected, 1e-12)


def test_spearman_by_hand():
    found = spearman([[1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 2, 4]], [[10, 20, 30, 40]] * 3)
    assert found.values.tolist() == pytest.approx([1.0, -1.0, 0.8])  # 1 - 6 * 2 / (4 * 15)
    assert found.mean == pytest.approx(0.8 / 3)
    assert found.std == pytest.approx(np.std([1, -1, 0.8]))
    assert found.undefined == 0


def test_spearman_with_ties_equals_scipy():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (20, 9)).astype(float)
    other = rng.integers(0, 4, (20, 9)).astype(float)
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(rows, other, strict=True)]
    np.testing.assert_allclose(spearman(rows, other).values, expected, atol=1e-12)


def test_spearman_without_an_answer():
    found = spearman([[1.0], [2, 2, 2], [1, 2]], [[1.0], [1, 2, 3], [3, 3]])
    assert (np.isnan(found.values).tolist(), found.undefined) == ([True] * 3, 3)
    assert math.isnan(found.mean)
    mixed = spearman([[1, 2, 9], [2, 2, 2]], [[1, 5, 3], [1, 2, 3]], mask=[[1, 1, 0], [1, 1, 1]])
    assert (mixed.mean, mixed.undefined) == (pytest.approx(1.0), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1, 2]], [[1, 2], [1, 2]]), "a row for each text"),
        (([[1, 2]], [[1, 2, 3]]), "text 0: rows must be of one length"),
        (([[1, np.nan]], [[1, 2]]), "text 0: scores hold NaN"),
        (([[1, 2]], [[1, 2]], [[1]]), "text 0: mask must have 2 entries"),
    ],
)
def test_spearman_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        spearman(*arguments)


def test_plausibility_by_hand():
    # ranked: marked, not, marked, not: precision 1 at recall 1/2, 2/3 at recall 1
    found = plausibility([0.9, 0.8, 0.7, 0.1], [1, 0, 1, 0])
    assert found.auprc == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert found.f1 == pytest.approx(0.5)  # one of the two highest is marked
    assert found.iou == pytest.approx(1 / 3)
    worst = plausibility([0.1, 0.2, 0.9], [1, 0, 0])
    assert (worst.auprc, worst.f1, worst.iou) == (pytest.approx(1 / 3), 0, 0)


def test_plausibility_of_ties_is_the_share_of_marked():
    assert plausibility([0.5] * 4, [1, 0, 0, 0]).auprc == pytest.approx(0.25)


def test_plausibility_leaves_out_what_does_not_count():
    found = plausibility([9.0, 0.9, 0.1, 9.0], [np.nan, 0.7, 0.3, np.nan])
    assert found == plausibility([0.9, 0.1], [1, 0])
    assert math.isnan(plausibility([1, 2], [0, 0]).auprc)
    assert math.isnan(plausibility([1, 2], [1, 1]).f1)
    assert plausibility([1, 2], [0.4, 0.3], threshold=0.35).f1 == 0


def test_marks_on_words_as_marks_on_pieces():
    # "unbelievably bad ." -> [CLS] un believ ably bad . [SEP]
    tokens = [None, (0, 2), (2, 8), (8, 12), (13, 16), (17, 18), None]
    marks = align([0.2, 1.0, 0.0], [(0, 12), (13, 16), (17, 18)], tokens)
    np.testing.assert_array_equal(marks, [np.nan, 0.2, 0.2, 0.2, 1.0, 0.0, np.nan])
    np.testing.assert_array_equal(align([0.2, 1.0], [(0, 3), (3, 5)], [(0, 5)]), [1.0])
    with pytest.raises(ValueError, match="marks must be one for each of the 2 words, got 1"):
        align([1], [(0, 1), (1, 2)], [])
    with pytest.raises(ValueError, match="marks must be numbers from 0 to 1"):
        align([2], [(0, 1)], [])


def test_flow_by_hand():
    # to token 0: from 0 by 0-0-0 at most 0.2 of 0.5 goes on, from 1 by 0.2 through 0 and 0.8 through 1
    maps = [[[0.5, 0.5], [0.0, 1.0]], [[0.2, 0.8], [0.0, 1.0]]]
    np.testing.assert_allclose(attention_flow(maps), [0.2, 1.0], atol=1e-6)
    np.testing.assert_allclose(attention_flow(maps, position=1), [0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(attention_flow(np.array(maps) * 1e-9), [0.2e-9, 1e-9], rtol=1e-6)
    assert attention_flow(np.zeros((2, 3, 3))).tolist() == [0, 0, 0]


def test_flow_of_one_layer_is_its_row():
    rows = np.random.default_rng(0).random((1, 6, 6))
    np.testing.assert_allclose(attention_flow(rows, position=2), rows[0, 2], rtol=1e-6)


def test_flow_of_many_tokens_does_not_overflow():
    """What flows into a token is more than 2**31 times the smallest unit that would do for one edge."""
    np.testing.assert_allclose(attention_flow(np.ones((2, 60, 60)))[:2], [60, 60], rtol=1e-6)


@pytest.mark.parametrize(
    ("maps", "position", "message"),
    [
        (np.zeros((2, 3)), 0, "maps must have shape"),
        (np.zeros((1, 2, 3)), 0, "maps must have shape"),
        (np.full((1, 2, 2), -1.0), 0, "finite and not negative"),
        (np.full((1, 2, 2), np.nan), 0, "finite and not negative"),
        (np.ones((1, 2, 2)), 2, "position must be in 0..1, got 2"),
    ],
)
def test_flow_refuses(maps, position, message):
    with pytest.raises(ValueError, match=message):
        attention_flow(maps, position)


def test_evaluate_is_part_of_the_package():
    assert globenc.metrics.saliency is saliency


@pytest.mark.parametrize("family", ["longformer", "big_bird"])
def test_hta_of_models_that_pad_inside(family):
    inputs = token_batch((5, 3))
    maps = globenc.metrics.hta_maps(tiny_model(family), **inputs)
    assert maps.shape[1:] == (2, 5, 5)
    assert bool((maps[:, 1, 3:] == 0).all())
    assert bool((maps[:, 0].sum(-1) > 0).all())
