"""Class scores of heads and activations of all kinds: what a model's author may have put on an encoder."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import VISION, pictures, randomize, tiny_model, token_batch
from torch import Tensor, nn

import globenc

MASK_TOKEN = 4


class Classifier(transformers.BertPreTrainedModel):
    """An encoder with a head that `features` begins."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.weigh = nn.Linear(24, 1)
        self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
        self.convolution, self.norm = nn.Conv1d(24, 24, 3, padding=1), nn.BatchNorm1d(24)
        self.recurrent = nn.LSTM(24, 24, batch_first=True)
        self.classifier = nn.Sequential(
            nn.Linear(24, 16), nn.LayerNorm(16), nn.SiLU(), nn.Dropout(0.1), nn.Linear(16, 3)
        )
        self.post_init()

    def features(self, states: Tensor, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, input_ids=None, attention_mask=None):
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.classifier(self.features(states, attention_mask.bool()))}


class AttentionPooling(Classifier):
    def features(self, states, mask):
        weights = self.weigh(states)[..., 0].masked_fill(~mask, -1e9).softmax(-1)
        return (weights[..., None] * states).sum(1)


class MultiheadAttention(Classifier):
    def features(self, states, mask):
        return self.attention(states, states, states, key_padding_mask=~mask)[0][:, 0]


class DotProductAttention(Classifier):
    def features(self, states, mask):
        heads = states.unflatten(-1, (2, -1)).transpose(1, 2)
        context = nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask[:, None, None])
        return context.transpose(1, 2).flatten(2)[:, 0]


class Convolution(Classifier):
    def features(self, states, mask):
        states = states * mask[..., None]
        return torch.relu(self.norm(self.convolution(states.transpose(1, 2)))).max(-1).values


class SigmoidGate(Classifier):
    def features(self, states, mask):
        return states[:, 0] * torch.sigmoid(states[:, 0])


class Recurrent(Classifier):
    def features(self, states, mask):
        return self.recurrent(states)[0][:, -1]


def made(kind: type[Classifier]) -> Classifier:
    config = tiny_model("bert").config
    config.num_labels = 3
    model = kind(config)
    randomize(model)
    return model.double().eval()


@pytest.mark.parametrize(
    "kind",
    [AttentionPooling, MultiheadAttention, DotProductAttention, Convolution, SigmoidGate],
    ids=lambda k: k.__name__,
)
def test_heads_of_ones_own(kind):
    model, inputs = made(kind), token_batch((7,) if kind is Convolution else (9, 4))
    with torch.no_grad():
        logits = model(**inputs)["logits"]
    for reference in ("zero", "origin", "model"):
        out = globenc.class_scores(model, label="all", reference=reference, mask_token_id=MASK_TOKEN, **inputs)
        assert (out.logits - logits).abs().max() < 1e-12
        assert out.completeness_gap.max() < 1e-10
        assert out.scores.abs().max() > 1e-3


def test_a_recurrent_head_is_refused():
    with pytest.raises(RuntimeError, match="the scores do not sum"):
        globenc.class_scores(made(Recurrent), **token_batch((7,)))


def test_siglip_pools_by_attention():
    model = transformers.SiglipVisionModel(VISION["siglip_vision_model"][0](**VISION["siglip_vision_model"][1]))
    randomize(model)
    for reference in ("zero", "origin"):
        out = globenc.class_scores(
            model.double().eval(),
            reference=reference,
            answer=lambda output: output.pooler_output[:, 0],
            pixel_values=pictures(),
        )
        assert out.completeness_gap.max() < 1e-10


@pytest.mark.parametrize(
    "activation", ["relu", "relu2", "silu", "gelu_new", "gelu_python", "quick_gelu", "sigmoid", "laplace"]
)
def test_activations(activation):
    model = tiny_model("bert", head="SequenceClassification", hidden_act=activation)
    for reference in ("zero", "origin", "model"):
        out = globenc.class_scores(model, reference=reference, mask_token_id=MASK_TOKEN, **token_batch((9, 4)))
        assert out.completeness_gap.max() < 1e-10


def test_feed_forward_blocks_in_chunks():
    whole, inputs = tiny_model("bert", head="SequenceClassification"), token_batch((9, 4))
    chunked = tiny_model("bert", head="SequenceClassification", chunk_size_feed_forward=3)
    for reference in ("zero", "origin"):
        scores = [globenc.class_scores(model, reference=reference, **inputs).scores for model in (whole, chunked)]
        assert (scores[0] - scores[1]).abs().max() < 1e-12
    with pytest.raises(ValueError, match="chunk_size_feed_forward cuts them: set it to 0"):
        globenc.class_scores(chunked, reference="model", mask_token_id=MASK_TOKEN, **inputs)


