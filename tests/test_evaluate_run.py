"""`globenc.evaluate` and `globenc evaluate`: the numbers against plain calls, the files, what goes wrong."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import save_letter_model
from pyarrow import parquet
from scipy import stats
from typer.testing import CliRunner

import globenc
from globenc import evaluate, evaluate_preset
from globenc.cli import app
from globenc.evaluation import page as page_module
from globenc.evaluation.measurements import PAPER_ORDER
from globenc.evaluation.presets import PRESETS, PUBLISHED, TASKS, published_numbers
from globenc.evaluation.tables import as_rows, tables
from globenc.metrics import plausibility, saliency

TEXTS = ["a charming and often affecting journey", "unflinchingly bleak and desperate", "dull", "it works"]
ROWS = [{"text": text, "label": k % 2} for k, text in enumerate(TEXTS)]
MARKED = [
    {"tokens": ["a", "charming", "journey"], "rationale": [0, 1, 0.2]},
    {"tokens": ["bleak", "and", "unflinchingly", "dull"], "rationale": [1, 0, 0, 1]},
    {"tokens": ["nothing", "here"], "rationale": [0, 0]},
]
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
    return parquet.read_table(found.output / "examples.parquet").to_pylist()


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


def test_means_are_those_of_the_examples(whole):
    for row in as_rows(whole.results):
        if row["metric"] == "correlation":
            values = of_text(whole, metric="correlation", **{k: row[k] for k in ("setting", "method", "layer")})
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
    assert len(rows) == 8 * 6 * 2 + 4 * 10 + 3 * 10
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
    for name in (*PAPER_ORDER, "saliency", "random", "In short", "Faithfulness", "Plausibility", "What it looks like"):
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
        ({"methods": ["Q"]}, "method must be one of .*W-Flow"),
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


HATE = [
    {
        "id": "1_gab",
        "annotators": {"label": [0, 2, 2], "annotator_id": [1, 2, 3], "target": [["A"], ["A"], []]},
        "rationales": [[0, 1, 1], [0, 0, 1]],
        "post_tokens": ["a", "b", "c"],
    },
    {
        "id": "2_twitter",
        "annotators": {"label": [1, 1, 1], "annotator_id": [1, 2, 3], "position": [[], [], []]},
        "rationales": [],
        "post_tokens": ["d", "e"],
    },
]


def local_copy(task: str, folder: Path) -> Path:
    """A few rows as the hub has them, in its columns and types."""
    rows = {
        "sst2": [{"sentence": "a b ", "label": 1, "idx": 0}, {"sentence": "c d e", "label": 0, "idx": 1}],
        "mnli": [{"premise": "a b", "hypothesis": "c .", "label": 1, "idx": 0}],
        "hatexplain": HATE,
    }[task]
    path = folder / "validation.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("task", TASKS)
def test_presets_on_local_copies(task, letters, tmp_path):
    published = tmp_path / "published.json"
    published.write_text(
        json.dumps({"source": "a paper", "correlation": {f"paper-{task}": {"N-Enc": {"mean": 0.25, "std": 0.125}}}})
    )
    copy = local_copy(task, tmp_path)
    found = evaluate_preset(
        f"paper-{task}", tmp_path / "out", inputs=str(copy), model=letters, published=published, progress=False
    )
    texts = found.results["texts"]
    assert texts["read"] == {"sst2": 2, "mnli": 1, "hatexplain": 2}[task]
    assert texts["rejected"] == 0
    assert (texts["accuracy"] is None) == (task == "hatexplain")
    assert ("plausibility" in found.results) == (task == "hatexplain")
    if task == "hatexplain":
        assert (texts["with_rationales"], texts["rationales_left_out"]) == (1, 1)
    page = found.report.read_text()
    assert "0.25 ± 0.12" in page
    assert "Published numbers: a paper" in page


def test_presets_read_what_the_paper_read(monkeypatch, tmp_path):
    """Every preset names the published checkpoint and the data on the hub."""
    asked = []
    monkeypatch.setattr(
        "globenc.evaluation.presets.evaluate", lambda inputs, output, **options: asked.append((inputs, options))
    )
    monkeypatch.setattr("globenc.evaluation.presets._joined", lambda given, task, format_: [{"text": given}])
    for preset in PRESETS:
        evaluate_preset(preset, tmp_path)
    assert len(asked) == 9
    assert {options["model"] for _, options in asked} == {
        *(f"TehranNLP-org/bert-base-uncased-cls-{task}" for task in ("sst2", "mnli", "hatexplain")),
        *(f"TehranNLP-org/bert-large-{task}" for task in ("sst2", "mnli", "hateXplain")),
        *(f"TehranNLP-org/electra-base-{task}" for task in ("sst2", "mnli", "hateXplain")),
    }
    for inputs, _ in asked:
        source = inputs if isinstance(inputs, str) else inputs[0]["text"]
        assert re.fullmatch(r"hf://[\w-]+/[\w-]+\?.*split=validation.*", source)


def test_unknown_preset(tmp_path):
    with pytest.raises(ValueError, match=r"preset must be one of paper-sst2, .*; got 'paper-qqp'"):
        evaluate_preset("paper-qqp", tmp_path)


def test_the_package_has_the_paper_s_numbers():
    """Spot checks against the paper's tables, and which preset which note belongs to."""
    content = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    assert set(content["correlation"]) == set(PRESETS)
    means = {preset: published_numbers(preset)["correlation"]["N-Enc"]["mean"] for preset in PRESETS}
    assert (means["paper-sst2"], means["paper-mnli-large"], means["paper-hatexplain-electra"]) == (0.77, 0.77, 0.47)
    for preset in PRESETS:
        numbers = published_numbers(preset)
        assert set(numbers["correlation"]) == set(PAPER_ORDER)
        named = [note for note in numbers["notes"] if "paper-" in note]
        assert all(note.startswith((f"{preset}:", f"{preset},")) for note in named)
        assert len(named) == (preset in ("paper-mnli-large", "paper-hatexplain", "paper-sst2-large"))
        assert numbers["notes"][0].startswith("read from a text copy of the camera-ready paper")
    layers = published_numbers("paper-sst2")["layers"]
    assert layers["rollout"]["N-Enc"]["6"] == {"mean": 0.74, "std": 0.14}
    assert layers["layer"]["N"]["max"] == {"mean": 0.41, "std": 0.21}
    assert published_numbers("paper-mnli")["layers"] == {}


