"""Signed scores for an answer: gradient times input, integrated gradients and occlusion, on answers known by
reasoning."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers import assert_rows_close, attention_state, tiny_model, token_batch
from test_evaluate import FAMILIES, answer_from, classifier, states_of
from test_faithfulness import MASK, NOTHING, STRONG, WEAK, adding, p, text  # noqa: F401

from globenc.metrics import gradient_times_input, integrated_gradients, occlusion, saliency
from globenc.metrics.gradients import AnswerGradients, hta_maps

MEASURES = {
    "gradient x input": gradient_times_input,
    "integrated gradients": lambda model, **given: integrated_gradients(model, steps=3, **given),
    "integrated gradients from mask tokens": lambda model, **given: integrated_gradients(
        model, steps=3, baseline="mask", mask_token_id=1, **given
    ),
    "occlusion": lambda model, **given: occlusion(model, mask_token_id=1, **given),
}


def test_gradient_times_input_is_the_signed_sum_of_what_saliency_measures():
    model, inputs = classifier(), token_batch((6, 4))
    gradient, states = AnswerGradients(model, inputs, "predicted", "logit").at()
    real = inputs["attention_mask"].bool()
    signed = gradient_times_input(model, **inputs)
    torch.testing.assert_close(signed[real], (gradient * states).sum(-1)[real], rtol=0, atol=1e-15)
    torch.testing.assert_close(saliency(model, **inputs)[real], (gradient * states).norm(dim=-1)[real], rtol=0, atol=0)
    assert bool((signed[real] < 0).any())
    assert bool((signed[real] > 0).any())


def test_two_opposite_classes_have_opposite_scores():
    """Where the logits are w and -w, what speaks for one speaks against the other."""
    model, inputs = classifier(num_labels=2), token_batch((6,))
    with torch.no_grad():
        model.classifier.weight[1] = -model.classifier.weight[0]
        model.classifier.bias.zero_()
    for measure in MEASURES.values():
        for_class = [measure(model, label=torch.tensor([label]), **inputs) for label in (0, 1)]
        torch.testing.assert_close(for_class[0], -for_class[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("output", ["logit", "probability"])
@pytest.mark.parametrize(
    ("family", "baseline"),
    # not from zero where a norm reads the embeddings: its denominator is next to zero there, and no sum converges
    [("bert", "zero"), ("bert", "mask"), ("albert", "zero"), ("roberta-prelayernorm", "mask")],
)
def test_integrated_gradients_sum_to_the_difference_of_the_answers(family, baseline, output):
    model, inputs = classifier(family), token_batch((5,))
    states = states_of(model, inputs)
    with torch.no_grad():
        column = int(model(**inputs).logits.argmax())
    masked = {**inputs, "input_ids": torch.full_like(inputs["input_ids"], 1)}
    start = torch.zeros_like(states) if baseline == "zero" else states_of(model, masked)
    difference = answer_from(model, inputs, states, column, output) - answer_from(model, inputs, start, column, output)
    given = {"output": output, "baseline": baseline, "mask_token_id": 1}
    total = integrated_gradients(model, steps=300, **given, **inputs).sum()
    assert float(total) == pytest.approx(float(difference), rel=1e-3, abs=1e-6)


def test_integrated_gradients_from_mask_tokens_leave_special_tokens_out():
    model, inputs = classifier(), token_batch((6, 4))
    special = torch.zeros_like(inputs["input_ids"])
    special[:, 0] = 1
    given = {"baseline": "mask", "mask_token_id": 1, "special_tokens_mask": special}
    scores = integrated_gradients(model, **given, **inputs)
    assert bool((scores[:, 0] == 0).all())
    assert bool((scores[0, 1:] != 0).all())


@pytest.mark.parametrize("removal", ["mask", "delete"])
def test_occlusion_of_a_sum_is_its_parts(adding, removal):  # noqa: F811
    """The logit of class 1 is the sum of the tokens' weights."""
    inputs = text(STRONG, NOTHING, WEAK)
    scores = occlusion(adding, removal=removal, mask_token_id=MASK, **inputs)
    assert scores.tolist() == [[0, 3, 0, 1, 0]]
    against = occlusion(adding, label=torch.tensor([0]), removal=removal, mask_token_id=MASK, **inputs)
    assert against.tolist() == [[0, 0, 0, 0, 0]]  # the logit of class 0 is always zero
    probable = occlusion(adding, output="probability", removal=removal, mask_token_id=MASK, **inputs)
    assert probable[0].tolist() == pytest.approx([0, p(4) - p(1), 0, p(4) - p(3), 0])


