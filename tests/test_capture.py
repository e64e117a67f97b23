"""One forward pass of an unmodified model: what comes back, and that the model is left as it was found."""

from __future__ import annotations

import copy
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import assert_rows_close, attention_state, tiny_model, token_batch
from torch import nn

import globenc
from globenc.capture import capture
from globenc.contributions.torch_backend import TorchBackend
from globenc.encoders import Encoder

HEADS = (
    "Model",
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MaskedLM",
    "NextSentencePrediction",
    "PreTraining",
)
CALLS = {
    "attribute-cls": lambda model, **inputs: globenc.attribute(model, **inputs),
    "attribute-all": lambda model, **inputs: globenc.attribute(model, position="all", per_layer=True, **inputs),
    "attribute-mean": lambda model, **inputs: globenc.attribute(model, position="mean", **inputs),
    "attribute-reference": lambda model, **inputs: globenc.attribute(model, backend="reference", **inputs),
    "contribution_maps": lambda model, **inputs: globenc.contribution_maps(model, **inputs),
    "mixing_ratios": lambda model, **inputs: globenc.mixing_ratios(model, **inputs),
    "completeness_gap": lambda model, **inputs: globenc.completeness_gap(model, **inputs),
}


class WholeLayers:
    """A consumer that calls `consume(index, trace)` for every complete layer."""

    def __init__(self, consume):
        self.consume, self.attention = consume, {}

    def attention_done(self, index, trace):
        self.attention[index] = trace

    def layer_done(self, index, end):
        self.consume(index, self.attention.pop(index).completed(end))


def show(model, inputs, consume):
    """`capture` of a model with its padding mask: every layer goes to `consume`."""
    return capture(Encoder.of(model), inputs, inputs["attention_mask"].bool(), WholeLayers(consume))


def test_the_state_comparison_can_fail(bert):
    before = attention_state(bert)
    assert attention_state(bert) == before
    changes = [
        lambda: bert.encoder.layer[1].output.LayerNorm.register_forward_hook(lambda *_: None),
        lambda: bert.encoder.layer[1].register_forward_pre_hook(lambda *_: None),
        lambda: bert.encoder.layer[2].attention.train(),
        lambda: bert.set_attn_implementation("eager"),
        lambda: setattr(bert.config, "output_attentions", True),
        lambda: bert.pooler.dense.weight.requires_grad_(False),
        lambda: bert.pooler.dense.weight.data.add_(0),
        lambda: setattr(bert.encoder, "recorder", 1),
    ]
    for number, change in enumerate(changes):
        change()
        after = attention_state(bert)
        # writes through .data leave no trace in the version counters, everything else must show
        assert (after == before) == (number == 6), number
        before = after


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("call", CALLS)
def test_model_is_left_as_found(call, attention):
    model = tiny_model("bert", head="SequenceClassification", attention=attention)
    model.bert.embeddings.requires_grad_(False)
    seen = []
    model.bert.encoder.layer[0].register_forward_hook(lambda *_: seen.append(1))  # a hook of the user's stays
    before = attention_state(model)
    CALLS[call](model, **token_batch((7, 4)))
    assert attention_state(model) == before
    assert seen == [1]  # one forward pass, not two


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_model_is_left_as_found_after_an_error_in_its_forward(bert, error):
    inputs = token_batch((7, 4))
    expected = globenc.attribute(bert, **inputs)
    bert.train()
    bert.encoder.layer[0].eval()

    def fail(*_):
        raise error("boom")

    handle = bert.encoder.layer[1].intermediate.register_forward_pre_hook(fail)
    before = attention_state(bert)
    with pytest.raises(error, match="boom"):
        globenc.attribute(bert, **inputs)
    assert attention_state(bert) == before
    handle.remove()
    assert torch.equal(globenc.attribute(bert, **inputs).scores, expected.scores)


def test_model_is_left_as_found_after_an_error_in_consume(bert):
    inputs = token_batch((7, 4))
    before = attention_state(bert)

    def consume(index, trace):
        if index == 1:
            raise ZeroDivisionError("boom")

    with pytest.raises(ZeroDivisionError, match="boom"):
        show(bert, inputs, consume)
    assert attention_state(bert) == before
    assert bool(torch.isfinite(globenc.attribute(bert, **inputs).scores).all())


