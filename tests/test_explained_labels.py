"""Class scores of `GlobEnc`: which label is explained, for every head, and that scores and remainder are its logit."""

from __future__ import annotations

import copy

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from helpers import tiny_model, tiny_vision
from test_predictions import own
from transformers import ViTConfig

import globenc

TEXTS = [
    "a charming journey .",
    "bleak",
    "unflinchingly bleak and desperate",
    "it 's slow -- very , very slow .",
    "a film",
    "the music",
]


@pytest.fixture
def three(wordpiece) -> globenc.GlobEnc:
    """A classifier of three labels, two of which differ by their case alone."""
    names = {0: "bad", 1: "Good", 2: "good"}
    return globenc.GlobEnc(tiny_model("bert", head="SequenceClassification", id2label=names, num_labels=3), wordpiece)


def masked(family: str, tokenizer, **options) -> globenc.GlobEnc:
    return globenc.GlobEnc(tiny_model(family, head="MaskedLM", **options), tokenizer)


def logits_of(explainer: globenc.GlobEnc, *texts: str) -> torch.Tensor:
    model = copy.deepcopy(explainer.model)  # BigBird's changes itself at short texts
    with torch.no_grad():
        return model(**explainer.tokenizer(*texts, return_tensors="pt")).logits[0]


def assert_complete(
    a: globenc.Attribution | globenc.ImageAttribution, logit: float | None = None, within: float = 1e-10
) -> None:
    assert a.class_scores.shape == (len(a),)
    assert a.class_scores.sum() + a.remainder == pytest.approx(a.logit, abs=1e-10)
    if logit is not None:
        assert a.logit == pytest.approx(float(logit), abs=within)


@pytest.mark.parametrize("reference", ["zero", "model", "origin"])
def test_scores_and_remainder_are_the_predicted_labels_logit(explainer, reference):
    for text, a in zip(TEXTS, explainer(TEXTS, reference=reference), strict=True):
        assert (a.explained_label, a.reference) == (a.label, reference)
        assert_complete(a, logits_of(explainer, text).max())
        assert sum(word.class_score for word in a.words()) + a.remainder == pytest.approx(a.logit)


def test_they_are_those_of_the_function(explainer):
    a = explainer(TEXTS[0], "its pair", label="good", reference="origin")
    inputs = explainer.tokenizer(TEXTS[0], "its pair", return_tensors="pt")
    out = globenc.class_scores(explainer.model, label=1, reference="origin", **inputs)
    np.testing.assert_allclose(a.class_scores, out.scores[0].numpy(), atol=1e-12)
    assert a.remainder == pytest.approx(float(out.remainder))


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "big_bird"])
@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_neighbours_and_padding_change_nothing(family, budget, wordpiece):
    explainer = globenc.GlobEnc(tiny_model(family, head="SequenceClassification"), wordpiece)
    labels = [k % 2 for k in range(len(TEXTS))]
    within = 1e-6 if family == "modernbert" else 1e-10  # its own norms and rotations round to float32
    for k, a in enumerate(explainer(TEXTS, label=labels, batch_tokens=budget)):
        alone = explainer(TEXTS[k], label=labels[k])
        np.testing.assert_allclose(a.class_scores, alone.class_scores, atol=1e-10)
        assert a.explained_label == alone.explained_label == f"LABEL_{labels[k]}"
        assert_complete(a, logits_of(explainer, TEXTS[k])[labels[k]], within)


def test_a_cut_text_is_explained_as_it_was_read(explainer):
    with pytest.warns(UserWarning, match="cut"):
        a = explainer(TEXTS[3], max_length=8)
    assert len(a.class_scores) == 8
    assert_complete(a)


@pytest.mark.parametrize("position", ["mean", "all", 1, [0, -1]])
def test_positions_change_no_class_scores(explainer, position):
    a, by_cls = explainer(TEXTS[0], position=position), explainer(TEXTS[0])
    np.testing.assert_array_equal(a.class_scores, by_cls.class_scores)


