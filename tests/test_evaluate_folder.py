"""The folder of an evaluation: old results or new ones whatever ends a run, and one run at a time."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import save_letter_model
from typer.testing import CliRunner

from globenc import evaluate
from globenc.cli import app
from globenc.evaluation import folder as folder_module
from globenc.evaluation.folder import FIGURE_ENDINGS, FIGURE_NAMES, OutputFolder

STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
NAMES = ["examples.parquet", "report.html", "results.csv", "results.json"]
NAMES += [f"figures/{name}{ending}" for name in FIGURE_NAMES for ending in FIGURE_ENDINGS]
posix = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


class Killed(BaseException):
    """As if the process ended: no later step happens either."""


class Death:
    """Before which step of the file system the process ends; a hook stays for good, so there is one."""

    def __init__(self) -> None:
        self.place: Path | None = None
        self.left = 0
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple) -> None:
        if self.place is None or event not in STEPS:
            return
        if Path(os.fsdecode(arguments[0])).is_relative_to(self.place):
            self.left -= 1
            if self.left < 0:
                raise Killed

    def after(self, steps: int, folder: Path, run: Callable[[], None]) -> bool:
        """Whether the run was ended."""
        self.place, self.left = folder, steps
        try:
            run()
        except Killed:
            return True
        finally:
            self.place = None
        return False


@pytest.fixture(scope="session")
def death() -> Death:
    return Death()


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> str:
    return save_letter_model(tmp_path_factory.mktemp("letters"))


def write(folder: Path, content: str, overwrite: bool = False, names: list[str] | None = None) -> None:
    with OutputFolder.opened(folder, overwrite, content) as opened, opened.replacing() as part:
        for name in names or NAMES:
            (part / name).write_text(content)


def held(folder: Path) -> dict[str, str]:
    """What a folder has, hidden files aside."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {str(name): path.read_text() for name, path in files.items() if name.parts[0][0] != "."}


def was_finished(folder: Path) -> bool:
    """Whether a run was ended before its very last step, the removal of an empty folder."""
    hidden = folder / ".globenc"
    return (folder / "results.json").exists() and hidden.exists() and not list(hidden.iterdir())


def moments(death: Death, make: Callable[[int], tuple[Path, Callable[[], None]]]) -> Iterator[tuple[int, Path]]:
    """A folder for every step before which its run was ended."""
    for steps in range(200):
        folder, run = make(steps)
        if not death.after(steps, folder, run):
            assert steps > 25
            return
        yield steps, folder


@pytest.fixture
def fast(monkeypatch) -> None:
    """Nothing waits for the disk: what is killed here is the process."""
    monkeypatch.setattr(folder_module, "_sync", lambda path: None)


def test_killed_before_any_step_of_a_first_run(death, tmp_path, fast):
    def make(steps: int) -> tuple[Path, Callable[[], None]]:
        folder = tmp_path / str(steps)
        return folder, lambda: write(folder, "new")

    for _, folder in moments(death, make):
        if folder.exists():
            assert set(held(folder).values()) <= {"new"}
        if was_finished(folder):
            with pytest.raises(ValueError, match="holds an evaluation already"):
                write(folder, "new")
        else:
            write(folder, "new")
        assert {path.name for path in folder.iterdir()} == {name.split("/")[0] for name in NAMES}
        assert held(folder) == dict.fromkeys(NAMES, "new")


@pytest.mark.parametrize("after", ["the same command", "another one", "killed again"])
def test_killed_before_any_step_of_an_overwriting_run(death, tmp_path, fast, after):
    def make(steps: int) -> tuple[Path, Callable[[], None]]:
        folder = tmp_path / str(steps)
        write(folder, "old")
        (folder / "figures" / "mine.png").write_text("mine")
        (folder / "notes.txt").write_text("mine")
        return folder, lambda: write(folder, "new", overwrite=True)

    mine = {"figures/mine.png": "mine", "notes.txt": "mine"}
    swapped = 0
    for steps, folder in moments(death, make):
        there = held(folder)
        assert len({content for name, content in there.items() if name not in mine}) <= 1, "old and new are mixed"
        if after == "another one":
            with pytest.raises(ValueError, match="holds an evaluation already"):
                write(folder, "other")
            (content,) = {content for name, content in held(folder).items() if name not in mine}
            assert held(folder) == {**dict.fromkeys(NAMES, content), **mine}
            swapped += content == "new"
            assert content == "old" or swapped
        else:
            if after == "killed again":
                death.after(steps // 2, folder, lambda folder=folder: write(folder, "new", overwrite=True))
            write(folder, "new", overwrite=True)
            assert held(folder) == {**dict.fromkeys(NAMES, "new"), **mine}
        assert not (folder / ".globenc").exists()
    assert after != "another one" or swapped > 10


def test_a_finished_run_is_not_replaced_but_by_its_own_command(death, tmp_path):
    write(tmp_path, "first")
    for content in ("first", "second"):
        with pytest.raises(ValueError, match="holds an evaluation already"):
            write(tmp_path, content)
    assert held(tmp_path) == dict.fromkeys(NAMES, "first")
    write(tmp_path, "fewer", overwrite=True, names=["results.json"])
    assert held(tmp_path) == {"results.json": "fewer"}


def test_what_earlier_versions_left(tmp_path):
    (tmp_path / ".part.123" / "figures").mkdir(parents=True)
    write(tmp_path, "new")
    assert held(tmp_path) == dict.fromkeys(NAMES, "new")
    assert not (tmp_path / ".part.123").exists()


@pytest.mark.parametrize("name", ["results.json", "figures/correlation_boxes.png"])
def test_a_folder_in_the_place_of_a_result_is_told_before_anything_is_done(tmp_path, name):
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(OSError, match="is a folder there"):
        write(tmp_path, "new", overwrite=True)
    assert held(tmp_path) == {}
    (tmp_path / name).rmdir()


def test_a_second_run_is_turned_away(tmp_path):
    folder = tmp_path / "out"
    entered, leave, errors = threading.Event(), threading.Event(), []

    def hold() -> None:
        with OutputFolder.opened(folder, False, "first") as opened, opened.replacing() as part:
            (part / "results.json").write_text("first")
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(30)
    for overwrite in (False, True):
        try:
            write(folder, "second", overwrite)
        except OSError as error:
            errors.append(str(error))
    leave.set()
    thread.join()
    assert len(errors) == 2
    assert all("another run is writing there: wait for it, or stop it" in error for error in errors)
    assert held(folder) == {"results.json": "first"}


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SystemExit(1)]
)
@pytest.mark.parametrize("where", ["writing", "syncing"])
def test_failures_leave_the_old_results(tmp_path, monkeypatch, error, where):
    write(tmp_path, "old")

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, "write_text") if where == "writing" else (folder_module.os, "fsync")), fail)
        with pytest.raises(
            type(error), match="cannot write to .*No space left" if isinstance(error, OSError) else None
        ):
            write(tmp_path, "new", overwrite=True)
    assert held(tmp_path) == dict.fromkeys(NAMES, "old")
    assert not (tmp_path / ".globenc").exists()
    with pytest.raises(type(error)), OutputFolder.opened(tmp_path / "fresh", False, "new"):
        raise error
    assert not (tmp_path / "fresh").exists()


