"""`globenc.evaluate.evaluate`: a model and its texts in, a folder with numbers, figures and a report out."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy import stats

from ..answers import kind_of, logits_of
from ..encoders import Encoder
from ..errors import in_a_line, refuses_target, short
from ..explainer import GlobEnc
from ..extraction.identity import about
from ..extraction.rows import Columns, Example, Reader
from ..extraction.sources import Input, inputs_of
from ..functional import compare_methods, contribution_maps
from ..methods import METHODS, get_method
from ..printing import escaped, say
from ..render.console import Console
from ..rollouts import Position, plain_position, rollout
from ..tokenization import Encoding, pad
from .correlation import rank_correlations
from .faithfulness import MEASURES, removal_drops
from .flow import attention_flow
from .folder import EXAMPLES, FIGURES, REPORT, RESULTS, ROWS, OutputFolder
from .gradients import OUTPUTS, hta_maps, saliency
from .plausibility import align, plausibility

METRICS = ("correlation", "faithfulness", "plausibility")
# in the paper's order; HTA and flow cost minutes a text and are evaluated where they are asked for
PAPER_ORDER = ("W", "W-FixedRes", "W-Res", "N", "N-FixedRes", "N-Res", "N-ResLN", "N-Enc")
EXTRAS = {
    "W-Flow": "attention flow: maximum flow through the mean attention weights (Abnar and Zuidema 2020)",
    "HTA": "hidden token attribution: norms of the layers' Jacobians, rolled out (Brunner et al. 2020)",
    "HTA-Input": "HTA x Input (18): the paper's upper bound",
}
SALIENCY, RANDOM = "saliency", "random"
REMOVAL_TEXTS = 200
RANDOM_DRAWS = 5
MARKS_COLUMNS = ("rationale", "rationale_mean", "rationales", "marks")
_SHOWN_TOKENS = 40  # of an example in the report
_EVERY = 10.0  # seconds between plain lines of progress


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        output: the folder.
        results: the content of results.json.
    """

    output: Path
    results: dict[str, Any]

    @property
    def report(self) -> Path:
        """The web page."""
        return self.output / REPORT


@dataclass(frozen=True)
class Rationale:
    """A text with the marks of its words; `words` are their characters (start, end)."""

    text: str
    words: list[tuple[int, int]]
    marks: list[float]


@dataclass
class Found:
    """Everything that was measured, text by text.

    Attributes:
        methods: names, the extras last.
        layers: how many the model has.
        ids: of the texts.
        correlations: "rollout" and "layer", [texts, methods, layers] each; NaN where there is none.
        right: whether the model's answer is the gold label, where there are labels.
        removed: which texts were changed for faithfulness.
        drops: by scorer and measure, [shares, removed texts].
        plausible: by scorer, [sentences, 3]: AUPRC, F1, IOU.
        examples: a few texts with every method's scores.
    """

    methods: list[str]
    layers: int = 0
    ids: list[Any] = field(default_factory=list)
    correlations: dict[str, np.ndarray] = field(default_factory=dict)
    right: list[bool] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    drops: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    plausible: dict[str, np.ndarray] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Row:
    """One text's scores: rollouts and layers [methods, layers, n], saliency [n], the class answered."""

    rollouts: np.ndarray
    layers: np.ndarray
    saliency: np.ndarray
    answer: int