def test_labels_by_name_number_and_text(three):
    given = ["bad", 1, "2", "good", np.int64(0), "BAD"]
    wanted = ["bad", "Good", "good", "good", "bad", "bad"]
    assert [a.explained_label for a in three(TEXTS, label=given)] == wanted
    for label, name in zip(given, wanted, strict=True):
        assert three(TEXTS[0], label=label).explained_label == name
    for labels in (np.array([2] * 6), torch.full((6,), 2), ("good",) * 6, iter(["good"] * 6)):
        assert {a.explained_label for a in three(TEXTS, label=labels)} == {"good"}
    assert {a.explained_label for a in three(TEXTS, label="bad")} == {"bad"}


@pytest.mark.parametrize(
    ("label", "error", "message"),
    [
        ("nice", ValueError, r"label must be one of this model's \(0 bad, 1 Good, 2 good\), got 'nice'"),
        ("GOOD", ValueError, "label 'GOOD' is the name of several of this model's labels; give its number: 0 bad"),
        (3, ValueError, r"label must be in 0\.\.2 \(0 bad, 1 Good, 2 good\), got 3"),
        (-1, ValueError, r"label must be in 0\.\.2"),
        (True, TypeError, "label must be a number or a name, got True"),
        (1.5, TypeError, 'label must be "predicted", a number, a name, one for each text or None, got 1.5'),
        ("all", ValueError, "label must be one of this model's"),
    ],
)
def test_a_label_that_is_none_of_the_models(three, label, error, message):
    for texts in (TEXTS[0], TEXTS):
        with pytest.raises(error, match=f"^{message}"):
            three(texts, label=label)
    if not isinstance(label, float):
        with pytest.raises(error, match=f"^text 1: {message}"):
            three(TEXTS[:3], label=[0, label, 1])


def test_labels_that_do_not_go_with_the_texts(three):
    with pytest.raises(ValueError, match="label must be one for each of the 6 texts, got 2"):
        three(TEXTS, label=[0, 1])
    with pytest.raises(TypeError, match=r"label must be one number or name for a single text, got \[0\]"):
        three(TEXTS[0], label=[0])
    with pytest.raises(TypeError, match="text 1: label must be a number or a name, got None"):
        three(TEXTS[:2], label=[0, None])


def test_an_unknown_reference(three):
    with pytest.raises(ValueError, match="reference must be one of zero, model, origin; got 'mask'"):
        three("a film", reference="mask")


def test_no_label_leaves_them_out(explainer, monkeypatch):
    monkeypatch.setattr(globenc.class_score_batches, "class_scores", None)  # is not called
    a = explainer(TEXTS[0], label=None)
    assert [a.class_scores, a.explained_label, a.logit, a.remainder, a.reference] == [None] * 5
    assert a.label is not None


def test_less_goes_into_a_batch_where_memory_is_short(explainer, monkeypatch):
    monkeypatch.setattr(globenc.batching, "free_memory", lambda: 12_000_000)
    assert explainer.budget(explained=True) == explainer.budget() // 2
    monkeypatch.setattr(globenc.batching, "free_memory", lambda: None)
    assert explainer.budget(explained=True) == explainer.budget() == 4096


def test_a_bare_encoder_has_no_label(bert, wordpiece):
    explainer = globenc.GlobEnc(bert, wordpiece)
    assert explainer(TEXTS)[0].class_scores is None
    with pytest.raises(ValueError, match="BertModel has no labels to explain: give a model that classifies"):
        explainer(TEXTS, label=1)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_many_labels_and_many_values(wordpiece, problem):
    model = tiny_model("bert", head="SequenceClassification", num_labels=3, problem_type=problem)
    explainer = globenc.GlobEnc(model, wordpiece)
    a = explainer(TEXTS[0])
    logits = logits_of(explainer, TEXTS[0])
    assert a.explained_label == f"LABEL_{int(logits.argmax())}"
    assert_complete(a, logits.max())
    assert_complete(explainer(TEXTS[0], label=0), logits[0])


