"""A tiny model, a corpus of 30 rows in 5 shards, and their extraction."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from extract_helpers import BAD, ROWS, SOME_BAD, jsonl, run
from helpers import LETTERS, save_letter_model

import globenc

MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where the system has a folder there: an extraction flushes every file, which takes most of its time."""
    if not (MEMORY.is_dir() and os.access(MEMORY, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="globenc-", dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A folder with a tiny classifier that knows single letters."""
    return save_letter_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def loaded(model) -> globenc.GlobEnc:
    return globenc.GlobEnc.from_pretrained(model)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """SOME_BAD as JSONL."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text(jsonl(SOME_BAD))
    return path


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory) -> Path:
    """As many rows and bytes, and other words."""
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    others = dict(zip(map(ord, LETTERS), [*LETTERS[1:], LETTERS[0]], strict=True))
    path.write_text(jsonl({**row, "text": BAD.get(k, row["text"].translate(others))} for k, row in enumerate(ROWS)))
    return path


@pytest.fixture(scope="module")
def finished(corpus, model, tmp_path_factory) -> Path:
    """An extraction that nothing happened to; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    run(corpus, folder, model)
    return folder


@pytest.fixture
def out(finished, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "out"))
