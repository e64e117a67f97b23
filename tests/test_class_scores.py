"""Class scores: sums for every family and head, labels, answers, references, and the model as it was."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
import transformers
from helpers import FAMILIES, NO_CLS, VISION, attention_state, pictures, randomize, tiny_model, tiny_vision, token_batch
from torch import nn

import globenc

MASK_TOKEN = 4
REFERENCES = ("zero", "origin", "model")
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM")
LENGTHS = (9, 1, 6)
WITHOUT_HEAD = {
    "SequenceClassification": NO_CLS,
    "TokenClassification": (),
    "QuestionAnswering": (*NO_CLS, "nomic_bert", "eurobert", "esm", "longformer"),  # longformer asks for separators
    "MaskedLM": NO_CLS,
}


def classifier(family: str = "bert", **options) -> transformers.PreTrainedModel:
    return tiny_model(family, head="SequenceClassification", num_labels=3, **options)


def assert_sums(out: globenc.ClassScores, tolerance: float = 1e-10) -> None:
    assert torch.isfinite(out.scores).all()
    assert (out.completeness_gap < tolerance * (1 + out.logits.abs())).all(), out.completeness_gap.max()


@pytest.mark.parametrize(
    ("head", "family"), [(head, family) for head in HEADS for family in FAMILIES if family not in WITHOUT_HEAD[head]]
)
def test_scores_sum_for_every_family_and_head(head, family):
    model, inputs = tiny_model(family, head=head), token_batch(LENGTHS)
    asked = {"position": 0} if head in ("TokenClassification", "MaskedLM") else {}
    for reference in REFERENCES:
        out = globenc.class_scores(model, reference=reference, mask_token_id=MASK_TOKEN, **asked, **inputs)
        assert_sums(out)
        assert out.scores.shape == inputs["input_ids"].shape
        assert (out.scores[inputs["attention_mask"] == 0] == 0).all()
        assert out.scores.abs().sum() > 1e-3
    with torch.no_grad():
        output = model(**inputs)
    if head == "SequenceClassification":  # some norms round to float32 by themselves
        assert (out.logits - output.logits.max(-1).values).abs().max() < 1e-5


@pytest.mark.parametrize("family", [*FAMILIES, *VISION])
def test_scores_of_a_base_model_sum_to_any_answer(family):
    image = family in VISION
    model = tiny_vision(family) if image else tiny_model(family)
    inputs = {"pixel_values": pictures()} if image else token_batch(LENGTHS)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for reference in ("zero", "origin"):
        out = globenc.class_scores(
            model, reference=reference, answer=lambda output: output.last_hidden_state[:, 0] @ direction, **inputs
        )
        assert_sums(out)
        assert out.labels is None


@pytest.mark.parametrize("reference", REFERENCES[:2])
@pytest.mark.parametrize(
    "kind",
    ["ViTForImageClassification", "DeiTForImageClassification", "Dinov2ForImageClassification",
     "Dinov2WithRegistersForImageClassification", "DeiTForImageClassificationWithTeacher"],
)  # fmt: skip
def test_image_classifiers(kind, reference):
    make = getattr(transformers, kind)
    family = make.config_class.model_type
    model = make(VISION[family][0](**VISION[family][1], num_labels=3))
    randomize(model)
    out = globenc.class_scores(model.double().eval(), reference=reference, pixel_values=pictures())
    assert_sums(out)
    assert out.scores.abs().max() > 1e-3


def test_any_scalar_is_explained():
    model, inputs = classifier(), token_batch((7, 4))
    margin = globenc.class_scores(model, answer=lambda output: output.logits[:, 1] - output.logits[:, 0], **inputs)
    both = globenc.class_scores(model, label="all", **inputs)
    assert (margin.scores - (both.scores[:, 1] - both.scores[:, 0])).abs().max() < 1e-12
    log_probability = globenc.class_scores(model, answer=lambda output: output.logits.log_softmax(-1)[:, 0], **inputs)
    assert_sums(log_probability)


@pytest.mark.parametrize("normalise", ["normalize", "cosine", "by hand"])
def test_similarity_is_explained(normalise):
    model, inputs = tiny_model("bert"), token_batch((7, 4))
    other = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def similarity(output):
        mask = inputs["attention_mask"][..., None].double()
        pooled = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        if normalise == "normalize":
            return nn.functional.normalize(pooled, dim=-1) @ nn.functional.normalize(other, dim=0)
        if normalise == "cosine":
            return torch.cosine_similarity(pooled, other[None], dim=-1)
        return pooled @ other / (pooled.norm(dim=-1) * other.norm())

    out = globenc.class_scores(model, answer=similarity, **inputs)
    assert_sums(out)
    with torch.no_grad():
        assert (out.logits - similarity(model(**inputs))).abs().max() < 1e-12
    origin = globenc.class_scores(model, answer=similarity, reference="origin", **inputs)
    assert_sums(origin)


def test_max_pooling_holds_which_token_it_takes():
    model, inputs = tiny_model("bert"), token_batch((7,))
    for pool in (
        lambda states: states.max(1).values,
        lambda states: states.amax(1),
        lambda states: torch.max(states, 1)[0],
    ):
        answer = functools.partial(lambda pool, output: pool(output.last_hidden_state).sum(-1), pool)
        assert_sums(globenc.class_scores(model, answer=answer, **inputs))


@pytest.mark.parametrize(
    ("answer", "kind", "says"),
    [
        (
            lambda output: output.logits,
            ValueError,
            r"answer must return one number for each text, as .*a tensor \[batch\] = \[2\], got \[2, 3\]",
        ),
        (lambda output: 3.0, ValueError, "answer must return one number for each text"),
        (lambda output: output.logits.argmax(-1), TypeError, "answer must return floating point numbers"),
        (lambda output: torch.ones(2), ValueError, "does not depend on the text"),
        (lambda output: output.logits[:, 0].detach(), ValueError, "does not depend on the text"),
        (lambda output: output.logits.softmax(-1)[:, 0], ValueError, "a softmax .give its logit. or a length"),
        (lambda output: output.logits[:, 0] * output.logits[:, 1], RuntimeError, "the scores do not sum"),
        (lambda output: output.logits[:, 0] ** 2, RuntimeError, "the scores do not sum"),
        (lambda output: output.logits[:, 0] / 0, FloatingPointError, "not finite"),
        (lambda output: output.logits.norm(dim=-1), ValueError, "does not depend on the text"),
        ("logits", TypeError, "answer must be a function"),
    ],
)
def test_answers_that_cannot_be_explained(answer, kind, says):
    with pytest.raises(kind, match=says):
        globenc.class_scores(classifier(), answer=answer, **token_batch((5, 5)))


@pytest.mark.parametrize("beside", [{"label": 1}, {"label": "all"}, {"position": 0}])
def test_an_answer_stands_alone(beside):
    with pytest.raises(ValueError, match="answer says what is explained, and so do label and position"):
        globenc.class_scores(classifier(), answer=lambda output: output.logits[:, 0], **beside, **token_batch((5,)))


def test_models_without_a_head_need_an_answer():
    with pytest.raises(ValueError, match="no labels to explain: give a model that classifies, or answer="):
        globenc.class_scores(tiny_model("bert"), **token_batch((5,)))


def test_references_that_cannot_be_used():
    inputs = token_batch((5,))
    with pytest.raises(ValueError, match="reference must be one of zero, model, origin; got 'mean'"):
        globenc.class_scores(classifier(), reference="mean", **inputs)
    with pytest.raises(ValueError, match="reference 'model' needs a mask token: pass mask_token_id"):
        globenc.class_scores(classifier(), reference="model", **inputs)
    with pytest.raises(ValueError, match=r"mask_token_id must be in .*, got 1000"):
        globenc.class_scores(classifier(), reference="model", mask_token_id=1000, **inputs)
    model = transformers.ViTForImageClassification(VISION["vit"][0](**VISION["vit"][1])).double().eval()
    with pytest.raises(ValueError, match="which images have not"):
        globenc.class_scores(model, reference="model", pixel_values=pictures())


@pytest.mark.parametrize("write", ["in place", "through .data"])
def test_constants_of_a_model_are_read_anew_when_its_weights_change(write):
    model, inputs = classifier(), token_batch((7,))
    options = {"reference": "model", "mask_token_id": MASK_TOKEN, **inputs}
    globenc.class_scores(model, **options)
    weight = model.base_model.encoder.layer[0].intermediate.dense.weight
    if write == "in place":
        with torch.no_grad():
            weight.mul_(1.5)
    else:
        weight.data.mul_(1.5)
    again = globenc.class_scores(model, **options)
    fresh = classifier()
    with torch.no_grad():
        fresh.base_model.encoder.layer[0].intermediate.dense.weight.mul_(1.5)
    assert (again.scores - globenc.class_scores(fresh, **options).scores).abs().max() < 1e-12


def test_padding_and_neighbours_change_nothing():
    model = classifier()
    together = globenc.class_scores(model, **token_batch(LENGTHS))
    for text, n in enumerate(LENGTHS):
        alone = globenc.class_scores(model, **token_batch((n,)))
        assert (together.scores[text, :n] - alone.scores[0]).abs().max() < 1e-12


def test_padding_on_the_left():
    left = token_batch(LENGTHS, left=True, position_ids=True)
    last = globenc.class_scores(tiny_model("bert"), answer=lambda output: output.last_hidden_state[:, -1, 0], **left)
    for text, n in enumerate(LENGTHS):
        inputs = token_batch((n,))
        alone = globenc.class_scores(
            tiny_model("bert"), answer=lambda output: output.last_hidden_state[:, -1, 0], **inputs
        )
        assert (last.scores[text, 9 - n :] - alone.scores[0]).abs().max() < 1e-12
        assert (last.scores[text, : 9 - n] == 0).all()
    with pytest.raises(ValueError, match=r"is read from padding .text [12] of the batch.: .* pad on the right"):
        globenc.class_scores(classifier(), **left)


@pytest.mark.parametrize("reference", REFERENCES)
def test_float32_and_half_precision(reference):
    inputs = token_batch(LENGTHS)
    exact = globenc.class_scores(classifier(), reference=reference, mask_token_id=MASK_TOKEN, **inputs)
    single = globenc.class_scores(
        classifier(dtype=torch.float32), reference=reference, mask_token_id=MASK_TOKEN, label=exact.labels, **inputs
    )
    assert single.scores.dtype == torch.float32
    assert_sums(single, 1e-4)
    assert (single.scores - exact.scores).abs().max() < 1e-2 * exact.scores.abs().max()
    half = globenc.class_scores(
        classifier(dtype=torch.bfloat16), reference=reference, mask_token_id=MASK_TOKEN, label=exact.labels, **inputs
    )
    assert half.scores.dtype == torch.float32
    assert_sums(half, 0.2)


def test_autocast_and_inference_mode_change_nothing():
    model, inputs = classifier(dtype=torch.float32), token_batch((7,))
    plain = globenc.class_scores(model, **inputs).scores
    with torch.autocast("cpu", torch.bfloat16):
        assert (globenc.class_scores(model, **inputs).scores == plain).all()
    with torch.no_grad():
        assert (globenc.class_scores(model, **inputs).scores == plain).all()
    with torch.inference_mode():
        scores = globenc.class_scores(model, **inputs).scores
    assert (scores == plain).all()


def test_the_output_carries_no_graph():
    out = globenc.class_scores(classifier(), maps=True, per_layer=True, **token_batch((7,)))
    for tensor in (out.scores, out.remainder, out.logits, out.maps, out.layer_scores, out.model_output.logits):
        assert not tensor.requires_grad


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v2", "big_bird", "albert"])
def test_the_model_is_as_it_was(family):
    model = classifier(family).train()
    before, grads = attention_state(model), [p.requires_grad for p in model.parameters()]
    inputs = token_batch((9,))
    globenc.class_scores(model, **inputs)

    def interrupt(output):
        raise KeyboardInterrupt

    def fail(output):
        raise ZeroDivisionError("mine")

    with pytest.raises(KeyboardInterrupt):
        globenc.class_scores(model, answer=interrupt, **inputs)
    with pytest.raises(ZeroDivisionError, match="mine"):
        globenc.class_scores(model, answer=fail, **inputs)
    assert attention_state(model) == before
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_activations_that_are_not_finite():
    model = classifier()
    with torch.no_grad():
        model.base_model.encoder.layer[1].output.dense.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="not finite"):
        globenc.class_scores(model, **token_batch((5,)))


def test_a_hook_that_is_no_straight_line_is_refused():
    model, inputs = classifier(), token_batch((5,))
    plain = globenc.class_scores(model, **inputs)
    layer = model.base_model.encoder.layer[1]
    handle = layer.register_forward_hook(lambda _, __, output: output * output)
    with pytest.raises(RuntimeError, match="the scores do not sum"):
        globenc.class_scores(model, **inputs)
    handle.remove()
    handle = layer.output.dense.register_forward_hook(lambda _, __, output: output * 0.5)
    halved = globenc.class_scores(model, **inputs)  # a straight line: part of the model
    assert_sums(halved)
    assert (halved.scores - plain.scores).abs().max() > 1e-3
    handle.remove()


def test_threads_share_a_model():
    model = classifier()
    batches = [token_batch((n,)) for n in (3, 5, 7, 9)]
    alone = [globenc.class_scores(model, **inputs).scores for inputs in batches]
    found: dict[int, torch.Tensor] = {}

    def work(k: int) -> None:
        for _ in range(5):
            found[k] = globenc.class_scores(model, **batches[k]).scores

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((found[k] == alone[k]).all() for k in range(4))


def test_scores_are_gradients_of_a_network_with_detached_parts():
    """The same parts detached by hand, in torch's own autograd."""
    model, inputs = classifier(attention="eager"), token_batch((9, 4))
    softmax, entered = nn.functional.softmax, []

    def norm(module, args, output):
        x = args[0] - args[0].mean(-1, keepdim=True)
        return x / (x.detach().square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight + module.bias

    def chord(module, args, output):
        return args[0] * (output / args[0]).detach()

    def enter(module, args):
        entered.append(args[0].detach().requires_grad_())
        return (entered[0], *args[1:])

    hooks = [model.base_model.encoder.layer[0].register_forward_pre_hook(enter)]
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and module is not model.base_model.embeddings.LayerNorm:
            hooks.append(module.register_forward_hook(norm))
        if isinstance(module, nn.Tanh) or type(module).__name__ == "GELUActivation":
            hooks.append(module.register_forward_hook(chord))
    nn.functional.softmax = lambda *args, **options: softmax(*args, **options).detach()
    try:
        logits = model(**inputs).logits
    finally:
        nn.functional.softmax = softmax
    for hook in hooks:
        hook.remove()
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), entered[0])
    out = globenc.class_scores(model, label=1, reference="origin", **inputs)
    assert (out.scores - (gradient * entered[0]).sum(-1)).abs().max() < 1e-10


