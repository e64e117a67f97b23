"""Correlation, faithfulness and plausibility of every method on texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..batching import pad
from ..metrics.correlation import rank_correlations
from ..metrics.faithfulness import MEASURES, removal_drops
from ..metrics.plausibility import align, plausibility
from ..printing import short
from ..progress import Steps
from ..tokenization import Encoding
from .label_methods import LABEL_METHODS
from .measurements import MARK_MEASURES, RANDOM, RANDOM_DRAWS, SALIENCY, Measurements
from .options import EvaluationOptions
from .rationales import Rationale
from .scorer import MethodScorer
from .texts import Corpus

_SHOWN_TOKENS = 40  # most of an example in the report
_REMOVAL_BATCH = 16  # texts whose changed versions are read together


def correlate(
    scorer: MethodScorer,
    corpus: Corpus,
    sample: list[int],
    options: EvaluationOptions,
    measurements: Measurements,
    steps: Steps,
) -> dict[int, dict[str, np.ndarray]]:
    """Measure the correlations, choose the examples of the report, and return the scores of whole texts in the sample.

    Where the correlation is not asked for, the sample alone is scored.
    """
    asked = "correlation" in options.metrics
    texts = list(range(len(corpus.encodings))) if asked else sample
    chosen = None if corpus.labels is None else [corpus.labels[k] for k in texts]
    rolled_out = len(scorer.rolled_out)
    shape = (len(corpus.encodings), rolled_out, measurements.layers)
    correlations = {"rollout": np.full(shape, np.nan), "layer": np.full(shape, np.nan)}
    signed = {name: np.full(len(corpus.encodings), np.nan) for name in scorer.methods if name in LABEL_METHODS}
    whole_texts: dict[int, dict[str, np.ndarray]] = {}
    right = dict.fromkeys(texts, False)
    steps.begin("attributions and saliency", len(texts))
    for index, scores in scorer.scores(
        [corpus.encodings[k] for k in texts], chosen if options.saliency_of == "gold" else None
    ):
        k, encoding = texts[index], corpus.encodings[texts[index]]
        counts = encoding.segments >= 0 if options.drop_special else np.ones(len(encoding), bool)
        for kind, rows in (("rollout", scores.rollouts), ("layer", scores.layers)):
            if rolled_out:
                flat = rows[..., counts].reshape(-1, int(counts.sum()))
                correlations[kind][k] = rank_correlations(flat, scores.saliency[counts]).reshape(rows.shape[:2])
        for name, row in scores.signed.items():
            signed[name][k] = rank_correlations(row[None, counts], scores.saliency[counts])[0]
        right[k] = corpus.labels is not None and corpus.labels[k] == scores.predicted
        if k in sample or len(encoding) <= _SHOWN_TOKENS:
            whole_texts[k] = scores.whole_texts()
        steps.advance()
    measurements.ids = [example.id for example in corpus.examples]
    measurements.right = [] if corpus.labels is None else [right[k] for k in texts]
    measurements.correlations, measurements.signed_correlations = correlations, signed
    agreement = measurements.whole_correlation(measurements.main_method)
    if not asked:
        measurements.correlations, measurements.signed_correlations = {}, {}
    measurements.examples = _examples(agreement, corpus, whole_texts, scorer)
    return {k: whole_texts[k] for k in sample}


def _examples(
    agreement: np.ndarray, corpus: Corpus, whole_texts: Mapping[int, Mapping[str, np.ndarray]], scorer: MethodScorer
) -> list[dict[str, Any]]:
    """Three short texts with all scores: where the main method agrees with saliency most, in the middle, and least."""
    few = [k for k in sorted(whole_texts) if len(corpus.encodings[k]) <= _SHOWN_TOKENS]
    ranked = sorted((k for k in few if not np.isnan(agreement[k])), key=lambda k: agreement[k])
    if not ranked:
        return []
    picks = {ranked[-1]: "most"}
    for k, name in ((ranked[len(ranked) // 2], "middle"), (ranked[0], "least")):
        picks.setdefault(k, name)
    examples = []
    for k, name in picks.items():
        encoding, scores = corpus.encodings[k], whole_texts[k]
        saliency = scores[SALIENCY]
        total = saliency.sum()
        examples.append(
            {
                "agreement": name,
                "correlation": float(agreement[k]),
                "id": corpus.examples[k].id,
                "tokens": scorer.explainer.tokenizer.convert_ids_to_tokens(encoding.ids.tolist()),
                "special": (encoding.segments < 0).tolist(),
                "scores": {
                    SALIENCY: (saliency / total if total > 0 else saliency).tolist(),
                    **{method: scores[method].tolist() for method in scorer.methods},
                },
            }
        )
    return examples


def remove_tokens(
    scorer: MethodScorer,
    corpus: Corpus,
    whole_texts: Mapping[int, Mapping[str, np.ndarray]],
    removal: str,
    rng: np.random.Generator,
    measurements: Measurements,
    steps: Steps,
) -> None:
    """Measure the faithfulness of the texts that `whole_texts` are of, a few texts at a time."""
    sample = list(whole_texts)
    scores: dict[int, dict[str, np.ndarray]] = {}
    for k in sample:
        draws = rng.random((RANDOM_DRAWS, len(corpus.encodings[k])))
        scores[k] = {**whole_texts[k], **{f"{RANDOM} {d}": draw for d, draw in enumerate(draws)}}
    names = list(scores[sample[0]])
    drops = {
        name: {kind: np.full((len(measure.shares), len(sample)), np.nan) for kind, measure in MEASURES.items()}
        for name in names
    }
    steps.begin("faithfulness: texts changed", len(sample))
    by_length = sorted(range(len(sample)), key=lambda column: len(corpus.encodings[sample[column]]))
    for begin in range(0, len(by_length), _REMOVAL_BATCH):
        columns = by_length[begin : begin + _REMOVAL_BATCH]
        part = [sample[column] for column in columns]
        batch_drops = _drops_of_batch(
            scorer, [corpus.encodings[k] for k in part], [scores[k] for k in part], names, removal
        )
        for name, measures in batch_drops.items():
            for kind, table in measures.items():
                drops[name][kind][:, columns] = table
        steps.advance(len(part))
    draws_of = [drops.pop(f"{RANDOM} {d}") for d in range(RANDOM_DRAWS)]
    drops[RANDOM] = {kind: np.mean([draw[kind] for draw in draws_of], axis=0) for kind in MEASURES}
    measurements.removed, measurements.drops = sample, drops


def _drops_of_batch(
    scorer: MethodScorer,
    encodings: list[Encoding],
    scores: list[dict[str, np.ndarray]],
    names: list[str],
    removal: str,
) -> dict[str, dict[str, np.ndarray]]:
    """Drops [shares, batch] by name and measure."""
    tokenizer, model = scorer.explainer.tokenizer, scorer.explainer.model
    inputs = pad(encodings, tokenizer, model)
    shape = tuple(inputs["input_ids"].shape)
    special = torch.ones(shape, dtype=torch.long)
    padded = {name: np.zeros(shape) for name in names}
    for row, encoding in enumerate(encodings):
        special[row, : len(encoding)] = torch.from_numpy(encoding.segments < 0).long()
        for name in names:
            padded[name][row, : len(encoding)] = scores[row][name]
    return removal_drops(
        model,
        padded,
        MEASURES,
        removal=removal,
        mask_token_id=tokenizer.mask_token_id if removal == "mask" else None,
        special_tokens_mask=special,
        batch_tokens=scorer.batch_tokens * 4,
        **inputs,
    )


def compare_with_marks(
    scorer: MethodScorer,
    marked: list[Rationale],
    max_length: int | None,
    rng: np.random.Generator,
    measurements: Measurements,
    steps: Steps,
) -> None:
    """Measure the plausibility of sentences whose words people marked.

    Raises:
        ValueError: no sentence can be read, or the tokenizer does not know where its tokens stand.
    """
    explainer = scorer.explainer
    encodings = explainer.encode_each([m.text for m in marked], None, explainer.limit(max_length))
    readable = {k: e for k, e in enumerate(encodings) if isinstance(e, Encoding) and not e.empty}
    if not readable:
        error = next((e for e in encodings if isinstance(e, BaseException)), "the tokenizer finds no token in any")
        raise ValueError(f"there is no sentence with marks that can be read: {short(str(error))}")
    if any(encoding.offsets is None for encoding in readable.values()):
        raise ValueError("plausibility needs a tokenizer that knows where its tokens stand (a fast one)")
    names = [*scorer.methods, SALIENCY, RANDOM]
    agreement = {name: np.full((len(marked), len(MARK_MEASURES)), np.nan) for name in names}
    noise = [rng.random((RANDOM_DRAWS, len(e) if isinstance(e, Encoding) else 0)) for e in encodings]
    steps.begin("plausibility: sentences", len(readable))
    numbers = list(readable)
    for index, scores in scorer.scores(list(readable.values())):
        k = numbers[index]
        marks = align(marked[k].marks, marked[k].words, _characters(readable[k]))
        for name, row in scores.whole_texts().items():
            agreement[name][k] = _plausibility(row, marks)
        agreement[RANDOM][k] = np.array([_plausibility(draw, marks) for draw in noise[k]]).mean(0)
        steps.advance()
    measurements.plausible = agreement


def _characters(encoding: Encoding) -> list[tuple[int, int] | None]:
    """Where each token stands in the text; None for special tokens."""
    if encoding.offsets is None:
        return [None] * len(encoding)
    return [
        None if segment < 0 else (start, end)
        for segment, (start, end) in zip(encoding.segments.tolist(), encoding.offsets.tolist(), strict=True)
    ]


def _plausibility(scores: np.ndarray, marks: np.ndarray) -> list[float]:
    values = plausibility(scores, marks)
    return [getattr(values, measure) for measure in MARK_MEASURES]
