"""What a model answers: a class, labels above a half, or a number, whatever its class and configuration look like."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import CONFIGS, randomize, save_letter_model, tiny_model, token_batch
from rich.console import Console
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput

import globenc
from globenc import compare_methods, evaluate
from globenc.metrics import aopc, saliency
from globenc.predictions import Prediction, head_of, in_words, kind_of, predictions_of
from globenc.render.html import page
from globenc.render.terminal import show

TEXTS = ["a charming and often affecting journey", "unflinchingly bleak", "slow"]
LABELS = {0: "toxic", 1: "insult", 2: "threat"}
MULTI = {"num_labels": 3, "id2label": LABELS, "problem_type": "multi_label_classification"}


def classifier(head: str = "SequenceClassification", **config) -> transformers.PreTrainedModel:
    return tiny_model("bert", head=head, **config)


def logits(model, wordpiece) -> torch.Tensor:
    with torch.no_grad():
        found = [model(**wordpiece(text, return_tensors="pt"), return_dict=True).logits for text in TEXTS]
    return torch.cat(found)


def printed(attribution) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    show(attribution, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def everywhere(attribution) -> list[str]:
    """The answer as it stands on the terminal, on the page and in the figure."""
    in_page = page(attribution)
    heading = in_page[in_page.index("<bdi>") + 5 : in_page.index("</bdi>")]
    title = attribution.plot()._suptitle.get_text().split(" · ")[0]  # type: ignore[union-attr]
    return [printed(attribution).splitlines()[0], heading, title]


# --- kinds of answers ---


@pytest.mark.parametrize("config", [{"num_labels": 1}, {"num_labels": 1, "problem_type": "regression"}], ids=str)
def test_a_number(wordpiece, config):
    model = classifier(**config)
    expected = logits(model, wordpiece)[:, 0].tolist()
    for a, value in zip(globenc.GlobEnc(model, wordpiece)(TEXTS), expected, strict=True):
        assert a.value == pytest.approx(value, rel=1e-10)
        assert (a.label, a.probability, a.labels) == (None, None, None)
        assert json.loads(a.to_json())["value"] == a.value
        assert everywhere(a) == [f"value {value:.4g}"] * 3
        assert f"value={a.value!r}" in repr(a)


def test_several_numbers(wordpiece):
    model = classifier(num_labels=3, problem_type="regression")
    a = globenc.GlobEnc(model, wordpiece)(TEXTS[0])
    assert a.value == pytest.approx(logits(model, wordpiece)[0].tolist(), rel=1e-10)
    assert printed(a).startswith("values ")


def test_labels_above_a_half(wordpiece):
    model = classifier(**MULTI)
    with torch.no_grad():
        model.classifier.bias += torch.tensor([4.0, 2.0, -4.0]) - logits(model, wordpiece).mean(0)
    (first, *_) = globenc.GlobEnc(model, wordpiece)(TEXTS)
    shares = logits(model, wordpiece)[0].sigmoid()
    expected = sorted(((float(shares[k]), LABELS[k]) for k in range(3) if shares[k] > 0.5), reverse=True)
    assert len(expected) == 2
    assert [label for label, _ in first.labels] == [label for _, label in expected]
    assert [share for _, share in first.labels] == pytest.approx([share for share, _ in expected], rel=1e-10)
    assert (first.label, first.value) == (first.labels[0][0], None)
    assert first.probability == first.labels[0][1]
    read = json.loads(first.to_json())["labels"]
    assert read == [{"label": label, "probability": share} for label, share in first.labels]
    assert everywhere(first) == [", ".join(f"{label} {share:.1%}" for label, share in first.labels)] * 3


def test_no_label_above_a_half_is_said(wordpiece):
    model = classifier(**MULTI)
    with torch.no_grad():
        model.classifier.bias += torch.tensor([-2.0, -3.0, -4.0]) - logits(model, wordpiece).amax(0)
    a = globenc.GlobEnc(model, wordpiece)(TEXTS[0])
    assert a.labels == []
    assert everywhere(a) == [f"no label above 50%, highest: {a.label} {a.probability:.1%}"] * 3
    assert "labels=[]" in repr(a)


def test_one_label_of_its_own_is_a_label(wordpiece):
    """A yes or no by one logit, trained as multi-label."""
    model = classifier(num_labels=1, id2label={0: "spam"}, problem_type="multi_label_classification")
    a = globenc.GlobEnc(model, wordpiece)(TEXTS[0])
    assert (a.label, a.value) == ("spam", None)
    assert a.probability == pytest.approx(float(logits(model, wordpiece)[0].sigmoid()), rel=1e-10)


def test_a_head_of_one_output_is_never_100_percent_sure(wordpiece):
    """The configuration says two labels, or one, where a softmax over the head's single logit would be 1."""
    for count in (2, 1):
        model = classifier(num_labels=count)
        model.config.problem_type = "single_label_classification"
        model.classifier = nn.Linear(24, 1).double()
        a = globenc.GlobEnc(model, wordpiece)(TEXTS[0])
        assert (a.label, a.probability) == (None, None)
        assert a.value == pytest.approx(float(logits(model, wordpiece)[0, 0]), rel=1e-10)


