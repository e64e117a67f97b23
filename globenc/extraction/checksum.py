"""Files that carry a hash of their own content, so that one file is one truth: no change of a byte goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

HASH_KEY = b"globenc.sha256"
_DIGITS = 64
_FIELD = HASH_KEY + b"\x18" + bytes([_DIGITS])  # as a Parquet footer holds it: the key, then a string of 64 bytes


def parquet_bytes(table: pa.Table, described: Sequence[str] | bool = True) -> bytes:
    """A table as a Parquet file, with the sha256 of all its other bytes in the metadata; `described` are the columns
    with dictionaries and statistics, all of them if True."""
    mark = secrets.token_hex(_DIGITS // 2).encode()  # nothing else in the file is like it
    sink = pa.BufferOutputStream()
    with parquet.ParquetWriter(
        sink,
        table.schema,
        compression="zstd",
        write_page_checksum=True,
        use_dictionary=described,
        write_statistics=described,
    ) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({HASH_KEY: mark})
    content = sink.getvalue().to_pybytes()
    start = content.rindex(mark)
    whole = memoryview(content)
    return b"".join([whole[:start], _hash_without(content, start), whole[start + _DIGITS :]])


def parquet_hash(content: bytes | memoryview) -> str:
    """The hash that a file of `parquet_bytes` carries, once it is that of the file.

    Raises:
        ValueError: the file carries none, or is not what it was.
    """
    footer = int.from_bytes(content[-8:-4], "little")  # its length stands before the last four bytes
    tail = bytes(content[-8 - footer :]) if footer <= len(content) - 8 else b""
    field = len(tail)
    while (field := tail.rfind(_FIELD, 0, field)) >= 0:  # texts in the footer may look like the field too
        start = len(content) - len(tail) + field + len(_FIELD)
        written = bytes(content[start : start + _DIGITS])
        if written == _hash_without(content, start):
            return written.decode()
    raise ValueError("is damaged")


def json_bytes(content: dict[str, Any]) -> bytes:
    """A dict as a JSON file, with the sha256 of its content as last value."""
    text = json.dumps({**content, "sha256": _hash_of(content)}, ensure_ascii=False, indent=2)
    return f"{text}\n".encode(errors="backslashreplace")  # JSON's own way to write half a surrogate pair, as in a name


def checked_json(content: dict[str, Any]) -> dict[str, Any]:
    """What was given to `json_bytes`.

    Raises:
        ValueError: it carries no hash, or is not what it was.
    """
    rest = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != _hash_of(rest):
        raise ValueError("its content is not what was written")
    return rest


def _hash_without(content: bytes | memoryview, start: int) -> bytes:
    """Of all bytes but those of the hash itself."""
    whole = memoryview(content)
    digest = hashlib.sha256(whole[:start])
    digest.update(whole[start + _DIGITS :])
    return digest.hexdigest().encode()


def _hash_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
