"""Files of a model's folder that are not to be read, are broken, or are missing."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from helpers import change_json, change_weights
from safetensors.torch import load_file

import globenc
from globenc import cli

INDEXES = {
    "pickle": ("weights.bin", "safetensors only"),
    "parent": ("../other.safetensors", "outside the model's folder"),
    "absolute": ("/elsewhere/other.safetensors", "outside the model's folder"),
    "windows": ("..\\other.safetensors", "outside the model's folder"),
    "drive": ("C:other.safetensors", "outside the model's folder"),
    "gone": ("model-9.safetensors", "is not there"),
    "number": (3, "safetensors only"),
}


@pytest.mark.parametrize(("name", "reason"), INDEXES.values(), ids=INDEXES.keys())
def test_only_safetensors_inside_the_folder(model_folder, name, reason):
    weights = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").rename(model_folder.parent / "other.safetensors")
    torch.save(weights, model_folder / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=reason):
        globenc.GlobEnc.from_pretrained(model_folder)


@pytest.mark.parametrize("name", ["weights.bin", "../model/model.safetensors", 5])
def test_weights_named_by_the_configuration(model_folder, name):
    change_json(model_folder, transformers_weights=name)
    with pytest.raises(OSError, match=r"its config\.json names"):
        globenc.GlobEnc.from_pretrained(model_folder)


class Canary:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_code_of_a_folder_runs(model_folder, tmp_path, capsys):
    sung = tmp_path / "sung"
    code = f"open({str(sung)!r}, 'w').close()\n"
    song = pickle.dumps(Canary(sung))
    for name in ("modeling.py", "tokenization.py", "configuration.py", "__init__.py", "setup.py", "sitecustomize.py"):
        (model_folder / name).write_text(code)
    (model_folder / "custom_generate").mkdir()
    (model_folder / "custom_generate" / "generate.py").write_text(code)
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "adapter_model.bin",
        "model_head.pkl",
        "vocab.pkl",
        ".metadata",
    ):
        (model_folder / name).write_bytes(song)
    auto = {name: f"modeling.{name}" for name in ("AutoModel", "AutoModelForSequenceClassification")}
    variants = {
        "beside": {},
        "auto_map": {"auto_map": {**auto, "AutoConfig": "configuration.Config", "AutoTokenizer": "tokenization.T"}},
        "own": {"auto_map": auto, "architectures": ["AutoModel"]},
        "type": {"model_type": "canary", "auto_map": {"AutoConfig": "configuration.Config"}},
        "kernel": {"_attn_implementation": "someone/kernel"},
        "pickled": {"transformers_weights": "pytorch_model.bin"},
    }
    (tmp_path / "rows.txt").write_text("a b\nc d\n")
    tokens = {"auto_map": {"AutoTokenizer": ["tokenization.T", None]}, "chat_template": "{{ cycler.__init__ }}"}
    change_json(model_folder, "tokenizer_config.json", **tokens)
    plain = (model_folder / "config.json").read_text()
    loaded = 0
    for fields in variants.values():
        (model_folder / "config.json").write_text(plain)
        change_json(model_folder, **fields)
        with contextlib.suppress(OSError, ValueError):
            globenc.GlobEnc.from_pretrained(model_folder)
            loaded += 1
        for command in (
            ["attribute", "a b"],
            *([name, str(tmp_path / "rows.txt")] for name in ("extract", "evaluate")),
        ):
            out = ["-o", str(tmp_path / "out"), "--overwrite"] if command[0] != "attribute" else []
            shutil.rmtree(tmp_path / "out", ignore_errors=True)
            if command[0] == "evaluate" and fields:
                continue
            with pytest.raises(SystemExit):
                cli.main([*command, *out, "-m", str(model_folder)])
        assert not sung.exists()
    (model_folder / "config.json").write_text(plain)
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"from safetensors only, not from adapter_model\.bin"):
        globenc.GlobEnc.from_pretrained(model_folder)
    (model_folder / "model.safetensors").write_bytes(song)
    with pytest.raises(OSError, match=r"model\.safetensors: "):
        globenc.GlobEnc.from_pretrained(model_folder)
    assert not sung.exists()
    assert loaded >= 2  # it would have sung
    pickle.loads(song)
    assert sung.exists()


SPLIT = {"type": "Split", "pattern": {"Regex": "((["}, "behavior": "Isolated", "invert": False}


BROKEN = {
    "architectures": ("config.json", {"architectures": [5]}, "architectures"),
    "architecture": ("config.json", {"architectures": "BertModel"}, "architectures"),
    "size": ("config.json", {"hidden_size": "abc"}, "'hidden_size'"),
    "heads": ("config.json", {"num_attention_heads": 0}, "num_attention_heads in its config.json cannot be 0"),
    "labels": ("config.json", {"id2label": ["a", "b"]}, "id2label"),
    "activation": ("config.json", {"hidden_act": "foo"}, "hidden_act in its config.json cannot be 'foo'"),
    "heads-negative": ("config.json", {"num_attention_heads": -1}, "num_attention_heads in its config.json cannot be"),
    "size-negative": ("config.json", {"hidden_size": -1}, "hidden_size in its config.json cannot be -1"),
    "words-negative": ("config.json", {"vocab_size": -1}, "vocab_size in its config.json cannot be -1"),
    "inner-negative": ("config.json", {"intermediate_size": -1}, "intermediate_size in its config.json cannot be -1"),
    "words-many": ("config.json", {"vocab_size": 10**14}, "whose vocab_size is 100000000000000"),
    "words-endless": ("config.json", {"vocab_size": 10**18}, "vocab_size in its config.json cannot be 1000"),
    "chunks": ("config.json", {"chunk_size_feed_forward": "abc"}, "chunk_size_feed_forward in its config.json"),
    "no-chunks": ("config.json", {"chunk_size_feed_forward": None}, "chunk_size_feed_forward in its config.json"),
    "half-chunks": ("config.json", {"chunk_size_feed_forward": 1.5}, "a whole number of at least 0"),
    "dtype": ("config.json", {"dtype": [1]}, "dtype in its config.json must be"),
    "code": ("config.json", {"auto_map": 5}, "auto_map in its config.json must be an object, got 5"),
    "quantising": ("config.json", {"quantization_config": "abc"}, "quantization_config in its config.json must be"),
    "reader": ("config.json", {"tokenizer_class": 5}, "tokenizer_class in its config.json must be"),
    "own-reader": ("tokenizer_config.json", {"tokenizer_class": 5}, "tokenizer_class in tokenizer_config.json must"),
    "type": ("config.json", {"model_type": ["bert"]}, "its config.json"),
    "quantised": ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "are quantised"),
    "regex": ("tokenizer.json", {"pre_tokenizer": SPLIT}, "its tokenizer"),
    "tokens": ("tokenizer.json", {"model": {"type": "Foo"}}, "its tokenizer"),
    "longest": ("tokenizer_config.json", {"model_max_length": "512"}, "model_max_length in tokenizer_config.json"),
    "special": ("tokenizer_config.json", {"cls_token": 5}, "its tokenizer"),
}


@pytest.mark.parametrize(("file", "fields", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_files_are_one_sentence_in_every_command(model_folder, tmp_path, capsys, file, fields, words):
    change_json(model_folder, file, **fields)
    with pytest.raises(OSError, match="cannot be loaded") as raised:
        globenc.GlobEnc.from_pretrained(model_folder)
    assert words in str(raised.value)
    (tmp_path / "rows.txt").write_text("a b\n")
    for command in ("extract", "evaluate"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, str(tmp_path / "rows.txt"), "-o", str(tmp_path / command), "-m", str(model_folder)])
        assert stopped.value.code == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "5", "[" * 100_000], ids=["empty", "list", "number", "deep"])
def test_files_that_are_no_json_object(model_folder, file, content):
    (model_folder / file).write_text(content)
    with pytest.raises(OSError, match=file):
        globenc.GlobEnc.from_pretrained(model_folder)


def test_half_precision_without_a_word_in_the_configuration(model_folder):
    """On a CPU it is float32 that runs, wherever the stored dtype is said."""
    change_weights(model_folder, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    change_json(model_folder, dtype=..., torch_dtype=...)
    assert globenc.GlobEnc.from_pretrained(model_folder, "cpu").model.dtype == torch.float32
    change_weights(
        model_folder, lambda weights: {k: v.to(torch.int8) if "query.weight" in k else v for k, v in weights.items()}
    )
    with pytest.raises(OSError, match=r"quantised \(bert.encoder.layer.0"):
        globenc.GlobEnc.from_pretrained(model_folder)


def test_whole_numbers_in_buffers_are_not_quantised(model_folder):
    kinds = {"causal_bias": torch.bool, "window.weight": torch.int64, "bias_index": torch.int32}
    more = {f"bert.encoder.layer.0.attention.self.{k}": torch.ones(2).to(v) for k, v in kinds.items()}
    change_weights(model_folder, lambda weights: weights | more)
    assert globenc.GlobEnc.from_pretrained(model_folder)("a b").label in ("no", "yes")


def test_files_that_are_missing(model_folder):
    (model_folder / "tokenizer.json").rename(model_folder / "other.json")
    with pytest.raises(OSError, match=r"it has no tokenizer\.json: save its tokenizer beside it"):
        globenc.GlobEnc.from_pretrained(model_folder)
    (model_folder / "model.safetensors").rename(model_folder / "weights.safetensors")
    with pytest.raises(OSError, match=r"it has weights\.safetensors: rename it to model\.safetensors$"):
        globenc.GlobEnc.from_pretrained(model_folder)
    shutil.copy(model_folder / "weights.safetensors", model_folder / "more.safetensors")
    with pytest.raises(OSError, match=r"it has more\.safetensors, weights\.safetensors: save the model once more"):
        globenc.GlobEnc.from_pretrained(model_folder)


def test_adapters_and_files_are_no_models(model_folder):
    with pytest.raises(OSError, match="is a file: give the folder"):
        globenc.GlobEnc.from_pretrained(model_folder / "model.safetensors")
    (model_folder / "adapter_config.json").write_text("{}")
    with pytest.raises(OSError, match="merge it into its model"):
        globenc.GlobEnc.from_pretrained(model_folder)
