"""`globenc.evaluate`: a model and its texts in, a folder with numbers, figures and a report out."""

from __future__ import annotations

import contextlib
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
from ..extraction.rows import Columns, Example
from ..extraction.sources import inputs_of
from ..metrics.gradients import OUTPUTS
from ..progress import Steps
from ..rollouts import Position, plain_position
from . import page
from .figures import write_figures
from .files import write_csv, write_examples, write_json
from .folder import EXAMPLES, FIGURES, REPORT, RESULTS, ROWS, OutputFolder
from .measure import compare_with_marks, correlate, remove_tokens
from .measurements import PAPER_ORDER, Measurements, summary
from .options import checked_methods, checked_metrics
from .rationales import read_rationales
from .scorer import MethodScorer
from .texts import check_model, gold_class, read_examples

REMOVAL_TEXTS = 200


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
        >>> import globenc, tempfile
        >>> rows = [{"text": "a charming journey"}, {"text": "unflinchingly bleak and desperate"}]
        >>> found = globenc.evaluate(rows, tempfile.mkdtemp() + "/out", progress=False)
        >>> found.results["texts"]["read"], found.report.name
        (2, 'report.html')
    """
    request = _request(**locals())
    start = time.monotonic()
    asked = checked_metrics(metrics, inputs is not None, rationales is not None)
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
    names = None if methods is None else checked_methods(methods)
    with OutputFolder.opened(output, overwrite, request) as folder:
        examples: list[Example] = []
        rejected: list[Any] = []
        if inputs is not None:
            columns = Columns(text_column, pair_column, id_column, label_column)
            examples, rejected = read_examples(inputs_of(inputs, format), columns, limit)
        marked, unmarked = (
            read_rationales(rationales, tokens_column, marks_column) if "plausibility" in asked else ([], 0)
        )
        explainer = (
            model
            if isinstance(model, GlobEnc)
            else GlobEnc.from_pretrained(
                model, device, dtype, backend, revision=revision, trust_remote_code=trust_remote_code
            )
        )
        check_model(explainer, label_column is not None)
        meaningful = Encoder.of(explainer.model).methods
        names = names or [name for name in PAPER_ORDER if name in meaningful]
        scorer = MethodScorer(
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
        found = Measurements(names)
        rng = np.random.default_rng(seed)
        timings: dict[str, float] = {}
        with Steps(progress) as steps:
            texts, encodings, empty = scorer.encoded(examples, max_length)
            truncated = sum(encoding.lost > 0 for encoding in encodings)
            rejected = [*rejected, *empty]
            if inputs is not None and not texts:
                raise ValueError(
                    f"there is no text to evaluate on: all {len(rejected)} rows are bad, the first because "
                    f"{rejected[0]}"
                    if rejected
                    else "there is no text to evaluate on: the input has no row"
                )
            golds = [gold_class(explainer.model, example) for example in texts] if label_column is not None else None
            if "correlation" in asked or "faithfulness" in asked:
                sample = sorted(rng.permutation(len(texts))[:removal_texts].tolist()) if "faithfulness" in asked else []
                chosen = golds if saliency_of == "gold" else None
                wanted = set(range(len(texts))) if "correlation" in asked else set(sample)
                with _timed(timings, "attribution and correlation"):
                    kept = correlate(
                        scorer, found, texts, encodings, wanted, set(sample), golds, chosen, drop_special, steps
                    )
                if "correlation" not in asked:
                    found.correlations = {}
                if sample:
                    with _timed(timings, "faithfulness"):
                        remove_tokens(scorer, found, encodings, kept, sample, removal, rng, steps)
            if marked:
                with _timed(timings, "plausibility"):
                    compare_with_marks(scorer, found, marked, max_length, rng, steps)
        means = summary(found, asked)
        timings["in all"] = time.monotonic() - start
        results: dict[str, Any] = {
            "title": title or "Do these attributions tell the truth?",
            **provenance(explainer, revision),
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
            **means,
            "published": published,
            "examples": found.examples,
        }
        with folder.replacing() as part:
            write_json(part / RESULTS, results)
            write_csv(part / ROWS, results)
            write_examples(part / EXAMPLES, found)
            write_figures(part / FIGURES, found, results)
            page.write_report(part / REPORT, part / FIGURES, found, results)
        return Evaluation(folder.folder, results)


def _request(inputs: Any, output: Any, rationales: Any, format: str | None, progress: bool, **options: Any) -> str:
    """What tells one call from another, as JSON; of objects their types."""
    data = None if inputs is None else [source.name for source in inputs_of(inputs, format)]
    marks = None if rationales is None else [source.name for source in inputs_of(rationales)]
    request = {"inputs": data, "rationales": marks, "format": format, **options}
    kinds = (Path, torch.device, torch.dtype)
    return json.dumps(request, default=lambda value: str(value) if isinstance(value, kinds) else repr(type(value)))


@contextlib.contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    timings[name] = time.monotonic() - start
