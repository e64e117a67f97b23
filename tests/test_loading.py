"""What stands in a model's folder: weights that are missing or too many, files that are not to be read, broken ones."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
import transformers
from helpers import save_letter_model, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

import globenc
from globenc import cli


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with a random BERT classifier that knows single letters, with its tokenizer."""
    return Path(save_letter_model(tmp_path_factory.mktemp("whole")))


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change_weights(folder: Path, change) -> None:
    weights = {name: tensor.clone() for name, tensor in change(load_file(folder / "model.safetensors")).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder: Path, file: str = "config.json", **fields) -> None:
    """Set fields; ... takes one away."""
    content = json.loads((folder / file).read_text()) | fields
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / file).write_text(json.dumps(content))


def renamed(old: str, new: str):
    return lambda folder: change_weights(
        folder, lambda weights: {k.replace(old, new, 1): v for k, v in weights.items()}
    )


def without(part: str):
    return lambda folder: change_weights(folder, lambda weights: {k: v for k, v in weights.items() if part not in k})


def prefixed(prefix: str):
    return lambda folder: change_weights(folder, lambda weights: {prefix + k: v for k, v in weights.items()})


def with_more(**more: torch.Tensor):
    return lambda folder: change_weights(folder, lambda weights: weights | more)


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
    "own-class": (lambda folder: change_json(folder, architectures=["MyClassifier"]), "does not have, MyClassifier"),
    "no-class": (lambda folder: change_json(folder, architectures=...), '"architectures": ["BertForSequenceClas'),
    "other-type": (lambda folder: change_json(folder, architectures=["RobertaForMaskedLM"]), "contradicts itself"),
    "unknown-part": (
        with_more(**{"bert.encoder.layer.0.attention.self.distance_embedding.weight": torch.zeros(5, 8)}),
        "computes something that this one does not",
    ),
}


@pytest.mark.parametrize(("way", "reason"), WAYS.values(), ids=WAYS.keys())
def test_weights_that_are_missing_are_told_everywhere(folder, tmp_path, capsys, way, reason):
    way(folder)
    with pytest.raises(OSError, match="cannot be loaded") as raised:
        globenc.GlobEnc.from_pretrained(folder)
    said = str(raised.value)
    assert reason in said
    assert repr(str(folder)) in said
    assert "\n" not in said
    (tmp_path / "rows.txt").write_text("a b\nc d\n")
    for command in (["attribute", "a b"], *([name, str(tmp_path / "rows.txt")] for name in ("extract", "evaluate"))):
        out = ["-o", str(tmp_path / command[0])] if command[0] != "attribute" else []
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, *out, "-m", str(folder)])
        assert stopped.value.code == 1
        assert capsys.readouterr().err.strip().endswith(said[-60:].rstrip("."))


def test_weights_that_the_answer_does_not_use_may_be_missing(folder):
    """The pooler of a base model; of DINOv2 and others likewise."""
    expected = globenc.GlobEnc.from_pretrained(folder)("a b c").scores
    change_json(folder, architectures=["BertModel"])
    change_weights(folder, lambda weights: {k: v for k, v in weights.items() if "pooler" not in k and "cl" not in k})
    explainer = globenc.GlobEnc.from_pretrained(folder)
    assert type(explainer.model) is transformers.BertModel
    assert explainer("a b c").scores == pytest.approx(expected)


