"""The pages under docs/ do what they say when followed to the letter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import duckdb
import matplotlib.image
import pytest

import globenc

DOCS = Path(__file__).parent.parent / "docs"


posix = pytest.mark.skipif(os.name != "posix", reason="the page's commands are for a POSIX shell")


def followed(page: str, folder: Path) -> list[str]:
    """What every block of code prints, run in order in a folder, but for installing."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    blocks = re.findall(
        r"^```(python|bash)\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    printed = []
    for language, code in blocks:
        if code.startswith("pip install"):
            continue
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        done = subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout + done.stderr)
    return printed


@posix
def test_evaluation(tmp_path):
    texts, command, library = followed("evaluation.md", tmp_path)
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
def test_corpora(tmp_path):
    corpus, extract, query, library, picture = followed("corpora.md", tmp_path)
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


def test_every_column_is_described(tmp_path):
    rows = [{"text": "a fine film", "pair": "is it good?", "gold": 1}]
    options = {"pair_column": "pair", "label_column": "gold", "words": True, "layers": True, "keep_text": True}
    globenc.extract(rows, tmp_path / "out", **options, progress=False)
    page = (DOCS / "corpora.md").read_text()
    for name in globenc.load_extract(tmp_path / "out").column_names:
        assert f"`{name}`" in page


def test_every_family_is_explained():
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    listed = text.split("## Each family in two sentences")[1]
    for family in globenc.supported_encoders():
        assert re.search(rf"\b{re.escape(family.model_type)}\b", listed), family.model_type