def test_layers_come_in_order_and_complete(bert):
    inputs = token_batch((7, 4))
    traces = []
    with torch.no_grad():
        hidden = bert(**inputs, output_hidden_states=True).hidden_states
    output = show(bert, inputs, lambda i, trace: traces.append((i, trace)))
    assert [i for i, _ in traces] == [0, 1, 2]
    for i, trace in traces:
        assert trace.attention.query.shape == trace.attention.key.shape == trace.value.shape == (2, 3, 7, 8)
        assert trace.context.shape == trace.hidden_states.shape == (2, 7, 24)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(trace.hidden_states[real], hidden[i][real], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(trace.output[real], hidden[i + 1][real], rtol=1e-12, atol=1e-13)
        assert not trace.output.requires_grad
    assert torch.equal(output.last_hidden_state, traces[-1][1].output)


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta", "longformer", "albert"])
def test_an_attention_block_is_handed_over_and_not_held(family):
    """Nobody but the consumer holds a layer's queries, keys and values once its feed-forward block runs."""
    model, inputs = tiny_model(family), token_batch((7, 4))
    events, held = [], []

    class Consumer:
        def attention_done(self, index, trace):
            events.append(("attention", index))
            held.append(weakref.ref(trace))

        def layer_done(self, index, end):
            events.append(("layer", index))
            assert held[-1]() is None
            assert len(end.norm_inputs) == (1 if trace_has_norms else 0)

    trace_has_norms = bool(Encoder.of(model).layers[0].norms)
    capture(Encoder.of(model), inputs, inputs["attention_mask"].bool(), Consumer())
    count = len(Encoder.of(model).layers)
    assert events == [(part, index) for index in range(count) for part in ("attention", "layer")]


def test_the_rollout_frees_values_and_residual_before_the_feed_forward_block(bert, monkeypatch):
    """A map needs queries, keys and factors; what the factors were made of does not outlive the attention block."""
    inputs, values = token_batch((7, 4)), []
    made = TorchBackend.layer_map

    def layer_map(backend, trace, method):
        values.append(weakref.ref(trace.value))
        return made(backend, trace, method)

    seen = []
    monkeypatch.setattr(TorchBackend, "layer_map", layer_map)
    for layer in bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda *_: seen.append([value() is None for value in values]))
    globenc.attribute(bert, backend="torch", position="mean", **inputs)
    assert [len(part) for part in seen] == [1, 2, 3]
    assert all(all(part) for part in seen)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("head", HEADS)
def test_output_is_the_models_own(head, attention):
    model = tiny_model("bert", head=head, attention=attention)
    inputs = token_batch((7, 4))
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True)
    out = globenc.attribute(model, **inputs, output_hidden_states=True)
    real = inputs["attention_mask"].bool()
    assert type(out.model_output) is type(expected)
    assert list(out.model_output) == list(expected)
    for name, own in expected.items():
        given = out.model_output[name]
        for a, b in zip(*([v] if torch.is_tensor(v) else v for v in (given, own)), strict=True):
            if a.shape[:2] == real.shape:  # what a model computes at padding is nobody's business
                a, b = a[real], b[real]
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    base = getattr(model, model.base_model_prefix, model)
    assert torch.equal(globenc.attribute(base, **inputs).scores, out.scores)


def test_loss_and_tuple_output():
    model = tiny_model("bert", head="SequenceClassification")
    inputs = {**token_batch((7, 4)), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        expected = model(**inputs).loss
    torch.testing.assert_close(globenc.attribute(model, **inputs).model_output.loss, expected)
    output = globenc.attribute(model, return_dict=False, **inputs).model_output
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], expected)


@pytest.mark.parametrize("shape", [(1, 5), (2, 6), (2, 3, 5)], ids=lambda s: "x".join(map(str, s)))
def test_multiple_choice_is_refused_clearly(shape):
    """Its texts have a dimension of their own; its encoder alone takes each of them."""
    model = tiny_model("bert", head="MultipleChoice")
    before = attention_state(model)
    with pytest.raises(ValueError, match=r"\[batch, n\]|MultipleChoice|multiple choice"):
        globenc.attribute(model, input_ids=torch.full(shape, 9))
    assert attention_state(model) == before
    assert globenc.attribute(model.bert, input_ids=torch.full((3, 5), 9)).scores.shape == (3, 5)