def test_ids_of_positions_and_old_names_are_no_matter(folder):
    with_more(**{"bert.embeddings.position_ids": torch.arange(40), "cls.seq_relationship.bias": torch.zeros(2)})(folder)
    renamed("LayerNorm.weight", "LayerNorm.gamma")(folder)
    assert globenc.GlobEnc.from_pretrained(folder)("a b").label in ("no", "yes")


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
        (lambda folder: change_json(folder, architectures=["BertModel"]), r"no place for \(classifier.bias"),
        (with_more(**{"my_head.weight": torch.zeros(2)}), r"no place for \(my_head.weight\)"),
        (lambda folder: change_json(folder, architectures=["BertForMultipleChoice"]), "scores, but no answer"),
    ],
    ids=["base", "own", "several-texts"],
)
def test_weights_that_are_left_out_are_told(folder, change, words):
    change(folder)
    with pytest.warns(UserWarning, match=words):
        globenc.GlobEnc.from_pretrained(folder)


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
def test_only_safetensors_inside_the_folder(folder, name, reason):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    torch.save(weights, folder / "weights.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match=reason):
        globenc.GlobEnc.from_pretrained(folder)


@pytest.mark.parametrize("name", ["weights.bin", "../model/model.safetensors", 5])
def test_weights_named_by_the_configuration(folder, name):
    change_json(folder, transformers_weights=name)
    with pytest.raises(OSError, match=r"its config\.json names"):
        globenc.GlobEnc.from_pretrained(folder)


class Canary:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_code_of_a_folder_runs(folder, tmp_path, capsys):
    sung = tmp_path / "sung"
    code = f"open({str(sung)!r}, 'w').close()\n"
    song = pickle.dumps(Canary(sung))
    for name in ("modeling.py", "tokenization.py", "configuration.py", "__init__.py", "setup.py", "sitecustomize.py"):
        (folder / name).write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code)
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "adapter_model.bin",
        "model_head.pkl",
        "vocab.pkl",
        ".metadata",
    ):
        (folder / name).write_bytes(song)
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
    change_json(folder, "tokenizer_config.json", **tokens)
    plain = (folder / "config.json").read_text()
    loaded = 0
    for fields in variants.values():
        (folder / "config.json").write_text(plain)
        change_json(folder, **fields)
        with contextlib.suppress(OSError, ValueError):
            globenc.GlobEnc.from_pretrained(folder)
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
                cli.main([*command, *out, "-m", str(folder)])
        assert not sung.exists()
    (folder / "config.json").write_text(plain)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"from safetensors only, not from adapter_model\.bin"):
        globenc.GlobEnc.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(song)
    with pytest.raises(OSError, match=r"model\.safetensors: "):
        globenc.GlobEnc.from_pretrained(folder)
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
def test_broken_files_are_one_sentence_in_every_command(folder, tmp_path, capsys, file, fields, words):
    change_json(folder, file, **fields)
    with pytest.raises(OSError, match="cannot be loaded") as raised:
        globenc.GlobEnc.from_pretrained(folder)
    assert words in str(raised.value)
    (tmp_path / "rows.txt").write_text("a b\n")
    for command in ("extract", "evaluate"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, str(tmp_path / "rows.txt"), "-o", str(tmp_path / command), "-m", str(folder)])
        assert stopped.value.code == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["", "[]", "5", "[" * 100_000], ids=["empty", "list", "number", "deep"])
def test_files_that_are_no_json_object(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(OSError, match=file):
        globenc.GlobEnc.from_pretrained(folder)


def test_half_precision_without_a_word_in_the_configuration(folder):
    """On a CPU it is float32 that runs, wherever the stored dtype is said."""
    change_weights(folder, lambda weights: {name: tensor.half() for name, tensor in weights.items()})
    change_json(folder, dtype=..., torch_dtype=...)
    assert globenc.GlobEnc.from_pretrained(folder, "cpu").model.dtype == torch.float32
    change_weights(
        folder, lambda weights: {k: v.to(torch.int8) if "query.weight" in k else v for k, v in weights.items()}
    )
    with pytest.raises(OSError, match=r"quantised \(bert.encoder.layer.0"):
        globenc.GlobEnc.from_pretrained(folder)


def test_whole_numbers_in_buffers_are_not_quantised(folder):
    kinds = {"causal_bias": torch.bool, "window.weight": torch.int64, "bias_index": torch.int32}
    with_more(**{f"bert.encoder.layer.0.attention.self.{k}": torch.ones(2).to(v) for k, v in kinds.items()})(folder)
    assert globenc.GlobEnc.from_pretrained(folder)("a b").label in ("no", "yes")


def test_files_that_are_missing(folder):
    (folder / "tokenizer.json").rename(folder / "other.json")
    with pytest.raises(OSError, match=r"it has no tokenizer\.json: save its tokenizer beside it"):
        globenc.GlobEnc.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(OSError, match=r"it has weights\.safetensors: rename it to model\.safetensors$"):
        globenc.GlobEnc.from_pretrained(folder)
    shutil.copy(folder / "weights.safetensors", folder / "more.safetensors")
    with pytest.raises(OSError, match=r"it has more\.safetensors, weights\.safetensors: save the model once more"):
        globenc.GlobEnc.from_pretrained(folder)


def test_adapters_and_files_are_no_models(folder):
    with pytest.raises(OSError, match="is a file: give the folder"):
        globenc.GlobEnc.from_pretrained(folder / "model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(OSError, match="merge it into its model"):
        globenc.GlobEnc.from_pretrained(folder)


def test_loading_draws_no_bar_and_leaves_settings_alone(whole, capfd):
    without_bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.enable_progress_bar()
    try:
        globenc.GlobEnc.from_pretrained(whole)
        assert capfd.readouterr().err == ""
        threads = [threading.Thread(target=globenc.GlobEnc.from_pretrained, args=(whole,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert capfd.readouterr().err == ""
        assert transformers.logging.is_progress_bar_enabled()
        transformers.BertModel.from_pretrained(whole)
        assert "Loading weights" in capfd.readouterr().err
    finally:
        if not without_bars:
            transformers.logging.disable_progress_bar()


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