@pytest.mark.parametrize(
    "names",
    [{"0": "no", "1": "yes", "2": "perhaps"}, {0: "no"}, ["no", "yes", "perhaps"], None, {0: None, 1: 7, 2: "perhaps"}],
    ids=str,
)
def test_names_of_labels_in_any_form(wordpiece, names):
    model = classifier(num_labels=3)
    model.config.id2label = names
    best = int(logits(model, wordpiece)[0].argmax())
    given = dict(enumerate(names)) if isinstance(names, list) else names or {}
    expected = given.get(best, given.get(str(best)))
    a = globenc.GlobEnc(model, wordpiece)(TEXTS[0])
    assert a.label == (f"LABEL_{best}" if expected is None else str(expected))


@pytest.mark.parametrize("config", [{}, {"num_labels": 1}, MULTI], ids=str)
def test_numbers_that_are_none_are_told(wordpiece, config):
    model = classifier(**config)
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        globenc.GlobEnc(model, wordpiece)(TEXTS[0])
    inputs = wordpiece(TEXTS[0], return_tensors="pt")
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        saliency(model, **inputs)


# --- classes of models ---


class Sentiment(transformers.BertForSequenceClassification):
    """A subclass whose name says nothing."""


class Own(transformers.BertPreTrainedModel):
    """A head of the user's own, which returns what `form` says."""

    form = "named"

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.top = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        states = self.bert(input_ids, attention_mask, token_type_ids, return_dict=True).last_hidden_state
        scores = self.top(states[:, 0])
        return {
            "named": SequenceClassifierOutput(logits=scores),
            "mapping": {"logits": scores},
            "squeezed": SequenceClassifierOutput(logits=scores.squeeze(-1)),
            "tuple": (states.mean(1), scores),
            "bare": scores,
            "tokens": SequenceClassifierOutput(logits=states[..., 0]),
        }[self.form]


def own(form: str, **config) -> Own:
    make, options = CONFIGS["bert"]
    model = type("OwnModel", (Own,), {"form": form})(make(**{**options, **config}))
    randomize(model)
    return model.double().eval()


def test_a_subclass_answers_as_its_parent(wordpiece):
    parent = classifier(id2label={0: "bad", 1: "good"})
    child = Sentiment(parent.config).double().eval()
    child.load_state_dict(parent.state_dict())
    ours, theirs = (globenc.GlobEnc(model, wordpiece)(TEXTS[0]) for model in (child, parent))
    assert (ours.label, ours.probability) == (theirs.label, theirs.probability)


@pytest.mark.parametrize("form", ["named", "mapping", "tuple", "bare"])
def test_a_head_of_the_users_own(wordpiece, form):
    model = own(form, id2label={0: "bad", 1: "so-so", 2: "good"})
    for text, a in zip(TEXTS, globenc.GlobEnc(model, wordpiece)(TEXTS), strict=True):
        with torch.no_grad():
            inputs = wordpiece(text, return_tensors="pt")
            states = model.bert(**inputs).last_hidden_state[:, 0]
            share, best = model.top(states)[0].softmax(-1).max(-1)
        assert a.label == model.config.id2label[int(best)]
        assert a.probability == pytest.approx(float(share), rel=1e-10)


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=len)
def test_a_head_that_squeezes(wordpiece, texts):
    model = own("squeezed", num_labels=1)
    values = [a.value for a in globenc.GlobEnc(model, wordpiece)(texts)]
    assert all(isinstance(value, float) for value in values)
    assert len(set(values)) == len(texts)


def test_numbers_of_tokens_are_no_answer(wordpiece):
    a = globenc.GlobEnc(own("tokens"), wordpiece)(TEXTS[0])
    assert (a.label, a.value, a.labels) == (None, None, None)


