"""What every rendering shows of an attribution: the targets, the text in pieces, the colour scale, the words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..attribution import Attribution, Word
from ..methods import get_method
from ..printing import printable as printable

MOST_TOKENS = 64  # more columns than this are no longer readable in a heat map


@dataclass(frozen=True)
class View:
    """One target of an attribution.

    Attributes:
        target: the target in words: "[CLS]", "bleak (token 13)".
        words: in order of the text, special tokens included; each score is a float.
        scores: [n], of the tokens.
        layer_scores: [layers, n], or None.
    """

    target: str
    words: list[Word]
    scores: np.ndarray
    layer_scores: np.ndarray | None

    def ranked(self) -> list[Word]:
        """The words of the text, highest score first."""
        return sorted((word for word in self.words if not word.special), key=lambda word: -word.score)

    def full_scale(self) -> float:
        """The score that is drawn in full colour: that of the highest word, special tokens aside."""
        return full_scale([word.score for word in self.words if not word.special])

    def percent(self, share: float) -> str:
        """A share for the eye: 12.3%, or 0.42% where the words of a long text have little each."""
        return f"{share:.1%}" if self.full_scale() >= 0.05 else f"{share:.2%}"

    def special_share(self) -> float:
        """What went to special tokens; the words have the rest of 1."""
        return float(sum(word.score for word in self.words if word.special))


@dataclass(frozen=True)
class Piece:
    """A stretch of the text: a word with its score, or what stands between words.

    Attributes:
        score: None where no token is, such as white space.
        read: False behind the last token of a text that was cut off.
    """

    text: str
    score: float | None
    read: bool = True


def full_scale(scores: Sequence[float] | np.ndarray) -> float:
    """The highest of some scores as a divisor: 1 where there is none above zero."""
    return float(max(scores, default=0.0)) or 1.0


def views(attribution: Attribution) -> list[View]:
    """One view a target; one only, the mean over all tokens, for target "all"."""
    words, scores, layers = attribution.words(), attribution.scores, attribution.layer_scores
    if scores.ndim == 1:
        return [View(target_names(attribution)[0], words, scores, layers)]
    if is_whole(attribution):
        averaged = [replace(word, score=float(word.score.mean())) for word in words]
        return [View("all tokens on average", averaged, scores.mean(0), None if layers is None else layers.mean(1))]
    return [
        View(
            name,
            [replace(word, score=float(word.score[k])) for word in words],
            scores[k],
            None if layers is None else layers[:, k],
        )
        for k, name in enumerate(target_names(attribution))
    ]


def is_whole(attribution: Attribution) -> bool:
    """Whether every token was a target, so that the scores are a square matrix."""
    return isinstance(attribution.target, str) and attribution.target == "all"


def target_names(attribution: Attribution) -> list[str]:
    """Every target in words, one for each row of the scores."""
    target, labels = attribution.target, token_labels(attribution)
    if isinstance(target, str):
        named = {"cls": labels[:1], "mean": ["the mean of all tokens"], "all": labels}
        return named[target]
    rows = 1 if attribution.scores.ndim == 1 else len(attribution.scores)
    positions = [target] if isinstance(target, int) else target
    if all(isinstance(position, int) for position in positions):
        return [f"{labels[p]} (token {p % len(labels)})" for p in positions]
    return ["the weighted tokens"] if rows == 1 else [f"weights {k}" for k in range(rows)]


def token_labels(attribution: Attribution) -> list[str]:
    """Tokens as they stand in the text, a continuing word piece marked by ##; byte-level names read as text again."""
    labels = []
    for token, span, segment in zip(attribution.tokens, attribution.offsets, attribution.segments, strict=True):
        label = token
        if span is not None and segment is not None:
            found = _source(attribution, segment)[span[0] : span[1]].strip()
            if found:
                label = f"##{found}" if token.startswith("##") else found
        labels.append(printable(label))
    return labels


def shown_tokens(attribution: Attribution, scores: np.ndarray) -> np.ndarray:
    """The tokens that a heat map has room for: all, or the MOST_TOKENS highest ones; in order of the text."""
    if len(attribution.tokens) <= MOST_TOKENS:
        return np.arange(len(attribution.tokens))
    return np.sort(np.argsort(-scores, kind="stable")[:MOST_TOKENS])


def special_tokens(attribution: Attribution) -> np.ndarray:
    """[n], True at special tokens."""
    return np.array([segment is None for segment in attribution.segments])


def pieces(attribution: Attribution, words: list[Word], segment: int) -> list[Piece]:
    """A text cut into its words and what stands between them; joined, they are the text.

    Words without offsets are joined by spaces. Words that share characters (a character that the tokenizer spelled out
    as several) become one piece.
    """
    chosen = [word for word in words if word.segment == segment]
    text = _source(attribution, segment)
    cut: list[Piece] = []
    cursor = 0
    for word in chosen:
        if word.start is None or word.end is None:
            cut.extend([Piece(" ", None)] if cut else [])
            cut.append(Piece(word.text, word.score))
            continue
        if word.start < cursor and cut and cut[-1].score is not None:
            last = cut.pop()
            cut.append(Piece(last.text + text[cursor : word.end], last.score + word.score))
        else:
            start = min(word.start + len(word.text) - len(word.text.lstrip()), word.end)
            if start > cursor:
                cut.append(Piece(text[cursor:start], None))
            cut.append(Piece(text[start : word.end], word.score))
        cursor = max(cursor, word.end)
    rest = text[cursor:]
    if rest and all(word.start is not None for word in chosen):
        cut.append(Piece(rest, None, read=not (attribution.truncated and rest.strip())))
    return cut


def meaning(view: View) -> str:
    """What a score says, in one sentence."""
    return (
        f"A score is the share of the attribution that flows from a word to {view.target} through all layers: "
        "it says how much, not for or against."
    )


def answer(attribution: Attribution) -> str | None:
    """Label and probability, where the model classifies."""
    if attribution.label is None or attribution.probability is None:
        return None
    return f"{printable(attribution.label)} {attribution.probability:.1%}"


def circumstances(attribution: Attribution) -> str:
    """Method, target and model in one line."""
    target = "all tokens" if is_whole(attribution) else ", ".join(target_names(attribution)[:8])
    if not is_whole(attribution) and len(target_names(attribution)) > 8:
        target += ", ..."
    rows = ", rows normalised" if attribution.row_normalize else ""
    summary = get_method(attribution.method).summary
    return (
        f"Method {attribution.method}{rows} ({summary}); target {target}; model {model_name(attribution)}; "
        f"{len(attribution.tokens)} tokens."
    )


def truncation(attribution: Attribution) -> str | None:
    """What to say of a text that was cut off; None where it was not."""
    if not attribution.truncated:
        return None
    full = attribution.truncated + len(attribution.tokens)
    return (
        f"The model did not read all of it: {attribution.truncated:,} of {full:,} tokens "
        f"({attribution.truncated / full:.0%}) were cut off."
    )


def model_name(attribution: Attribution) -> str:
    """The model's name; of a folder its last part."""
    path = Path(attribution.model)
    return printable(path.name if path.is_absolute() else attribution.model)


def _source(attribution: Attribution, segment: int) -> str:
    return attribution.text if segment == 0 else attribution.text_pair or ""
