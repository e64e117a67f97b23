"""Files that are there whole or not at all, whenever a program or its machine stops."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Put a file with this content in the place of what may be there.

    Raises:
        OSError: it cannot be written; what was there is there still.
    """
    part = path.with_name(f".{path.name}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def sync_folder(folder: Path) -> None:
    """Make a rename last; where a system cannot, it does not."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def as_cannot_write(path: Path) -> Iterator[None]:
    """An OSError of the system's as one of globenc's."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