def test_train_mode_is_evaluated_without_dropout():
    model = tiny_model("bert", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    inputs = token_batch((7, 4))
    expected = globenc.attribute(model, **inputs)
    model.train()
    model.encoder.layer[1].eval()
    model.encoder.layer[1].attention.self.dropout.train()
    before = attention_state(model)
    for _ in range(2):
        out = globenc.attribute(model, **inputs)
        assert torch.equal(out.scores, expected.scores)
        assert torch.equal(out.model_output.last_hidden_state, expected.model_output.last_hidden_state)
    assert attention_state(model) == before


@pytest.mark.parametrize("chunk", [1, 2, 4])
@pytest.mark.parametrize("family", ["bert", "albert", "distilbert"])
def test_chunked_feed_forward(family, chunk):
    whole = tiny_model(family)
    model = tiny_model(family, chunk_size_feed_forward=chunk)
    inputs = token_batch((8, 5))
    assert_rows_close(globenc.attribute(model, **inputs).scores, globenc.attribute(whole, **inputs).scores, 1e-12)
    assert float(globenc.completeness_gap(model, **inputs).max()) < 1e-12


@pytest.mark.parametrize(
    ("how", "backend"),
    [("wrapped", "aot_eager"), ("in-place", "eager"), ("encoder-in-place", "eager")],
)
def test_compiled_model(how, backend):
    model = tiny_model("bert", num_hidden_layers=1)
    inputs = token_batch((7, 4))
    expected = globenc.attribute(model, **inputs)
    if how == "wrapped":
        compiled = torch.compile(model, backend=backend)
    else:
        compiled = model
        (model if how == "in-place" else model.encoder).compile(backend=backend)
    with torch.no_grad():
        own = compiled(**inputs).last_hidden_state
    out = globenc.attribute(compiled, **inputs)
    assert torch.equal(out.scores, expected.scores)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.model_output.last_hidden_state[real], own[real], rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # and the compiled model still runs
        torch.testing.assert_close(compiled(**inputs).last_hidden_state[real], own[real])
    torch.compiler.reset()


def test_data_parallel_wrapper(bert):
    inputs = token_batch((7,))
    assert torch.equal(
        globenc.attribute(nn.DataParallel(bert), **inputs).scores, globenc.attribute(bert, **inputs).scores
    )


def test_two_threads_on_one_model(bert):
    batches = [token_batch((length, 3), seed=seed) for seed in range(4) for length in (5, 9)]
    expected = [globenc.attribute(bert, **inputs).scores for inputs in batches]
    before = attention_state(bert)
    start = threading.Barrier(2)

    def work(order):
        start.wait()
        return [(i, globenc.attribute(bert, **batches[i]).scores) for i in order]

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(work, order) for order in (range(8), range(7, -1, -1))]
    for result in results:
        for i, scores in result.result():
            assert torch.equal(scores, expected[i])
    assert attention_state(bert) == before


def test_two_threads_on_a_model_and_its_encoder():
    """The head and the encoder inside it are one model: the same modules, the same config."""
    model = tiny_model("bert", head="SequenceClassification")
    inputs = token_batch((9, 4))
    expected = globenc.attribute(model, **inputs).scores
    before = attention_state(model)
    start = threading.Barrier(2)

    def work(which):
        start.wait()
        return [globenc.attribute(which, **inputs).scores for _ in range(8)]

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(work, which) for which in (model, model.bert)]
    for result in results:
        for scores in result.result():
            assert torch.equal(scores, expected)
    assert attention_state(model) == before


