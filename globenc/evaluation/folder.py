"""The folder of an evaluation: written by one run at a time, and swapped from the old results to the new at one moment.

A run works in a hidden folder inside. `part` there is being written; renamed to `new` it is complete, and stands; from
then on the old results are removed, `new` becomes `moving`, and its files go to their places. A run that was killed is
brought to its end by whoever opens the folder next: what was complete is moved, what was not is dropped.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ..extraction.whole_files import sync_folder

RESULTS, ROWS, EXAMPLES, REPORT, FIGURES = "results.json", "results.csv", "examples.parquet", "report.html", "figures"
FIGURE_NAMES = ("correlation_per_layer", "correlation_boxes", "correlation_table", "faithfulness_curves")
FIGURE_ENDINGS = (".png", ".svg")
_FILES = (RESULTS, ROWS, EXAMPLES, REPORT)
_FIGURES = tuple(f"{FIGURES}/{name}{ending}" for name in FIGURE_NAMES for ending in FIGURE_ENDINGS)
_HIDDEN = ".globenc"
_LOCK, _REQUEST, _PART, _NEW, _MOVING = "lock", "request.json", "part", "new", "moving"
_OLDER = re.compile(r"\.part\.\d+")  # what earlier versions left when they were killed


class OutputFolder:
    """A folder that one evaluation writes at a time; use `opened`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._hidden = folder / _HIDDEN

    @classmethod
    @contextlib.contextmanager
    def opened(cls, output: str | Path, overwrite: bool, request: str) -> Iterator[OutputFolder]:
        """The folder, made where it is not there, locked, and free of what killed runs left.

        Args:
            output: the folder.
            overwrite: whether it may hold an evaluation.
            request: what this run was asked for. What a killed run of the same request left is replaced.

        Raises:
            OSError: it cannot be written to, or another run writes it.
            ValueError: it holds an evaluation that is not to be overwritten, or other things.
        """
        folder = Path(output).expanduser()
        if folder.exists() and not folder.is_dir():
            raise OSError(f"output {str(folder)!r} is a file: name a folder")
        new = not folder.exists()
        made = cls(folder)
        lock = FileLock(made._hidden / _LOCK)
        try:
            with made._as_sentences():
                made._acquire(lock)
                made._begin(overwrite, request)
            yield made
        finally:
            if lock.is_locked:
                made._end(new)
            lock.release()

    @contextlib.contextmanager
    def replacing(self) -> Iterator[Path]:
        """A folder to write results to. They take the place of the old ones when all are written, and else go away.

        Raises:
            OSError: they cannot be written. The old results stand.
        """
        part = self._hidden / _PART
        with self._as_sentences():
            (part / FIGURES).mkdir(parents=True)
            yield part
            for path in sorted(part.rglob("*"), reverse=True):
                _sync(path)
            _sync(part)
            part.rename(self._hidden / _NEW)
            _sync(self._hidden)
            self._settle()

    def _acquire(self, lock: FileLock) -> None:
        self._hidden.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout, FileNotFoundError):
            lock.acquire(timeout=0)
            held = lock._context.lock_file_fd
            # a run that ends removes the file: who opened it before that would hold a lock that no other run sees
            if held is not None and os.path.samestat(os.fstat(held), os.stat(self._hidden / _LOCK)):
                return
        lock.release()
        raise OSError("another run is writing there: wait for it, or stop it")

    def _begin(self, overwrite: bool, request: str) -> None:
        self._settle()
        note = self._hidden / _REQUEST
        again = note.exists() and note.read_text(encoding="utf-8", errors="replace") == request
        held = [name for name in _FILES if (self.folder / name).exists()]
        if held and not overwrite and not again:
            raise ValueError(
                f"output {str(self.folder)!r} holds an evaluation already: name another folder, or overwrite it"
            )
        others = [path for path in self.folder.iterdir() if path.name not in (_HIDDEN, *_FILES, FIGURES)]
        if (others or (self.folder / FIGURES).exists()) and not held and not overwrite:
            raise ValueError(f"output {str(self.folder)!r} is not empty: name a new folder")
        for name in (*_FILES, *_FIGURES):
            if (self.folder / name).is_dir():
                raise OSError(f"{name} is a folder there: name another output")
        if (self.folder / FIGURES).exists() and not (self.folder / FIGURES).is_dir():
            raise OSError(f"{FIGURES} is a file there: name another output")
        if not again:
            note.write_text(request, encoding="utf-8")

    def _end(self, new: bool) -> None:
        """Leave the folder with the old results or the new ones alone; what fails here is left to the next run."""
        with contextlib.suppress(OSError):
            self._settle()
            with contextlib.suppress(PermissionError):  # Windows keeps a file that is open
                (self._hidden / _LOCK).unlink()
            (self._hidden / _REQUEST).unlink(missing_ok=True)
            self._hidden.rmdir()
            if new and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _settle(self) -> None:
        """Move a complete set of files into the folder, and drop an incomplete one."""
        new, moving = self._hidden / _NEW, self._hidden / _MOVING
        if new.exists():
            for name in (*_FILES, *_FIGURES):
                (self.folder / name).unlink(missing_ok=True)
            _sync(self.folder / FIGURES)
            _sync(self.folder)
            new.rename(moving)
            _sync(self._hidden)
        if moving.exists():
            (self.folder / FIGURES).mkdir(exist_ok=True)
            for path in sorted(path for path in moving.rglob("*") if path.is_file()):
                path.replace(self.folder / path.relative_to(moving))
            _sync(self.folder / FIGURES)
            _sync(self.folder)
            shutil.rmtree(moving)
        for path in (self._hidden / _PART, *self.folder.glob(".part.*")):
            if path.name == _PART or _OLDER.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _as_sentences(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write to {str(self.folder)!r}: {error.strerror or error}") from None


def _sync(path: Path) -> None:
    """Make what was written to a file last, or what was renamed in a folder where the system can."""
    if not path.is_file():
        sync_folder(path)
        return
    with path.open("r+b") as file:
        os.fsync(file.fileno())
