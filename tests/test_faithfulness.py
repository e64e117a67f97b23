"""AOPC, comprehensiveness and sufficiency on a model whose answers are known by reasoning."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import tiny_model
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import globenc
from globenc.metrics import aopc, comprehensiveness, sufficiency
from globenc.metrics.faithfulness import MEASURES, removal_drops

MASK, CLS, SEP, PAD, STRONG, WEAK, NOTHING = 1, 2, 3, 0, 10, 11, 12
WEIGHTS = {STRONG: 3.0, WEAK: 1.0}


class Adding(BertForSequenceClassification):
    """Its logit of class 1 is the sum of its tokens' weights; that of class 0 is zero."""

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None):
        weights = torch.zeros(20, dtype=torch.float64)
        for token, weight in WEIGHTS.items():
            weights[token] = weight
        self.read = [*getattr(self, "read", []), input_ids]
        total = (weights[input_ids] * attention_mask).sum(-1)
        return SequenceClassifierOutput(logits=torch.stack([torch.zeros_like(total), total], -1))


@pytest.fixture
def adding():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Adding(BertConfig(**sizes, intermediate_size=8, pad_token_id=PAD, num_labels=2))


def text(*inside: int) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[CLS, *inside, SEP]])
    special = ((ids == CLS) | (ids == SEP)).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "special_tokens_mask": special}


def p(total: float) -> float:
    return 1 / (1 + math.exp(-total))


TEN = text(NOTHING, NOTHING, STRONG, *[NOTHING] * 7)  # one of ten tokens says everything
RIGHT = torch.zeros(1, 12)
RIGHT[0, 3] = 1.0


@pytest.mark.parametrize("removal", ["mask", "delete"])
def test_one_token_that_says_everything(adding, removal):
    options = {"removal": removal, "mask_token_id": MASK, **TEN}
    everything = p(3) - p(0)
    found = aopc(adding, RIGHT, **options)
    assert found.drops[:, 0] == pytest.approx([everything] * 9)
    assert (found.mean, found.std, found.undefined) == (pytest.approx(everything), 0, 0)
    assert aopc(adding, RIGHT, order="least", **options).drops[:, 0] == pytest.approx([0] * 9)
    assert aopc(adding, -RIGHT, **options).mean == pytest.approx(0)
    assert comprehensiveness(adding, RIGHT, **options).drops[:, 0] == pytest.approx([everything] * 5)
    assert sufficiency(adding, RIGHT, **options).drops[:, 0] == pytest.approx([0] * 5)
    # the lowest token alone says nothing, nor do the lowest five
    assert sufficiency(adding, -RIGHT, **options).drops[:, 0] == pytest.approx([everything] * 5)


def test_how_many_tokens_go(adding):
    """Of ten tokens with weight 1 a share of K goes, at least one, and each lowers the logit by 1."""
    scores = torch.arange(12.0).flip(0)[None]
    found = aopc(adding, scores, shares=(0.01, 0.1, 0.14, 0.15, 0.5, 1.0), mask_token_id=MASK, **text(*[WEAK] * 10))
    assert found.drops[:, 0] == pytest.approx([p(10) - p(10 - gone) for gone in (1, 1, 1, 2, 5, 10)])


def test_order_of_two(adding):
    inputs = text(STRONG, WEAK)
    scores = torch.tensor([[9.0, 2.0, 1.0, 9.0]])  # the special tokens' scores do not matter
    found = aopc(adding, scores, shares=(0.5, 1.0), mask_token_id=MASK, **inputs)
    assert found.drops[:, 0] == pytest.approx([p(4) - p(1), p(4) - p(0)])
    least = aopc(adding, scores, order="least", shares=(0.5, 1.0), mask_token_id=MASK, **inputs)
    assert least.drops[:, 0] == pytest.approx([p(4) - p(3), p(4) - p(0)])


def test_special_tokens_stay_and_deleting_closes_the_gap(adding):
    removal_drops(adding, {"s": RIGHT}, MEASURES, removal="delete", **TEN)
    for ids in torch.cat([batch.flatten(0, -2) for batch in adding.read if batch.shape[1] == 12]):
        assert ids.tolist()[0] == CLS
    for batch in adding.read:
        for ids in batch:
            real = ids[ids != PAD].tolist()
            assert real[0] == CLS
            assert real[-1] == SEP
            assert MASK not in real
    adding.read = []
    removal_drops(adding, {"s": RIGHT}, MEASURES, mask_token_id=MASK, **TEN)
    assert {batch.shape[1] for batch in adding.read} == {12}


def test_a_changed_text_is_read_once(adding):
    once = removal_drops(adding, {"a": RIGHT}, MEASURES, mask_token_id=MASK, **TEN)
    rows = [tuple(ids.tolist()) for batch in adding.read for ids in batch]
    assert len(rows) == len({(k, row) for k, row in enumerate(rows)})
    count, adding.read = len(rows), []
    twice = removal_drops(adding, {"a": RIGHT, "b": RIGHT * 2}, MEASURES, mask_token_id=MASK, **TEN)
    assert sum(len(batch) for batch in adding.read) == count
    for kind in MEASURES:
        np.testing.assert_array_equal(twice["b"][kind], once["a"][kind])


