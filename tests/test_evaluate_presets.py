"""The paper's experiments as presets, and its published numbers beside ours."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from helpers import save_letter_model
from pyarrow import parquet
from typer.testing import CliRunner

from globenc import evaluate_preset
from globenc.cli import app
from globenc.evaluation.measurements import PAPER_ORDER
from globenc.evaluation.presets import PRESETS, PUBLISHED, TASKS, published_numbers
from globenc.evaluation.tables import tables


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> str:
    return save_letter_model(tmp_path_factory.mktemp("letters"))


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