def test_a_model_that_was_made_in_inference_mode():
    inputs = token_batch((9, 4))
    with torch.inference_mode():
        made = classifier()
    other = classifier()
    for reference in REFERENCES:
        options = {"reference": reference, "mask_token_id": MASK_TOKEN, **inputs}
        assert (globenc.class_scores(made, **options).scores == globenc.class_scores(other, **options).scores).all()
    assert all(p.requires_grad for p in made.parameters())


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_hook_on_an_activation_is_part_of_the_model(reference):
    """Set to zero by the activation or by the module around it, a unit says nothing."""

    def replace(module, args, output):
        return output * (torch.arange(output.shape[-1]) != 3)

    def write(module, args, output):
        output[..., 3] = 0

    scores = []
    for path, hook in (("intermediate", replace), ("intermediate.intermediate_act_fn", replace)):
        model = classifier()
        model.get_submodule(f"bert.encoder.layer.1.{path}").register_forward_hook(hook)
        scores.append(globenc.class_scores(model, reference=reference, mask_token_id=4, **token_batch((9,))).scores)
    model = classifier()
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn.register_forward_hook(write)
    scores.append(globenc.class_scores(model, reference=reference, mask_token_id=4, **token_batch((9,))).scores)
    assert (scores[0] - scores[1]).abs().max() < 1e-12
    assert (scores[0] - scores[2]).abs().max() < 1e-12
    model.bert.encoder.layer[1].output.LayerNorm.register_forward_hook(write)
    with pytest.raises(RuntimeError, match="writes into what attention, a norm or an activation has put out"):
        globenc.class_scores(model, reference=reference, mask_token_id=4, **token_batch((9,)))


