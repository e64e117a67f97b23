"""Engine "ray": the same output, rejects and resume as engine "local", and workers that die."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LETTERS
from programs import GLOBENC

import globenc

ray = pytest.importorskip("ray", reason="Ray is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """60 rows of JSONL, every tenth of them bad."""
    generator = np.random.default_rng(0)
    rows = [" ".join(generator.choice(LETTERS, generator.integers(1, 30))) for _ in range(60)]
    lines = [json.dumps({"text": None if i % 10 == 4 else text, "gold": i % 2}) for i, text in enumerate(rows)]
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def cluster():
    """Ray on two processors of this machine, for all tests of this file."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local(corpus, model, tmp_path_factory) -> Path:
    """What engine "local" makes of the corpus."""
    folder = tmp_path_factory.mktemp("local") / "out"
    globenc.extract(corpus, folder, **OPTIONS, model=model)
    return folder


OPTIONS = {
    **{"label_column": "gold", "shard_rows": 7, "words": True, "keep_text": True, "progress": False},
    **{"class_scores": True, "label": "yes"},
}


def assert_same(folder: Path, other: Path) -> None:
    """Two extractions with the same rows, rejects and counts, and the same model in every shard."""
    assert globenc.load_extract(folder).equals(globenc.load_extract(other), check_metadata=True)
    assert (folder / "rejects.jsonl").read_text() == (other / "rejects.jsonl").read_text()
    counts = [json.loads((place / "manifest.json").read_text())["counts"] for place in (folder, other)]
    assert counts[0] == counts[1]
    assert len(list((folder / "data").iterdir())) == counts[0]["shards"]


def test_two_workers_write_what_local_writes(cluster, corpus, model, local, tmp_path):
    threads = torch.get_num_threads()
    summary = globenc.extract(corpus, tmp_path / "out", **OPTIONS, model=model, engine="ray", workers=2)
    assert (summary.rows, summary.rejected, summary.shards, summary.resumed) == (54, 6, 9, 0)
    assert_same(tmp_path / "out", local)
    assert torch.get_num_threads() == threads
    assert ray.is_initialized()


@pytest.mark.slow  # Ray starts anew
def test_ray_finishes_what_local_began(cluster, corpus, model, local, tmp_path):
    globenc.extract(corpus, tmp_path / "out", **OPTIONS, model=model)
    for index in (0, 3, 8):
        (tmp_path / "out" / "data" / f"part-{index:05d}.parquet").unlink()
    with pytest.raises(OSError, match="missing or damaged"):
        globenc.load_extract(tmp_path / "out")
    summary = globenc.extract(corpus, tmp_path / "out", **OPTIONS, model=model, engine="ray", workers=2)
    assert (summary.rows, summary.rejected) == (54, 6)
    assert summary.resumed == 60 - 7 - 7 - 4
    assert_same(tmp_path / "out", local)


@pytest.mark.slow  # Ray starts anew
def test_standard_input(cluster, corpus, model, local, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(corpus.read_bytes())))
    globenc.extract("-", tmp_path / "out", **OPTIONS, model=model, engine="ray", workers=2)
    table = globenc.load_extract(tmp_path / "out")
    assert table.equals(globenc.load_extract(local))
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["row"], reject["input"]) for reject in rejects] == [(i, "-") for i in range(4, 60, 10)]


def test_errors_of_workers_are_plain(cluster, corpus, model, tmp_path):
    common = {**OPTIONS, "model": model, "engine": "ray"}
    with pytest.raises(ValueError, match=r"^row 4 \(rows.jsonl line 5\): text column 'text' is null$"):
        globenc.extract(corpus, tmp_path / "strict", **common, strict=True)
    with pytest.raises(ValueError, match="special tokens, got 2"):
        globenc.extract(corpus, tmp_path / "short", **common, max_length=2)
    globenc.extract(corpus, tmp_path / "out", **common)
    changed = tmp_path / "rows.jsonl"
    changed.write_bytes(corpus.read_bytes().replace(b"a", b"b"))
    with pytest.raises(ValueError, match="begun with another input: rows 0 to 6"):
        globenc.extract(changed, tmp_path / "out", **common)


def test_refuses_what_cannot_be(cluster, corpus, model, tmp_path):
    with pytest.raises(ValueError, match="workers must be at most the 0 GPUs or 2 CPUs"):
        globenc.extract(corpus, tmp_path / "a", model=model, engine="ray", workers=3)
    with pytest.raises(ValueError, match="device 'cuda': the cluster has no GPU"):
        globenc.extract(corpus, tmp_path / "b", model=globenc.ModelSource(model, "cuda"), engine="ray")
    explainer = globenc.GlobEnc.from_pretrained(model)
    with pytest.raises(TypeError, match="model must be a name"):
        globenc.extract(corpus, tmp_path / "c", model=explainer, engine="ray")
    with pytest.raises(ValueError, match="workers goes with engine 'ray'"):
        globenc.extract(corpus, tmp_path / "d", model=model, workers=2)
    assert not list(tmp_path.iterdir())


def test_no_cluster_at_the_address(programs, corpus, tmp_path):
    arguments = ["extract", str(corpus), "-o", str(tmp_path / "out"), "--engine", "ray", "--ray-address", "127.0.0.1:1"]
    done = programs.start(GLOBENC, *arguments)
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 1
    assert errors.startswith("globenc: error: ray_address '127.0.0.1:1' is no Ray cluster that answers")
    assert not (tmp_path / "out").exists()


def workers_of(parent: int) -> list[int]:
    """Processes of model workers that belong to the run of a process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes()
            session = int((folder / "stat").read_text().rpartition(")")[2].split()[3])
        except OSError:
            continue
        if b"MapWorker" in name and session == os.getsid(parent):
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the workers in /proc")
def test_killed_workers_lose_nothing(tmp_path):
    """kill -9 of a worker, five times in one run over 2,000 rows of real text."""
    corpus = Path(__file__).parents[3] / "shared" / "data" / "ag_news" / "test.jsonl.gz"
    if not corpus.exists():
        pytest.skip("needs shared/data/ag_news")
    common = ["--text-column", "description", "--label-column", "label", "--limit", "2000", "--shard-rows", "100"]
    command = [sys.executable, "-m", "globenc", "extract", str(corpus), *common, "--words", "--output"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as a worker has: with two, last bits differ
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, env=one_thread)
    run = subprocess.Popen(
        [*command, str(tmp_path / "killed"), "--engine", "ray", "--workers", "2"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    generator = np.random.default_rng(0)
    data, killed = tmp_path / "killed" / "data", 0
    while run.poll() is None and killed < 5:
        time.sleep(generator.uniform(0.5, 2))
        workers = workers_of(run.pid)
        if workers and len(list(data.glob("*.parquet"))) > 2 * killed:
            os.kill(int(generator.choice(workers)), signal.SIGKILL)
            killed += 1
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors
    assert killed == 5
    assert_same(tmp_path / "killed", tmp_path / "whole")
