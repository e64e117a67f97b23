"""manifest.json: what a folder says about the run that wrote it, read with its hash, and compared with another run."""

from __future__ import annotations

import datetime
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checksum import checked_json

FORMAT = "globenc-extract-2"
MANIFEST = "manifest.json"
_FORMATS = "globenc-extract-"


class DamagedManifestError(OSError):
    """manifest.json is there, and not as it was written."""


class OtherVersionError(OSError):
    """manifest.json is of another version of globenc."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What manifest.json of a folder holds; None where there is none.

    Raises:
        OSError: it is not one of an extraction's, or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        passing = isinstance(error, OSError) and error.errno != errno.EIO  # a permission, not damage
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise (OSError if passing else DamagedManifestError)(f"{str(path)!r} cannot be read: {reason}") from None
    written = manifest if isinstance(manifest, dict) else {}
    format_ = written.get("format")
    if format_ == FORMAT or "sha256" in written:
        try:
            manifest = checked_json(written)
        except ValueError as error:
            raise DamagedManifestError(f"{str(path)!r} is damaged: {error}") from None
    reason = f"{str(path)!r} is no manifest of this version's extractions: its format is {format_!r}"
    if str(format_).startswith(_FORMATS) and format_ != FORMAT:
        raise OtherVersionError(f"{reason}; name another folder, or overwrite it")
    if format_ != FORMAT:
        raise DamagedManifestError(reason)
    return manifest


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str | None:
    """The first difference of two runs' options in words; None where there is none."""
    first = first_difference(old, new)
    return None if first is None else f"{first[0]} {first[1]}, and now it is {first[2]}"


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> tuple[str, str, str] | None:
    """Name, old and new value."""
    for name in dict.fromkeys([*old, *new]):
        before, after = old.get(name), new.get(name)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            return first_difference(before, after, f"{name} ")
        was, is_ = (json.dumps(value, ensure_ascii=False) for value in (before, after))
        return f"{path}{name}", was, is_
    return None


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
