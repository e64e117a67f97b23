"""Weights that are missing or too many, and the class that a model is loaded as."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import transformers
from helpers import change_json, change_weights, tiny_model, with_more
from safetensors.torch import load_file, save_file

import globenc
from globenc import cli


def renamed(old: str, new: str):
    return lambda folder: change_weights(
        folder, lambda weights: {k.replace(old, new, 1): v for k, v in weights.items()}
    )


def without(part: str):
    return lambda folder: change_weights(folder, lambda weights: {k: v for k, v in weights.items() if part not in k})


def prefixed(prefix: str):
    return lambda folder: change_weights(folder, lambda weights: {prefix + k: v for k, v in weights.items()})


def other_head(folder: Path) -> None:
    without("classifier")(folder)
    with_more(**{"cls.predictions.bias": torch.zeros(55)})(folder)


def adapted(folder: Path) -> None:
    renamed("query.", "query.base_layer.")(folder)
    with_more(**{"bert.encoder.layer.0.attention.self.query.lora_A.default.weight": torch.zeros(2, 24)})(folder)


def sharded(folder: Path, left_out: str = "layer.1.") -> None:
    """Two shards, and an index that does not know the second."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    second = {name for name in weights if left_out in name}
    save_file({k: v for k, v in weights.items() if k not in second}, folder / "model-1.safetensors")
    save_file({k: v for k, v in weights.items() if k in second}, folder / "model-2.safetensors")
    places = {name: "model-1.safetensors" for name in weights if name not in second}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


WAYS = {
    "module": (prefixed("module."), "have 'module.' too much"),
    "model": (prefixed("model."), "have 'model.' too much"),
    "compiled": (prefixed("_orig_mod."), "have '_orig_mod.' too much"),
    "compiled-inside": (renamed("bert.", "bert._orig_mod."), "have '_orig_mod.' too much"),
    "two-wrappers": (prefixed("student.module."), "have 'student.module.' too much"),
    "part": (renamed("bert.encoder.", ""), "lack 'encoder.'"),
    "no-classifier": (without("classifier"), "classifier.weight, classifier.bias: they belong to its head"),
    "no-pooler": (without("pooler"), "an encoder without it"),
    "other-head": (other_head, "its files hold another one, cls.predictions.bias"),
    "layer": (without("layer.1."), "they belong to layer 1"),
    "bias": (without("layer.2.attention.self.value.bias"), "they belong to layer 2"),
    "embeddings": (without("position_embeddings"), "position_embeddings.weight: its files are not whole"),
    "more-layers": (lambda folder: change_json(folder, num_hidden_layers=5), "they belong to layers 3, 4"),
    "fewer-layers": (
        lambda folder: change_json(folder, num_hidden_layers=2),
        "num_hidden_layers in its config.json is 2",
    ),
    "labels": (lambda folder: change_json(folder, id2label={"0": "a", "1": "b", "2": "c"}), "has 3 labels"),
    "adapter": (adapted, "merge it into the model"),
    "shard": (sharded, "they belong to layer 1"),
    "own-class": (
        lambda folder: change_json(folder, architectures=["MyClassifier"]),
        "does not have, MyClassifier",
    ),
    "no-class": (
        lambda folder: change_json(folder, architectures=...),
        '"architectures": ["BertForSequenceClas',
    ),
    "other-type": (
        lambda folder: change_json(folder, architectures=["RobertaForMaskedLM"]),
        "contradicts itself",
    ),
    "unknown-part": (
        with_more(**{"bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(5, 8)}),
        "computes something that this one does not",
    ),
}


@pytest.mark.parametrize(("way", "reason"), WAYS.values(), ids=WAYS.keys())
def test_weights_that_are_missing_are_told_everywhere(model_folder, tmp_path, capsys, way, reason):
    way(model_folder)
    with pytest.raises(OSError, match="cannot be loaded") as raised:
        globenc.GlobEnc.from_pretrained(model_folder)
    said = str(raised.value)
    assert reason in said
    assert repr(str(model_folder)) in said
    assert "\n" not in said
    (tmp_path / "rows.txt").write_text("a b\nc d\n")
    for command in (["attribute", "a b"], *([name, str(tmp_path / "rows.txt")] for name in ("extract", "evaluate"))):
        out = ["-o", str(tmp_path / command[0])] if command[0] != "attribute" else []
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, *out, "-m", str(model_folder)])
        assert stopped.value.code == 1
        assert capsys.readouterr().err.strip().endswith(said[-60:].rstrip("."))


def test_weights_that_the_answer_does_not_use_may_be_missing(model_folder):
    """The pooler of a base model; of DINOv2 and others likewise."""
    expected = globenc.GlobEnc.from_pretrained(model_folder)("a b c").scores
    change_json(model_folder, architectures=["BertModel"])
    change_weights(
        model_folder, lambda weights: {k: v for k, v in weights.items() if "pooler" not in k and "cl" not in k}
    )
    explainer = globenc.GlobEnc.from_pretrained(model_folder)
    assert type(explainer.model) is transformers.BertModel
    assert explainer("a b c").scores == pytest.approx(expected)


