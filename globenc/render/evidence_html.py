"""What HTML pages say of class scores: the question and the sum that answers it, the coloured text, the words."""

from __future__ import annotations

from typing import Any

from ..printing import printable
from ..text_spans import Word
from .evidence import MINUS, Evidence
from .marks import exact, word_colour
from .token_labels import visible
from .view import View


def answer(explained: Evidence | None) -> dict[str, Any] | None:
    """What was asked, and the sum that answers it; None where no class is explained."""
    if explained is None:
        return None
    logit, terms = explained.terms()
    styles = {"for": word_colour(1.0), "against": word_colour(-1.0)}
    return {
        "question": explained.question,
        "quantity": explained.quantity,
        "logit": logit.replace("-", MINUS),
        "terms": [
            {
                "sign": "" if k == 0 and term.sign == "+" else term.sign.replace("-", MINUS),
                "text": f"{term.name} {term.digits}",
                "style": styles.get(term.kind, ""),
            }
            for k, term in enumerate(terms)
        ],
    }


def signed_chip(explained: Evidence, word: Word) -> dict[str, str]:
    """A special token with its class score."""
    return {
        "text": f"{printable(word.text)} {explained.signed(word.score, MINUS)}",
        "title": f"{word.text}: {exact(word.score, signed=True)}",
    }


def note(explained: Evidence, scale: float) -> str:
    """What full colour means."""
    return f"Full colour is {explained.signed(scale, MINUS)} or {explained.signed(-scale, MINUS)}"


def ranking(explained: Evidence, view: View | None, most: int) -> list[dict[str, Any]]:
    """The `most` strongest words, with their shares where a view is given."""
    shares = {} if view is None else {word.tokens: word.score for word in view.words}
    scale = 1.0 if view is None else view.full_scale()
    rows = []
    for rank, word in enumerate(explained.ranked()[:most], 1):
        width = 50 * min(abs(word.score) / explained.scale, 1.0)
        share = shares.get(word.tokens)
        rows.append(
            {
                "rank": rank,
                "text": visible(word.text),
                "exact": exact(word.score, signed=True),
                "signed": explained.signed(word.score, MINUS),
                "against": word.score < 0,
                "width": f"margin-left:{50 - width if word.score < 0 else 50:.2f}%;width:{width:.2f}%",
                "share": None if share is None or view is None else view.percent(share),
                "share_width": "" if share is None else f"width:{min(share / scale, 1.0):.1%}",
                "share_exact": "" if share is None else exact(share),
            }
        )
    return rows
