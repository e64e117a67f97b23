"""Texts that are read and files that are written."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from .console import UsageError, errors_in_a_line


def read_text(text: list[str] | None, file: str | None) -> str:
    if file is not None:
        if text:
            raise UsageError("give TEXT or --file, not both")
        return checked_text("--file", _read_file(file))
    if not text:
        raise UsageError('give the text in quotes, such as globenc attribute "not bad at all", or --file FILE')
    if len(text) > 1:
        raise UsageError(f"TEXT must be one argument, got {len(text)}: put the text in quotes")
    return checked_text("TEXT", text[0])


def _read_file(file: str) -> str:
    with errors_in_a_line():
        try:
            if file == "-" and sys.stdin is None:
                raise OSError(errno.EBADF, "standard input is closed")
            content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"file {file!r} is not UTF-8 text: byte {error.start} is part of no character") from None
        except OSError as error:
            raise OSError(f"file {file!r} cannot be read: {error.strerror}") from None


def checked_text(where: str, text: str) -> str:
    if not text.strip():
        raise UsageError(f"{where} is empty: there is no word to score")
    if any("\ud800" <= character <= "\udfff" for character in text):
        try:
            return os.fsencode(text).decode()  # an argument that Python decoded by a locale without UTF-8
        except UnicodeError:
            raise UsageError(f"{where} is not valid UTF-8") from None
    return text


def picture_path(path: Path) -> Path:
    from ..render.saving import check_ending

    try:
        check_ending(path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end, or goes away if anything fails.

    It is made at once: a place that cannot be written to is known before the model runs.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {str(path)!r}: it is not a regular file")
    part = path.with_name(f".{path.stem[:100]}.{os.getpid()}{path.suffix}")
    try:
        part.open("xb").close()
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror}") from None
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