@pytest.mark.parametrize(("names", "shown"), [({0: "LABEL_0"}, "value"), ({0: "stars"}, "stars")])
def test_one_value(wordpiece, names, shown):
    explainer = globenc.GlobEnc(tiny_model("bert", head="SequenceClassification", id2label=names), wordpiece)
    for a in explainer(TEXTS):
        assert a.explained_label == shown
        assert_complete(a, a.value)


def test_a_tokens_label(wordpiece):
    model = tiny_model("bert", head="TokenClassification", id2label={0: "O", 1: "PER", 2: "LOC"})
    explainer = globenc.GlobEnc(model, wordpiece)
    names = model.config.id2label
    for position in (2, -2):
        for text, a in zip(TEXTS, explainer(TEXTS, position=position), strict=True):
            logits = logits_of(explainer, text)[position]
            assert a.explained_label == names[int(logits.argmax())]
            assert_complete(a, logits.max())
    assert_complete(explainer(TEXTS[0], position=1, label="LOC"), logits_of(explainer, TEXTS[0])[1, 2])
    for position in ("cls", "mean", "all", [1]):
        assert explainer(TEXTS[0], position=position).class_scores is None
        with pytest.raises(ValueError, match="position must be a token's position for a label of BertForToken"):
            explainer(TEXTS[0], position=position, label=1)


def test_a_masked_languages_label_is_a_token(wordpiece):
    explainer = masked("bert", wordpiece)
    text = "a charming [MASK] ."
    at = explainer(text).tokens.index("[MASK]")
    logits = logits_of(explainer, text)[at]
    best = int(logits[: len(wordpiece)].argmax()) if len(wordpiece) < len(logits) else int(logits.argmax())
    a = explainer(text, position=at, label=best)
    assert a.explained_label == wordpiece.convert_ids_to_tokens(best)
    assert_complete(a, logits[best])
    token = next(token for token in wordpiece.get_vocab() if len(token) == 1 and token.isalpha())
    for label in (token, token.upper(), wordpiece.convert_tokens_to_ids(token)):
        named = explainer([text, "a"], position=1, label=[label, 7])
        assert named[0].explained_label == token
        assert_complete(named[0], logits_of(explainer, text)[1, wordpiece.convert_tokens_to_ids(token)])
    assert explainer(text).class_scores is None
    for label, told in (("zz q", "tokens"), ("\u2603", "unknown")):
        with pytest.raises(ValueError, match=f"label must be a token of a masked language model, .* is .*{told}"):
            explainer(text, position=1, label=label)
    with pytest.raises(ValueError, match=r"label must be in 0\.\.89, a token's number, got 90"):
        explainer(text, position=1, label=90)


def test_an_answer_to_a_question(wordpiece):
    explainer = globenc.GlobEnc(tiny_model("bert", head="QuestionAnswering"), wordpiece)
    pair = ("a film", TEXTS[0])
    both, start, end = (explainer(*pair, label=label) for label in ("predicted", "start", "end"))
    assert [a.explained_label for a in (both, start, end)] == ["start + end", "start", "end"]
    assert both.logit == pytest.approx(start.logit + end.logit)
    for a in (both, start, end):
        assert_complete(a)
    with torch.no_grad():
        out = explainer.model(**wordpiece(*pair, return_tensors="pt"))
    assert_complete(explainer(*pair, position=3, label="start"), out.start_logits[0, 3])
    with pytest.raises(ValueError, match=r'label must be "predicted" \(start and end\), "start" or "end"'):
        explainer(*pair, label="middle")


class Pixels:
    """An image processor that knows the sizes alone."""

    do_normalize, do_rescale = False, True

    def __call__(self, image, return_tensors):
        pixels = torch.from_numpy(np.asarray(image.resize((12, 12)), np.float64).transpose(2, 0, 1).copy() / 255)
        return {"pixel_values": pixels[None]}


