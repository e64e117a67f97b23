"""`globenc.evaluate` and `globenc evaluate`: the numbers against plain calls, the files, what goes wrong."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from helpers import save_letter_model
from pyarrow import parquet
from scipy import stats
from typer.testing import CliRunner

import globenc
from globenc import evaluate
from globenc.cli import app
from globenc.evaluation import page as page_module
from globenc.evaluation.costs import Costs
from globenc.evaluation.measurements import PAPER_ORDER, told_apart
from globenc.evaluation.tables import as_rows
from globenc.metrics import plausibility, saliency

TEXTS = ["a charming and often affecting journey", "unflinchingly bleak and desperate", "dull", "it works"]
ROWS = [{"text": text, "label": k % 2} for k, text in enumerate(TEXTS)]
MARKED = [
    {"tokens": ["a", "charming", "journey"], "rationale": [0, 1, 0.2]},
    {"tokens": ["bleak", "and", "unflinchingly", "dull"], "rationale": [1, 0, 0, 1]},
    {"tokens": ["nothing", "here"], "rationale": [0, 0]},
]
SIGNED = ["class-scores", "class-scores-model", "class-scores-origin", "gradient-x-input"]
FILES = {"results.json", "results.csv", "examples.parquet", "report.html", "figures"}


@pytest.fixture(scope="module")
def explainer() -> globenc.GlobEnc:
    return globenc.GlobEnc.from_pretrained()


@pytest.fixture(scope="module")
def whole(explainer, tmp_path_factory):
    """Every metric on a few texts."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return evaluate(ROWS, folder, model=explainer, rationales=MARKED, label_column="label", progress=False)


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> str:
    return save_letter_model(tmp_path_factory.mktemp("letters"))


