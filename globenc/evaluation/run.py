"""`globenc.evaluate`: a model and its texts in, a folder with numbers, figures and a report out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..encoders import Encoder
from ..errors import refuses_target
from ..explainer import GlobEnc
from ..extraction.provenance import provenance
from ..extraction.rows import Columns
from ..extraction.sources import Input, inputs_of
from ..loading import ModelSource
from ..progress import Steps
from ..rollouts import Position, plain_position
from . import page
from .figures import write_figures
from .files import write_csv, write_examples, write_json
from .folder import EXAMPLES, FIGURES, REPORT, RESULTS, ROWS, OutputFolder
from .measure import compare_with_marks, correlate, remove_tokens
from .measurements import Measurements, summary
from .options import REMOVAL_TEXTS, EvaluationOptions, checked_methods, checked_metrics
from .rationales import Rationale, read_rationales
from .scorer import MethodScorer, default_methods
from .texts import Corpus, check_model, read_examples, read_tokens


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

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


@refuses_target
def evaluate(
    inputs: Any,
    output: str | Path,
    *,
    model: str | Path | ModelSource | GlobEnc | None = None,
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
    progress: bool = True,
) -> Evaluation:
    """Evaluate attribution methods on a classifier and its texts, as the paper does and as the field has done since.

    Correlation: Spearman's rank correlation of every method with gradient-times-input saliency (17), text by text, for
    the rollout up to every layer and for every single layer. Faithfulness: `aopc`, `comprehensiveness`, `sufficiency`
    of the whole rollouts, and of signed scores as they are, beside saliency and random scores. Plausibility: agreement
    with words that people marked. Cost: each method's time in plain forward passes of the same texts.

    Args:
        inputs, text_column, pair_column, id_column, label_column, format, limit, max_length: as for `globenc.extract`.
            None for `inputs` where plausibility alone is asked for.
        output: folder to write: results.json, results.csv, examples.parquet, figures/, report.html.
        model: a text classifier: folder, hub name, `globenc.ModelSource` (which also says device, dtype, backend and
            revision) or GlobEnc; None is the model in the package.
        rationales: JSONL (or what `inputs` may be) of texts as lists of words, with a mark for each.
        methods: names of the eight; of "class-scores", "class-scores-model", "class-scores-origin" (signed, for the
            class of the saliency, by `globenc.class_scores`) and "gradient-x-input"; of "W-Flow", "HTA", "HTA-Input",
            "integrated-gradients-zero", "integrated-gradients-mask" and "occlusion", which take many forward passes or
            minutes a text. None is every one but the last six that can be computed for the model.
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
        published: numbers to stand beside these, as `globenc.evaluate_preset` takes them from a file: {"source": ...,
            "correlation": {method: {"mean": ..., "std": ...}}}, and if there are any "of", "notes" and "layers".
        title: of the report.
        overwrite: write into a folder that holds an evaluation.
        progress: show on standard error how far it is.

    Returns:
        Evaluation.

    Raises:
        OSError, TypeError, ValueError: an input, option or model that cannot be used.
        FloatingPointError: the model gives no finite numbers.

    Example:
        >>> import globenc, tempfile
        >>> rows = [{"text": "a charming journey"}, {"text": "unflinchingly bleak and desperate"}]
        >>> evaluation = globenc.evaluate(rows, tempfile.mkdtemp() + "/out", progress=False)
        >>> evaluation.results["texts"]["read"], evaluation.report.name
        (2, 'report.html')
    """
    options = EvaluationOptions(
        metrics=checked_metrics(metrics, inputs is not None, rationales is not None),
        methods=checked_methods(methods),
        columns=Columns(text_column, pair_column, id_column, label_column),
        format=format,
        tokens_column=tokens_column,
        marks_column=marks_column,
        limit=limit,
        max_length=max_length,
        position=position,
        saliency_of=saliency_of,
        saliency_output=saliency_output,
        drop_special=drop_special,
        removal=removal,
        removal_texts=removal_texts,
        batch_tokens=batch_tokens,
        seed=seed,
        published=published,
        title=title,
    )
    start = time.monotonic()
    sources = [] if inputs is None else inputs_of(inputs, format)
    marked_sources = [] if rationales is None else inputs_of(rationales)
    with OutputFolder.opened(output, overwrite, _request(sources, marked_sources, model, overwrite, options)) as folder:
        evaluated = _measure(model, sources, marked_sources, options, progress)
        evaluated.seconds["in all"] = time.monotonic() - start
        results = _results(evaluated, options, model, sources, rationales)
        with folder.replacing() as part:
            _write(part, evaluated.measurements, results)
        return Evaluation(folder.folder, results)


@dataclass(frozen=True)
class _Evaluated:
    """What has been measured, of what, and in which time."""

    scorer: MethodScorer
    removal: str
    corpus: Corpus
    marked: list[Rationale]
    unmarked: int
    measurements: Measurements
    seconds: dict[str, float]


def _results(
    evaluated: _Evaluated, options: EvaluationOptions, model: Any, sources: list[Input], rationales: Any
) -> dict[str, Any]:
    """The content of results.json."""
    corpus, measurements, explainer = evaluated.corpus, evaluated.measurements, evaluated.scorer.explainer
    return {
        "title": options.title or "Do these attributions tell the truth?",
        **provenance(explainer, model.revision if isinstance(model, ModelSource) else None),
        "model_class": type(explainer.model).__name__,
        "model_layers": measurements.layers,
        "data": [source.name for source in sources],
        "rationales": str(rationales) if isinstance(rationales, str | Path) else rationales is not None,
        "settings": {
            "metrics": list(options.metrics),
            "methods": measurements.methods,
            "methods_left_out": measurements.left_out,
            "position": options.position if isinstance(options.position, str) else str(options.position),
            "saliency_of": options.saliency_of,
            "saliency_output": options.saliency_output,
            "special_tokens": not options.drop_special,
            "removal": evaluated.removal,
            "seed": options.seed,
            "limit": options.limit,
            "max_length": options.max_length,
            "device": str(explainer.device),
            "dtype": str(explainer.model.dtype).removeprefix("torch."),
        },
        "texts": {
            "read": len(corpus.examples),
            "rejected": len(corpus.rejects),
            "first_rejects": [str(reject) for reject in corpus.rejects[:10]],
            "truncated": corpus.truncated,
            "changed_for_faithfulness": len(measurements.removed),
            "with_rationales": len(evaluated.marked),
            "rationales_left_out": evaluated.unmarked,
            "accuracy": float(np.mean(measurements.right)) if measurements.right else None,
        },
        "seconds": {name: round(seconds, 2) for name, seconds in evaluated.seconds.items()},
        **summary(measurements, options.metrics),
        "published": options.published,
        "examples": measurements.examples,
    }


def _write(part: Path, measurements: Measurements, results: dict[str, Any]) -> None:
    """Write every file of an evaluation to a folder."""
    write_json(part / RESULTS, results)
    write_csv(part / ROWS, results)
    write_examples(part / EXAMPLES, measurements)
    write_figures(part / FIGURES, measurements, results)
    page.write_report(part / REPORT, part / FIGURES, results)


def _measure(
    model: Any, sources: list[Input], marked_sources: list[Input], options: EvaluationOptions, progress: bool
) -> _Evaluated:
    """Read the data, load the model and measure what the options ask for."""
    examples, rejects = read_examples(sources, options.columns, options.limit) if sources else ([], [])
    marked, unmarked = (
        read_rationales(marked_sources, options.tokens_column, options.marks_column)
        if "plausibility" in options.metrics
        else ([], 0)
    )
    with_labels = options.columns.label is not None
    explainer = GlobEnc.of(model)
    check_model(explainer, with_labels)
    methods, left_out = default_methods(explainer) if options.methods is None else ([*options.methods], {})
    scorer, removal = _scorer(explainer, methods, options), _removal(explainer, options.removal)
    layers = len(Encoder.of(explainer.model).layers)
    measurements = Measurements(list(scorer.methods), layers=layers, left_out=left_out)
    rng = np.random.default_rng(options.seed)
    seconds: dict[str, float] = {}
    with Steps(progress) as steps:
        corpus = Corpus()
        if sources:
            corpus = read_tokens(explainer, examples, rejects, options.max_length, with_labels)
        if set(options.metrics) & {"correlation", "faithfulness"}:
            sample: list[int] = []
            if "faithfulness" in options.metrics:
                sample = sorted(rng.permutation(len(corpus.examples))[: options.removal_texts].tolist())
            with _timed(seconds, "attribution and correlation"):
                whole_texts = correlate(scorer, corpus, sample, options, measurements, steps)
            if sample:
                with _timed(seconds, "faithfulness"):
                    remove_tokens(scorer, corpus, whole_texts, removal, rng, measurements, steps)
        if marked:
            with _timed(seconds, "plausibility"):
                compare_with_marks(scorer, marked, options.max_length, rng, measurements, steps)
    measurements.costs = scorer.costs.in_forward_passes()
    return _Evaluated(scorer, removal, corpus, marked, unmarked, measurements, seconds)


def _scorer(explainer: GlobEnc, methods: Sequence[str], options: EvaluationOptions) -> MethodScorer:
    return MethodScorer(
        explainer,
        methods,
        plain_position(options.position),
        options.saliency_output,
        options.batch_tokens or max(256, explainer.budget() // 8),
    )


def _removal(explainer: GlobEnc, removal: str) -> str:
    """How tokens are removed: "mask" or "delete"."""
    can_mask = explainer.tokenizer.mask_token_id is not None
    if removal == "mask" and not can_mask:
        raise ValueError("removal 'mask' needs a tokenizer with a mask token, and this one has none: take 'delete'")
    return removal if removal != "auto" else "mask" if can_mask else "delete"


def _request(
    sources: list[Input], marked_sources: list[Input], model: Any, overwrite: bool, options: EvaluationOptions
) -> str:
    """What tells one call from another, as JSON; of objects their types."""
    request = {
        "inputs": [source.name for source in sources],
        "rationales": [source.name for source in marked_sources],
        "model": dataclasses.asdict(model) if isinstance(model, ModelSource) else model,
        "overwrite": overwrite,
        **dataclasses.asdict(options),
    }
    kinds = (Path, torch.device, torch.dtype)
    return json.dumps(request, default=lambda value: str(value) if isinstance(value, kinds) else repr(type(value)))


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start