class LeakyInPlace(Classifier):
    def features(self, states, mask):
        return nn.functional.leaky_relu(self.classifier[0](states[:, 0]), 0.1, True).repeat(1, 2)[:, :24]


class Leaky(Classifier):
    def features(self, states, mask):
        return nn.functional.leaky_relu(self.classifier[0](states[:, 0]), 0.1).repeat(1, 2)[:, :24]


class ReadAfterwards(Classifier):
    """What an activation has overwritten is read once more."""

    def features(self, states, mask):
        before = self.classifier[0](states[:, 0])
        return torch.cat([before.tanh_(), before], -1)[:, :24]


class Highway(Classifier):
    def features(self, states, mask):
        gate = torch.sigmoid(self.classifier[0](states[:, 0]))
        return torch.cat([gate * states[:, 0, :16] + (1 - gate) * states[:, 0, 8:], states[:, 0, :8]], -1)


@pytest.mark.parametrize("kind", [LeakyInPlace, ReadAfterwards, Highway], ids=lambda k: k.__name__)
def test_activations_in_place_and_gates(kind):
    model, inputs = made(kind), token_batch((9, 4))
    with torch.no_grad():
        logits = model(**inputs)["logits"]
    for reference in ("zero", "origin", "model"):
        out = globenc.class_scores(model, label="all", reference=reference, mask_token_id=MASK_TOKEN, **inputs)
        assert (out.logits - logits).abs().max() < 1e-12
        assert out.completeness_gap.max() < 1e-10


@pytest.mark.parametrize("reference", ["zero", "origin", "model"])
def test_an_activation_in_place_has_the_same_chord(reference):
    options = {"label": "all", "reference": reference, "mask_token_id": MASK_TOKEN, **token_batch((9, 4))}
    scores = [globenc.class_scores(made(kind), **options).scores for kind in (Leaky, LeakyInPlace)]
    assert (scores[0] - scores[1]).abs().max() < 1e-12


class NotTrained(Classifier):
    """The encoder is not trained, and runs without gradients."""

    def forward(self, input_ids=None, attention_mask=None):
        with torch.no_grad():
            states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.classifier(states[:, 0])}


class InInferenceMode(Classifier):
    def forward(self, input_ids=None, attention_mask=None):
        with torch.inference_mode():
            states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return {"logits": self.classifier(states[:, 0].clone())}


class Pair(Classifier):
    def forward(self, input_ids=None, attention_mask=None):
        first, second = (self.bert(ids, attention_mask).last_hidden_state for ids in (input_ids, input_ids.flip(1)))
        return {"logits": self.classifier(first[:, 0] - second[:, 0])}


def test_an_encoder_without_gradients():
    model, inputs = made(NotTrained), token_batch((9, 4))
    out = globenc.class_scores(model, label="all", **inputs)
    assert out.completeness_gap.max() < 1e-10
    assert out.scores.abs().max() > 1e-3
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match=r"runs its encoder in torch.inference_mode\(\), where nothing"):
        globenc.class_scores(made(InInferenceMode), **inputs)


def test_an_encoder_that_runs_twice_is_refused():
    for options in ({}, {"per_layer": True}, {"reference": "origin"}):
        with pytest.raises(RuntimeError, match="the model runs its encoder more than once"):
            globenc.class_scores(made(Pair), **options, **token_batch((9, 4)))


def test_an_answer_may_run_the_model_on_another_text():
    model, inputs, other = tiny_model("bert"), token_batch((9, 4)), token_batch((5, 5))
    with torch.no_grad():
        embedding = model(**other).last_hidden_state[:, 0]

    def run(output):
        return torch.cosine_similarity(output.last_hidden_state[:, 0], model(**other).last_hidden_state[:, 0], dim=-1)

    def known(output):
        return torch.cosine_similarity(output.last_hidden_state[:, 0], embedding, dim=-1)

    for reference in ("zero", "origin"):
        found, expected = (
            globenc.class_scores(model, answer=answer, reference=reference, per_layer=True, maps=True, **inputs)
            for answer in (run, known)
        )
        for name in ("scores", "remainder", "layer_scores", "maps"):
            assert (getattr(found, name) - getattr(expected, name)).abs().max() < 1e-12
    with pytest.raises(RuntimeError, match="the model runs its encoder more than once"):
        globenc.class_scores(
            model,
            answer=lambda output: model(inputs_embeds=output.last_hidden_state).last_hidden_state[:, 0, 0],
            **inputs,
        )