def test_heads_are_known_by_what_a_class_is():
    assert head_of(Sentiment(transformers.BertConfig(**CONFIGS["bert"][1]))) == "SequenceClassification"
    assert head_of(own("named")) is None
    for head in ("TokenClassification", "MaskedLM", "NextSentencePrediction", "PreTraining", "QuestionAnswering"):
        model = tiny_model("electra" if head == "PreTraining" else "bert", head=head)
        assert (head_of(model), kind_of(model)) == (head, None)
    assert kind_of(tiny_model("bert")) is None


def test_scores_of_tokens_are_no_answer_of_an_electra_discriminator(wordpiece):
    """Its logits are [batch, n]: with as many labels as tokens they look like a classifier's."""
    n = len(wordpiece(TEXTS[2])["input_ids"])
    model = tiny_model("electra", head="PreTraining", num_labels=n)
    assert globenc.GlobEnc(model, wordpiece)(TEXTS[2]).label is None


def test_answers_of_a_stranger_model():
    model = SimpleNamespace(config=SimpleNamespace(), base_model=None)
    assert predictions_of(model, SimpleNamespace(logits=None), 2) == [Prediction(), Prediction()]
    assert in_words(Prediction()) is None


# --- models that return tuples ---


@pytest.fixture
def tupled(wordpiece):
    """A classifier whose configuration asks for tuples, and its answers where it does not."""
    model = classifier(id2label={0: "bad", 1: "good"})
    expected = globenc.GlobEnc(model, wordpiece)(TEXTS[0])
    model.config.return_dict = False
    return model, expected


def test_return_dict_false(tupled, wordpiece):
    model, expected = tupled
    a = globenc.GlobEnc(model, wordpiece)(TEXTS[0])
    assert (a.label, a.probability) == (expected.label, expected.probability)
    np.testing.assert_array_equal(a.scores, expected.scores)
    inputs = wordpiece(TEXTS[0], return_tensors="pt")
    assert globenc.attribute(model, **inputs).model_output.logits.shape == (1, 2)
    assert compare_methods(model, **inputs).model_output.logits.shape == (1, 2)
    assert isinstance(globenc.attribute(model, **inputs, return_dict=False).model_output, tuple)
    assert model.config.return_dict is False


def test_return_dict_false_in_evaluation(tupled, wordpiece):
    model, expected = tupled
    inputs = wordpiece(TEXTS[0], return_tensors="pt")
    found = saliency(model, **inputs), aopc(model, expected.scores[None], mask_token_id=4, **inputs).values
    model.config.return_dict = True
    torch.testing.assert_close(found[0], saliency(model, **inputs), rtol=0, atol=0)
    np.testing.assert_array_equal(found[1], aopc(model, expected.scores[None], mask_token_id=4, **inputs).values)


@pytest.mark.parametrize("compute", [globenc.attribute, saliency], ids=lambda f: f.__name__)
def test_models_that_cannot_return_tuples_say_so(compute):
    """In transformers, ModernBertForSequenceClassification itself fails then."""
    model = tiny_model("modernbert", head="SequenceClassification")
    model.config.return_dict = False
    with pytest.raises(
        ValueError, match=r"cannot run with config.return_dict=False .* set model.config.return_dict = T"
    ):
        compute(model, **token_batch((6,)))
    model.config.return_dict = True
    compute(model, **token_batch((6,)))


# --- evaluation ---


def test_saliency_of_probabilities_goes_by_the_kind():
    inputs = token_batch((7, 4))
    with pytest.raises(ValueError, match="output must be 'logit' for BertForSequenceClassification: it answers with a"):
        saliency(classifier(num_labels=1), output="probability", **inputs)
    assert float(saliency(classifier(num_labels=1), **inputs).sum()) > 0
    model = classifier(**MULTI)
    with torch.no_grad():
        best = model(**inputs).logits.max(-1).values.sigmoid()
    by_logit, by_share = (saliency(model, output=output, **inputs) for output in ("logit", "probability"))
    torch.testing.assert_close(by_share, by_logit * (best * (1 - best))[:, None], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            classifier(num_labels=1),
            {},
            "must choose between classes to be evaluated; BertForSeq.* answers with a number",
        ),
        (
            classifier(head="TokenClassification"),
            {},
            "must be a text classifier to be evaluated, got BertForTokenClass",
        ),
        (tiny_model("bert"), {}, "must be a text classifier to be evaluated, got BertModel"),
        (
            classifier(**MULTI),
            {"label_column": "label"},
            r"label_column must be left out .*\(multi_label_classification\)",
        ),
    ],
    ids=["number", "tokens", "bare", "labels"],
)
def test_evaluate_says_what_it_cannot_take(wordpiece, tmp_path, model, options, message):
    rows = [{"text": text, "label": 0} for text in TEXTS]
    with pytest.raises(ValueError, match=message):
        evaluate(rows, tmp_path / "out", model=globenc.GlobEnc(model, wordpiece), progress=False, **options)


