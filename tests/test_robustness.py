"""Models and uses that are not quite ordinary: shared and copied configurations, patched layers, missing parts."""

from __future__ import annotations

import copy
import json
import threading
import warnings

import numpy as np
import pytest
import torch
from helpers import CONFIGS, tiny_model

import globenc

IDS = torch.arange(5, 17)[None]


def test_models_that_share_a_configuration_in_two_threads(bert):
    other = type(bert)(bert.config).eval()
    assert other.config is bert.config
    before = bert.config._attn_implementation
    failures = []

    def run(model):
        try:
            for _ in range(15):
                globenc.attribute(model, input_ids=IDS)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(model,)) for model in (bert, other, bert)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert bert.config._attn_implementation == before


def test_a_layer_with_a_configuration_of_its_own():
    model = tiny_model("bert")
    expected = globenc.attribute(model, input_ids=IDS).scores
    model.encoder.layer[1] = copy.deepcopy(model.encoder.layer[1])
    inputs = {"input_ids": torch.cat([IDS, IDS]), "attention_mask": torch.ones(2, IDS.shape[1], dtype=torch.long)}
    inputs["attention_mask"][1, 9:] = 0
    torch.testing.assert_close(globenc.attribute(model, **inputs).scores[:1], expected)
    assert model.encoder.layer[1].attention.self.config._attn_implementation == "sdpa"


def test_the_same_layer_twice():
    model = tiny_model("bert")
    model.encoder.layer[2] = model.encoder.layer[0]
    maps = globenc.contribution_maps(model, input_ids=IDS)
    torch.testing.assert_close(maps, globenc.contribution_maps(model, backend="reference", input_ids=IDS))
    assert globenc.completeness_gap(model, input_ids=IDS).max() < 1e-5


def zero_a_head(module, args):
    changed = args[0].clone()
    changed[..., :8] = 0
    return (changed,)


PATCHES = {
    "ablated-head": lambda layer: layer.attention.output.dense.register_forward_pre_hook(zero_a_head),
    "projection": lambda layer: layer.attention.output.dense.register_forward_hook(lambda m, a, out: out * 0),
    "dropout": lambda layer: layer.attention.output.dropout.register_forward_hook(lambda m, a, out: out * 2),
    "replaced-forward": lambda layer: setattr(layer.attention.output.dense, "forward", lambda x: x),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patch", PATCHES)
def test_a_patch_behind_the_attention_is_refused(patch, dtype):
    """The parts would not be the output's: no numbers rather than wrong ones; the gap still tells how wrong."""
    model = tiny_model("bert").to(dtype)
    globenc.attribute(model, input_ids=IDS)
    PATCHES[patch](model.encoder.layer[1])
    for call in (globenc.attribute, globenc.contribution_maps, globenc.mixing_ratios):
        with pytest.raises(ValueError, match=r"layer 1: what enters the first LayerNorm is not the residual plus"):
            call(model, input_ids=IDS)
    gap = globenc.completeness_gap(model, input_ids=IDS)
    assert gap[1].max() > 0.05
    assert gap[2].max() < 0.05


def test_a_patch_of_what_flows_between_layers_is_fine():
    model = tiny_model("bert").double()
    model.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 1.5)
    model.encoder.layer[1].attention.self.value.register_forward_hook(lambda module, args, output: output * 0.5)
    fast, slow = (globenc.contribution_maps(model, backend=b, input_ids=IDS) for b in ("torch", "reference"))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-14)


@pytest.fixture
def own(explainer) -> globenc.GlobEnc:
    """An explainer whose model a test may change."""
    return globenc.GlobEnc(copy.deepcopy(explainer.model), explainer.tokenizer)


def test_not_finite_logits_are_no_answer(own):
    own.model.classifier.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        own("a good film")


def test_a_label_without_a_name(own):
    own.model.config.id2label = {7: "seven", 8: "eight"}
    assert own("a good film").label.startswith("LABEL_")


def test_a_folder_without_tokenizer(tmp_path):
    tiny_model("bert", head="SequenceClassification").save_pretrained(tmp_path)
    with pytest.raises(OSError, match="has no tokenizer"):
        globenc.GlobEnc.from_pretrained(tmp_path)