def test_class_of_the_answer(adding):
    """A text that the model answers with class 0, and its gold class 1."""
    WEIGHTS[WEAK + 5] = -2.0
    try:
        inputs = text(WEAK + 5, NOTHING)
        scores = torch.tensor([[0.0, 1.0, 0.5, 0.0]])
        own = aopc(adding, scores, shares=(0.5,), mask_token_id=MASK, **inputs)
        gold = aopc(adding, scores, shares=(0.5,), mask_token_id=MASK, label=torch.tensor([1]), **inputs)
    finally:
        del WEIGHTS[WEAK + 5]
    assert own.mean == pytest.approx(p(2) - p(0))
    assert gold.mean == pytest.approx(p(-2) - p(0))


def test_a_text_without_removable_tokens_is_counted(adding):
    ids = torch.tensor([[CLS, SEP, PAD], [CLS, STRONG, SEP]])
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "special_tokens_mask": (ids < 4).long()}
    found = aopc(adding, np.ones((2, 3)), mask_token_id=MASK, **inputs)
    assert found.undefined == 1
    assert np.isnan(found.values[0])
    assert found.mean == pytest.approx(p(3) - p(0))
    nothing = aopc(adding, np.ones((1, 2)), mask_token_id=MASK, **text())
    assert math.isnan(nothing.mean)


def test_deleting_leaves_something_to_read(adding):
    found = aopc(
        adding,
        torch.tensor([[2.0, 1.0]]),
        removal="delete",
        shares=(1.0,),
        input_ids=torch.tensor([[STRONG, WEAK]]),
        attention_mask=torch.ones(1, 2, dtype=torch.long),
    )
    assert found.mean == pytest.approx(p(4) - p(1))


@pytest.mark.parametrize("removal", ["mask", "delete"])
def test_by_hand_on_a_real_model(removal):
    """The default model: every changed text written down and read alone."""
    explainer = globenc.GlobEnc.from_pretrained()
    tokenizer, model = explainer.tokenizer, explainer.model
    inputs = tokenizer(["a charming and often affecting journey"], return_tensors="pt", return_special_tokens_mask=True)
    special = inputs.pop("special_tokens_mask")
    scores = globenc.attribute(model, **inputs).scores
    found = aopc(
        model, scores, removal=removal, mask_token_id=tokenizer.mask_token_id, special_tokens_mask=special, **inputs
    )
    ids = inputs["input_ids"][0].tolist()
    inside = [k for k in range(len(ids)) if not special[0, k]]
    ranked = sorted(inside, key=lambda k: -float(scores[0, k]))

    def probabilities(changed):
        with torch.no_grad():
            return model(input_ids=torch.tensor([changed])).logits[0].softmax(-1)

    whole = probabilities(ids)
    answer = int(whole.argmax())
    for drop, tenths in zip(found.drops[:, 0], range(1, 10), strict=True):
        gone = set(ranked[: max(1, round(tenths * len(inside) / 10 + 1e-9))])
        if removal == "mask":
            changed = [tokenizer.mask_token_id if k in gone else token for k, token in enumerate(ids)]
        else:
            changed = [token for k, token in enumerate(ids) if k not in gone]
        assert drop == pytest.approx(float(whole[answer] - probabilities(changed)[answer]), abs=2e-6)


def test_padding_on_either_side_and_alone():
    explainer = globenc.GlobEnc.from_pretrained()
    tokenizer, model = explainer.tokenizer, explainer.model
    texts = ["a charming and often affecting journey", "dull"]
    values = {}
    for side in ("right", "left"):
        batch = tokenizer(texts, padding=True, padding_side=side, return_tensors="pt", return_special_tokens_mask=True)
        special = batch.pop("special_tokens_mask")
        scores = batch["input_ids"].double()  # any order that follows the tokens
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # of shifted positions, which repacking mends
            values[side] = aopc(
                model, scores, mask_token_id=tokenizer.mask_token_id, special_tokens_mask=special, **batch
            ).values
    single = tokenizer(texts[1], return_tensors="pt", return_special_tokens_mask=True)
    special = single.pop("special_tokens_mask")
    alone = aopc(
        model, single["input_ids"], mask_token_id=tokenizer.mask_token_id, special_tokens_mask=special, **single
    )
    np.testing.assert_allclose(values["left"], values["right"], atol=1e-6)
    np.testing.assert_allclose(alone.values, values["right"][1:], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "best"}, "order must be one of most, least"),
        ({"removal": "blur"}, "removal must be one of mask, delete"),
        ({"mask_token_id": None}, "mask_token_id is needed"),
        ({"mask_token_id": 99}, "mask_token_id must be in 0..19"),
        ({"shares": ()}, "shares must be numbers above 0"),
        ({"shares": (0.0,)}, "shares must be numbers above 0"),
        ({"scores": torch.ones(1, 3)}, r"must have shape \[batch, n\] = \[1, 12\]"),
        ({"scores": RIGHT * math.nan}, "hold NaN"),
        ({"special_tokens_mask": torch.ones(1, 2)}, "special_tokens_mask must have shape"),
        ({"label": torch.tensor([7])}, r"label must be in 0\.\.1"),
        ({"position_ids": torch.arange(12)[None]}, "token by token"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(options, message):
    model = tiny_model("bert", head="SequenceClassification", vocab_size=20)
    arguments = {"scores": RIGHT, "mask_token_id": MASK, **TEN, **options}
    with pytest.raises(ValueError, match=message):
        aopc(model, arguments.pop("scores"), **arguments)


def test_refuses_regression():
    model = tiny_model("bert", head="SequenceClassification", num_labels=1, vocab_size=20)
    with pytest.raises(ValueError, match="does not choose between classes"):
        aopc(model, RIGHT, mask_token_id=MASK, **TEN)
