"""The result type: which tokens and words of a text a prediction came from."""

from __future__ import annotations

import bisect
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .passages import paragraphs, sentences
from .predictions import in_code
from .results import TokenScores
from .text_spans import Passage, Word, find_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False, eq=False)
class Attribution(TokenScores):
    """Which tokens of a text a prediction came from. `len` and iteration are over tokens, see `TokenScores`.

    Attributes:
        text, text_pair: what was attributed; the pair may be None.
        tokens: word pieces as the tokenizer names them, special tokens included, n of them.
        offsets: characters (start, end) of each token in its text, without blanks around it; None for special tokens,
            and for all tokens of a tokenizer that knows no offsets.
        segments: 0 for tokens of the text, 1 of the pair, None for special tokens.
        word_ids: number of the word (`Word`) a token belongs to within its segment; None for special tokens.
        scores: [n], or [positions, n] where several were asked for; each row sums to 1. float32, float64 for float64
            models.
        log2_scale: the rollout's own value is scores * 2**log2_scale; a float, or [positions].
        layer_scores: rollout up to every layer, [layers, n] or [layers, positions, n]; None unless asked for.
        layer_log2_scale: [layers] or [layers, positions]; None unless asked for.
        label, probability: the class that the model predicts, of a multi-label model its highest label; None for a
            model that does not classify texts.
        method, position, row_normalize: as asked for.
        model: the model's name.
        truncated: how many tokens were cut off because the model takes no more.
        value: the number that a regression model or a reranker predicts, as the model gives it; a list where it gives
            several; None for other models.
        labels: of a multi-label model, (label, probability) of those above 0.5, highest first, which may be none;
            None for other models.
        class_scores: how much each token speaks for `explained_label` (positive) or against it (negative), [n], in
            logits, see `globenc.class_scores`; float32, float64 for float64 models. None where no label is explained:
            it was not asked for, or the model gives none to a text.
        explained_label: the label that `class_scores` are about; "start + end", "start" or "end" of an answer to a
            question; "value" where a model gives one number without a name.
        logit: its logit, in a regression model the value itself: class_scores.sum() + remainder, up to rounding.
        remainder: the part of the logit that belongs to no token.
        reference: from where activations are read, "zero", "model" or "origin". These four are None with
            `class_scores`.
    """

    text: str
    text_pair: str | None
    tokens: list[str]
    offsets: list[tuple[int, int] | None]
    segments: list[int | None]
    word_ids: list[int | None]
    scores: np.ndarray
    log2_scale: Any
    layer_scores: np.ndarray | None
    layer_log2_scale: np.ndarray | None
    label: str | None
    probability: float | None
    method: str
    position: Any
    row_normalize: bool
    model: str
    truncated: int = 0
    value: float | list[float] | None = None
    labels: list[tuple[str, float]] | None = None
    class_scores: np.ndarray | None = None
    explained_label: str | None = None
    logit: float | None = None
    remainder: float | None = None
    reference: str | None = None

    def __repr__(self) -> str:
        prediction = in_code(self)
        if self.scores.ndim > 1:
            return f"Attribution({len(self.tokens)} tokens, {len(self.scores)} positions{prediction})"
        best = sorted((w for w in self.words() if not w.special), key=lambda w: -w.score)[:3]
        words = ", ".join(f"{w.text} {w.score:.3f}" for w in best)
        return f"Attribution({len(self.tokens)} tokens{prediction}, top words: {words})"

    def words(self) -> list[Word]:
        """The tokens merged into words, special tokens standing alone; scores still sum to 1, class scores to what
        they did.

        Returns:
            Words in order of the text.

        Example:
            >>> import globenc
            >>> a = globenc.GlobEnc.from_pretrained()("unflinchingly bleak")
            >>> [word.text for word in a.words()]
            ['[CLS]', 'unflinchingly', 'bleak', '[SEP]']
        """
        sources = (self.text, self.text_pair)
        words: list[Word] = []
        for run in find_words(sources, self.tokens, self.offsets, self.segments, self.word_ids):
            score: Any = self.scores[..., run.first : run.stop].sum(-1)
            score = float(score) if self.scores.ndim == 1 else score
            for_label = None if self.class_scores is None else float(self.class_scores[run.first : run.stop].sum())
            words.append(Word(run.text, score, run.start, run.end, (run.first, run.stop), run.segment, for_label))
        return words

    def sentences(self) -> list[Passage]:
        """The sentences with the sums of their words' scores; they and the special tokens sum to 1.

        Sentences end at punctuation and at blank lines. What was cut off is in none of them; of a sentence that was cut
        in two, the part that was read is there.

        Returns:
            Passages in order of the text; none for a tokenizer that knows no offsets.

        Example:
            >>> import globenc
            >>> a = globenc.GlobEnc.from_pretrained()("The plot drags. The acting is superb!")
            >>> [passage.text for passage in a.sentences()]
            ['The plot drags.', 'The acting is superb!']
        """
        return self._passages(sentences)

    def paragraphs(self) -> list[Passage]:
        """The same for paragraphs: what blank lines divide; one of more than 3,000 characters is cut further."""
        return self._passages(paragraphs)

    def _passages(self, divide: Callable[[str], list[tuple[int, int]]]) -> list[Passage]:
        found, words, unread = [], self.words(), self.unread()
        for segment, source in enumerate((self.text, self.text_pair)):
            spans = [] if source is None else divide(source)
            whole = len(source or "")
            gaps = [(start, end) for where, start, end in unread if where == segment]
            first = max((end for _, end in gaps if end < whole), default=0)
            last = min((start for start, end in gaps if end == whole), default=whole)
            spans = [(max(start, first), min(end, last)) for start, end in spans if start < last and end > first]
            starts = [start for start, _ in spans]
            scores = np.zeros((*self.scores.shape[:-1], len(spans)), np.float64)
            for_label = np.zeros(len(spans))
            read = [(word, word.end) for word in words if word.segment == segment and word.end is not None and spans]
            for word, last in read:
                k = max(0, bisect.bisect_right(starts, last - 1) - 1)
                scores[..., k] += word.score
                for_label[k] += word.class_score or 0.0
            if source is None or not read:
                continue
            for k, (start, end) in enumerate(spans):
                score = float(scores[k]) if scores.ndim == 1 else scores[..., k]
                class_score = None if self.class_scores is None else float(for_label[k])
                found.append(Passage(source[start:end], score, start, end, segment, class_score))
        return found

    def unread(self) -> list[tuple[int, int, int]]:
        """What was cut off, as (segment, start, end): characters start:end of the text, or in segment 1 of the pair.

        It is at the front or at the end, as the tokenizer cuts. Characters that have no token although nothing was cut
        there, such as white space and control characters, are not among it.

        Returns:
            In order of the texts; none for a tokenizer that knows no offsets.

        Example:
            >>> import globenc
            >>> a = globenc.GlobEnc.from_pretrained()("a charming journey")
            >>> a.unread()
            []
        """
        found: list[tuple[int, int, int]] = []
        read = [self.segments.count(0), self.segments.count(1)]
        for segment, source in enumerate((self.text, self.text_pair)):
            # of a pair the longer text is cut, both only where they end up equally long
            if not self.truncated or source is None or read[segment] + 1 < read[1 - segment]:
                continue
            spans = [span for span, where in zip(self.offsets, self.segments, strict=True) if where == segment and span]
            if spans or not read[segment]:
                first, last = min((s for s, _ in spans), default=0), max((e for _, e in spans), default=0)
                gaps = ((0, first), (last, len(source)))
                found += [(segment, start, end) for start, end in gaps if _has_text(source[start:end])]
        return found

    def raw_scores(self) -> np.ndarray:
        """The rollout's own values, scores * 2**log2_scale, float64, same shape as `scores`.

        Raises:
            OverflowError: they do not fit into float64 (very deep models): use `scores` and `log2_scale`.
        """
        scale = np.asarray(self.log2_scale, dtype=np.float64)
        if scale.size and float(scale.max()) >= 1023:
            raise OverflowError(
                f"raw scores of about 2**{float(scale.max()):.0f} do not fit into float64; use scores and log2_scale"
            )
        return self.scores.astype(np.float64) * np.exp2(scale)[..., None]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain lists, strings and numbers."""
        return {
            "text": self.text,
            "text_pair": self.text_pair,
            **self._prediction_dict(),
            "tokens": self.tokens,
            "scores": self.scores.tolist(),
            **self._class_score_dict(),
            "words": [
                {
                    "text": word.text,
                    "score": word.score if isinstance(word.score, float) else word.score.tolist(),
                    "class_score": word.class_score,
                    "start": word.start,
                    "end": word.end,
                    "segment": word.segment,
                }
                for word in self.words()
            ],
            "sentences": [_plain(passage) for passage in self.sentences()],
            "paragraphs": [_plain(passage) for passage in self.paragraphs()],
            "offsets": [None if span is None else list(span) for span in self.offsets],
            "segments": self.segments,
            **self._rollout_dict(),
            "truncated": self.truncated,
            "unread": [{"segment": segment, "start": start, "end": end} for segment, start, end in self.unread()],
        }

    def _token_columns(self) -> dict[str, Any]:
        words = [(word.text, word.tokens[1] - word.tokens[0]) for word in self.words()]
        offsets = [span or (None, None) for span in self.offsets]
        return {
            "word": [text for text, count in words for _ in range(count)],
            "word_id": self.word_ids,
            "segment": self.segments,
            "start": [start for start, _ in offsets],
            "end": [end for _, end in offsets],
        }

    def _repr_html_(self) -> str:
        from .render.html import fragment

        return fragment(self)

    def _page(self) -> str:
        from .render.html import page

        return page(self)

    def _figure(self, ax: Any = None) -> Figure:
        from .render.figure import figure

        return figure(self, ax)


def _has_text(characters: str) -> bool:
    """Whether some character is none that tokenizers clean away: white space, control characters, bare accents."""
    return any(unicodedata.category(c)[0] not in "ZCM" and c != "\ufffd" for c in characters)


def _plain(passage: Passage) -> dict[str, Any]:
    """A passage without its text, which its offsets tell."""
    score = passage.score if isinstance(passage.score, float) else passage.score.tolist()
    return {
        "score": score,
        "class_score": passage.class_score,
        "start": passage.start,
        "end": passage.end,
        "segment": passage.segment,
    }
