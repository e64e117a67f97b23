"""Correlation, faithfulness and plausibility of every method on texts."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..errors import short
from ..extraction.rows import Example
from ..metrics.correlation import rank_correlations
from ..metrics.faithfulness import MEASURES, removal_drops
from ..metrics.plausibility import align, plausibility
from ..progress import Steps
from ..tokenization import Encoding, pad
from .measurements import RANDOM, RANDOM_DRAWS, SALIENCY, Measurements, main_method
from .rationales import Rationale
from .scorer import MethodScorer, TextScores

_SHOWN_TOKENS = 40  # of an example in the report


def correlate(
    scorer: MethodScorer,
    found: Measurements,
    texts: list[Example],
    encodings: list[Encoding],
    wanted: set[int],
    sample: set[int],
    golds: list[int] | None,
    chosen: list[int] | None,
    drop_special: bool,
    steps: Steps,
) -> dict[int, TextScores]:
    """Fill in the correlations, and keep the last rollouts of the sample."""
    order = sorted(wanted)
    kept: dict[int, TextScores] = {}
    steps.begin("attributions and saliency", len(order))
    labels = None if chosen is None else [chosen[k] for k in order]
    for place, row in scorer.rows([encodings[k] for k in order], labels):
        k = order[place]
        if not found.correlations:
            shape = (len(texts), *row.rollouts.shape[:2])
            found.layers = row.rollouts.shape[1]
            found.correlations = {"rollout": np.full(shape, np.nan), "layer": np.full(shape, np.nan)}
            found.right = [False] * len(texts) if golds is not None else []
        counts = encodings[k].segments >= 0 if drop_special else np.ones(len(encodings[k]), bool)
        for kind, rows in (("rollout", row.rollouts), ("layer", row.layers)):
            flat = rows[..., counts].reshape(-1, int(counts.sum()))
            found.correlations[kind][k] = rank_correlations(flat, row.saliency[counts]).reshape(rows.shape[:2])
        if golds is not None:
            found.right[k] = golds[k] == row.answer
        if k in sample:
            kept[k] = TextScores(row.rollouts[:, -1:], row.layers[:, :0], row.saliency, row.answer)
        steps.advance()
    found.ids = [example.id for example in texts]
    if golds is not None and len(order) < len(texts):
        found.right = [found.right[k] for k in order]
    _show(scorer, found, texts, encodings, order, labels)
    return kept


def _show(
    scorer: MethodScorer,
    found: Measurements,
    texts: list[Example],
    encodings: list[Encoding],
    order: list[int],
    labels: list[int] | None,
) -> None:
    """Three texts with all their scores: where the main method agrees with saliency most, in the middle, and least."""
    values = found.correlations["rollout"][order, main_method(found.methods), -1]
    short = [p for p in range(len(order)) if not np.isnan(values[p]) and len(encodings[order[p]]) <= _SHOWN_TOKENS]
    if not short:
        return
    ranked = sorted(short, key=lambda p: values[p])
    picks = {ranked[-1]: "most"}
    for p, agreement in ((ranked[len(ranked) // 2], "middle"), (ranked[0], "least")):
        picks.setdefault(p, agreement)
    scored = dict(
        scorer.rows([encodings[order[p]] for p in picks], None if labels is None else [labels[p] for p in picks])
    )
    for place, (p, agreement) in enumerate(picks.items()):
        row, encoding = scored[place], encodings[order[p]]
        total = row.saliency.sum()
        found.examples.append(
            {
                "agreement": agreement,
                "correlation": float(values[p]),
                "id": texts[order[p]].id,
                "tokens": scorer.explainer.tokenizer.convert_ids_to_tokens(encoding.ids.tolist()),
                "special": (encoding.segments < 0).tolist(),
                "scores": {
                    SALIENCY: (row.saliency / total if total > 0 else row.saliency).tolist(),
                    **{method: row.rollouts[m, -1].tolist() for m, method in enumerate(found.methods)},
                },
            }
        )


def remove_tokens(
    scorer: MethodScorer,
    found: Measurements,
    encodings: list[Encoding],
    kept: dict[int, TextScores],
    sample: list[int],
    removal: str,
    rng: np.random.Generator,
    steps: Steps,
) -> None:
    """Fill in the drops, a few texts at a time."""
    tokenizer, model = scorer.explainer.tokenizer, scorer.explainer.model
    names = [*found.methods, SALIENCY, *(f"{RANDOM} {k}" for k in range(RANDOM_DRAWS))]
    ordered = sorted(sample, key=lambda k: len(encodings[k]))
    drops: dict[str, dict[str, np.ndarray]] = {
        name: {kind: np.full((len(measure.shares), len(sample)), np.nan) for kind, measure in MEASURES.items()}
        for name in names
    }
    noise = {k: rng.random((RANDOM_DRAWS, len(encodings[k]))) for k in sample}
    steps.begin("faithfulness: texts changed", len(sample))
    for begin in range(0, len(ordered), 16):
        part = ordered[begin : begin + 16]
        inputs = pad([encodings[k] for k in part], tokenizer, model)
        n = inputs["input_ids"].shape[1]
        special = torch.ones(len(part), n, dtype=torch.long)
        scores = np.zeros((len(names), len(part), n))
        for row, k in enumerate(part):
            length = len(encodings[k])
            special[row, :length] = torch.from_numpy(encodings[k].segments < 0).long()
            scores[: len(found.methods), row, :length] = kept[k].rollouts[:, -1]
            scores[len(found.methods), row, :length] = kept[k].saliency
            scores[len(found.methods) + 1 :, row, :length] = noise[k]
        made = removal_drops(
            model,
            dict(zip(names, scores, strict=True)),
            MEASURES,
            removal=removal,
            mask_token_id=tokenizer.mask_token_id if removal == "mask" else None,
            special_tokens_mask=special,
            batch_tokens=scorer.batch_tokens * 4,
            **inputs,
        )
        places = [sample.index(k) for k in part]
        for name, measures in made.items():
            for kind, table in measures.items():
                drops[name][kind][:, places] = table
        steps.advance(len(part))
    draws = [drops.pop(f"{RANDOM} {k}") for k in range(RANDOM_DRAWS)]
    drops[RANDOM] = {kind: np.mean([draw[kind] for draw in draws], axis=0) for kind in MEASURES}
    found.removed, found.drops = sample, drops


def compare_with_marks(
    scorer: MethodScorer,
    found: Measurements,
    marked: list[Rationale],
    max_length: int | None,
    rng: np.random.Generator,
    steps: Steps,
) -> None:
    """Fill in the plausibility."""
    explainer = scorer.explainer
    encodings = explainer.encode_each([m.text for m in marked], None, explainer.limit(max_length))
    good = {k: e for k, e in enumerate(encodings) if isinstance(e, Encoding) and not e.empty}
    if not good:
        error = next((e for e in encodings if isinstance(e, BaseException)), "the tokenizer finds no token in any")
        raise ValueError(f"there is no sentence with marks that can be read: {short(str(error))}")
    if any(encoding.spans is None for encoding in good.values()):
        raise ValueError("plausibility needs a tokenizer that knows where its tokens stand (a fast one)")
    names = [*found.methods, SALIENCY, RANDOM]
    table = np.full((len(names), len(marked), 3), np.nan)
    noise = [rng.random((RANDOM_DRAWS, len(e) if isinstance(e, Encoding) else 0)) for e in encodings]
    steps.begin("plausibility: sentences", len(good))
    numbers = [*good]
    for place, row in scorer.rows([*good.values()]):
        k = numbers[place]
        encoding = good[k]
        spans = [
            None if segment < 0 or encoding.spans is None else tuple(encoding.spans[token].tolist())
            for token, segment in enumerate(encoding.segments.tolist())
        ]
        marks = align(marked[k].marks, marked[k].words, spans)
        found.layers = row.rollouts.shape[1]
        for m, scores in enumerate([*row.rollouts[:, -1], row.saliency]):
            table[m, k] = _plausibility(scores, marks)
        draws = np.array([_plausibility(scores, marks) for scores in noise[k]])
        table[-1, k] = draws.mean(0)
        steps.advance()
    found.plausible = dict(zip(names, table, strict=True))


def _plausibility(scores: np.ndarray, marks: np.ndarray) -> list[float]:
    value = plausibility(scores, marks)
    return [math.nan if v is None else v for v in (value.auprc, value.f1, value.iou)]