@refuses_target
def evaluate(
    inputs: Any,
    output: str | Path,
    *,
    model: str | Path | GlobEnc | None = None,
    rationales: Any = None,
    methods: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    pair_column: str | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    format: str | None = None,
    max_length: int | None = None,
    tokens_column: str = "tokens",
    marks_column: str | None = None,
    position: Position = "cls",
    saliency_of: str = "predicted",
    saliency_output: str = "logit",
    drop_special: bool = False,
    removal: str = "auto",
    removal_texts: int = REMOVAL_TEXTS,
    batch_tokens: int | None = None,
    published: Mapping[str, Any] | None = None,
    title: str | None = None,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    backend: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Evaluate attribution methods on a classifier and its texts, as the paper does and as the field has done since.

    Correlation: Spearman's rank correlation of every method with gradient-times-input saliency (17), text by text, for
    the rollout up to every layer and for every single layer. Faithfulness: `aopc`, `comprehensiveness`, `sufficiency`
    of the whole rollouts, beside saliency and random scores. Plausibility: agreement with words that people marked.

    Args:
        inputs, text_column, pair_column, id_column, label_column, format, limit, max_length: as for `globenc.extract`.
            None for `inputs` where plausibility alone is asked for.
        output: folder to write: results.json, results.csv, examples.parquet, figures/, report.html.
        model: folder, hub name or a GlobEnc of a text classifier; None is the model in the package.
        rationales: JSONL (or what `inputs` may be) of texts as lists of words, with a mark for each.
        methods: names of the eight, and of "W-Flow", "HTA", "HTA-Input", which take seconds to minutes a text; None is
            every one of the eight that has a meaning for the model.
        metrics: of "correlation", "faithfulness", "plausibility"; None is all, plausibility where there are rationales.
        seed: of random scores, and of which texts are changed.
        tokens_column, marks_column: of the rationales: a list of words; a list of marks, 0 to 1, or a list of such
            lists, one for each annotator. None takes the first that is there of rationale, rationale_mean,
            rationales, marks.
        position: the token whose row is evaluated, "cls", "mean" or a position.
        saliency_of: class y_c of (17): "predicted", or "gold", the label column's.
        saliency_output: "logit" or "probability", as for `saliency`.
        drop_special: leave special tokens out of the correlation; the paper keeps them.
        removal: "mask", "delete", or "auto": mask where the tokenizer has a mask token.
        removal_texts: how many texts faithfulness changes, chosen by the seed; each is read some 200 times.
        batch_tokens: most tokens of a batch, padding included.
        published: numbers to stand beside these, as `presets.published_numbers` returns them: {"source": ...,
            "correlation": {method: {"mean": ..., "std": ...}}}, and if there are any "of", "notes" and "layers".
        title: of the report.
        overwrite: write into a folder that holds an evaluation.
        device, dtype, backend, revision, trust_remote_code: as for `GlobEnc.from_pretrained`.
        progress: show on standard error how far it is.

    Returns:
        Evaluation.

    Raises:
        OSError, TypeError, ValueError: an input, option or model that cannot be used.
        FloatingPointError: the model gives no finite numbers.

    Example:
        >>> import globenc.evaluate, tempfile
        >>> rows = [{"text": "a charming journey"}, {"text": "unflinchingly bleak and desperate"}]
        >>> found = globenc.evaluate.evaluate(rows, tempfile.mkdtemp() + "/out", progress=False)
        >>> found.results["texts"]["read"], found.report.name
        (2, 'report.html')
    """
    request = _request(**locals())
    from .report import write_figures, write_report

    start = time.monotonic()
    asked = _checked_metrics(metrics, inputs is not None, rationales is not None)
    numbers = {"limit": limit, "max_length": max_length, "removal_texts": removal_texts, "batch_tokens": batch_tokens}
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be a positive whole number, got {number!r}")
    for name, value, allowed in (
        ("saliency_of", saliency_of, ("predicted", "gold")),
        ("saliency_output", saliency_output, OUTPUTS),
        ("removal", removal, ("auto", "mask", "delete")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if saliency_of == "gold" and label_column is None:
        raise ValueError("saliency_of 'gold' needs label_column: the column of the gold labels")
    names = None if methods is None else _checked_methods(methods)
    with OutputFolder.opened(output, overwrite, request) as folder:
        examples: list[Example] = []
        rejected: list[Any] = []
        if inputs is not None:
            columns = Columns(text_column, pair_column, id_column, label_column)
            examples, rejected = _examples(inputs_of(inputs, format), columns, limit)
        marked, unmarked = _rationales(rationales, tokens_column, marks_column) if "plausibility" in asked else ([], 0)
        explainer = (
            model
            if isinstance(model, GlobEnc)
            else GlobEnc.from_pretrained(
                model, device, dtype, backend, revision=revision, trust_remote_code=trust_remote_code
            )
        )
        _check_model(explainer, label_column is not None)
        methods = Encoder.of(explainer.model).methods
        names = names or [name for name in PAPER_ORDER if name in methods]
        runner = _Runner(
            explainer,
            names,
            plain_position(position),
            saliency_output,
            batch_tokens or max(256, explainer.budget() // 8),
        )
        mask_token_id = explainer.tokenizer.mask_token_id
        if removal == "mask" and mask_token_id is None:
            raise ValueError("removal 'mask' needs a tokenizer with a mask token, and this one has none: take 'delete'")
        removal = ("delete" if mask_token_id is None else "mask") if removal == "auto" else removal
        found = Found(names)
        rng = np.random.default_rng(seed)
        timings: dict[str, float] = {}
        with _Steps(progress) as steps:
            texts, encodings, empty = runner.encoded(examples, max_length)
            truncated = sum(encoding.lost > 0 for encoding in encodings)
            rejected = [*rejected, *empty]
            if inputs is not None and not texts:
                raise ValueError(
                    f"there is no text to evaluate on: all {len(rejected)} rows are bad, the first because "
                    f"{rejected[0]}"
                    if rejected
                    else "there is no text to evaluate on: the input has no row"
                )
            golds = [_class_of(explainer.model, example) for example in texts] if label_column is not None else None
            if "correlation" in asked or "faithfulness" in asked:
                sample = sorted(rng.permutation(len(texts))[:removal_texts].tolist()) if "faithfulness" in asked else []
                chosen = golds if saliency_of == "gold" else None
                wanted = set(range(len(texts))) if "correlation" in asked else set(sample)
                with _timed(timings, "attribution and correlation"):
                    kept = _correlate(
                        runner, found, texts, encodings, wanted, set(sample), golds, chosen, drop_special, steps
                    )
                if "correlation" not in asked:
                    found.correlations = {}
                if sample:
                    with _timed(timings, "faithfulness"):
                        _remove(runner, found, encodings, kept, sample, removal, rng, steps)
            if marked:
                with _timed(timings, "plausibility"):
                    _compare_with_marks(runner, found, marked, max_length, rng, steps)
        summary = _summary(found, asked)
        timings["in all"] = time.monotonic() - start
        results: dict[str, Any] = {
            "title": title or "Do these attributions tell the truth?",
            **about(explainer, revision),
            "model_class": type(explainer.model).__name__,
            "model_layers": found.layers,
            "data": [source.name for source in inputs_of(inputs, format)] if inputs is not None else [],
            "rationales": str(rationales) if isinstance(rationales, str | Path) else rationales is not None,
            "settings": {
                "metrics": list(asked),
                "methods": names,
                "position": position if isinstance(position, str) else str(position),
                "saliency_of": saliency_of,
                "saliency_output": saliency_output,
                "special_tokens": not drop_special,
                "removal": removal,
                "seed": seed,
                "limit": limit,
                "max_length": max_length,
                "device": str(explainer.device),
                "dtype": str(explainer.model.dtype).removeprefix("torch."),
            },
            "texts": {
                "read": len(texts),
                "rejected": len(rejected),
                "first_rejects": [str(reject) for reject in rejected[:10]],
                "truncated": truncated,
                "changed_for_faithfulness": len(found.removed),
                "with_rationales": len(marked),
                "rationales_left_out": unmarked,
                "accuracy": float(np.mean(found.right)) if found.right else None,
            },
            "seconds": {name: round(seconds, 2) for name, seconds in timings.items()},
            **summary,
            "published": published,
            "examples": found.examples,
        }
        with folder.replacing() as part:
            _write_json(part / RESULTS, results)
            _write_csv(part / ROWS, results)
            _write_examples(part / EXAMPLES, found)
            write_figures(part / FIGURES, found, results)
            write_report(part / REPORT, part / FIGURES, found, results)
        return Evaluation(folder.folder, results)


def _request(inputs: Any, output: Any, rationales: Any, format: str | None, progress: bool, **options: Any) -> str:
    """What tells one call from another, as JSON; of objects their types."""
    data = None if inputs is None else [source.name for source in inputs_of(inputs, format)]
    marks = None if rationales is None else [source.name for source in inputs_of(rationales)]
    request = {"inputs": data, "rationales": marks, "format": format, **options}
    kinds = (Path, torch.device, torch.dtype)
    return json.dumps(request, default=lambda value: str(value) if isinstance(value, kinds) else repr(type(value)))


def _checked_metrics(metrics: Sequence[str] | None, data: bool, rationales: bool) -> tuple[str, ...]:
    if isinstance(metrics, str):
        raise TypeError(f"metrics must be a list of names, got the string {metrics!r}")
    if metrics is None:
        asked = tuple(name for name in METRICS if (rationales if name == "plausibility" else data))
        if not asked:
            raise ValueError("inputs are needed: texts to evaluate on")
        return asked
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be of {', '.join(METRICS)}; got {name!r}")
    if not metrics:
        raise ValueError("metrics is an empty list: give at least one name")
    if "plausibility" in metrics and not rationales:
        raise ValueError("plausibility needs rationales: a file of texts with marked words")
    if not data and set(metrics) - {"plausibility"}:
        raise ValueError("inputs are needed: correlation and faithfulness read texts")
    return tuple(name for name in METRICS if name in metrics)


def _checked_methods(methods: Sequence[str]) -> list[str]:
    if isinstance(methods, str):
        raise TypeError(f"methods must be a list of names, got the string {methods!r}")
    known = [name if name in EXTRAS else None for name in methods]
    for name, extra in zip(methods, known, strict=True):
        if extra is None:
            try:
                get_method(name)
            except ValueError as error:
                raise ValueError(f"{error}; besides these {', '.join(EXTRAS)}") from None
    if not known:
        raise ValueError("methods is an empty list: give at least one name")
    order = [*PAPER_ORDER, *EXTRAS]
    return sorted(set(methods), key=order.index)


def _check_model(explainer: GlobEnc, gold: bool) -> None:
    model = explainer.model
    if explainer.reads_pictures:
        raise ValueError("model must read texts to be evaluated; this one reads pictures")
    kind = kind_of(model)
    if kind is None:
        raise ValueError(
            f"model must be a text classifier to be evaluated, got {type(model).__name__}: saliency and faithfulness "
            "ask for its answers"
        )
    if kind == "value":
        raise ValueError(
            f"model must choose between classes to be evaluated; {type(model).__name__} answers with a number, whose "
            "probability cannot drop"
        )
    if kind == "labels" and gold:
        raise ValueError(
            f"label_column must be left out for {type(model).__name__}: it gives each of its labels a probability of "
            "its own (multi_label_classification), and a text may have several; its highest label is evaluated"
        )


def _examples(sources: list[Input], columns: Columns, limit: int | None) -> tuple[list[Example], list[Any]]:
    """The rows that have a text, and what is wrong with the others."""
    for source in sources:
        source.check(columns.names())
    examples: list[Example] = []
    rejects: list[Any] = []
    for work in Reader(sources, columns, 2000, limit, strict=False):
        examples += work.examples
        rejects += work.rejects
    return examples, rejects


def _class_of(model: Any, example: Example) -> int:
    """The gold label as a class: a number, or a name of the model's configuration."""
    count, gold = model.config.num_labels, example.gold
    named = {str(name).lower(): k for name, k in (model.config.label2id or {}).items()}
    written = str(gold).strip()
    if isinstance(gold, float) and gold.is_integer():
        written = str(int(gold))
    if written.lower() in named:
        return int(named[written.lower()])
    if written.isdigit() and int(written) < count:
        return int(written)
    raise ValueError(
        f"row {example.row}: label {gold!r} is none of the model's: a number from 0 to {count - 1}, or "
        f"{', '.join(str(name) for name in (model.config.label2id or {}))}"
    )


def _rationales(given: Any, tokens_column: str, marks_column: str | None) -> tuple[list[Rationale], int]:
    """Texts with marked words, and how many rows have no marks that can be used.

    Raises:
        OSError, ValueError: the file cannot be read, lacks a column, or has no usable row.
    """
    (source, *others) = inputs_of(given)
    if others:
        raise ValueError("rationales must be one file")
    name = marks_column
    if name is None:
        for name in MARKS_COLUMNS:
            try:
                source.check([tokens_column, name])
            except ValueError as error:
                if f"no column {tokens_column!r}" in str(error):
                    raise
                continue
            break
        else:
            raise ValueError(
                f"rationales {source.name!r} have none of the columns {', '.join(MARKS_COLUMNS)}: name the one with "
                "the marks with marks_column"
            )
    found, left_out, first = [], 0, ""
    for number, raw in enumerate(source.rows([tokens_column, name])):
        try:
            found.append(_rationale(raw.values or {}, raw.reason, tokens_column, name))
        except (ValueError, TypeError) as error:
            left_out += 1
            first = first or f"row {number}: {error}"
    if not found:
        raise ValueError(f"rationales {source.name!r} have no usable row; {first or 'they are empty'}")
    return found, left_out


def _rationale(values: Mapping[str, Any], reason: str | None, tokens_column: str, marks_column: str) -> Rationale:
    if reason is not None:
        raise ValueError(reason)
    tokens, marks = values.get(tokens_column), values.get(marks_column)
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(f"{tokens_column} must be a list of words")
    if not isinstance(marks, list) or not marks:
        raise ValueError(f"{marks_column} must be a list of marks, one for each word")
    if isinstance(marks[0], list):  # annotators
        marks = np.mean(np.array(marks, dtype=np.float64), axis=0).tolist()
    if len(marks) != len(tokens):
        raise ValueError(f"{marks_column} has {len(marks)} marks for {len(tokens)} words")
    numbers = [float(mark) for mark in marks]
    if not all(0 <= mark <= 1 for mark in numbers):
        raise ValueError(f"{marks_column} must be numbers from 0 to 1")
    words, start = [], 0
    for token in tokens:
        words.append((start, start + len(token)))
        start += len(token) + 1
    return Rationale(" ".join(tokens), words, numbers)


class _Runner:
    """Attributions of many texts under every method, and their saliency."""

    def __init__(self, explainer: GlobEnc, names: list[str], position: Any, output: str, batch_tokens: int):
        self.explainer, self.names, self.position, self.output = explainer, names, position, output
        self.batch_tokens = batch_tokens
        self.plain = [name for name in names if name in METHODS]
        self.extras = [name for name in names if name in EXTRAS]
        if self.extras and (position != "cls" or not Encoder.of(explainer.model).family.has_cls):
            raise ValueError(f"{self.extras[0]} is evaluated for position 'cls' alone, got {position!r}")

    def encoded(
        self, examples: Sequence[Example], max_length: int | None
    ) -> tuple[list[Example], list[Encoding], list[str]]:
        """The examples that have tokens, their tokens, and what is wrong with the others."""
        if not examples:
            return [], [], []
        firsts = [example.text for example in examples]
        seconds = [example.pair or "" for example in examples] if examples[0].pair is not None else None
        encodings = self.explainer.encode_each(firsts, seconds, self.explainer.limit(max_length))
        good: list[Example] = []
        found: list[Encoding] = []
        bad: list[str] = []
        for example, encoding in zip(examples, encodings, strict=True):
            if isinstance(encoding, BaseException):
                bad.append(f"row {example.row}: {short(in_a_line(encoding))}")
            elif encoding.empty:
                bad.append(f"row {example.row}: no token")
            else:
                good.append(example)
                found.append(encoding)
        return good, found, bad

    def rows(self, encodings: Sequence[Encoding], golds: Sequence[int] | None = None) -> Iterator[tuple[int, _Row]]:
        """Index and scores of every text, batch by batch."""
        for batch in self.explainer.batches([len(e) for e in encodings], self.batch_tokens):
            inputs = pad([encodings[k] for k in batch], self.explainer.tokenizer, self.explainer.model)
            label: Any = "predicted" if golds is None else torch.tensor([golds[k] for k in batch])
            yield from zip(batch, self._batch(inputs, label), strict=True)

    def _batch(self, inputs: dict[str, torch.Tensor], label: Any) -> list[_Row]:
        model, backend = self.explainer.model, self.explainer.backend
        out = compare_methods(model, methods=self.plain or ["W"], position=self.position, backend=backend, **inputs)
        rollouts = {name: out.rollouts[name].cpu().double().numpy() for name in self.plain}
        layers = {name: out.layers[name].cpu().double().numpy() for name in self.plain}
        for name in self.extras:
            rollouts[name], layers[name] = self._extra(name, inputs)
        gradients = saliency(model, label=label, output=self.output, **inputs).cpu().double().numpy()
        logits = logits_of(model, out.model_output)
        assert logits is not None  # saliency has looked
        answers = logits.argmax(-1).tolist()
        lengths = inputs["attention_mask"].sum(-1).tolist()
        return [
            _Row(
                np.stack([rollouts[name][:, k, :n] for name in self.names]),
                np.stack([layers[name][:, k, :n] for name in self.names]),
                gradients[k, :n],
                answers[k],
            )
            for k, n in enumerate(lengths)
        ]

    def _extra(self, name: str, inputs: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the first token up to every layer, and of every layer alone, [layers, batch, n]."""
        model = self.explainer.model
        if name != "W-Flow":
            alone = hta_maps(model, times_input=name == "HTA-Input", **inputs)
            mantissa, _ = rollout(alone)
            return mantissa[:, :, 0].cpu().double().numpy(), alone[:, :, 0].cpu().double().numpy()
        maps = contribution_maps(model, method="W", backend=self.explainer.backend, **inputs).cpu().double().numpy()
        depth, batch, n, _ = maps.shape
        lengths = inputs["attention_mask"].sum(-1).tolist()
        flows = np.zeros((depth, batch, n))
        for k, real in enumerate(lengths):
            for layer in range(depth):
                flows[layer, k, :real] = attention_flow(maps[: layer + 1, k, :real, :real])
        return flows, maps[:, :, 0]


def _correlate(
    runner: _Runner,
    found: Found,
    texts: list[Example],
    encodings: list[Encoding],
    wanted: set[int],
    sample: set[int],
    golds: list[int] | None,
    chosen: list[int] | None,
    drop_special: bool,
    steps: _Steps,
) -> dict[int, _Row]:
    """Fill in the correlations, and keep the last rollouts of the sample."""
    order = sorted(wanted)
    kept: dict[int, _Row] = {}
    steps.begin("attributions and saliency", len(order))
    labels = None if chosen is None else [chosen[k] for k in order]
    for place, row in runner.rows([encodings[k] for k in order], labels):
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
            kept[k] = _Row(row.rollouts[:, -1:], row.layers[:, :0], row.saliency, row.answer)
        steps.advance()
    found.ids = [example.id for example in texts]
    if golds is not None and len(order) < len(texts):
        found.right = [found.right[k] for k in order]
    _show(runner, found, texts, encodings, order, labels)
    return kept


def _show(
    runner: _Runner,
    found: Found,
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
        runner.rows([encodings[order[p]] for p in picks], None if labels is None else [labels[p] for p in picks])
    )
    for place, (p, agreement) in enumerate(picks.items()):
        row, encoding = scored[place], encodings[order[p]]
        total = row.saliency.sum()
        found.examples.append(
            {
                "agreement": agreement,
                "correlation": float(values[p]),
                "id": texts[order[p]].id,
                "tokens": runner.explainer.tokenizer.convert_ids_to_tokens(encoding.ids.tolist()),
                "special": (encoding.segments < 0).tolist(),
                "scores": {
                    SALIENCY: (row.saliency / total if total > 0 else row.saliency).tolist(),
                    **{method: row.rollouts[m, -1].tolist() for m, method in enumerate(found.methods)},
                },
            }
        )


def _remove(
    runner: _Runner,
    found: Found,
    encodings: list[Encoding],
    kept: dict[int, _Row],
    sample: list[int],
    removal: str,
    rng: np.random.Generator,
    steps: _Steps,
) -> None:
    """Fill in the drops, a few texts at a time."""
    tokenizer, model = runner.explainer.tokenizer, runner.explainer.model
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
            batch_tokens=runner.batch_tokens * 4,
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


def _compare_with_marks(
    runner: _Runner,
    found: Found,
    marked: list[Rationale],
    max_length: int | None,
    rng: np.random.Generator,
    steps: _Steps,
) -> None:
    """Fill in the plausibility."""
    explainer = runner.explainer
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
    for place, row in runner.rows([*good.values()]):
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


def describe(values: np.ndarray) -> dict[str, Any]:
    """Mean, population standard deviation and 99 % confidence interval of the mean (Student's t), of values that are
    there."""
    there = values[~np.isnan(values)]
    if not len(there):
        return {"count": 0, "undefined": len(values), "mean": None, "std": None, "low99": None, "high99": None}
    mean, std = float(there.mean()), float(there.std())
    half = math.nan
    if len(there) > 1:
        half = float(stats.t.ppf(0.995, len(there) - 1)) * float(there.std(ddof=1)) / math.sqrt(len(there))
    return {
        "count": len(there),
        "undefined": len(values) - len(there),
        "mean": mean,
        "std": std,
        "low99": None if math.isnan(half) else mean - half,
        "high99": None if math.isnan(half) else mean + half,
    }


def main_method(methods: Sequence[str]) -> int:
    """Which of the methods the others are compared with: N-Enc, or else the last."""
    return methods.index("N-Enc") if "N-Enc" in methods else len(methods) - 1


def _summary(found: Found, asked: Iterable[str]) -> dict[str, Any]:
    """What results.json says of every metric."""
    place = main_method(found.methods)
    main = found.methods[place]
    made: dict[str, Any] = {"main_method": main}
    if "correlation" in asked:
        made["correlation"] = {
            kind: {
                name: [describe(table[:, m, layer]) for layer in range(found.layers)]
                for m, name in enumerate(found.methods)
            }
            for kind, table in found.correlations.items()
        }
        last = found.correlations["rollout"][:, :, -1]
        made["correlation"]["main_minus"] = {
            name: describe(last[:, place] - last[:, m]) for m, name in enumerate(found.methods) if m != place
        }
    if "faithfulness" in asked:
        made["faithfulness"] = {
            kind: {
                name: {
                    **describe(drops[kind].mean(0)),
                    "main_minus_this": describe((found.drops[main][kind] - drops[kind]).mean(0)),
                    "shares": list(measure.shares),
                    "drops": [describe(row)["mean"] for row in drops[kind]],
                }
                for name, drops in found.drops.items()
            }
            for kind, measure in MEASURES.items()
        }
    if "plausibility" in asked:
        made["plausibility"] = {
            kind: {
                name: {
                    **describe(table[:, column]),
                    "main_minus_this": describe((found.plausible[main] - table)[:, column]),
                }
                for name, table in found.plausible.items()
            }
            for column, kind in enumerate(("auprc", "f1", "iou"))
        }
    return made


def published_of(
    results: Mapping[str, Any], kind: str, method: str, layer: int | str
) -> Mapping[str, float | None] | None:
    """The published mean and deviation for a layer, or for "max", the best of them; None where there is none."""
    published = results.get("published") or {}
    if kind == "rollout" and layer == results["model_layers"] and method in published.get("correlation", {}):
        return published["correlation"][method]
    return published.get("layers", {}).get(kind, {}).get(method, {}).get(str(layer))


def tidy(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """results.json's numbers as rows: metric, setting, method, layer, what `describe` says, and what was published."""
    rows: list[dict[str, Any]] = []
    columns = ("count", "undefined", "mean", "std", "low99", "high99")
    notes = "; ".join((results.get("published") or {}).get("notes", ()))

    def add(metric: str, setting: str, method: str, layer: int | str, numbers: Mapping[str, Any]) -> None:
        known = published_of(results, setting, method, layer) if metric == "correlation" else None
        there: dict[str, Any] = dict.fromkeys(("published", "published_std", "published_notes"))
        if known is not None:
            there = {"published": known["mean"], "published_std": known["std"], "published_notes": notes or None}
        rows.append(
            {"metric": metric, "setting": setting, "method": method, "layer": layer}
            | {name: numbers[name] for name in columns}
            | there
        )

    for kind in ("rollout", "layer"):
        for method, layers in results.get("correlation", {}).get(kind, {}).items():
            for layer, numbers in enumerate(layers, 1):
                add("correlation", kind, method, layer, numbers)
    for kind, table in results.get("faithfulness", {}).items():
        for method, numbers in table.items():
            add(kind, results["settings"]["removal"], method, "", numbers)
    for kind, table in results.get("plausibility", {}).items():
        for method, numbers in table.items():
            add(kind, "marks >= 0.5", method, "", numbers)
    return rows


def _write_json(path: Path, results: Mapping[str, Any]) -> None:
    written = escaped(json.dumps(results, ensure_ascii=False, indent=1, allow_nan=False))
    path.write_text(written + "\n", encoding="utf-8")


def _write_csv(path: Path, results: Mapping[str, Any]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = tidy(results)
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _write_examples(path: Path, found: Found) -> None:
    """Every single value: id, metric, setting, method, layer, value; null where it is not defined."""
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [(name, pa.string()) for name in ("id", "metric", "setting", "method")]
        + [("layer", pa.int32()), ("value", pa.float64())]
    )
    with path.open("wb") as file, parquet.ParquetWriter(file, schema) as writer:

        def add(ids: Sequence[Any], metric: str, setting: str, method: str, layer: int | None, values: Any) -> None:
            columns = {
                "id": [str(i) for i in ids],
                "metric": [metric] * len(ids),
                "setting": [setting] * len(ids),
                "method": [method] * len(ids),
                "layer": [layer] * len(ids),
                "value": pa.array(values, pa.float64(), from_pandas=True),  # NaN is null
            }
            writer.write_table(pa.table(columns, schema))

        for kind, table in found.correlations.items():
            for m, method in enumerate(found.methods):
                for layer in range(found.layers):
                    add(found.ids, "correlation", kind, method, layer + 1, table[:, m, layer])
        for method, measures in found.drops.items():
            for kind, drops in measures.items():
                add([found.ids[k] for k in found.removed], kind, "", method, None, drops.mean(0))
        for method, values in found.plausible.items():
            for column, kind in enumerate(("auprc", "f1", "iou")):
                add(range(len(values)), kind, "", method, None, values[:, column])


class _Steps:
    """How far an evaluation is: a bar on a terminal, a plain line now and then elsewhere; on standard error."""

    def __init__(self, shown: bool):
        console = Console(stderr=True)
        self._shown = shown
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True) if shown and console.is_terminal else None
        self._task: Any = None
        self._doing, self._done, self._total, self._printed = "", 0, 0, time.monotonic()

    def __enter__(self) -> _Steps:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, doing: str, total: int) -> None:
        """The next step has so many things to do."""
        self._doing, self._done, self._total = doing, 0, total
        if self._bar is not None:
            self._task = self._bar.add_task(doing, total=total)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.advance(self._task, count)
        elif self._shown and time.monotonic() - self._printed >= _EVERY:
            self._printed = time.monotonic()
            say(f"globenc: {self._doing} {self._done:,} of {self._total:,}")


@contextlib.contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    timings[name] = time.monotonic() - start
