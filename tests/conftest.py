"""Fixtures: tiny random models and tiny real tokenizers, all made on the spot."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, so before anything imports triton

import pytest
import transformers
from helpers import CORPUS, FAMILIES, save_letter_model, tiny_model
from programs import Programs, forking_programs
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import globenc
from globenc.encoders.table import FAMILIES as FAMILIES_KNOWN

torch.set_num_threads(1)  # tiny tensors: a second thread only waits
LONGEST = ("test_extract_ray", "test_kernel_", "test_triton_backend", "test_docs", "test_extract_cli")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, so that what they share is made once, and so do those of all kernels, which
    share their layers. Not the slow tests, which are few and long."""
    if config.option.dist != "load" or config.option.markexpr != "not slow":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "kernels" if "test_kernel_" in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # the order is that of the collection
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: at the end, one process waits for the other."""
    items.sort(key=lambda item: next((k for k, name in enumerate(LONGEST) if item.path.name.startswith(name)), 99))


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request) -> transformers.PreTrainedModel:
    """The base model of every family, float64."""
    return tiny_model(request.param)


@pytest.fixture
def poisoned_outputs(monkeypatch) -> None:
    """What is made without values is made of NaN: an element that no kernel writes shows."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def made(*args: Any, **options: Any) -> torch.Tensor:
            tensor = make(*args, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture
def bert() -> transformers.PreTrainedModel:
    """A tiny BERT, float64, new for every test."""
    return tiny_model("bert")


@pytest.fixture(scope="session")
def wordpiece() -> transformers.PreTrainedTokenizerFast:
    """A BERT-like fast WordPiece tokenizer of 80 word pieces."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.decoder = decoders.WordPiece()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def byte_bpe() -> transformers.PreTrainedTokenizerFast:
    """A RoBERTa-like fast byte-level BPE tokenizer; its special tokens have RoBERTa's ids 0 to 4."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    template = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def classifier() -> transformers.PreTrainedModel:
    """A tiny BERT classifier of two labels, float64."""
    return tiny_model(
        "bert", head="SequenceClassification", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}
    )


@pytest.fixture(scope="session")
def explainer(classifier, wordpiece) -> globenc.GlobEnc:
    """The tiny classifier with the WordPiece tokenizer."""
    return globenc.GlobEnc(classifier, wordpiece)


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A folder with a random BERT classifier that knows single letters, with its tokenizer."""
    return Path(save_letter_model(tmp_path_factory.mktemp("saved")))


@pytest.fixture
def model_folder(saved_model, tmp_path) -> Path:
    """A copy of `saved_model` that a test may change."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def programs(tmp_path_factory) -> Iterator[Programs]:
    """Starts programs that have imported everything already."""
    with forking_programs(tmp_path_factory.mktemp("programs")) as programs:
        yield programs


@pytest.fixture
def family_table():
    """The table of families, which is as it was after the test."""
    before = dict(FAMILIES_KNOWN)
    yield FAMILIES_KNOWN
    FAMILIES_KNOWN.clear()
    FAMILIES_KNOWN.update(before)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
