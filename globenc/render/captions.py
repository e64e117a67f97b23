"""Sentences beside the scores: what they mean, the model's prediction, method and model, what was cut off."""

from __future__ import annotations

import textwrap
from pathlib import Path

from ..methods import get_method
from ..predictions import in_words
from ..printing import printable
from .protocols import Result, TextResult, text_of
from .view import View, is_whole, position_names

_LETTERS_PER_INCH = 11  # of a title


def meaning(view: View) -> str:
    """What a score says, in one sentence."""
    return (
        f"A score is the share of the attribution that flows from a word to {view.position} through all layers: "
        "it says how much, not for or against."
    )


def share_meaning(attribution: TextResult, view: View) -> str:
    """The same where class scores stand beside it."""
    return (
        f"The share says how much of each word is in {summary_of(attribution, view)}, by what flows there through all "
        "layers: it says how much, not for or against."
    )


def summary_of(attribution: TextResult, view: View) -> str:
    """The position, and what it is to most models where it is the first token."""
    first = isinstance(attribution.position, str) and attribution.position == "cls"
    return f"{view.position}, the summary that most classifiers decide from" if first else view.position


def wrapped(line: str, inches: float) -> str:
    """A line of a figure's title in as many as its width takes."""
    return "\n".join(textwrap.wrap(line, max(20, int(inches * _LETTERS_PER_INCH)))) or line


def prediction(attribution: Result) -> str | None:
    """What the model predicts: a class, labels, or a number; None where it predicts nothing."""
    predicted = in_words(attribution)
    return None if predicted is None else printable(predicted)


def circumstances(attribution: TextResult) -> str:
    """Method, position and model in one line."""
    position = "all tokens" if is_whole(attribution) else ", ".join(position_names(attribution)[:8])
    if not is_whole(attribution) and len(position_names(attribution)) > 8:
        position += ", ..."
    rows = ", rows normalised" if attribution.row_normalize else ""
    summary = get_method(attribution.method).summary
    return (
        f"Method {attribution.method}{rows} ({summary}); position {position}; model {model_name(attribution)}; "
        f"{len(attribution.tokens)} tokens."
    )


def truncation(attribution: TextResult) -> str | None:
    """What to say of a text that was cut off; None where it was not."""
    if not attribution.truncated:
        return None
    full = attribution.truncated + len(attribution.tokens)
    unread = attribution.unread()
    fronts = {start == 0 and end < len(text_of(attribution, segment)) for segment, start, end in unread}
    where = f" at the {'beginning' if fronts == {True} else 'end'}" if len(fronts) == 1 else ""
    if where and attribution.text_pair is not None:
        names = {0: "of the first text", 1: "of the second text"}
        segments = sorted({segment for segment, _, _ in unread})
        where += f" {names[segments[0]] if len(segments) == 1 else 'of both texts'}"
    return (
        f"The model did not read all of it: {attribution.truncated:,} of {full:,} tokens "
        f"({attribution.truncated / full:.0%}) were cut off{where}."
    )


def model_name(attribution: TextResult) -> str:
    """The model's name; of a folder its last part."""
    path = Path(attribution.model)
    return printable(path.name if path.is_absolute() else attribution.model)
