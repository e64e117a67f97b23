"""What a person reads on a terminal: free of what steers one, and in characters that it can show."""

from __future__ import annotations

import codecs
import contextlib
import re
import sys
from collections.abc import Iterator

# of Unicode's Bidi_Control: what turns runs of text around, and the marks that only stand for a letter
_TURNING, _MARKS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069", "\u061c\u200e\u200f"
_BREAKS = "\n\r\t\x85\u2028\u2029"
_PRINTABLE: dict[int, str | None] = {
    **dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000), *map(ord, _TURNING)], "\ufffd"),
    **dict.fromkeys(map(ord, _BREAKS), " "),
    **dict.fromkeys(map(ord, _MARKS)),
}
_STEERING = re.compile(f"[\x7f-\x9f\ud800-\udfff\u2028\u2029{_TURNING}{_MARKS}]")
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
    return _STEERING.sub(lambda found: f"\\u{ord(found[0]):04x}", json)


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
