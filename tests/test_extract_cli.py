"""`globenc extract` as a program: what it prints, its exit codes, and what signals leave behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import LETTERS, save_letter_model
from programs import GLOBENC, Program
from typer.testing import CliRunner

import globenc
from globenc.cli import app
from globenc.progress import Meter

AG_NEWS = Path(__file__).parents[2] / "shared" / "data" / "ag_news" / "test.jsonl.gz"
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a tiny classifier that knows single letters."""
    return save_letter_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """600 rows of CSV, one of them empty."""
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(LETTERS, generator.integers(1, 30))) for _ in range(600)]
    texts[77] = ""
    path = tmp_path_factory.mktemp("corpus") / "rows.csv"
    path.write_text("review,stars\n" + "".join(f"{text},{k % 5}\n" for k, text in enumerate(texts)))
    return path


def arguments(corpus: Path, folder: Path, model: str, *more: str) -> list[str]:
    columns = ["--text-column", "review", "--label-column", "stars", "--shard-rows", "20", "--words"]
    return ["extract", str(corpus), "-o", str(folder), "-m", model, *columns, *more]


def start(arguments: list[str], **options) -> subprocess.Popen:
    """The program, with one thread: with another number of them last bits differ."""
    return subprocess.Popen(
        [sys.executable, "-m", "globenc", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def shards(folder: Path) -> int:
    return len(list(folder.glob("data/*.parquet")))


def wait_for(process: subprocess.Popen | Program, folder: Path, count: int) -> None:
    """Until there are so many shards, and the run goes on."""
    deadline = time.monotonic() + 60
    while shards(folder) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


def assert_same(folder: Path, other: Path) -> None:
    """Two extractions with the same rows in all columns, byte for byte, and the same rejects and counts."""
    assert globenc.load_extract(folder).equals(globenc.load_extract(other), check_metadata=True)
    assert (folder / "rejects.jsonl").read_bytes() == (other / "rejects.jsonl").read_bytes()
    counts = [json.loads((place / "manifest.json").read_text())["counts"] for place in (folder, other)]
    assert counts[0] == counts[1]
    names = [sorted(path.name for path in (place / "data").iterdir()) for place in (folder, other)]
    assert names[0] == names[1]


@pytest.fixture(scope="module")
def whole(corpus, model, tmp_path_factory) -> Path:
    """The extraction of a program that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    process = start(arguments(corpus, folder, model))
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (0, "")
    first, second = errors.splitlines()
    number = r"[\d,.]+"
    assert re.fullmatch(
        rf"globenc: wrote {re.escape(str(folder))}: 599 of 600 rows in {number} s, {number} rows/s", first
    )
    assert second == "globenc: warning: 1 rows were rejected: rejects.jsonl has the reasons"
    return folder


def test_a_second_time_there_is_nothing_to_do(whole, corpus, model):
    done = CliRunner().invoke(app, arguments(corpus, whole, model))
    assert done.exit_code == 0
    assert done.stderr.startswith(f"globenc: wrote {whole}: 599 of 600 rows, all done before\n")


def test_refusals_are_one_sentence(whole, corpus, model, tmp_path):
    def failed(*more: str, folder: Path = whole) -> str:
        done = CliRunner().invoke(app, arguments(corpus, folder, model, *more))
        assert done.exit_code == 1
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert 'was begun with method "N-Enc", and now it is "N-Res"; name another folder' in failed("--method", "N-Res")
    assert "row 77 (rows.csv line 79): text column 'review' is empty" in failed("--strict", folder=tmp_path / "new")
    assert "is no Parquet file" in failed("--format", "parquet")
    assert "goes with engine 'ray'" in failed("--workers", "2")


def test_overwrite_and_standard_input(whole, corpus, model, tmp_path):
    folder = tmp_path / "out"
    first = CliRunner().invoke(app, arguments(corpus, folder, model, "--limit", "30"))
    assert first.exit_code == 0
    more = ["--format", "csv", "--overwrite"]
    done = CliRunner().invoke(app, arguments(Path("-"), folder, model, *more), input=corpus.read_bytes())
    assert done.exit_code == 0, done.stderr
    assert globenc.load_extract(folder, ["id", "words"]).equals(globenc.load_extract(whole, ["id", "words"]))


def test_plain_progress_lines(capsys, monkeypatch):
    monkeypatch.setattr("globenc.progress.EVERY", 0.0)
    with Meter() as meter:
        meter.skip(1000, 1000, 0.25)
        meter._start -= 100
        meter.advance(500, 20000)
    _, errors = capsys.readouterr()
    assert re.fullmatch(r"globenc: 500 rows \(1,000 done before\), 200 tokens/s, 5 rows/s, ETA 0:08:20\n", errors)
    with Meter(False) as meter:
        meter.advance(500, 20000)
    assert capsys.readouterr() == ("", "")


@posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_interrupted_then_resumed(programs, whole, corpus, model, tmp_path, number, code):
    folder = tmp_path / "out"
    process = programs.start(GLOBENC, *arguments(corpus, folder, model))
    wait_for(process, folder, 3)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    rows = 20 * shards(folder)
    assert 60 <= rows < 600
    if number == signal.SIGINT:
        assert f"{rows} rows of the input are done in '{folder}'; the same command goes on from there" in errors
    assert not list(folder.glob("data/.*"))
    process = programs.start(GLOBENC, *arguments(corpus, folder, model))
    _, errors = process.communicate(timeout=60)
    assert f"599 of 600 rows ({rows} done before)" in errors
    assert_same(folder, whole)


@posix
def test_killed_twice_then_resumed(programs, whole, corpus, model, tmp_path):
    folder = tmp_path / "out"
    for count in (2, 9):
        process = programs.start(GLOBENC, *arguments(corpus, folder, model))
        wait_for(process, folder, count)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        with pytest.raises(ValueError, match="is incomplete"):
            globenc.load_extract(folder)
    process = programs.start(GLOBENC, *arguments(corpus, folder, model))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert_same(folder, whole)


@posix
@pytest.mark.slow
@pytest.mark.skipif(not AG_NEWS.exists(), reason="needs shared/data/ag_news")
def test_killed_at_25_random_moments(tmp_path):
    """2,000 rows of real text with the embedded model. A run may be killed while it imports, reads or writes."""
    columns = ["--text-column", "description", "--id-column", "idx", "--label-column", "label"]
    common = [str(AG_NEWS), *columns, "--limit", "2000", "--shard-rows", "50", "--words", "--keep-text", "--per-layer"]
    process = start(["extract", *common, "-o", str(tmp_path / "whole")])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    generator, folder, kills = np.random.default_rng(0), tmp_path / "killed", 0
    moments = []
    while kills < 25:
        process = start(["extract", *common, "-o", str(folder)])
        if kills % 5:  # every fifth at any time from the start on, the others while the model runs
            wait_for(process, folder, shards(folder) + 1)
        time.sleep(generator.uniform(0, 0.4 if kills % 5 else 6))
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "it was done before it was killed 25 times"
        kills += 1
        moments.append(shards(folder))
    assert moments[-1] < 40
    assert len(set(moments)) > 5
    process = start(["extract", *common, "-o", str(folder)])
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert_same(folder, tmp_path / "whole")
