"""A model that is given: resolved to its family and layers, or refused with what to pass instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from helpers import methods_of, tiny_model
from torch import nn

import globenc
from globenc.encoders import Encoder


def test_the_modules_of_every_family_are_in_their_layer(family_model):
    encoder = Encoder.of(family_model)
    assert encoder.model is family_model
    assert set(encoder.methods) == set(methods_of(family_model))
    for layer in encoder.layers:
        inside = set(layer.module.modules())
        parts = (layer.attention, layer.output_projection, layer.attention_norm, layer.output_norm, layer.block)
        assert {part for part in parts if part is not None} <= inside
        assert (layer.block is layer.module) == encoder.family.pre_norm


def test_the_encoder_behind_wrappers(bert):
    for wrapped in (torch.compile(bert), nn.DataParallel(bert), nn.DataParallel(torch.compile(bert))):
        assert Encoder.of(wrapped).model is bert


def test_what_is_changed_is_seen_by_the_next_call(bert):
    before = Encoder.of(bert)
    bert.encoder.layer[1] = tiny_model("bert", seed=1).encoder.layer[0]
    after = Encoder.of(bert)
    assert after.layers[1].module is bert.encoder.layer[1] is not before.layers[1].module
    assert after.layers[0].module is before.layers[0].module
    assert before.max_length == 48
    bert.config.max_position_embeddings = 7
    assert Encoder.of(bert).max_length == before.max_length == 7


def _gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return transformers.GPT2Model(config)


def _t5():
    config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def _deberta(**options):
    config = transformers.DebertaV2Config(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **options
    )
    return transformers.DebertaV2Model(config)


def _clip():
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=tower, vision_config=tower))


SUPPORTED = r"bert, roberta, xlm-roberta, camembert, electra, distilbert, albert, .*siglip_vision_model"


NOT_ENCODERS = {
    "gpt2": (_gpt2, ValueError, rf"GPT2Model of type 'gpt2'; supported: {SUPPORTED}.*register_encoder\('gpt2'"),
    "t5": (_t5, ValueError, r"T5ForConditionalGeneration of type 't5', an encoder-decoder.*load its encoder, T5Enc"),
    "deberta": (lambda: _deberta(conv_kernel_size=3), ValueError, "a convolution between its layers"),
    "clip": (_clip, ValueError, "CLIPModel of type 'clip', which has two: pass its vision tower, model.vision_model"),
    "bert-decoder": (
        lambda: tiny_model("bert", is_decoder=True),
        ValueError,
        "BertModel configured as a decoder .* load it with is_decoder=False",
    ),
    "plain-module": (lambda: nn.Linear(2, 2), TypeError, "must be a transformers encoder .* got Linear"),
    "no-module": (lambda: "bert-base-uncased", TypeError, "must be a transformers encoder .* got str"),
    "nothing": (lambda: None, TypeError, "must be a transformers encoder .* got NoneType"),
}


@pytest.mark.parametrize("which", NOT_ENCODERS)
def test_models_that_are_no_encoders(which):
    make, error, message = NOT_ENCODERS[which]
    model = make()
    for call in (globenc.attribute, globenc.contribution_maps, globenc.mixing_ratios, globenc.completeness_gap):
        with pytest.raises(error, match=message):
            call(model, input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(error, match=message):
        globenc.GlobEnc(model)


# what is passed instead of a model


class Wrapper(nn.Module):
    """Somebody's module that keeps the configuration."""

    def __init__(self, bert):
        super().__init__()
        self.bert, self.config, self.out = bert, bert.config, nn.Linear(24, 2)


class Holder:
    def __init__(self, body):
        self.labels, self.model_body = [], body


def wrapped(kind: str, bert):
    return {
        "own": lambda: Wrapper(bert),
        "sequence": lambda: nn.Sequential(nn.Sequential(bert)),
        "holder": lambda: Holder(nn.Sequential(bert)),
        "globenc": lambda: globenc.GlobEnc(bert),
        "list": lambda: [bert],
        "class": lambda: type(bert),
        "configuration": lambda: bert.config,
        "name": lambda: "bert-base-uncased",
        "path": lambda: Path("folder"),
        "none": lambda: None,
        "traced": lambda: torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)),
    }[kind]()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("own", r"got Wrapper: pass the model inside, its \.bert$"),
        ("sequence", r"its \[0\]\[0\]$"),
        ("holder", r"its \.model_body\[0\]$"),
        ("globenc", r"its \.model$"),
        ("list", "got list; pass one model"),
        ("class", r"got the class BertModel: .* BertModel\.from_pretrained"),
        ("configuration", "has no weights"),
        ("name", r"GlobEnc\.from_pretrained\('bert-base-uncased'\)"),
        ("path", r"GlobEnc\.from_pretrained\('folder'\)"),
        ("none", "got NoneType"),
        ("traced", "exported model"),
    ],
)
def test_what_is_no_transformers_model(bert, kind, words):
    given = wrapped(kind, bert)
    for call in (globenc.GlobEnc, globenc.attribute, globenc.contribution_maps, globenc.mixing_ratios):
        inputs = {} if call is globenc.GlobEnc else {"input_ids": torch.tensor([[5, 6]])}
        with pytest.raises(TypeError, match=words):
            call(given, **inputs)


def test_wrapped_by_other_packages(bert):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert, peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="merge_and_unload"):
        globenc.GlobEnc(model)


class Packed(torch.Tensor):
    """Only looks like a tensor of numbers."""


@pytest.mark.parametrize("kind", ["dynamic", "packed", "float8"])
def test_quantised_models(kind):
    model = tiny_model("bert", torch.float32)
    projection = model.encoder.layer[1].attention.output.dense
    if kind == "dynamic":
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    elif kind == "packed":
        projection.weight = nn.Parameter(projection.weight.detach().as_subclass(Packed))
    else:
        projection.weight = nn.Parameter(projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    for call in (globenc.GlobEnc, globenc.attribute):
        inputs = {} if call is globenc.GlobEnc else {"input_ids": torch.tensor([[5, 6]])}
        with pytest.raises(ValueError, match=r"is quantised \(.*load the model without quantisation"):
            call(model, **inputs)