def examples(found) -> list[dict]:
    path = found.output / "examples.parquet"
    return _rows(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _rows(path: Path, written: int) -> list[dict]:
    """The rows of a file, which tests ask for hundreds of times, as it was written at a time."""
    return parquet.read_table(path).to_pylist()


def of_text(found, **fields) -> list[float]:
    return [row["value"] for row in examples(found) if all(row[name] == value for name, value in fields.items())]


@pytest.mark.parametrize("method", PAPER_ORDER)
def test_correlations_equal_plain_calls(whole, explainer, method):
    for k, text in enumerate(TEXTS):
        inputs = explainer.tokenizer(text, return_tensors="pt")
        reference = saliency(explainer.model, **inputs)[0].numpy()
        rollouts = explainer(text, method=method, per_layer=True).layer_scores
        maps = globenc.contribution_maps(explainer.model, method=method, **inputs)[:, 0, 0].numpy()
        for layer in range(len(rollouts)):
            for kind, row in (("rollout", rollouts[layer]), ("layer", maps[layer])):
                (value,) = of_text(whole, id=str(k), metric="correlation", setting=kind, method=method, layer=layer + 1)
                assert value == pytest.approx(stats.spearmanr(row, reference).statistic, abs=1e-9)


@pytest.mark.parametrize("reference", ["zero", "model", "origin"])
def test_class_scores_equal_plain_calls(whole, explainer, reference):
    method = "class-scores" if reference == "zero" else f"class-scores-{reference}"
    for k, text in enumerate(TEXTS):
        inputs = explainer.tokenizer(text, return_tensors="pt")
        given = {"reference": reference, "mask_token_id": explainer.tokenizer.mask_token_id}
        scores = globenc.class_scores(explainer.model, **given, **inputs).scores[0].numpy()
        (value,) = of_text(whole, id=str(k), metric="correlation", setting="signed", method=method)
        correlation = stats.spearmanr(scores, saliency(explainer.model, **inputs)[0].numpy()).statistic
        assert value == pytest.approx(correlation, abs=1e-9)
    assert whole.results["settings"]["methods"] == [*PAPER_ORDER, *SIGNED]


def test_means_are_those_of_the_examples(whole):
    for row in as_rows(whole.results):
        if row["metric"] == "correlation":
            fields = {k: row[k] for k in ("setting", "method")}
            values = of_text(whole, metric="correlation", layer=row["layer"] or None, **fields)
        else:
            values = of_text(whole, metric=row["metric"], method=row["method"])
        there = [value for value in values if value is not None]
        assert (row["count"], row["undefined"]) == (len(there), len(values) - len(there))
        assert row["mean"] == pytest.approx(np.mean(there))
        assert row["std"] == pytest.approx(np.std(there))
        # Student's t, from a table: 99 % lie within so many standard errors
        half = {2: 63.657, 4: 5.841}[len(there)] * np.std(there, ddof=1) / np.sqrt(len(there))
        assert row["high99"] - row["mean"] == pytest.approx(half, rel=1e-4, abs=1e-12)


def test_faithfulness_equals_plain_calls(whole, explainer):
    tokenizer = explainer.tokenizer
    for k, text in enumerate(TEXTS):
        inputs = tokenizer(text, return_tensors="pt", return_special_tokens_mask=True)
        options = {"mask_token_id": tokenizer.mask_token_id, **inputs}
        del inputs["special_tokens_mask"]
        scores = {
            "N-Enc": globenc.attribute(explainer.model, **inputs).scores,
            "saliency": saliency(explainer.model, **inputs),
            "class-scores": globenc.class_scores(explainer.model, **inputs).scores,
            "gradient-x-input": globenc.metrics.gradient_times_input(explainer.model, **inputs),
        }
        for name, row in scores.items():
            for metric, call in (
                ("aopc", globenc.metrics.aopc),
                ("comprehensiveness", globenc.metrics.comprehensiveness),
                ("sufficiency", globenc.metrics.sufficiency),
            ):
                (value,) = of_text(whole, id=str(k), metric=metric, method=name)
                assert value == pytest.approx(call(explainer.model, row, **options).mean, abs=1e-5)


def test_plausibility_equals_plain_calls(whole, explainer):
    # each of these words is a token of its own or several with one mark
    for k, row in enumerate(MARKED[:2]):
        attribution = explainer(" ".join(row["tokens"]))
        words = [word for word in attribution.words() if not word.special]
        marks = [np.nan] * len(attribution.tokens)
        for word, mark in zip(words, row["rationale"], strict=True):
            for token in range(*word.tokens):
                marks[token] = mark
        expected = plausibility(attribution.scores, marks)
        for metric in ("auprc", "f1", "iou"):
            (value,) = of_text(whole, id=str(k), metric=metric, method="N-Enc")
            assert value == pytest.approx(getattr(expected, metric))
    numbers = whole.results["plausibility"]["auprc"]["N-Enc"]
    assert (numbers["count"], numbers["undefined"]) == (2, 1)  # of the third no word is marked


def test_accuracy(whole, explainer):
    answers = [attribution.label for attribution in explainer(TEXTS)]
    right = [answer == ("negative", "positive")[k % 2] for k, answer in enumerate(answers)]
    assert whole.results["texts"]["accuracy"] == np.mean(right)


def test_files(whole):
    assert {path.name for path in whole.output.iterdir()} == FILES
    assert json.loads((whole.output / "results.json").read_text()) == whole.results
    with (whole.output / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 6 * 2 + 4 + 4 * 14 + 3 * 14
    assert {row["method"] for row in rows if row["forward_passes"] == ""} == {"random"}
    for path in (whole.output / "figures").glob("*.png"):
        assert matplotlib.image.imread(path).std() > 0.02, path.name
    assert {path.stem for path in (whole.output / "figures").iterdir()} == {
        "correlation_per_layer",
        "correlation_boxes",
        "correlation_table",
        "faithfulness_curves",
    }


def test_report_is_redrawn_from_its_folder(whole, tmp_path):
    """From results.json and the figures, without the model and the texts."""
    shutil.copytree(whole.output, tmp_path / "copy")
    (tmp_path / "copy" / "report.html").unlink()
    redrawn = page_module.redraw_report(tmp_path / "copy")
    assert redrawn.read_text(encoding="utf-8") == whole.report.read_text(encoding="utf-8")


def test_report_is_one_file(whole):
    page = whole.report.read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in page
    for name in (
        *PAPER_ORDER,
        *SIGNED,
        "forward passes",
        "saliency",
        "random",
        "In short",
        "Faithfulness",
        "Plausibility",
        "What it looks like",
    ):
        assert name in page
    assert "nan" not in re.sub(r"base64,[^\"]+", "", page).lower().replace("financ", "")


def test_seed(explainer, whole, tmp_path):
    def run(name, seed):
        options = {"metrics": ["faithfulness"], "methods": ["N-Enc"], "removal_texts": 2, "progress": False}
        return evaluate(ROWS, tmp_path / name, model=explainer, seed=seed, **options)

    first, again, other = run("first", 1), run("again", 1), run("other", 2)
    assert first.results["faithfulness"] == again.results["faithfulness"]
    assert first.results["faithfulness"]["aopc"]["random"] != other.results["faithfulness"]["aopc"]["random"]
    assert first.results["texts"]["changed_for_faithfulness"] == 2
    assert "correlation" not in first.results
    assert "Correlation with saliency</h2>" not in first.report.read_text()


def test_without_special_tokens(explainer, tmp_path):
    found = evaluate(
        ROWS, tmp_path / "out", model=explainer, metrics=["correlation"], drop_special=True, progress=False
    )
    numbers = found.results["correlation"]["rollout"]["N-Enc"][-1]
    assert (numbers["count"], numbers["undefined"]) == (3, 1)  # "dull" is one token: it has no order
    text = TEXTS[0]
    inputs = explainer.tokenizer(text, return_tensors="pt")
    expected = stats.spearmanr(
        explainer(text).scores[1:-1], saliency(explainer.model, **inputs)[0, 1:-1].numpy()
    ).statistic
    (value,) = of_text(found, id="0", setting="rollout", method="N-Enc", layer=6)
    assert value == pytest.approx(expected)


def test_saliency_of_the_gold_class(explainer, tmp_path):
    options = {"metrics": ["correlation"], "methods": ["N-Enc"], "label_column": "label", "progress": False}
    named = [{"text": text, "label": ("negative", "positive")[k % 2]} for k, text in enumerate(TEXTS)]
    found = evaluate(named, tmp_path / "out", model=explainer, saliency_of="gold", **options)
    for k, text in enumerate(TEXTS):
        inputs = explainer.tokenizer(text, return_tensors="pt")
        reference = saliency(explainer.model, label=torch.tensor([k % 2]), **inputs)[0].numpy()
        (value,) = of_text(found, id=str(k), setting="rollout", layer=6)
        assert value == pytest.approx(stats.spearmanr(explainer(text).scores, reference).statistic, abs=1e-9)


def test_flow_and_hta(letters, tmp_path):
    model = globenc.GlobEnc.from_pretrained(letters)
    rows = [{"text": "a b c d"}, {"text": "x y"}]
    methods = ["HTA-Input", "W", "W-Flow", "HTA"]
    found = evaluate(rows, tmp_path / "out", model=model, methods=methods, metrics=["correlation"], progress=False)
    assert found.results["settings"]["methods"] == ["W", "W-Flow", "HTA", "HTA-Input"]
    for k, row in enumerate(rows):
        inputs = model.tokenizer(row["text"], return_tensors="pt")
        reference = saliency(model.model, **inputs)[0].numpy()
        maps = globenc.contribution_maps(model.model, method="W", **inputs)[:, 0]
        flow = globenc.metrics.attention_flow(maps.numpy())
        jacobians = globenc.metrics.hta(model.model, **inputs)[0][-1, 0, 0].numpy()
        for name, scores in (("W-Flow", flow), ("HTA-Input", jacobians)):
            (value,) = of_text(found, id=str(k), setting="rollout", method=name, layer=3)
            assert value == pytest.approx(stats.spearmanr(scores, reference).statistic, abs=1e-6), name


def test_signed_methods_that_cost_many_passes(letters, tmp_path):
    """By themselves, without a method that is rolled out; in the position "mean" too."""
    explainer = globenc.GlobEnc.from_pretrained(letters)
    rows, marked = [{"text": "a b c d e f g"}, {"text": "x y z"}], [{"tokens": ["a", "b"], "rationale": [1, 0]}]
    methods = ["occlusion", "integrated-gradients-mask", "integrated-gradients-zero", "class-scores"]
    options = {"methods": methods, "position": "mean", "rationales": marked, "progress": False}
    found = evaluate(rows, tmp_path / "out", model=explainer, **options)
    assert found.results["settings"]["methods"] == ["class-scores", *reversed(methods[:3])]
    assert found.results["main_method"] == "occlusion"
    assert found.results["correlation"]["rollout"] == {}
    for k, row in enumerate(rows):
        inputs = explainer.tokenizer(row["text"], return_tensors="pt")
        given = {"mask_token_id": explainer.tokenizer.mask_token_id}
        given["special_tokens_mask"] = torch.zeros_like(inputs["input_ids"])
        given["special_tokens_mask"][:, [0, -1]] = 1
        for name, scores in (
            ("occlusion", globenc.metrics.occlusion(explainer.model, **given, **inputs)),
            (
                "integrated-gradients-mask",
                globenc.metrics.integrated_gradients(explainer.model, baseline="mask", **given, **inputs),
            ),
            ("integrated-gradients-zero", globenc.metrics.integrated_gradients(explainer.model, **inputs)),
        ):
            (value,) = of_text(found, id=str(k), metric="correlation", setting="signed", method=name)
            reference = saliency(explainer.model, **inputs)[0].numpy()
            assert value == pytest.approx(stats.spearmanr(scores[0].numpy(), reference).statistic, abs=1e-6), name
    cost = found.results["cost"]
    assert set(cost) == {*methods, "saliency"}
    assert cost["integrated-gradients-zero"] > 10 * cost["saliency"] / 2
    assert "correlation_per_layer" not in found.report.read_text()


def test_what_needs_a_mask_token_is_left_out_without_one(letters, tmp_path):
    explainer = globenc.GlobEnc.from_pretrained(letters)
    explainer.tokenizer.mask_token = None
    options = {"model": explainer, "metrics": ["correlation"], "progress": False}
    found = evaluate([{"text": "a b"}], tmp_path / "out", **options)
    assert found.results["settings"]["methods"][8:] == [name for name in SIGNED if name != "class-scores-model"]
    reason = "class-scores-model needs a tokenizer with a mask token, and this one has none"
    assert found.results["settings"]["methods_left_out"] == {"class-scores-model": reason}
    assert f"class-scores-model was left out: {reason}" in found.report.read_text()
    with pytest.raises(ValueError, match="class-scores-model needs a tokenizer with a mask token, and this one has no"):
        evaluate([{"text": "a b"}], tmp_path / "other", methods=["class-scores-model"], **options)


def test_what_a_head_does_not_allow_is_left_out_where_it_was_not_asked_for(letters, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("the scores do not sum to what is explained")

    monkeypatch.setattr("globenc.evaluation.label_methods.class_scores", refuse)
    options = {"model": letters, "metrics": ["correlation"], "progress": False}
    found = evaluate([{"text": "a b"}], tmp_path / "out", **options)
    assert found.results["settings"]["methods"] == [*PAPER_ORDER, "gradient-x-input"]
    assert list(found.results["settings"]["methods_left_out"]) == SIGNED[:3]
    with pytest.raises(RuntimeError, match="do not sum"):
        evaluate([{"text": "a b"}], tmp_path / "other", methods=["class-scores"], **options)


def test_bold_is_what_a_paired_interval_tells_apart_from_all_others():
    rng = np.random.default_rng(0)
    texts = rng.normal(size=40)  # which differ much more than the methods do
    values = {"a": texts, "b": texts + 0.1 + 0.01 * rng.normal(size=40), "c": texts - 1}
    assert told_apart(values, higher=True) == "b"
    assert told_apart(values, higher=False) == "c"
    values["d"] = values["b"] + 0.01 * rng.normal(size=40)  # as good as b
    assert told_apart(values, higher=True) is None
    assert told_apart(values, higher=False) == "c"
    values["c"] = np.where(np.arange(40) < 39, np.nan, values["c"])  # a single text has no interval
    assert told_apart({name: values[name] for name in ("a", "c")}, higher=False) is None
    assert told_apart({"a": texts}, higher=True) is None
    assert told_apart({"a": texts, "b": np.full(40, np.nan)}, higher=True) is None
    assert told_apart({"a": texts, "b": texts}, higher=True) is None


def test_costs_are_times_in_forward_passes():
    now = [0.0]

    def takes(seconds: float, result: object = None):
        def run() -> object:
            now[0] += seconds
            return result

        return run

    costs = Costs(torch.device("cpu"), clock=lambda: now[0])
    costs.begin(takes(2))
    assert costs.measure("a", takes(6, "result")) == "result"
    costs.measure("b", takes(1))
    costs.begin(takes(8))
    costs.measure("a", takes(24))
    assert costs.in_forward_passes() == {"a": 3.0, "b": 0.5}


def test_pairs_and_bad_rows(letters, tmp_path):
    rows = [{"a": "b c", "b": "d"}, {"a": "", "b": "d"}, {"a": "q r s", "b": "t u"}, {"a": None, "b": "x"}]
    found = evaluate(rows, tmp_path / "out", model=letters, text_column="a", pair_column="b", progress=False)
    texts = found.results["texts"]
    assert (texts["read"], texts["rejected"]) == (2, 2)
    assert "row 1" in texts["first_rejects"][0]
    assert "2 rows were left out" in found.report.read_text()


def test_unusable_rationales_are_counted(letters, tmp_path):
    rows = [*MARKED, {"tokens": ["a"], "rationale": [1, 0]}, {"tokens": "a b", "rationale": [1, 0]}]
    rows += [{"tokens": ["a", "b"], "rationale": [2, 0]}, {"tokens": ["a", "b"], "rationale": [[1, 0], [0, 0]]}]
    found = evaluate(None, tmp_path / "out", model=letters, rationales=rows, methods=["N"], progress=False)
    assert found.results["texts"]["rationales_left_out"] == 3
    assert found.results["texts"]["with_rationales"] == 4  # the mean of two annotators is half
    assert "correlation" not in found.results


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": None}, "inputs are needed"),
        ({"metrics": ["truth"]}, "metrics must be of"),
        ({"metrics": "correlation"}, "metrics must be a list"),
        ({"metrics": []}, "metrics is an empty list"),
        ({"metrics": ["plausibility"]}, "needs rationales"),
        ({"methods": ["Q"]}, "method must be one of .*class-scores, .*occlusion, W-Flow"),
        ({"methods": []}, "methods is an empty list"),
        ({"saliency_of": "gold"}, "needs label_column"),
        ({"removal": "blur"}, "removal must be one of"),
        ({"removal_texts": 0}, "removal_texts must be a positive"),
        ({"limit": 0}, "limit must be a positive"),
        ({"text_column": "t"}, "no column 't'"),
        ({"rationales": [{"tokens": ["a"]}]}, "none of the columns"),
        ({"rationales": [{"words": ["a"], "marks": [1]}]}, "no column 'tokens'"),
        ({"rationales": [{"tokens": ["a"], "marks": [3]}]}, "no usable row; row 0"),
        ({"inputs": [{"text": ""}]}, "all 1 rows are bad, the first because row 0"),
        ({"label_column": "text"}, "label 'a b' is none of the model's"),
        ({"position": "all"}, "position must be a single one"),
        ({"methods": ["HTA"], "position": "mean"}, "for position 'cls' alone"),
    ],
)
def test_refuses(letters, tmp_path, options, message):
    arguments = {"inputs": [{"text": "a b"}], "model": letters, **options}
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(arguments.pop("inputs"), tmp_path / "out", progress=False, **arguments)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_refuses_models_that_do_not_classify(letters, tmp_path):
    encoder = globenc.GlobEnc(
        globenc.GlobEnc.from_pretrained(letters).model.base_model, globenc.GlobEnc.from_pretrained(letters).tokenizer
    )
    with pytest.raises(ValueError, match="must be a text classifier to be evaluated, got BertModel"):
        evaluate([{"text": "a"}], tmp_path / "out", model=encoder, progress=False)


def test_what_is_written_is_not_lost(letters, tmp_path, monkeypatch):
    options = {"model": letters, "metrics": ["correlation"], "methods": ["W"], "progress": False}
    evaluate([{"text": "a b"}], tmp_path, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match="holds an evaluation already"):
        evaluate([{"text": "c d"}], tmp_path, **options)

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(page_module, "write_report", fail)
        with pytest.raises(OSError, match="no space"):
            evaluate([{"text": "c d"}], tmp_path, overwrite=True, **options)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    evaluate([{"text": "c d"}], tmp_path, overwrite=True, **options)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    other = tmp_path / "figures"
    with pytest.raises(ValueError, match="is not empty"):
        evaluate([{"text": "c d"}], other, **options)
    with pytest.raises(OSError, match="is a file"):
        evaluate([{"text": "c d"}], tmp_path / "results.json", **options)


def command(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "120"})
    return done.exit_code, done.stdout, done.stderr


def test_command(letters, tmp_path):
    data, marked = tmp_path / "data.jsonl", tmp_path / "marked.jsonl"
    data.write_text("".join(json.dumps({"review": text}) + "\n" for text in ("a b c", "", "d e f g")))
    marked.write_text('{"tokens": ["a", "b"], "rationale_mean": [0.8, 0]}\n')
    code, out, err = command(
        data, "-o", tmp_path / "out", "-m", letters, "--text-column", "review", "--rationales", marked
    )
    assert code == 0, err
    for title in ("Spearman correlation", "Faithfulness", "Plausibility", "N-Enc", "random"):
        assert title in out
    assert "wrote" in err
    assert "1 rows were left out" in err
    assert (tmp_path / "out" / "report.html").exists()
    code, out, err = command(data, "-o", tmp_path / "out", "-m", letters, "--text-column", "review")
    assert (code, out) == (1, "")
    assert "holds an evaluation already" in err
