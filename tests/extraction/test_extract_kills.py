"""Runs that end at any moment: the same command mends the folder."""

from __future__ import annotations

import json
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
import builtins, json, os, shutil, signal, sys, time, traceback, warnings
import globenc

warnings.simplefilter("ignore")
explainer = globenc.GlobEnc.from_pretrained(sys.argv[1])
score, scores = globenc.GlobEnc.score, {}


def remembered(self, encodings, **options):
    # what the model says is not in question: a child need not ask it again
    key = str(options), *(tuple(encoding.ids) for encoding in encodings)
    if key not in scores:
        scores[key] = score(self, encodings, **options)
    return scores[key]


def extract(overwrite=False):
    globenc.extract(corpus, out, model=explainer, shard_rows=7, limit=21, progress=False, overwrite=overwrite)


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


def mend(number):
    try:
        extract(overwrite and number % 2 == 0)
    except Exception:
        extract(overwrite)


def check_mended(number):
    _, status = os.waitpid(child(lambda: mend(number)), 0)
    assert not status, number
    assert globenc.load_extract(out).equals(expected, check_metadata=True), number
    shutil.rmtree(out)


def fresh():
    if os.path.isdir(begun):
        shutil.copytree(begun, out)


def kills_of(how):
    fresh()
    globenc.GlobEnc.score = remembered
    extract(overwrite)  # here, so that every child knows the scores
    shutil.rmtree(out)
    check_mended(0)
    fresh()
    start = time.monotonic()
    os.waitpid(child(lambda: extract(overwrite)), 0)
    longest = time.monotonic() - start  # of a run that nothing stops, as far as is known
    shutil.rmtree(out)
    kills = number = 0
    while kills < 40 if how == "time" else True:
        number += 1
        fresh()
        if how == "time":
            pid = child(lambda: extract(overwrite))
            time.sleep(number * 0.618034 % 1 * longest)  # moments that lie everywhere in a run
            os.kill(pid, signal.SIGKILL)
        else:
            stage = ("before", "after")[number % 2]
            def act():
                deadly((number + 1) // 2, stage)
                extract(overwrite)
            pid = child(act)
        _, status = os.waitpid(pid, 0)
        killed = os.WIFSIGNALED(status)
        assert killed or status == 0, number
        kills += killed
        if how == "time" and not killed:
            longest *= 0.9  # it came to its end before: others may be as quick
        check_mended(number)
        if how != "time" and not killed:
            return kills
    return kills


for line in sys.stdin:
    corpus, begun, whole, out, overwrite, how = json.loads(line)
    try:
        expected = globenc.load_extract(whole)
        print(json.dumps(kills_of(how)), flush=True)
    except BaseException:
        print(json.dumps(traceback.format_exc()), flush=True)
"""


@pytest.fixture(scope="module")
def driver(model):
    """A program that has loaded everything, and whose children extract and are killed."""
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, model],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield process
        process.stdin.close()


@posix
@pytest.mark.slow
@pytest.mark.parametrize(
    ("begun", "how"), [*((begun, "call") for begun in BEGUN), ("nothing", "time"), ("input", "time")]
)
def test_kill_9_at_every_call_and_at_any_time(small, corpus, other_corpus, loaded, driver, tmp_path, begun, how):
    """Before and after every rename, removal, new folder, opened file and flush of a run; and at any time of it."""
    options = SMALL if begun == "nothing" else begin_with(begun, tmp_path / "begun", corpus, other_corpus, loaded)
    paths = [str(path) for path in (corpus, tmp_path / "begun", small, tmp_path / "out")]
    print(json.dumps([*paths, options.get("overwrite", False), how]), file=driver.stdin, flush=True)
    kills = json.loads(driver.stdout.readline())
    print(f"{begun}, {how}: {kills} kills")
    assert isinstance(kills, int), kills
    assert kills > 20
