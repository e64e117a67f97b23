"""Tokens as readers see them: as in the text, bytes as characters, blanks as signs."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..printing import printable
from .protocols import TextResult, text_of

_BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}  # in names of byte-level tokens


def token_labels(attribution: TextResult) -> list[str]:
    """Tokens as they stand in the text, a continuing word piece marked by ##; names as text where that is not known.

    Blank tokens are shown by signs, "␣" and "↵".
    """
    names, labels = token_texts(attribution.tokens), []
    for k, (token, span, segment) in enumerate(
        zip(attribution.tokens, attribution.offsets, attribution.segments, strict=True)
    ):
        if segment is None:
            labels.append(printable(token))
            continue
        label = "" if span is None else text_of(attribution, segment)[slice(*span)].strip()
        if not label:
            label = names[k]
        elif token.startswith("##"):
            label = f"##{label}"
        labels.append(visible(label))
    return labels


def token_texts(tokens: Sequence[str]) -> list[str]:
    """The names of tokens as text: "é" for the byte-level "Ã©" and for "<0xC3>", "<0xA9>" each; "film" for "▁film",
    "film@@" and "film</w>"; the blanks of blank tokens. WordPiece's ## stays."""
    pieces = [_token_bytes(token) for token in tokens]
    texts, k = [], 0
    while k < len(tokens):
        # the bytes of one character may be several tokens
        for count in range(1, 5):
            joined = pieces[k : k + count]
            text = None if None in joined else _decoded(b"".join(piece or b"" for piece in joined))
            if text is not None:
                break
        else:
            count, text = 1, tokens[k].removesuffix("</w>").replace("▁", " ")
            if len(text) > 2:
                text = text.removesuffix("@@")
        count = min(count, len(tokens) - k)
        texts += [text.strip() or text] * count
        k += count
    return texts


def _token_bytes(token: str) -> bytes | None:
    """The bytes that a byte-level or a byte-fallback token stands for; None for others."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    data = [_BYTE_OF.get(character) for character in token]
    return None if token.isascii() or None in data else bytes(byte for byte in data if byte is not None)


def _decoded(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def visible(text: str) -> str:
    """Text on one line; by signs where there is nothing in it to be seen."""
    if any(not character.isspace() and unicodedata.category(character) != "Cf" for character in text):
        return printable(text)
    signs = {"\n": "↵", "\r": "↵", "\t": "⇥"}
    return "".join(signs.get(c, "␣" if c.isspace() else f"U+{ord(c):04X}") for c in text) or "␣"