def test_published_numbers_stand_beside_ours(letters, tmp_path):
    """In the page, the JSON and the rows; a note of another preset does not."""
    file = tmp_path / "published.json"
    notes = ["digits <may> be wrong", "paper-sst2, N: its sign", "paper-sst2-large: another model's", "paper-mnli: no"]
    table = {"N-Enc": {"mean": 0.25, "std": 0.125}, "N": {"mean": -0.5}}
    layers = {"rollout": {"N": {"1": [-0.375, 0.25], "12": [0.0625, 0.5], "max": [0.0625, 0.5]}}}
    content = {"source": "a paper", "notes": notes, "correlation": {"paper-sst2": table}}
    file.write_text(json.dumps({**content, "table2_bert_base_sst2": layers}))
    copy, options = str(local_copy("sst2", tmp_path)), {"metrics": ["correlation"], "progress": False}
    found = evaluate_preset("paper-sst2", tmp_path / "out", inputs=copy, model=letters, published=file, **options)
    assert found.results["published"]["notes"] == notes[:2]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["published"] == found.results["published"]
    with (tmp_path / "out" / "results.csv").open(newline="") as rows:
        shown = {(row["setting"], row["method"], row["layer"]): row for row in csv.DictReader(rows) if row["published"]}
    assert {key: (row["published"], row["published_std"]) for key, row in shown.items()} == {
        ("rollout", "N-Enc", "3"): ("0.25", "0.125"),
        ("rollout", "N", "3"): ("-0.5", ""),
        ("rollout", "N", "1"): ("-0.375", "0.25"),
    }
    assert all(row["published_notes"] == "digits <may> be wrong; paper-sst2, N: its sign" for row in shown.values())
    page = found.report.read_text(encoding="utf-8")
    for expected in ("Published numbers: a paper", "TehranNLP-org/bert-base-uncased-cls-sst2 on SST-2", "0.25 ± 0.12"):
        assert expected in page
    assert page.count("<li>digits &lt;may&gt; be wrong</li>") == page.count("<li>paper-sst2, N: its sign</li>") == 1
    assert "another model" not in page
    assert re.search(r"N, published</td><td>-0.38 ± 0.25</td><td>0.06 ± 0.50</td><td>0.06 ± 0.50", page)
    titles = [title for title, _, _ in tables(found.results)]
    assert titles == ["Spearman correlation with saliency, mean ± std", "Rollout up to a layer, mean ± std"]


