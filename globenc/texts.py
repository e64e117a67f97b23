"""Texts as they are given: what can be one, their encodings, and the one at fault named by its index."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .errors import blames_text, named, warn_caller
from .printing import short
from .rollouts import Position, check_position
from .tokenization import Encoding, encode

_SUSPECTS = 64  # texts tried alone, most, to find the one at fault
_SURROGATE = re.compile("[\ud800-\udfff]")


def check_texts(
    texts: str | Iterable[str], text_pair: str | Iterable[str] | None
) -> tuple[list[str], list[str] | None]:
    """Texts and pairs as lists of equal length, every one a string with something in it."""

    def checked(name: str, value: Any) -> list[str]:
        if not isinstance(value, str):
            _check_column(name, value)
            value = value.to_pylist() if hasattr(value, "to_pylist") else value  # an Arrow column
        values = [value] if isinstance(value, str) else list(value)
        for i, text in enumerate(values):
            where = name if isinstance(value, str) else f"{name}[{i}]"
            if not isinstance(text, str):
                got = "None" if text is None else type(text).__name__
                pairs = "; second texts of pairs go to text_pair" if isinstance(text, list | tuple) else ""
                raise TypeError(f"{where} must be a string, got {got}{pairs}")
            if not text.isascii() and _SURROGATE.search(text):
                raise ValueError(f"{where} is no valid text: it holds half of a surrogate pair")
            if not text or text.isspace():
                raise ValueError(f"{where} is empty: there is no token to attribute to")
        return values

    firsts = checked("texts", texts)
    if not firsts:
        raise ValueError("texts is an empty list: give at least one text")
    if text_pair is None:
        return firsts, None
    if isinstance(text_pair, str) != isinstance(texts, str):
        raise TypeError("text_pair must be a string for a text and a list for a list of texts")
    seconds = checked("text_pair", text_pair)
    if len(seconds) != len(firsts):
        raise ValueError(f"text_pair must hold one text for each of the {len(firsts)} texts, got {len(seconds)}")
    return firsts, seconds


def _check_column(name: str, value: Any) -> None:
    """Raises TypeError where something is no column of texts, in an order."""
    wanted = f"{name} must be a string or a list of strings, got {type(value).__name__}"
    columns = getattr(value, "column_names", None)
    columns = getattr(value, "columns", None) if columns is None else columns
    if isinstance(value, Mapping):
        columns = value
    if columns is not None:
        names = [repr(column) for column in columns][:5]
        choice = f": choose one, {name}[{short(names[0], 50)}]" if names else ""
        raise TypeError(f"{wanted} of {short(', '.join(names)) or 'nothing'}{choice}")
    if isinstance(value, bytes | set | frozenset) or not isinstance(value, Iterable):
        raise TypeError(wanted)


def encode_each(
    tokenizer: Any, model: Any, texts: Sequence[str], text_pair: Sequence[str] | None, limit: int | None
) -> list[Encoding | BaseException]:
    """As `tokenization.encode`, text by text where one of them fails: its error stands in its place, also where a
    token of it is none of the model's."""
    try:
        encodings: list[Encoding | BaseException] = [*encode(tokenizer, texts, text_pair, limit)]
    except BaseException as error:
        if not blames_text(error):
            raise
        encodings = [error.with_traceback(None)]
    if isinstance(encodings[0], BaseException) and len(texts) > 1:
        middle = len(texts) // 2
        return [
            encoding
            for half in (slice(middle), slice(middle, None))
            for encoding in encode_each(
                tokenizer, model, texts[half], None if text_pair is None else text_pair[half], limit
            )
        ]
    known = model.get_input_embeddings().weight.shape[0]
    for i, encoding in enumerate(encodings):
        if isinstance(encoding, Encoding) and len(encoding) and encoding.ids.max() >= known:
            number = int(encoding.ids[encoding.ids >= known][0])
            token = short(str(tokenizer.convert_ids_to_tokens(number)), 40)
            encodings[i] = ValueError(
                f"token id {number} ({token!r}) is beyond the model's {known} embeddings: resize the model's "
                "embeddings (is the tokenizer this model's?)"
            )
    return encodings


def all_encoded(encodings: Sequence[Encoding | BaseException]) -> list[Encoding]:
    """The result of `encode_each` where no text failed.

    Raises:
        Exception: the error of the first that failed, with the text's index where others did not.
    """
    bad = {i: error for i, error in enumerate(encodings) if isinstance(error, BaseException)}
    for i, error in bad.items():
        if len(bad) < len(encodings) or not isinstance(error, Exception):
            raise named(error, f"text {i}" if len(encodings) > 1 else "the text") from error
        raise error
    return [encoding for encoding in encodings if isinstance(encoding, Encoding)]


def check_encodings(encodings: Sequence[Encoding], texts: Sequence[str], limit: int | None, single: bool) -> None:
    """Warns of texts without a known word and of those that were cut.

    Raises:
        ValueError: a text has no token.
    """
    for i, (encoding, text) in enumerate(zip(encodings, texts, strict=True)):
        if encoding.empty:
            where = "text" if single else f"text {i}"
            raise ValueError(f"{where} has no token: the tokenizer finds nothing in {text[:80]!r}")
        if encoding.unknown:
            where = "the text" if single else f"text {i}"
            warn_caller(f"the tokenizer knows no word of {where}: is it this model's?")
    _warn_truncated(encodings, limit, single)


def check_positions(position: Position, encodings: Sequence[Encoding], single: bool) -> None:
    """Raises ValueError where a text does not have the position, with its index unless it is a single one."""
    for i, encoding in enumerate(encodings):
        try:
            check_position(position, len(encoding), many=len(encodings) > 1)
        except ValueError as error:
            raise ValueError(str(error) if single else f"text {i}: {error}") from None


def _warn_truncated(encodings: Sequence[Encoding], limit: int | None, single: bool) -> None:
    """Warn of texts that were cut."""
    cut = [(i, e.lost, len(e) + e.lost) for i, e in enumerate(encodings) if e.lost]
    if not cut:
        return
    shown = "; ".join(
        f"{'the text' if single else f'text {i}'} lost {lost:,} of its {full:,} tokens ({lost / full:.0%})"
        for i, lost, full in cut[:5]
    )
    more = f"; and {len(cut) - 5} more" if len(cut) > 5 else ""
    warn_caller(f"longer than the {limit} tokens that fit, so they were cut: {shown}{more}")


def error_of_text(
    error: Exception, encodings: Sequence[Encoding], batch: Sequence[int], score: Callable[[int], object]
) -> Exception:
    """The error of a batch with the index of the text that raises it; as it is where every text fails.

    Args:
        error: what the batch raised.
        encodings: of all texts.
        batch: indices of those in the batch, which are tried first.
        score: runs one text alone, given by its index.
    """
    culprit: Exception | None = None
    works = False
    for i in [*batch, *(set(range(len(encodings))) - set(batch))][:_SUSPECTS]:
        try:
            score(i)
            works = True
        except Exception as alone:
            if not blames_text(alone):
                raise
            culprit = culprit or named(alone, f"text {i}")
        if works and culprit is not None:
            return culprit
    return error
