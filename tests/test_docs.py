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


@pytest.mark.skipif(os.name != "posix", reason="the page's commands are for a POSIX shell")
def test_corpora(tmp_path):
    """Every block in order, but for installing."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / "corpora.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    printed = []
    for language, code in blocks:
        if code.startswith("pip install"):
            continue
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout + done.stderr)
    corpus, extract, query, library, picture = printed
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