def test_published_numbers(tmp_path):
    content = json.loads(PUBLISHED.read_text())
    assert "NAACL 2022" in content["source"]
    assert set(content["correlation"]) <= set(PRESETS)
    for preset in PRESETS:
        published_numbers(preset)
    path = tmp_path / "p.json"
    with pytest.raises(OSError, match="cannot be read"):
        published_numbers("paper-sst2", path)
    for wrong in ("[]", "{", '{"source": "x", "correlation": {"paper-sst2": {"Q": {"mean": 0}}}}'):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="must be JSON like"):
            published_numbers("paper-sst2", path)
    for wrong in ('{"mean": 7}', '{"mean": NaN}', '{"mean": 0, "std": Infinity}', '{"mean": 0, "std": -1}'):
        path.write_text(f'{{"source": "x", "correlation": {{"paper-sst2": {{"N": {wrong}}}}}}}')
        with pytest.raises(ValueError, match="correlation"):
            published_numbers("paper-sst2", path)
    path.write_text('{"source": "x", "notes": "one", "correlation": {}}')
    with pytest.raises(ValueError, match="notes must be a list"):
        published_numbers("paper-sst2", path)


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


def test_command_with_preset(letters, tmp_path):
    options = ("-m", letters, "--metrics", "correlation", "--methods", "W,N-Enc")
    code, out, err = command(local_copy("sst2", tmp_path), "--preset", "paper-sst2", "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "no published numbers" not in err
    assert "0.77 ± 0.12" in out
    assert "they are of TehranNLP-org/bert-base-uncased-cls-sst2 on SST-2" in " ".join(out.split())
    assert "in which a digit or a sign may have been misread" in " ".join(out.split())
    shutil.rmtree(tmp_path / "out")
    other = tmp_path / "other.json"
    other.write_text('{"source": "x", "correlation": {}}')
    arguments = (local_copy("sst2", tmp_path), "--preset", "paper-sst2", "-o", tmp_path / "out", "--published", other)
    assert "no published numbers" in command(*arguments, *options)[2]
    shutil.rmtree(tmp_path / "out")
    assert command("-o", tmp_path / "out")[0] == 2
    assert command("data.jsonl")[0] == 2
    for more, message in (
        (("--text-column", "x"), "--text-column does not go with --preset"),
        (("--rationales", "x"), "--rationales does not go with --preset"),
    ):
        code, _, err = command("--preset", "paper-sst2", "-o", tmp_path / "out", *more, *options)
        assert code == 2
        assert message in " ".join(re.sub(r"[│\n]", " ", err).split())
    code, _, err = command("--preset", "paper-x", "-o", tmp_path / "out")
    assert code == 1
    assert "preset must be one of" in err
