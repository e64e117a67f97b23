"""Rows of JSON, an object a line, also of texts so long that Python's own reader would copy them several times."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from . import lines as lines_module
from .lines import MARK, PIECE, TOO_LONG, Chained, Lines, decoded, undecodable
from .raw_rows import RawRow, first_line, with_columns_seen

LONG_TEXT = 1 << 20  # bytes of a text that are decoded at once; a longer one is taken out of its line first
_BLANK = object()
_CONTROL = re.compile(rb"[\x00-\x1f]")


def json_rows(lines: Lines, columns: Sequence[str], name: str) -> Iterator[RawRow]:
    """Rows of JSON objects, one a line.

    Raises:
        ValueError: the first lines lack a column, or all lines are one array.
    """
    return with_columns_seen(_objects(lines, columns, name), columns, name)


def _objects(lines: Lines, columns: Sequence[str], name: str) -> Iterator[RawRow]:
    for number, line in lines:
        if line is None:
            yield RawRow(None, TOO_LONG, number)
            continue
        if number == 1 and re.match(rb"\s*\[", line):
            raise ValueError(
                f"input {name!r} is one JSON array: write one object a line (JSONL), such as jq -c '.[]' does"
            )
        if not line:
            continue
        values, reason = _json(line, columns)
        del line
        if values is _BLANK:
            continue
        if isinstance(values, dict):
            yield RawRow(values, reason, number)
        else:
            yield RawRow(None, reason or f"the line is a JSON {_kind(values)}, not an object", number)


def sniffed(stream: IO[bytes]) -> tuple[Any, str]:
    """Standard input and its format: JSONL where the first line is a JSON object, else plain text."""
    first = bytearray(stream.readline(min(PIECE, lines_module.LONGEST_LINE)))
    while len(first) < lines_module.LONGEST_LINE and not first.endswith(b"\n"):
        piece = stream.readline(min(PIECE, lines_module.LONGEST_LINE - len(first)))
        if not piece:
            break
        first += piece
    chained = Chained(first, stream)
    value, _ = _json(first.removeprefix(MARK), [])
    return chained, "jsonl" if isinstance(value, dict) else "text"


def _json(line: bytes | bytearray, columns: Sequence[str]) -> tuple[Any, str | None]:
    """A line of JSON, _BLANK if there is nothing in it, and what is wrong with it; of an object only `columns` are sure
    to be whole. A long line is emptied."""
    reason: str | None = None
    texts: dict[str, bytearray] = {}
    try:
        if isinstance(line, bytearray):
            line, texts = _without_long_texts(line)
        text, reason = decoded(line)
        if text.isspace():
            return _BLANK, None
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # a number of more digits than Python reads
            values = json.loads(text, parse_int=_whole_number)
        if texts and isinstance(values, dict):
            values.update({name: _with_texts(values[name], texts) for name in columns if name in values})
    except UnicodeDecodeError as error:
        return None, undecodable(error.object[error.start])
    except json.JSONDecodeError as error:
        # the places in a line that was taken apart are not those of the line
        return None, reason or f"malformed JSON: {error.msg if texts else error}"
    except (ValueError, RecursionError) as error:
        return None, reason or f"malformed JSON: {first_line(error)}"
    return values, reason


def _whole_number(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


def _without_long_texts(line: bytearray) -> tuple[bytes, dict[str, bytearray]]:
    """JSON with a name for every long text in it, and these texts by name, still as JSON: Python's reader would copy
    the whole line several times, at up to four bytes a character. The line is emptied."""
    prefix, copied = uuid.uuid4().hex, 0
    parts: list[bytes | bytearray] = []
    texts: dict[str, bytearray] = {}
    start = line.find(b'"')
    while start >= 0:
        end = line.find(b'"', start + 1)
        while end >= 0 and _backslashes_before(line, end) % 2:
            end = line.find(b'"', end + 1)
        if end < 0:
            break
        if end - start > LONG_TEXT:
            name = f"{prefix}{len(texts)}"
            parts += [line[copied : start + 1], name.encode()]
            texts[name] = line[start + 1 : end]
            copied = end
        start = line.find(b'"', end + 1)
    rest = bytes(line[copied:])
    line.clear()
    return b"".join([*parts, rest]), texts


def _backslashes_before(line: bytearray, end: int) -> int:
    count, window = 0, 16
    while True:
        before = line[max(0, end - count - window) : end - count]
        run = len(before) - len(before.rstrip(b"\\"))
        count += run
        if run < window:
            return count
        window = LONG_TEXT


def _with_texts(value: Any, texts: dict[str, bytearray]) -> Any:
    """A JSON value with its long texts in their places."""
    if isinstance(value, str):
        return _unescaped(texts.pop(value)) if value in texts else value
    if isinstance(value, list):
        return [_with_texts(item, texts) for item in value]
    if isinstance(value, dict):
        return {name: _with_texts(item, texts) for name, item in value.items()}
    return value


def _unescaped(text: bytearray) -> str:
    """What stands between the quotes of JSON as a text, piece by piece; it is emptied."""
    if b"\\" not in text:
        if _CONTROL.search(text):
            raise ValueError("Invalid control character")
        return _strict(text)
    plain, begin = bytearray(), 0
    while begin < len(text):
        for end in range(begin + LONG_TEXT, begin + LONG_TEXT + 13):  # an escape, or two of a pair, may be at the cut
            try:
                piece = json.loads(b'"' + text[begin:end] + b'"')
            except ValueError:
                if end >= len(text) or end == begin + LONG_TEXT + 12:
                    raise  # it is not the cut
                continue
            if end >= len(text) or not "\ud800" <= piece[-1] <= "\udbff":
                break
        plain += piece.encode(errors="surrogatepass")
        begin = end
    text.clear()
    return _strict(plain)


def _strict(text: bytearray) -> str:
    decoded = text.decode(errors="surrogatepass")
    text.clear()
    return decoded


def _kind(value: Any) -> str:
    """The type of a value in JSON's words."""
    if value is None:
        return "null"
    kinds: dict[type, str] = {bool: "boolean", int: "number", float: "number", str: "string", list: "array"}
    return kinds.get(type(value), "object" if isinstance(value, Mapping) else type(value).__name__)