def test_a_text_of_unknown_words_warns(explainer):
    with pytest.warns(UserWarning, match="knows no word of the text") as caught:
        explainer("\u4e00\u4e01")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("/nope/x", OSError, "^there is no folder '/nope/x'"),
        ("./nope", OSError, "^there is no folder './nope'"),
        ("", OSError, "^there is no folder ''"),
        (3, TypeError, "^name_or_path must be a folder or a hub name, got int"),
    ],
)
def test_from_pretrained_refuses(source, error, message):
    with pytest.raises(error, match=message):
        globenc.GlobEnc.from_pretrained(source)


def test_from_pretrained_refuses_devices():
    with pytest.raises(ValueError, match=r"^device must be"):
        globenc.GlobEnc.from_pretrained(device="foo")
    with pytest.raises(RuntimeError, match=r"^there is no device 'cuda:99' here"):
        globenc.GlobEnc.from_pretrained(device="cuda:99")


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert"])
def test_left_padding_the_model_does_not_see_as_padding_warns(family):
    model, padding = tiny_model(family), CONFIGS[family][1]["pad_token_id"]
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        globenc.attribute(model, input_ids=IDS.where(mask.bool(), torch.tensor(padding)), attention_mask=mask)
    with pytest.warns(UserWarning, match="padded on the left"):
        globenc.attribute(model, input_ids=IDS, attention_mask=mask)


def test_weights_of_any_size_are_one_position(bert):
    n = IDS.shape[1]
    plain = globenc.attribute(bert, position=torch.ones(n), per_layer=True, input_ids=IDS)
    for size in (1e-50, 1e-42, 3e38, 1e200):
        out = globenc.attribute(
            bert, position=torch.full((n,), size, dtype=torch.float64), per_layer=True, input_ids=IDS
        )
        torch.testing.assert_close(out.scores, plain.scores)
        torch.testing.assert_close(out.log2_scale - plain.log2_scale, torch.tensor([np.log2(size)]), rtol=0, atol=1e-6)
        torch.testing.assert_close(out.layer_scores, plain.layer_scores)


@pytest.mark.parametrize(
    "position", [torch.ones(5, requires_grad=True), torch.ones(5, dtype=torch.bfloat16), np.int64(1)]
)
def test_json_of_any_position(explainer, position):
    n = len(explainer("a good film").tokens)
    position = position[:1].expand(n) if isinstance(position, torch.Tensor) else position
    assert json.loads(explainer("a good film", position=position).to_json())["position"] is not None


@pytest.mark.parametrize("position", [np.int64(1), [np.int64(1), 2]], ids=["one", "list"])
def test_numpy_positions_are_drawn_like_any(explainer, position):
    a = explainer("a good film", position=position)
    assert a.position == (1 if isinstance(position, np.integer) else [1, 2])
    assert "(token 1)" in a._repr_html_()


def test_containers_of_texts(explainer):
    expected = [a.scores for a in explainer(["a good film", "bad"])]
    for texts in (("a good film", "bad"), np.array(["a good film", "bad"]), (t for t in ["a good film", "bad"])):
        for found, scores in zip(explainer(texts), expected, strict=True):
            np.testing.assert_array_equal(found.scores, scores)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"position_ids": IDS + 1000}, ValueError, r"^position_ids must be in 0..47 for this model, got 1016"),
        ({"token_type_ids": IDS}, ValueError, r"^token_type_ids must be in 0..1 for this model, got 16"),
        ({"token_type_ids": IDS.float()}, TypeError, "^token_type_ids must be an integer tensor, got torch.float32"),
        ({"token_type_ids": IDS[:, :3] * 0}, ValueError, r"^token_type_ids must have shape \[batch, n\] = \[1, 12\]"),
        ({"layer": True}, TypeError, "did you mean 'per_layer'"),
        ({"method": "n-enc"}, ValueError, "did you mean 'N-Enc'"),
        ({"method": "GlobEnc"}, ValueError, "did you mean 'N-Enc'"),
    ],
)
def test_inputs_are_named_in_errors(bert, inputs, error, message):
    with pytest.raises(error, match=message):
        globenc.attribute(bert, input_ids=IDS, **inputs)


def test_embeddings_must_be_the_models(bert):
    for embeds in (torch.zeros(1, 4, 5), torch.zeros(1, 4, 24, dtype=torch.float16)):
        with pytest.raises(ValueError, match=r"^inputs_embeds must be torch"):
            globenc.attribute(bert, inputs_embeds=embeds)