def test_evaluate_takes_a_head_of_the_users_own(wordpiece, tmp_path):
    model = own("named")
    rows = [{"text": text} for text in TEXTS]
    explainer = globenc.GlobEnc(model, wordpiece)
    found = evaluate(
        rows, tmp_path / "out", model=explainer, methods=["N-Enc"], metrics=["correlation"], progress=False
    )
    assert {row["count"] for row in found.results["correlation"]["rollout"]["N-Enc"]} == {len(TEXTS)}


# --- corpora ---


def extracted(model, wordpiece, folder, **options):
    rows = [{"text": text} for text in TEXTS]
    globenc.extract(
        rows, folder, model=globenc.GlobEnc(model, wordpiece), progress=False, shard_rows=2, engine="local", **options
    )
    return globenc.load_extract(folder)


def test_columns_of_numbers(wordpiece, tmp_path):
    model = classifier(num_labels=1)
    table = extracted(model, wordpiece, tmp_path / "one")
    assert str(table.schema.field("value").type) == "double"
    np.testing.assert_allclose(table["value"].to_pylist(), logits(model, wordpiece)[:, 0], rtol=1e-6)
    assert table["label"].null_count == table["probability"].null_count == 3
    model = classifier(num_labels=2, problem_type="regression")
    table = extracted(model, wordpiece, tmp_path / "two")
    assert str(table.schema.field("value").type) in ("list<element: double>", "list<item: double>")
    np.testing.assert_allclose(table["value"].to_pylist(), logits(model, wordpiece), rtol=1e-6)


def test_columns_of_labels(wordpiece, tmp_path):
    model = classifier(**MULTI)
    with torch.no_grad():
        model.classifier.bias += torch.tensor([4.0, 0.0, -4.0]) - logits(model, wordpiece).mean(0)
    table = extracted(model, wordpiece, tmp_path / "out")
    results = globenc.GlobEnc(model, wordpiece)(TEXTS)
    assert table["labels"].to_pylist() == [[label for label, _ in a.labels] for a in results]
    for row, a in zip(table["label_probabilities"].to_pylist(), results, strict=True):
        assert row == pytest.approx([share for _, share in a.labels], rel=1e-6)
    assert table["label"].to_pylist() == [a.label for a in results]
    assert "value" not in table.column_names


def test_classes_have_the_columns_they_had(wordpiece, tmp_path):
    table = extracted(classifier(), wordpiece, tmp_path / "out")
    assert {"label", "probability"} <= set(table.column_names)
    assert not {"value", "labels", "label_probabilities"} & set(table.column_names)


def test_answers_of_another_kind_than_the_configuration_says_end_a_run(wordpiece, tmp_path):
    model = classifier(num_labels=2)
    model.classifier = nn.Linear(24, 1).double()
    with pytest.raises(
        ValueError, match=r"BertForSequenceClassification answers 'value .* is not what its configuration"
    ):
        extracted(model, wordpiece, tmp_path / "out")


class HandsOn(transformers.BertForSequenceClassification):
    """A class of the user's own, which hands everything on."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_forward_that_hands_everything_on(tmp_path):
    plain = globenc.GlobEnc.from_pretrained(save_letter_model(tmp_path))
    own = HandsOn(plain.model.config).eval()
    own.load_state_dict(plain.model.state_dict())
    explainer = globenc.GlobEnc(own, plain.tokenizer)
    for pair in (None, "c d"):
        found, expected = explainer("a b", pair), plain("a b", pair)
        np.testing.assert_array_equal(found.scores, expected.scores)  # token types are passed on too
        assert (found.label, found.probability) == (expected.label, expected.probability)
    with pytest.raises(TypeError, match="HandsOn takes no input 'input_idz', did you mean 'input_ids'"):
        globenc.attribute(own, input_idz=torch.ones(1, 3, dtype=torch.long))