def test_ids_of_positions_and_old_names_are_no_matter(model_folder):
    with_more(**{"bert.embeddings.position_ids": torch.arange(40), "cls.seq_relationship.bias": torch.zeros(2)})(
        model_folder
    )
    renamed("LayerNorm.weight", "LayerNorm.gamma")(model_folder)
    assert globenc.GlobEnc.from_pretrained(model_folder)("a b").label in ("no", "yes")


@pytest.mark.parametrize("head", ["QuestionAnswering", "PreTraining", "NextSentencePrediction"])
def test_the_class_in_the_configuration_is_loaded(tmp_path, wordpiece, head):
    model = tiny_model("bert", torch.float32, head=head)
    model.save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    assert type(globenc.GlobEnc.from_pretrained(tmp_path).model) is type(model)


def test_a_head_that_fits_one_class_is_found(tmp_path, wordpiece):
    model = tiny_model("roberta", torch.float32, head="SequenceClassification")
    model.save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    change_json(tmp_path, architectures=...)
    assert type(globenc.GlobEnc.from_pretrained(tmp_path).model) is type(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda folder: change_json(folder, architectures=["BertModel"]),
            r"no place for \(classifier.bias",
        ),
        (with_more(**{"my_head.weight": torch.zeros(2)}), r"no place for \(my_head.weight\)"),
        (
            lambda folder: change_json(folder, architectures=["BertForMultipleChoice"]),
            "scores, but no answer",
        ),
    ],
    ids=["base", "own", "several-texts"],
)
def test_weights_that_are_left_out_are_told(model_folder, change, words):
    change(model_folder)
    with pytest.warns(UserWarning, match=words) as caught:
        globenc.GlobEnc.from_pretrained(model_folder)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("family", "head"),
    [("mpnet", "MaskedLM"), ("roberta", "MaskedLM"), ("bert", "MaskedLM"), ("bert", "PreTraining")],
)
def test_an_encoder_that_names_the_class_it_was_pretrained_as(tmp_path, wordpiece, capfd, recwarn, family, head):
    """The layout that sentence-transformers saves."""
    model = tiny_model(family, torch.float32)
    model.save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    change_json(tmp_path, architectures=[type(model).__name__.replace("Model", f"For{head}")])
    capfd.readouterr()
    found = globenc.GlobEnc.from_pretrained(tmp_path).model
    assert type(found) is type(model)
    assert capfd.readouterr().err == ""
    assert not recwarn.list
    with_more(**{"classifier.weight": torch.zeros(2, 24)})(tmp_path)
    with pytest.warns(UserWarning, match=r"no place for \(classifier.weight\), so they are left out"):
        globenc.GlobEnc.from_pretrained(tmp_path)
    without("layer.1.")(tmp_path)
    with pytest.raises(OSError, match=rf"of the weights of \w+For{head} are missing, .*layer\.1\."):
        globenc.GlobEnc.from_pretrained(tmp_path)


def test_a_part_of_the_encoder_is_no_head(tmp_path, wordpiece):
    tiny_model("modernbert", torch.float32).save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    without("final_norm")(tmp_path)
    for name in ("ModernBertModel", "ModernBertForMaskedLM"):
        change_json(tmp_path, architectures=[name])
        with pytest.raises(OSError, match=r"of ModernBert\w+ are missing, .*its files are not whole"):
            globenc.GlobEnc.from_pretrained(tmp_path)


def test_an_encoder_without_its_decoder_and_without_a_class(tmp_path, wordpiece):
    model = tiny_model("t5", torch.float32)
    model.config.is_encoder_decoder = False
    model.save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    change_json(tmp_path, architectures=...)
    assert type(globenc.GlobEnc.from_pretrained(tmp_path).model) is type(model)
    whole = transformers.T5ForConditionalGeneration(model.config)
    whole.config.is_encoder_decoder = False
    with pytest.raises(ValueError, match="load its encoder, T5EncoderModel"):
        globenc.GlobEnc(whole)


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_pooler_is_no_other_head(tmp_path, wordpiece, head):
    tiny_model("roberta", torch.float32).save_pretrained(tmp_path)
    wordpiece.save_pretrained(tmp_path)
    change_json(tmp_path, architectures=[f"RobertaFor{head}"])
    with pytest.raises(OSError, match=r'"architectures": \["RobertaModel"\]') as raised:
        globenc.GlobEnc.from_pretrained(tmp_path)
    assert "another" not in str(raised.value)


def test_loading_draws_no_bar_and_leaves_settings_alone(saved_model, capfd):
    without_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.enable_progress_bar()
    try:
        globenc.GlobEnc.from_pretrained(saved_model)
        assert capfd.readouterr().err == ""
        threads = [threading.Thread(target=globenc.GlobEnc.from_pretrained, args=(saved_model,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert capfd.readouterr().err == ""
        assert transformers.logging.is_progress_bar_enabled()
        transformers.BertModel.from_pretrained(saved_model)
        assert "Loading weights" in capfd.readouterr().err
    finally:
        if not without_bars:
            transformers.logging.disable_progress_bar()
