"""Text for a person's terminal: without control characters, and in characters that the terminal can show."""

from __future__ import annotations

import codecs
import contextlib
import re
import sys
from collections.abc import Iterator

# of Unicode's Bidi_Control: what sets the direction of whole runs of text, and the marks that stand for one letter
_DIRECTIONS, _MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069", "\u061c\u200e\u200f"
_BREAKS = "\n\r\t\x85\u2028\u2029"
_PRINTABLE: dict[int, str | None] = {
    **dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), *map(ord, _DIRECTIONS)], "\ufffd"),
    **dict.fromkeys(map(ord, _BREAKS), " "),
    **dict.fromkeys(map(ord, _MARKS)),
}
_CONTROLS = re.compile(f"[\x7f-\x9f\ud800-\udfff\u2028\u2029{_DIRECTIONS}{_MARKS}]")
_LOOKALIKES = {
    **dict.fromkeys("─━", "-"),
    **dict.fromkeys("│┃", "|"),
    **dict.fromkeys("█▉▊▋▌▍▎▏", "#"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’‚", "'"),
    **dict.fromkeys("–—−", "-"),
    "±": "+-",
    "…": "...",
    "•": "*",
    "·": "-",
    "×": "x",
    "½": "1/2",
    "↑": "^",
    "↓": "v",
    "\ufffd": "?",
}
_READABLE = "globenc.readable"


def printable(text: str) -> str:
    """Text on one line without characters that steer a terminal or turn the writing direction.

    Example:
        >>> printable("a" + chr(27) + "[31m" + chr(10) + "b")
        'a\ufffd[31m b'
    """
    return text.translate(_PRINTABLE)


def short(text: str, most: int = 200) -> str:
    """Text of unknown origin for a sentence: one line, unprintable characters as escapes, at most so many characters.

    Where a text is shown, `printable` keeps its width; where it is quoted, an escape says which character it was.

    Example:
        >>> short("a" + chr(27) + "[31m" + chr(10) + "b")
        'a\\\\x1b[31m\\\\nb'
    """
    if len(text) <= most and text.isprintable():
        return text
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: most + 1])
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def say(line: str) -> None:
    """Print one line on standard error."""
    if sys.stderr is not None:
        print(printable(line), file=sys.stderr, flush=True)


def escaped(json: str) -> str:
    """JSON with the same meaning, in which nothing steers a terminal, and which UTF-8 can encode.

    Example:
        >>> escaped('"a' + chr(0x9b) + chr(0xdcff) + 'é"')
        '"a\\\\u009b\\\\udcffé"'
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", json)


@contextlib.contextmanager
def readable_streams() -> Iterator[None]:
    """Standard output and error print what their encoding lacks by look-alikes and escapes, instead of failing."""
    before = []
    try:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                before.append((stream, stream.errors))
                stream.reconfigure(errors=_READABLE)
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(ValueError, OSError):  # closed meanwhile
                stream.reconfigure(errors=errors)


def _readable(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(map(_written, missing)), error.end


def _written(character: str) -> str:
    """A character in ASCII."""
    if character in _LOOKALIKES:
        return _LOOKALIKES[character]
    if "\u2500" <= character <= "\u257f":  # corners and crossings of boxes
        return "+"
    return character.encode("ascii", "backslashreplace").decode("ascii")


codecs.register_error(_READABLE, _readable)
