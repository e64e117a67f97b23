"""Class scores in an extraction: the columns, which label, resume with other options, and models without labels."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest
from extract_helpers import ROWS, TEXTS, assert_same, at_a_shard, rejects_in, run, state
from typer.testing import CliRunner

import globenc
from globenc.cli import app

COLUMNS = ["class_scores", "explained_label", "logit", "remainder"]


@pytest.fixture(scope="module")
def explained(loaded, tmp_path_factory):
    """An extraction with class scores of "yes"; not to be changed."""
    folder = tmp_path_factory.mktemp("explained") / "out"
    run(ROWS, folder, loaded, class_scores=True, label="yes")
    return folder


@pytest.mark.parametrize("options", [{}, {"label": "no"}, {"label": 1, "reference": "origin"}], ids=str)
def test_columns_hold_what_globenc_gives(loaded, tmp_path, options):
    run(ROWS, tmp_path / "out", loaded, class_scores=True, words=True, pair_column="pair", **options)
    table = globenc.load_extract(tmp_path / "out")
    kinds = [table.schema.field(name).type for name in COLUMNS]
    assert kinds[0].value_type == pa.float32()
    assert kinds[1:] == [pa.string(), pa.float64(), pa.float64()]
    assert table.schema.field("word_class_scores").type.value_type == pa.float32()
    for row, given in zip(table.to_pylist(), ROWS, strict=True):
        a = loaded(given["text"], given["pair"], **options)
        assert row["explained_label"] == a.explained_label
        np.testing.assert_allclose(row["class_scores"], a.class_scores, rtol=1e-4, atol=1e-6)
        assert (row["logit"], row["remainder"]) == pytest.approx((a.logit, a.remainder), rel=1e-4, abs=1e-6)
        assert sum(row["class_scores"]) + row["remainder"] == pytest.approx(row["logit"], abs=1e-5)
        words = [word.class_score for word in a.words() if not word.special]
        np.testing.assert_allclose(row["word_class_scores"], words, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", ["all", [0, -1]], ids=str)
def test_several_positions_have_one_row_of_class_scores(loaded, explained, tmp_path, position):
    run(ROWS, tmp_path / "out", loaded, class_scores=True, label="yes", position=position, words=True)
    table, by_cls = globenc.load_extract(tmp_path / "out"), globenc.load_extract(explained)
    for row, wanted in zip(table["class_scores"].to_pylist(), by_cls["class_scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(row, wanted, rtol=1e-4, atol=1e-6)


def test_without_them_nothing_is_written(finished):
    table = globenc.load_extract(finished)
    assert not {*COLUMNS, "word_class_scores"} & {*table.schema.names}
    identity = json.loads((finished / "manifest.json").read_text())["identity"]
    assert not {"class_scores", "label", "reference"} & {*identity}  # as folders of earlier versions


def test_a_label_is_the_same_by_name_and_number(loaded, explained):
    before = state(explained)
    for label in (1, "1", "YES"):
        assert run(ROWS, explained, loaded, class_scores=True, label=label).resumed == 30
    assert state(explained) == before


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"class_scores": True, "label": "no"}, "label 1, and now it is 0"),
        ({"class_scores": True}, 'label 1, and now it is "predicted"'),
        ({"class_scores": True, "label": 1, "reference": "origin"}, 'reference "zero", and now it is "origin"'),
        ({}, "class_scores true, and now it is null"),
    ],
    ids=str,
)
def test_other_options_are_refused(loaded, explained, options, sentence):
    before = state(explained)
    with pytest.raises(ValueError, match=f"was begun with {sentence}; name another folder, or overwrite it$"):
        run(ROWS, explained, loaded, **options)
    assert state(explained) == before


def test_a_stopped_run_goes_on(loaded, explained, tmp_path):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), at_a_shard(interrupt, 3):
        run(ROWS, tmp_path / "out", loaded, class_scores=True, label="yes", batch_tokens=200)
    assert 0 < run(ROWS, tmp_path / "out", loaded, class_scores=True, label="yes", batch_tokens=200).resumed < 30
    run(ROWS, tmp_path / "whole", loaded, class_scores=True, label="yes", batch_tokens=200)
    assert_same(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_scores": True, "label": "maybe"}, ValueError, r"label must be one of this model's \(0 no, 1 yes\)"),
        ({"class_scores": True, "label": 2}, ValueError, r"label must be in 0\.\.1 \(0 no, 1 yes\), got 2"),
        ({"class_scores": True, "label": None}, TypeError, 'label must be "predicted", a number or a name'),
        ({"class_scores": True, "label": [0, 1]}, TypeError, r"label must be one number or name"),
        ({"class_scores": True, "reference": "mask"}, ValueError, "reference must be one of zero, model, origin"),
        ({"label": "yes"}, ValueError, "label goes with class_scores=True"),
        ({"reference": "origin"}, ValueError, "reference goes with class_scores=True"),
    ],
)
def test_options_that_cannot_be_used_leave_no_folder(loaded, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(ROWS, tmp_path / "out", loaded, **options)
    assert not list((tmp_path / "out").glob("data/*"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_model_without_labels_is_refused(loaded, tmp_path):
    base = globenc.GlobEnc(loaded.model.bert, loaded.tokenizer)
    with pytest.raises(ValueError, match="BertModel has no labels to explain: give a model that classifies"):
        run(ROWS, tmp_path / "out", base, class_scores=True)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_text_that_fails_is_rejected_and_no_other(loaded, tmp_path, monkeypatch):
    whole = globenc.class_score_batches.class_scores
    bad = max(range(len(TEXTS)), key=lambda k: len(loaded.tokenizer(TEXTS[k])["input_ids"]))
    longest = len(loaded.tokenizer(TEXTS[bad])["input_ids"])

    def failing(model, **options):
        if options["input_ids"].shape[1] == longest:
            raise RuntimeError("the scores do not sum")
        return whole(model, **options)

    monkeypatch.setattr(globenc.class_score_batches, "class_scores", failing)
    summary = run(ROWS, tmp_path / "out", loaded, class_scores=True)
    reasons = rejects_in(tmp_path / "out")
    assert summary.rejected == len(reasons) < 3
    assert reasons[bad] == "class scores, which can be left out: the scores do not sum"


def test_the_command(model, loaded, explained, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    command = ["extract", str(path), "-o", str(tmp_path / "out"), "-m", model, "--shard-rows", "7"]
    done = CliRunner().invoke(app, [*command, "--class-scores", "--label", "yes", "--reference", "zero"])
    assert done.exit_code == 0, done.output
    table, wanted = globenc.load_extract(tmp_path / "out"), globenc.load_extract(explained)
    assert table.select(COLUMNS[1:2]).equals(wanted.select(COLUMNS[1:2]))
    for row, other in zip(table["class_scores"].to_pylist(), wanted["class_scores"].to_pylist(), strict=True):
        np.testing.assert_allclose(row, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("option", ["--label=yes", "--reference=origin"])
def test_the_commands_options_go_with_class_scores(tmp_path, option):
    from globenc.cli.console import UsageError

    done = CliRunner().invoke(app, ["extract", "-", "-o", str(tmp_path / "out"), option], standalone_mode=False)
    assert isinstance(done.exception, UsageError)
    assert str(done.exception.format_message()) == f"{option.split('=')[0]} goes with --class-scores"