def test_occlusion_reads_each_changed_text_once(adding):  # noqa: F811
    adding.read = []
    occlusion(adding, mask_token_id=MASK, batch_tokens=1, **text(STRONG, NOTHING, WEAK))
    assert len(adding.read) == 1 + 3


def test_occlusion_of_a_text_of_one_token_that_cannot_be_deleted(adding):  # noqa: F811
    ids = torch.tensor([[STRONG]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert occlusion(adding, removal="delete", **inputs).tolist() == [[0]]
    assert occlusion(adding, mask_token_id=MASK, **inputs).tolist() == [[3]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", MEASURES)
def test_in_a_batch(family, name):
    model, measure = classifier(family), MEASURES[name]
    together = measure(model, **token_batch((9, 4, 6)))
    assert together.dtype == torch.float64
    for row, length in enumerate((9, 4, 6)):
        alone = measure(model, **token_batch((length,)))
        assert_rows_close(together[row : row + 1, :length], alone, 1e-9)
        assert bool((together[row, length:] == 0).all())


@pytest.mark.parametrize("name", MEASURES)
def test_the_model_is_left_as_it_was(name):
    model = classifier().train()
    before = attention_state(model)
    MEASURES[name](model, **token_batch((5,)))
    assert attention_state(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("name", MEASURES)
def test_regression_models_have_scores_of_their_number_alone(name):
    model = classifier(num_labels=1, problem_type="regression")
    assert MEASURES[name](model, **token_batch((5,))).shape == (1, 5)
    with pytest.raises(ValueError, match="output must be 'logit' for BertForSequenceClassification"):
        MEASURES[name](model, output="probability", **token_batch((5,)))


@pytest.mark.parametrize(
    ("measure", "options", "message"),
    [
        (gradient_times_input, {"output": "loss"}, "output must be one of logit, probability; got 'loss'"),
        (integrated_gradients, {"output": "loss"}, "output must be one of logit, probability; got 'loss'"),
        (integrated_gradients, {"baseline": "pad"}, "baseline must be one of zero, mask; got 'pad'"),
        (integrated_gradients, {"steps": 0}, "steps must be a positive whole number, got 0"),
        (integrated_gradients, {"steps": True}, "steps must be a positive whole number, got True"),
        (integrated_gradients, {"baseline": "mask"}, "mask_token_id is needed for baseline 'mask': give the tokenizer"),
        (integrated_gradients, {"baseline": "mask", "mask_token_id": 999}, "mask_token_id must be in 0.."),
        (
            integrated_gradients,
            {"baseline": "mask", "mask_token_id": 1, "special_tokens_mask": torch.zeros(1, 2)},
            r"special_tokens_mask must have shape \[batch, n\] = \[1, 5\], got \[1, 2\]",
        ),
        (occlusion, {"output": "loss"}, "output must be one of logit, probability; got 'loss'"),
        (occlusion, {}, "mask_token_id is needed for removal 'mask'"),
        (occlusion, {"removal": "blank"}, "removal must be one of mask, delete"),
        (occlusion, {"mask_token_id": 1, "label": "gold"}, 'label must be "predicted" or a tensor of classes'),
        (occlusion, {"mask_token_id": 1, "special_tokens_mask": torch.zeros(1, 2)}, "special_tokens_mask must have"),
    ],
)
def test_refuses(measure, options, message):
    with pytest.raises(ValueError, match=message):
        measure(classifier(), **options, **token_batch((5,)))


def test_mask_tokens_need_ids():
    model, inputs = classifier(), token_batch((5,))
    given = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]), "mask_token_id": 1}
    with pytest.raises(ValueError, match="give input_ids, or baseline='zero'"):
        integrated_gradients(model, baseline="mask", **given)
    with pytest.raises(ValueError, match="texts are changed token by token"):
        occlusion(model, **given)


def test_a_bare_encoder_has_no_answer():
    with pytest.raises(ValueError, match="BertModel has no logits"):
        integrated_gradients(tiny_model("bert"), **token_batch((5,)))
    with pytest.raises(ValueError, match="BertModel has no class logits"):
        occlusion(tiny_model("bert"), mask_token_id=1, **token_batch((5,)))


def test_a_gradient_in_one_thread_is_of_its_own_text():
    model = classifier(FAMILIES[0])
    batches = [token_batch((n,)) for n in (4, 7, 9)]
    measures = (gradient_times_input, hta_maps)

    def values() -> list[torch.Tensor]:
        return [measure(model, **inputs) for inputs in batches for measure in measures]

    alone, found = values(), []

    def work() -> None:
        for _ in range(10):
            found.append(all(torch.equal(*pair) for pair in zip(values(), alone, strict=True)))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 30
    assert all(found)