def test_an_interrupt_in_the_swap_ends_with_the_new_results(tmp_path, monkeypatch):
    write(tmp_path, "old")
    original = Path.replace

    def interrupted(path, target):
        monkeypatch.setattr(Path, "replace", original)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "new", overwrite=True)
    assert held(tmp_path) == dict.fromkeys(NAMES, "new")
    assert not (tmp_path / ".globenc").exists()


def test_evaluate_writes_only_what_the_folder_knows(letters, tmp_path):
    """Every file of an evaluation is one that the next evaluation would replace."""
    rows = [{"text": "a b c"}, {"text": "d e"}]
    marked = [{"tokens": ["a", "b"], "rationale": [1, 0]}]
    evaluate(rows, tmp_path, model=letters, rationales=marked, removal_texts=1, progress=False)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(NAMES)


KILLER = """
import os, signal, sys
left = int(sys.argv[1])
def hook(event, arguments):
    global left
    if event in {"os.rename", "os.remove", "os.rmdir", "os.mkdir"} and os.path.abspath(
        os.fsdecode(arguments[0])).startswith(sys.argv[2]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
from globenc.cli import main
sys.addaudithook(hook)
main(sys.argv[3:])
"""


@posix
@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_really_killed(letters, tmp_path, overwrite):
    """SIGKILL before every eleventh step; the same command makes the results of a run that nothing stopped."""
    data, other = tmp_path / "data.jsonl", tmp_path / "other.jsonl"
    data.write_text('{"text": "a b c"}\n{"text": "d e"}\n')
    other.write_text('{"text": "f g h i"}\n')

    def command(folder: Path, data: Path, overwrite: bool) -> list[str]:
        options = ["-m", letters, "--methods", "W,N-Enc", "--metrics", "correlation"]
        return ["evaluate", str(data), "-o", str(folder), *options, *["--overwrite"] * overwrite]

    def results(folder: Path) -> dict:
        found = json.loads((folder / "results.json").read_text())
        return {name: value for name, value in found.items() if name not in ("seconds", "cost")}  # measured times

    def untimed_rows(folder: Path) -> list[dict[str, str]]:
        with (folder / "results.csv").open(newline="") as file:
            return [{**row, "forward_passes": ""} for row in csv.DictReader(file)]

    def done(folder: Path, data: Path, overwrite: bool) -> None:
        found = CliRunner().invoke(app, command(folder, data, overwrite))
        assert found.exit_code == 0, found.stderr

    done(tmp_path / "whole", data, False)
    done(tmp_path / "other", other, False)
    kills = 0
    for steps in range(0, 100, 11):
        folder = tmp_path / f"killed-{steps}"
        if overwrite:
            done(folder, other, False)
        ended = subprocess.run(
            [sys.executable, "-c", KILLER, str(steps), str(folder), *command(folder, data, overwrite)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as here: sums in another order end in other digits
            capture_output=True,
            text=True,
        )
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        kills += 1
        if (folder / "results.json").exists():
            assert results(folder) in (results(tmp_path / "whole"), results(tmp_path / "other"))
        if overwrite or not was_finished(folder):
            done(folder, data, overwrite)
        assert results(folder) == results(tmp_path / "whole")
        assert untimed_rows(folder) == untimed_rows(tmp_path / "whole")
        assert (folder / "examples.parquet").read_bytes() == (tmp_path / "whole" / "examples.parquet").read_bytes()
        assert {path.name for path in folder.iterdir()} - {".globenc"} == {
            path.name for path in (tmp_path / "whole").iterdir()
        }
    assert kills > 2
