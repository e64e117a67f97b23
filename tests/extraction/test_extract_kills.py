"""Runs that end at any moment: the same command mends the folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from extract_helpers import PART, KilledError, assert_same, flipped, killed_at, posix, quietly, run

import globenc

SMALL = {"limit": 21}  # three shards: a first one, one between and a last one
BEGUN = ("nothing", "method", "input", "damaged")  # of these the first and the third are quick


def begin_with(kind: str, folder: Path, corpus: Path, other: Path, model: globenc.GlobEnc) -> dict[str, bool]:
    """A folder as a run may find it, and the options of that run."""
    if kind == "method":
        run(corpus, folder, model, method="N-Res", **SMALL)
    elif kind == "input":  # of the same size, so that only its rows tell
        run(other, folder, model, **SMALL)
    elif kind == "damaged":
        run(corpus, folder, model, **SMALL)
        (folder / PART).write_bytes(flipped((folder / PART).read_bytes(), 900))
        (folder / "data" / "part-00000.parquet").unlink()
        (folder / "rejects.jsonl").unlink()
    return {"overwrite": kind in ("method", "input"), **SMALL}


@pytest.fixture(scope="module")
def small(corpus, loaded, tmp_path_factory) -> Path:
    """An extraction of three shards that nothing happened to."""
    folder = tmp_path_factory.mktemp("small") / "out"
    run(corpus, folder, loaded, **SMALL)
    return folder


@pytest.mark.parametrize("begun", ["nothing", "input", *(pytest.param(k, marks=pytest.mark.slow) for k in BEGUN[1::2])])
def test_killed_before_and_after_every_rename(small, corpus, other_corpus, loaded, tmp_path, begun):
    options = begin_with(begun, tmp_path / "begun", corpus, other_corpus, loaded) if begun != "nothing" else SMALL
    number, killed = 0, True
    while killed:
        number += 1
        for stage in ("before", "after"):
            folder = tmp_path / f"{number}-{stage}"
            if begun != "nothing":
                shutil.copytree(tmp_path / "begun", folder)
            killed = False
            try:
                with killed_at(number, stage):
                    quietly(corpus, folder, loaded, **options)
            except KilledError:
                killed = True
            began = number > 1 or stage == "after"  # else nothing was done yet
            again = options if number % 2 or not began else SMALL
            quietly(corpus, folder, loaded, **again)
            assert_same(folder, small)
            shutil.rmtree(folder)
    assert number > 6


DRIVER = """
import builtins, os, shutil, signal, sys, time, warnings
import globenc
warnings.simplefilter("ignore")
corpus, begun, whole, out, model, overwrite, how = sys.argv[1:]
explainer = globenc.GlobEnc.from_pretrained(model)
overwrite = overwrite == "True"


def extract(**options):
    globenc.extract(corpus, out, model=explainer, shard_rows=7, limit=21, progress=False, **options)


def deadly(number, stage):
    count = 0
    def dying(act, counts=lambda *arguments: True):
        def counted(*arguments, **options):
            nonlocal count
            if not counts(*arguments):
                return act(*arguments, **options)
            count += 1
            mine = count
            if (mine, stage) == (number, "before"):
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return act(*arguments, **options)
            finally:
                if mine == number:
                    os.kill(os.getpid(), signal.SIGKILL)
        return counted
    for name in ("replace", "rename", "unlink", "mkdir", "rmdir", "fsync"):
        setattr(os, name, dying(getattr(os, name)))
    builtins.open = dying(open, lambda path, mode="r", *more: mode[0] in "wa")


def child(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def mended(number):
    _, status = os.waitpid(child(lambda: extract(overwrite=overwrite and number % 2 == 0)), 0)
    if status:
        _, status = os.waitpid(child(lambda: extract(overwrite=overwrite)), 0)
    assert not status, number
    expected, table = globenc.load_extract(whole), globenc.load_extract(out)
    assert table.equals(expected, check_metadata=True), number
    shutil.rmtree(out)


def fresh():
    if os.path.isdir(begun):
        shutil.copytree(begun, out)


mended(0)
fresh()
start = time.monotonic()
os.waitpid(child(lambda: extract(overwrite=overwrite)), 0)
longest = time.monotonic() - start  # of a run that nothing stops, as far as is known
shutil.rmtree(out)
kills = number = 0
while kills < 40 if how == "time" else True:
    number += 1
    fresh()
    if how == "time":
        pid = child(lambda: extract(overwrite=overwrite))
        time.sleep(number * 0.618034 % 1 * longest)  # moments that lie everywhere in a run
        os.kill(pid, signal.SIGKILL)
    else:
        stage = ("before", "after")[number % 2]
        def act():
            deadly((number + 1) // 2, stage)
            extract(overwrite=overwrite)
        pid = child(act)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or status == 0, number
    kills += os.WIFSIGNALED(status)
    if how == "time" and not os.WIFSIGNALED(status):
        longest *= 0.9  # it came to its end before: others may be as quick
    mended(number)
    if how != "time" and not os.WIFSIGNALED(status):
        break
print(kills)
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "how"), [*((begun, "call") for begun in BEGUN), ("nothing", "time"), ("input", "time")]
)
def test_kill_9_at_every_call_and_at_any_time(small, corpus, other_corpus, loaded, model, tmp_path, begun, how):
    """Before and after every rename, removal, new folder, opened file and flush of a run; and at any time of it."""
    options = SMALL if begun == "nothing" else begin_with(begun, tmp_path / "begun", corpus, other_corpus, loaded)
    folders = [tmp_path / "begun", small, tmp_path / "out", model]
    arguments = [corpus, *folders, options.get("overwrite", False), how]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kills = int(done.stdout)
    print(f"{begun}, {how}: {kills} kills")
    assert kills > 20