def test_images_have_them_too():
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=12, patch_size=4,
        id2label={0: "cat", 1: "dog", 2: "bird"},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).double().eval()
    explainer = globenc.GlobEnc(model, Pixels())
    images = [PIL.Image.new("RGB", (12, 12), color) for color in ("red", "blue", "green")]
    for a, label in zip(explainer(images, label=["dog", 0, 2], batch_tokens=10), ("dog", "cat", "bird"), strict=True):
        assert a.explained_label == label
        assert_complete(a)
        assert a.to_dict()["logit"] == a.logit
    a = explainer(images[0])
    assert a.explained_label == a.label
    with pytest.raises(ValueError, match=r"images\[1\]: label must be one of this model's \(0 cat, 1 dog, 2 bird\)"):
        explainer(images, label=["dog", "horse", 2])
    with pytest.raises(ValueError, match="needs a mask token, which images have not"):
        explainer(images, reference="model")
    assert globenc.GlobEnc(tiny_vision("vit"), Pixels())(images[0]).class_scores is None


def test_the_model_reference_takes_the_tokenizers_mask_token(explainer, monkeypatch):
    assert getattr(explainer.model.config, "mask_token_id", None) is None
    a = explainer(TEXTS[0], reference="model")
    inputs = explainer.tokenizer(TEXTS[0], return_tensors="pt")
    out = globenc.class_scores(
        explainer.model, reference="model", mask_token_id=explainer.tokenizer.mask_token_id, **inputs
    )
    np.testing.assert_allclose(a.class_scores, out.scores[0].numpy(), atol=1e-12)


def test_what_fails_without_being_asked_for_is_left_out(explainer, monkeypatch):
    def failing(*arguments, **options):
        raise RuntimeError("the scores do not sum to what is explained")

    monkeypatch.setattr(globenc.class_score_batches, "class_scores", failing)
    for texts in (TEXTS[0], TEXTS):
        with pytest.warns(UserWarning, match=r"class scores are left out .label=None.*: the scores do not sum") as told:
            results = explainer(texts)
        assert {warning.filename for warning in told} == {__file__}
        assert all(a.class_scores is None for a in ([results] if isinstance(texts, str) else results))
        with pytest.raises(RuntimeError, match=r"^the scores do not sum"):
            explainer(texts, label=0)


def test_the_text_that_fails_alone_is_named(explainer, monkeypatch):
    whole = globenc.class_score_batches.class_scores

    def failing(model, **options):
        if options["input_ids"].shape[1] > 20:
            raise RuntimeError("too long for me")
        return whole(model, **options)

    monkeypatch.setattr(globenc.class_score_batches, "class_scores", failing)
    longest = max(range(len(TEXTS)), key=lambda k: len(TEXTS[k]))
    with pytest.raises(RuntimeError, match=f"^text {longest}: too long for me"):
        explainer(TEXTS, label=[1, 0, 1, 0, 1, 0], batch_tokens=300)


@pytest.mark.parametrize("form", ["named", "tuple", "bare"])
def test_labels_of_a_head_that_only_its_author_knows(form, wordpiece):
    explainer = globenc.GlobEnc(own(form, num_labels=3, id2label={0: "bad", 1: "7", 2: "all"}), wordpiece)
    given = ["bad", 0, "0", "7", "2", 2]
    wanted = ["bad", "bad", "bad", "7", "all", "all"]
    assert [a.explained_label for a in explainer(TEXTS, label=given)] == wanted
    for label, name in zip((*given, "all"), (*wanted, "all"), strict=True):
        a = explainer(TEXTS[0], label=label)
        assert a.explained_label == name
        assert_complete(a)
    for label, message in (("9", "label must be in 0..2"), ("nice", "label must be one of this model's")):
        with pytest.raises(ValueError, match=message):
            explainer(TEXTS[0], label=label)
    with pytest.raises(TypeError, match="label must be a number or a name, got True"):
        explainer(TEXTS[0], label=True)
    explainer.model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    with pytest.raises(ValueError, match=r"label must be one of this model's .*, got 'all'"):
        explainer(TEXTS[0], label="all")


def test_one_logit_for_each_token_is_no_label(wordpiece):
    explainer = globenc.GlobEnc(own("tokens", num_labels=3), wordpiece)
    assert explainer(TEXTS[0]).class_scores is None
    with pytest.raises(ValueError, match="as many as a text has tokens, and its configuration names 3 labels"):
        explainer(TEXTS, label=0)
