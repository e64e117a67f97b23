"""A second run into a folder: what goes on, what is refused, what is overwritten."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from extract_helpers import (
    ROWS,
    TEXTS,
    assert_same,
    run,
    state,
)
from filelock import FileLock
from helpers import save_letter_model

import globenc
from globenc import ModelSource


def test_a_complete_extraction_is_left_alone(finished, corpus, model):
    before = state(finished)
    summary = run(corpus, finished, model)
    assert (summary.rows, summary.rejected, summary.resumed) == (26, 4, 30)
    assert state(finished) == before


DIFFERENT = {
    "method": ({"method": "N-ResLN"}, 'method "N-Enc", and now it is "N-ResLN"'),
    "position": ({"position": [0, 1]}, r'position "cls", and now it is \[0, 1\]'),
    "layers": ({"per_layer": True}, "per_layer false, and now it is true"),
    "max-length": ({"max_length": 20}, "max_length null, and now it is 20"),
    "words": ({"words": True}, "words false, and now it is true"),
    "label": ({"label_column": "gold"}, 'label_column null, and now it is "gold"'),
    "limit": ({"limit": 9}, "limit null, and now it is 9"),
    "shard-rows": ({"shard_rows": 8}, "shard_rows 7, and now it is 8"),
    "dtype": (ModelSource, 'model dtype "float32", and now it is "float64"'),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_other_options_are_refused(finished, corpus, model, name):
    options, sentence = DIFFERENT[name]
    if options is ModelSource:
        model, options = ModelSource(model, dtype="float64"), {}
    before = state(finished)
    with pytest.raises(ValueError, match=f"was begun with {sentence}; name another folder, or overwrite it$"):
        run(corpus, finished, model, **options)
    assert state(finished) == before


def test_another_model_is_refused(finished, corpus, loaded, model):
    other = globenc.GlobEnc.from_pretrained(model)
    with torch.no_grad():
        other.model.classifier.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r'was begun with model weights "[0-9a-f]{64}", and now it is "'):
        run(corpus, finished, other)
    words = globenc.GlobEnc(loaded.model, transformers.AutoTokenizer.from_pretrained(model, model_max_length=30))
    with pytest.raises(ValueError, match="was begun with model tokenizer "):
        run(corpus, finished, words)


def test_another_input_is_refused(finished, corpus, model, tmp_path):
    before = state(finished)
    changed = tmp_path / "rows.jsonl"
    changed.write_text(corpus.read_text() + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match=r'was begun with input .*"bytes": '):
        run(changed, finished, model)
    content = corpus.read_text()
    changed.write_text(content.replace(TEXTS[20], TEXTS[20][::-1]))
    assert changed.stat().st_size == corpus.stat().st_size
    with pytest.raises(ValueError, match="begun with another input: rows 14 to 20 are not what they were"):
        run(changed, finished, model)
    assert state(finished) == before


def test_an_input_that_became_shorter_is_refused(model, tmp_path):
    run(ROWS, tmp_path / "out", model)
    with pytest.raises(ValueError, match="rows up to 30, and the input only 28"):
        run(ROWS[:28], tmp_path / "out", model, shard_rows=7)


def test_a_moved_input_and_model_go_on(finished, corpus, model, tmp_path):
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_bytes(corpus.read_bytes())
    before = state(finished)
    assert run(moved, finished, save_letter_model(tmp_path / "model")).resumed == 30
    assert state(finished) == before


def test_overwrite(finished, corpus, model, tmp_path):
    folder = tmp_path / "out"
    run(ROWS, folder, model, words=True, shard_rows=3)
    summary = run(corpus, folder, model, overwrite=True)
    assert (summary.rows, summary.resumed) == (26, 0)
    assert_same(folder, finished)


def test_a_foreign_folder_is_refused(corpus, model, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(OSError, match=r"holds 'thesis.tex' and no manifest.json: it is no extraction"):
            run(corpus, tmp_path, model, overwrite=overwrite)
    with pytest.raises(OSError, match="is a file: name a folder"):
        run(corpus, tmp_path / "thesis.tex", model)
    with pytest.raises(OSError, match="cannot be written to"):
        run(corpus, tmp_path / "thesis.tex" / "out", model)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_a_second_run_beside_the_first_is_refused(finished, corpus, model):
    before = state(finished)
    with FileLock(finished / ".lock"), pytest.raises(OSError, match="is being written by another run"):
        run(corpus, finished, model)
    assert state(finished) == before


def test_wrong_options_make_no_folder(corpus, model, loaded, tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'N-Ence'"):
        run(corpus, folder, model, method="N-Ence")
    with pytest.raises(ValueError, match=r"shard_rows must be a positive whole number, got 0"):
        run(corpus, folder, model, shard_rows=0)
    with pytest.raises(ValueError, match="engine must be one of local, ray; got 'spark'"):
        run(corpus, folder, model, engine="spark")
    with pytest.raises(TypeError, match="position weights belong to one text"):
        run(corpus, folder, model, position=torch.ones(3))
    with pytest.raises(ValueError, match="has no column 'review'"):
        run(corpus, folder, model, text_column="review")
    with pytest.raises(TypeError, match="unexpected keyword argument 'dtype'"):
        run(corpus, folder, loaded, dtype="float64")
    with pytest.raises(OSError, match="there is no folder"):
        run(corpus, folder, tmp_path / "no-model")
    assert not folder.exists()