def test_plain_forward_in_another_thread_does_not_disturb(bert):
    """While a capture is under way, somebody else runs the model: neither sees the other."""
    inputs, other = token_batch((7, 4)), token_batch((5,), seed=3)
    with torch.no_grad():
        own = bert(**other).last_hidden_state
    quiet, disturbed, outputs = [], [], []
    show(bert, inputs, lambda i, trace: quiet.append(trace))

    def run():
        with torch.no_grad():
            outputs.append(bert(**other).last_hidden_state)

    def consume(index, trace):
        disturbed.append(trace)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    show(bert, inputs, consume)
    assert len(disturbed) == len(quiet) == len(outputs) == 3
    for a, b in zip(disturbed, quiet, strict=True):
        for name in ("value", "hidden_states", "attention_norm_input", "output"):
            assert torch.equal(getattr(a, name), getattr(b, name))
        for name in ("query", "key"):
            assert torch.equal(getattr(a.attention, name), getattr(b.attention, name))
    for output in outputs:
        torch.testing.assert_close(output, own)


def test_no_gradients(bert):
    inputs = token_batch((7,))
    out = globenc.attribute(bert, **inputs)
    assert not out.scores.requires_grad
    assert not out.model_output.last_hidden_state.requires_grad
    assert all(parameter.grad is None for parameter in bert.parameters())
    assert torch.is_grad_enabled()
    bert(**inputs).last_hidden_state.sum().backward()  # the model still trains
    grads = {name: parameter.grad.clone() for name, parameter in bert.named_parameters() if parameter.grad is not None}
    globenc.attribute(bert, **inputs)
    assert grads
    for name, parameter in bert.named_parameters():
        assert name not in grads or torch.equal(parameter.grad, grads[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", ["N-Enc", "W-Res", "W"])
def test_gradient_contexts(bert, context, method):
    inputs = token_batch((7, 4))
    for position in ("cls", "all", [0, 2, 3]):
        model = copy.deepcopy(bert)
        with context():
            inside = globenc.attribute(model, method=method, position=position, **inputs).scores
        # what was cached inside must be of use outside
        outside = globenc.attribute(model, method=method, position=position, **inputs).scores
        assert torch.equal(inside, outside)
        model(**inputs).last_hidden_state.sum().backward()


@pytest.mark.parametrize("position", ["cls", "mean", "all"])
def test_autocast(position):
    """The model runs as the caller's autocast says, the attribution's own sums stay in float32."""
    model = tiny_model("bert", torch.float32)
    inputs = token_batch((9, 5))
    expected = globenc.attribute(model, position=position, **inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = globenc.attribute(model, position=position, **inputs)
        direct = globenc.attribute(model, position=position, backend="reference", **inputs)
        with torch.no_grad():
            own = model(**inputs).last_hidden_state
    assert out.scores.dtype == torch.float32
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(out.model_output.last_hidden_state[real], own[real], rtol=0.05, atol=0.05)
    assert_rows_close(out.scores, direct.scores, 1e-5)  # same bfloat16 activations
    assert_rows_close(out.scores, expected.scores, 0.1)


def test_config_that_returns_attentions():
    bert = tiny_model("bert", attention="eager")
    inputs = token_batch((7, 4))
    expected = globenc.attribute(bert, **inputs).scores
    bert.config.output_hidden_states = True
    assert torch.equal(globenc.attribute(bert, **inputs).scores, expected)
    bert.config.output_attentions = True
    assert torch.equal(globenc.attribute(bert, **inputs).scores, expected)
    assert bert.config.output_attentions is True


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing(bert):
    inputs = token_batch((7, 4))
    expected = globenc.attribute(bert, **inputs).scores
    bert.gradient_checkpointing_enable()
    bert.train()
    assert torch.equal(globenc.attribute(bert, **inputs).scores, expected)
    assert bert.is_gradient_checkpointing


def test_embeddings_instead_of_token_ids(bert):
    inputs = token_batch((7, 4))
    embeds = bert.get_input_embeddings()(inputs["input_ids"]).detach()
    out = globenc.attribute(bert, inputs_embeds=embeds, attention_mask=inputs["attention_mask"])
    assert torch.equal(out.scores, globenc.attribute(bert, **inputs).scores)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, torch.float64], ids=str)
def test_any_kind_of_mask(bert, kind):
    inputs = token_batch((7, 4))
    expected = globenc.attribute(bert, **inputs).scores
    inputs["attention_mask"] = inputs["attention_mask"].to(kind)
    assert torch.equal(globenc.attribute(bert, **inputs).scores, expected)
