"""What one row can do to an extraction: nothing but be rejected itself."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import pytest
import torch
from extract_helpers import (
    as_rows,
    rejects_in,
    run,
)
from helpers import LETTERS, tiny_model

import globenc

LETTER_TEXTS = [" ".join(LETTERS[k : k + 1 + k % 4]) for k in range(20)]


@pytest.fixture
def grown(model) -> globenc.GlobEnc:
    """Its tokenizer has a token that the model has no embedding of."""
    explainer = globenc.GlobEnc.from_pretrained(model)
    explainer.tokenizer.add_tokens(["<new>"])
    return explainer


def test_a_token_beyond_the_vocabulary(grown, loaded, tmp_path):
    with_bad = [*LETTER_TEXTS[:5], "a <new> b", *LETTER_TEXTS[5:], "<new>"]
    ids = [*range(5), 100, *range(5, 20), 101]
    summary = run(as_rows(with_bad, n=ids), tmp_path / "out", grown, id_column="n", shard_rows=100)
    assert (summary.rows, summary.rejected) == (20, 2)
    reason = "token id 57 ('<new>') is beyond the model's 57 embeddings: resize the model's embeddings"
    assert [found.startswith(reason) for found in rejects_in(tmp_path / "out").values()] == [True, True]
    assert list(rejects_in(tmp_path / "out")) == [5, 21]
    run(as_rows(LETTER_TEXTS, n=range(20)), tmp_path / "good", loaded, id_column="n", shard_rows=100)
    assert globenc.load_extract(tmp_path / "out").equals(globenc.load_extract(tmp_path / "good"))
    assert run(as_rows(with_bad, n=ids), tmp_path / "out", grown, id_column="n", shard_rows=100).resumed == 22
    with pytest.raises(ValueError, match=r"^row 5 \(rows\): token id 57 \('<new>'\) is beyond"):
        run(as_rows(with_bad), tmp_path / "strict", grown, strict=True)


def test_a_corpus_of_nothing_but_such_rows(grown, tmp_path):
    assert run(as_rows(["<new>"] * 3), tmp_path / "out", grown, shard_rows=1).rejected == 3


def test_a_list_names_the_text(grown, loaded, monkeypatch):
    with pytest.raises(ValueError, match=r"^text 1: token id 57 \('<new>'\) is beyond the model's 57 embeddings"):
        grown(["a", "<new>", "b"])
    with pytest.raises(ValueError, match=r"^token id 57"):
        grown("<new>")
    z = loaded.tokenizer.convert_tokens_to_ids("z")
    score = globenc.GlobEnc.score

    def fails(self, encodings, **options):
        if any(z in encoding.ids for encoding in encodings):
            raise FloatingPointError("the activations are not finite")
        return score(self, encodings, **options)

    monkeypatch.setattr(globenc.GlobEnc, "score", fails)
    with pytest.raises(FloatingPointError, match=r"^text 2: the activations are not finite"):
        loaded(["a", "b c", "z", "d"])
    with pytest.raises(FloatingPointError, match=r"^the activations are not finite"):
        loaded(["z", "a z"])
    with pytest.raises(ValueError, match=r"^method 'N-ResLN' has no meaning"):
        globenc.GlobEnc(tiny_model("modernbert"), loaded.tokenizer)(["a", "b"], method="N-ResLN")


def test_evaluate_leaves_such_texts_out(grown, tmp_path):
    rows = [{"text": "a b c"}, {"text": "a <new>"}, {"text": ""}, {"text": "c d"}]
    marked = [{"tokens": ["a", "b"], "rationale": [1, 0]}, {"tokens": ["<new>", "b"], "rationale": [0, 1]}]
    options = {"model": grown, "rationales": marked, "methods": ["N"], "progress": False}
    metrics = ["correlation", "plausibility"]
    texts = globenc.evaluate(rows, tmp_path / "out", metrics=metrics, **options).results["texts"]
    assert (texts["read"], texts["rejected"]) == (2, 2)
    assert "row 1: token id 57 ('<new>') is beyond the model's 57 embeddings" in texts["first_rejects"][1]
    with pytest.raises(ValueError, match="no sentence with marks that can be read: token id 57"):
        globenc.evaluate(rows, tmp_path / "none", **{**options, "rationales": marked[1:]})


class PanicException(BaseException):
    """Named as what Rust's tokenizers raise."""


