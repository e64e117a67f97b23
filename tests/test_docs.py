"""The pages under docs/ do what they say when followed to the letter."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import matplotlib.image
import numpy as np
import pyarrow as pa
import pytest
from programs import Program, Programs
from pyarrow import parquet
from scipy import stats

import globenc

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SST2 = ROOT.parent / "shared" / "data" / "sst2" / "validation.jsonl"

posix = pytest.mark.skipif(os.name != "posix", reason="the page's commands are for a POSIX shell")


def followed(page: str, folder: Path, programs: Programs) -> list[str]:
    """What every block of code prints, each a program of its own, run in order in a folder, but for installing."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    blocks = re.findall(
        r"^```(python|bash)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    printed = []
    for language, code in blocks:
        if code.startswith("pip install"):
            continue
        if language == "python":
            done: Program | subprocess.Popen = programs.start(code, folder=folder)
        else:
            options = {"cwd": folder, "env": {**os.environ, "PATH": path}, "text": True}
            done = subprocess.Popen(["bash", "-euc", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        output, errors = done.communicate(timeout=300)
        assert done.returncode == 0, errors
        printed.append(output + errors)
    return printed


@posix
def test_evaluation(programs, tmp_path):
    texts, command, library = followed("evaluation.md", tmp_path, programs)
    assert texts == ""
    for name in ("Spearman correlation", "Faithfulness", "Plausibility", "wrote evaluation/report.html"):
        assert name in command
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    for path in (tmp_path / "evaluation").iterdir():
        assert f"`{path.name}{'/' * path.is_dir()}`" in page
    header = (tmp_path / "evaluation" / "results.csv").read_text().splitlines()[0]
    assert all(f"`{column}`" in page for column in header.split(","))
    assert library.count(" correlation ") == 8
    assert re.search(r"N-Enc +correlation [+-]0\.\d\d, AOPC [+-]0\.\d{3}", library)


@posix
def test_corpora(programs, tmp_path):
    corpus, extract, signed, query, library, picture = followed("corpora.md", tmp_path, programs)
    assert {word for word in ("dull", "boring") if word in signed}
    assert (corpus, picture) == ("", "")
    assert "wrote attributions: 23 of 24 rows" in extract
    assert "1 rows were rejected" in extract
    assert "lift" in query
    assert len(library.splitlines()) == 3
    assert matplotlib.image.imread(tmp_path / "words.png").std() > 0.05
    rows = duckdb.sql(f"select label, words from '{tmp_path}/attributions/data/*.parquet'").fetchall()
    assert len(rows) == 23
    assert sum(label == "negative" for label, _ in rows) >= 8
    assert {word for word in ("dull", "boring") if word in query}


def lifts(folder: Path, monkeypatch, limit: str = "", labels: str = "where label = 'negative'") -> list[tuple]:
    """(word, times, tokens, lift, total) of the page's query on the extraction in folder/attributions."""
    page = (DOCS / "corpora.md").read_text(encoding="utf-8")
    (query,) = re.findall(r'negative = duckdb\.sql\("""(.*?)"""\)', page, flags=re.DOTALL)
    assert query.count("limit 10") == query.count("where label = 'negative'") == 1
    monkeypatch.chdir(folder)
    return duckdb.sql(query.replace("limit 10", limit).replace("where label = 'negative'", labels)).fetchall()


def test_lift_does_not_see_how_many_tokens_a_word_has(tmp_path, monkeypatch):
    """Every token of a text has the same score, and so every word the same lift."""
    tokens = [[1, 2, 1], [3, 1], [2, 3, 1, 1], [1, 2, 3, 4]]
    words = [["a", "bb", "a"], ["ccc", "a"], ["bb", "ccc", "e", "f"], ["e", "ii", "jjj", "dddd"]]
    data = tmp_path / "attributions" / "data"
    data.mkdir(parents=True)
    scores = [[0.8 * n / sum(row) for n in row] for row in tokens]
    columns = {"words": words, "word_tokens": tokens, "word_scores": scores, "label": ["negative"] * len(words)}
    parquet.write_table(pa.table(columns), data / "part-00000.parquet")
    assert {(row[0], row[3]) for row in lifts(tmp_path, monkeypatch)} == {(w, 1.0) for w in ("a", "bb", "ccc", "e")}
    columns["word_scores"][2] = [0.1, 0.1, 0.5, 0.1]  # e, of one token, now stands out from a
    parquet.write_table(pa.table(columns), data / "part-00000.parquet")
    found = {row[0]: row[3] for row in lifts(tmp_path, monkeypatch)}
    assert found["e"] > 1.3 > 1 == found["bb"] == found["ccc"] > found["a"]


def test_words_have_their_numbers_of_tokens(tmp_path):
    rows = [{"text": "an unflinchingly bleak film"}, {"text": "dull"}]
    globenc.extract(rows, tmp_path, words=True, progress=False)
    table = globenc.load_extract(tmp_path)
    for row in table.to_pylist():
        ends = [end for end in row["end"] if end is not None]
        scores = [s for s, end in zip(row["scores"], row["end"], strict=True) if end is not None]
        parts = np.split(scores, np.cumsum(row["word_tokens"])[:-1])
        assert sum(row["word_tokens"]) == len(ends)
        np.testing.assert_allclose([part.sum() for part in parts], row["word_scores"], rtol=1e-5)
    assert table["word_tokens"][0].as_py()[1] > 1
    assert table.schema.field("word_tokens").type.value_type == pa.int32()


@pytest.mark.slow
@pytest.mark.skipif(not SST2.exists(), reason="needs shared/data/sst2")
def test_lift_on_real_sentences(tmp_path, monkeypatch):
    """The page's numbers for the 872 validation sentences."""
    globenc.extract(SST2, tmp_path / "attributions", text_column="sentence", words=True, progress=False)
    rows = lifts(tmp_path, monkeypatch, labels="")
    assert abs(stats.spearmanr([row[2] for row in rows], [row[3] for row in rows]).statistic) < 0.03
    assert np.mean([row[2] for row in rows[:50]]) < 1.35
    plain = duckdb.sql("""
        select avg(tokens), avg(score * words) from (
            select lower(unnest(words)) as word, unnest(word_tokens) as tokens, unnest(word_scores) as score,
                   len(words) as words from 'attributions/data/*.parquet'
        ) where regexp_matches(word, '[[:alpha:]]') group by word having count(*) >= 2
    """).fetchall()
    assert len(plain) == len(rows)
    assert stats.spearmanr(plain).statistic > 0.3


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", *(f"docs/{path.name}" for path in DOCS.glob("*.md"))])
def test_links_and_pictures_are_in_the_repository(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in [*re.findall(r"\]\(([^)\s]+)", text), *re.findall(r"(?:src|href)=[\"']([^\"']+)", text)]:
        if "://" not in target and not target.startswith("#"):
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), target


def test_the_papers_numbers_are_those_of_the_package():
    spec = importlib.util.spec_from_file_location("table", ROOT / "bench" / "table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (DOCS / "evaluation.md").read_text(encoding="utf-8")
    assert module.with_tables(page, {"published": module.published_table()}) == page


def test_every_column_is_described(tmp_path):
    rows = [{"text": "a fine film", "pair": "is it good?", "gold": 1}]
    options = {"pair_column": "pair", "label_column": "gold", "words": True, "per_layer": True, "keep_text": True}
    globenc.extract(rows, tmp_path / "out", **options, progress=False)
    page = (DOCS / "corpora.md").read_text()
    for name in globenc.load_extract(tmp_path / "out").column_names:
        assert f"`{name}`" in page


def test_every_family_is_explained():
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    listed = text.split("## Each family in two sentences")[1]
    for family in globenc.supported_encoders():
        assert re.search(rf"\b{re.escape(family.model_type)}\b", listed), family.model_type


def test_the_api_page_lists_the_public_names():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = [
        name for row in page.splitlines() if row.startswith("| `") for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(listed) == sorted(set(globenc.__all__) - {"__version__"})