def test_constants_of_a_model_are_those_without_a_hook_that_is_gone():
    options = {"reference": "model", "mask_token_id": MASK_TOKEN, **token_batch((7,))}
    model, plain = classifier(), globenc.class_scores(classifier(), **options).scores
    handle = model.bert.encoder.layer[0].attention.self.value.register_forward_hook(lambda _, __, output: output * 0)
    globenc.class_scores(model, **options)
    handle.remove()
    assert (globenc.class_scores(model, **options).scores == plain).all()


def test_a_mask_token_says_nothing_about_a_token_classifier():
    model, inputs = tiny_model("bert", head="TokenClassification", num_labels=4), token_batch((6, 6))
    inputs["input_ids"][:, 2] = MASK_TOKEN
    with pytest.raises(ValueError, match="position must say which token of BertForTokenClassification"):
        globenc.class_scores(model, mask_token_id=MASK_TOKEN, **inputs)


@pytest.mark.parametrize(("head", "asked"), [("QuestionAnswering", {}), ("TokenClassification", {"position": 0})])
def test_outputs_without_names(head, asked):
    with pytest.raises(ValueError, match=r"by name \(leave return_dict out\)"):
        globenc.class_scores(tiny_model("bert", head=head), return_dict=False, **asked, **token_batch((6,)))


@pytest.mark.parametrize("family", ["bert", "big_bird"])
def test_maps_in_one_thread_change_nothing_in_another(family):
    model, inputs = classifier(family), token_batch((9, 4))
    before = attention_state(model)
    alone, attributed = globenc.class_scores(model, maps=True, **inputs), globenc.attribute(model, **inputs).scores
    found: list[bool] = []

    def explain() -> None:
        for _ in range(12):
            found.append(bool((globenc.class_scores(model, maps=True, **inputs).maps == alone.maps).all()))

    def attribute() -> None:
        for _ in range(40):
            found.append(bool((globenc.attribute(model, **inputs).scores == attributed).all()))

    threads = [threading.Thread(target=work) for work in (explain, explain, attribute)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 64
    assert all(found)
    assert attention_state(model) == before