ERRORS = [ValueError("no such word"), KeyError("q"), IndexError(), RuntimeError("shapes differ"), PanicException("oh")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("stage", ["encode", "score"])
def test_whatever_fails_at_one_text(loaded, tmp_path, monkeypatch, stage, error):
    """A batch that fails is taken apart until the text at fault is found."""
    q = loaded.tokenizer.convert_tokens_to_ids("q")
    encode, score = globenc.texts.encode, globenc.GlobEnc.score

    def failing_encode(tokenizer, texts, *rest):
        if any("q" in text for text in texts):
            raise error
        return encode(tokenizer, texts, *rest)

    def failing_score(self, encodings, **options):
        if any(q in encoding.ids for encoding in encodings):
            raise error
        return score(self, encodings, **options)

    run(as_rows(LETTER_TEXTS), tmp_path / "good", loaded)
    if stage == "encode":
        monkeypatch.setattr(globenc.texts, "encode", failing_encode)
    else:
        monkeypatch.setattr(globenc.GlobEnc, "score", failing_score)
    summary = run(as_rows(LETTER_TEXTS), tmp_path / "out", loaded)
    bad = [k for k, text in enumerate(LETTER_TEXTS) if "q" in text]
    assert 0 < len(bad) == summary.rejected < 7
    told = {ValueError: "no such word", RuntimeError: "shapes differ", IndexError: "IndexError"}
    assert rejects_in(tmp_path / "out") == {k: told.get(type(error), f"{type(error).__name__}: {error}") for k in bad}
    table, good = (globenc.load_extract(tmp_path / name) for name in ("out", "good"))
    wanted = good.filter(pa.array([k not in bad for k in range(20)]))
    assert (
        table.drop("scores")
        .drop("log2_scale")
        .drop("probability")
        .equals(wanted.drop("scores").drop("log2_scale").drop("probability"))
    )
    for actual, expected in zip(table["scores"].to_pylist(), wanted["scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no such device"),
        KeyboardInterrupt(),
        SystemExit(3),
        ImportError("no protobuf"),
        RuntimeError("CUDA error"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("stage", ["encode", "score"])
def test_errors_of_the_machine_stop_the_run(loaded, tmp_path, monkeypatch, stage, error):
    def fails(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((globenc.texts, "encode") if stage == "encode" else (globenc.GlobEnc, "score")), fails)
        with pytest.raises(type(error)):
            run(as_rows(LETTER_TEXTS), tmp_path / "out", loaded)
    assert run(as_rows(LETTER_TEXTS), tmp_path / "out", loaded).rows == 20


@pytest.mark.parametrize("stage", ["encode", "score"])
def test_what_fails_at_every_text_is_no_text(loaded, tmp_path, monkeypatch, stage):
    def fails(*_, **__):
        raise AttributeError("the programme is wrong")

    with monkeypatch.context() as patch:
        patch.setattr(*((globenc.texts, "encode") if stage == "encode" else (globenc.GlobEnc, "score")), fails)
        with pytest.raises(AttributeError, match=r"^the programme is wrong"):
            run(as_rows(LETTER_TEXTS), tmp_path / "out", loaded)
    assert run(as_rows(LETTER_TEXTS), tmp_path / "out", loaded).rows == 20


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("unable to mmap 64 bytes: Cannot allocate memory (12)"),
        MemoryError(),
        ValueError("what nobody foresaw"),
    ],
    ids=["primitive", "memory", "bad_alloc", "mmap", "MemoryError", "unknown"],
)
def test_what_fails_at_every_text_from_some_time_on_is_no_text(loaded, tmp_path, monkeypatch, error):
    texts, calls, score = as_rows(["a b c"] * 40), [], globenc.GlobEnc.score

    def fails_later(self, encodings, **options):
        calls.append(len(encodings))
        if len(calls) > 2:
            raise error
        return score(self, encodings, **options)

    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(globenc.GlobEnc, "score", fails_later)
        with pytest.raises(type(error)):
            run(texts, tmp_path / "out", loaded, shard_rows=8)
    summary = run(texts, tmp_path / "out", loaded, shard_rows=8)
    assert (summary.rows, summary.rejected) == (40, 0)


def test_every_text_cut_to_nothing_is_an_option(loaded, tmp_path):
    with pytest.raises(ValueError, match=r"^max_length must be more than the 2 special tokens, got 2"):
        run(as_rows(LETTER_TEXTS), tmp_path / "out", loaded, max_length=2)


def test_the_last_row_alone_may_be_bad(loaded, tmp_path, monkeypatch):
    """A run that goes on behind finished shards has scored nothing yet: that is not the model's fault."""
    broken = globenc.GlobEnc.from_pretrained(loaded.model.config._name_or_path)
    with torch.no_grad():
        broken.model.bert.embeddings.word_embeddings.weight[broken.tokenizer.convert_tokens_to_ids("z")] = float("nan")
    rows = as_rows([*LETTERS[:7], "z"])
    run(rows, tmp_path / "out", broken)
    (tmp_path / "out" / "data" / "part-00001.parquet").unlink()
    summary = run(rows, tmp_path / "out", broken)
    assert (summary.rows, summary.rejected, summary.resumed) == (7, 1, 7)
