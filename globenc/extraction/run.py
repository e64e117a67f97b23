"""`globenc.extract`: inputs and a model in, a folder of Parquet shards out."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..class_score_batches import PREDICTED, known_labels, require_labels
from ..errors import refuses_target, warn_caller
from ..explainer import GlobEnc
from ..loading import ModelSource, stored_dtype
from ..methods import get_method
from ..progress import Meter
from ..rollouts import Position, check_position, plain_position
from . import local
from .manifest import FORMAT, now
from .options import RunOptions, Settings
from .provenance import model_hash, provenance
from .rows import Plan, Reader
from .sources import Input, inputs_of
from .store import Store
from .worker import Worker

SHARD_ROWS = 2000
ENGINES = ("local", "ray")


@dataclass(frozen=True)
class ExtractSummary:
    """What an extraction did.

    Attributes:
        output: the folder.
        input_rows: rows of the input.
        rows: attributed ones.
        rejected: those that could not be; rejects.jsonl has the reasons.
        truncated: texts that were cut because the model takes no more.
        unknown: texts of which the tokenizer knows no token.
        tokens: of the attributed texts, special ones included.
        shards: Parquet files.
        resumed: rows of the input that were done by an earlier run.
        seconds: time of this run, without loading the model.
    """

    output: Path
    input_rows: int
    rows: int
    rejected: int
    truncated: int
    unknown: int
    tokens: int
    shards: int
    resumed: int
    seconds: float


@refuses_target
def extract(
    inputs: str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]] | Any,
    output: str | Path,
    *,
    model: str | Path | ModelSource | GlobEnc | None = None,
    text_column: str = "text",
    pair_column: str | None = None,
    id_column: str | None = None,
    label_column: str | None = None,
    format: str | None = None,
    limit: int | None = None,
    method: str = "N-Enc",
    position: Position = "cls",
    per_layer: bool = False,
    row_normalize: bool = False,
    max_length: int | None = None,
    words: bool = False,
    keep_text: bool = False,
    class_scores: bool = False,
    label: str | int = PREDICTED,
    reference: str = "zero",
    batch_tokens: int | None = None,
    shard_rows: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    engine: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> ExtractSummary:
    """Attribute every text of files or data sets, and write the results as Parquet shards.

    The folder can be interrupted at any moment: the same call goes on where the last finished shard ends, and every row
    of the input comes out exactly once, in the input's order, or is named in `rejects.jsonl`. Files of the folder that
    are lost, damaged or of another run are made again, with a warning.

    Args:
        inputs: JSONL, CSV, TSV, Parquet or plain text (a text a line), gzip of those, "-" for standard input,
            "hf://OWNER/DATASET?split=train" for a Hugging Face data set (with &name= and &revision=, or a folder
            instead of OWNER/DATASET); or from Python a data frame, an Arrow table, a column of texts (a Series, an
            array), or rows as mappings, such as a `datasets.Dataset`. Only the columns that are named are looked at.
        output: folder to write: data/part-*.parquet, manifest.json, rejects.jsonl.
        model: folder or hub name, a ModelSource where device, dtype, backend, revision or trust_remote_code are to be
            chosen too, or a GlobEnc; None is the model in the package.
        text_column, pair_column: columns of the text and of the second text of pairs. Plain text has one, "text".
        id_column: column to be kept as `id`; None numbers the rows from 0 over all inputs.
        label_column: column to be kept as `gold_label`. It and the id are passed through whatever they hold, as the
            narrowest of bool, int64, float64 and string that takes every value; null where a row has none.
        format: "jsonl", "csv", "tsv", "parquet" or "text"; None goes by the file's ending. Standard input is JSONL if
            its first line is a JSON object, else plain text.
        limit: rows to read.
        method, position, per_layer, row_normalize, max_length: as for `GlobEnc`; no weight tensor. `per_layer` adds
            `layer_scores`.
        words: add `words`, `word_scores` and `word_tokens` (how many each has), without special tokens.
        keep_text: add `text` (and `text_pair`).
        class_scores: add `class_scores`, `explained_label`, `logit` and `remainder`, see `globenc.class_scores`, and
            with `words` also `word_class_scores`.
        label, reference: of `class_scores`, as for `GlobEnc`; one label for all rows.
        batch_tokens: most tokens of a batch, padding included; None goes by the free memory. Halved when it runs out.
        shard_rows: rows of a shard, at most 100,000; fewer where texts are long. None is 2,000, and 100 for position
            "all".
        strict: stop at the first bad row instead of writing it to rejects.jsonl.
        overwrite: start anew where the folder holds an extraction.
        engine: "local", or "ray" for many GPUs or machines (`pip install "globenc[ray]"`).
        ray_address: of a running cluster; None starts Ray on this machine.
        workers: models at once with engine "ray"; None is one for each GPU, or one without GPUs.
        progress: show on standard error how far it is.

    Returns:
        Counts. `globenc.load_extract(output)` reads the rows.

    Raises:
        OSError: an input or the output cannot be used, or an input was written to while it was read; what is written
            stays, and the same call goes on.
        TypeError, ValueError: an option is wrong, an input lacks a column, the model is no supported encoder, the
            folder was begun with other options, another input or another model, or a row is bad and `strict` is set.
        Exception: what the tokenizer or the model raises at every text, such as FloatingPointError where none gives
            finite numbers; what it raises at one text alone is a reason to reject that row.

    Example:
        >>> import globenc, tempfile
        >>> rows = [{"text": "a charming journey"}, {"text": ""}, {"text": "unflinchingly bleak"}]
        >>> folder = tempfile.mkdtemp() + "/out"
        >>> summary = globenc.extract(rows, folder, progress=False)
        >>> summary.rows, summary.rejected, globenc.load_extract(folder)["label"].to_pylist()
        (2, 1, ['positive', 'negative'])
    """
    positive = {"limit": limit, "max_length": max_length, "batch_tokens": batch_tokens, "shard_rows": shard_rows}
    _check_positive({**positive, "workers": workers})
    if shard_rows is None:
        shard_rows = 100 if isinstance(position, str) and position == "all" else SHARD_ROWS
    options = RunOptions(
        method=get_method(method).name,
        position=_position(position),
        per_layer=per_layer,
        row_normalize=row_normalize,
        max_length=max_length,
        text_column=text_column,
        pair_column=pair_column,
        id_column=id_column,
        label_column=label_column,
        limit=limit,
        words=words,
        keep_text=keep_text,
        shard_rows=shard_rows,
        class_scores=class_scores,
        label=label,
        reference=reference,
    )
    if not class_scores and (label, reference) != (PREDICTED, "zero"):
        raise ValueError(f"{'reference' if label == PREDICTED else 'label'} goes with class_scores=True")
    execution = _Execution(engine, ray_address, workers, batch_tokens, strict, overwrite, progress)
    return _extract(inputs_of(inputs, format), Path(output), model, options, execution)


@dataclass(frozen=True)
class _Execution:
    """How a run goes, which no row depends on; the names are those of `extract`."""

    engine: str
    ray_address: str | None
    workers: int | None
    batch_tokens: int | None
    strict: bool
    overwrite: bool
    progress: bool

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}; got {self.engine!r}")
        if self.engine == "local" and (self.ray_address is not None or self.workers is not None):
            raise ValueError(f"{'workers' if self.ray_address is None else 'ray_address'} goes with engine 'ray'")


def _extract(
    sources: list[Input],
    output: Path,
    model: str | Path | ModelSource | GlobEnc | None,
    options: RunOptions,
    execution: _Execution,
) -> ExtractSummary:
    versions = [source.on_disk() for source in sources]
    for source in sources:
        source.check(options.columns.names())
    workers, gpus = 1, False
    loading = model if isinstance(model, ModelSource) else ModelSource(None if isinstance(model, GlobEnc) else model)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(Store.opened(output, execution.overwrite))
        if execution.engine == "ray":
            from . import on_ray

            if isinstance(model, GlobEnc):
                raise TypeError(
                    "model must be a name, a folder or a ModelSource with engine 'ray': every worker loads it"
                )
            workers, gpus = stack.enter_context(
                on_ray.cluster(execution.ray_address, execution.workers, loading.device)
            )
            loading = _looked_at(loading, gpus)
        explainer = model if isinstance(model, GlobEnc) else GlobEnc.from_pretrained(loading)
        if explainer.reads_images:
            raise ValueError("model must read texts for extract; this one reads images: call GlobEnc on them")
        options = _with_known_label(explainer, options)
        known = model_hash(explainer)
        run_options = {"model": known, **options.identity, "input": [_known(source) for source in sources]}
        earlier = None if execution.overwrite else store.made_by.get("batch_tokens")
        batch_tokens = execution.batch_tokens or earlier or (None if gpus else explainer.budget(options.class_scores))
        made_by = {**provenance(explainer, loading.revision), "batch_tokens": batch_tokens}
        settings = Settings(options, batch_tokens, execution.strict, json.dumps({**made_by, **run_options}))
        names = [source.name for source in sources]
        rest = {"inputs": names, "engine": execution.engine, "started": now()}
        store.begin(
            {"format": FORMAT, "complete": False, **made_by, "identity": run_options, **rest}, execution.overwrite
        )
        start, resumed = time.monotonic(), sum(last - first for first, last, *_ in store.done().values())
        with Meter(execution.progress) as meter:
            reader = Reader(sources, options.columns, options.shard_rows, options.limit, execution.strict)
            plan = Plan(reader, store.done(), meter.skip)
            if execution.engine == "ray":
                on_ray.run(plan, loading, known, settings, store, meter, workers, gpus)
            else:
                local.run(plan, Worker(explainer, settings, meter.advance), store, meter)
        counted = store.finish(plan.end_row)
        for source, version in zip(sources, versions, strict=True):
            if source.on_disk() != version:
                warn_caller(
                    f"input {source.name!r} was changed or replaced during the run: the output is of what was opened"
                )
        return ExtractSummary(store.folder, **counted, resumed=resumed, seconds=time.monotonic() - start)


def _check_positive(numbers: Mapping[str, int | None]) -> None:
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
            raise ValueError(f"{name} must be a positive whole number, got {number!r}")


def _position(position: Position) -> Position:
    """A position that holds for many texts, as plain numbers."""
    if isinstance(position, torch.Tensor):
        raise TypeError("position weights belong to one text: give positions or a name")
    check_position(position, n=2**31)
    return plain_position(position)


def _with_known_label(explainer: GlobEnc, options: RunOptions) -> RunOptions:
    """The same with the label's number, so that its name and its number are the same run.

    Raises:
        TypeError, ValueError: there is no such label, or the model has none.
    """
    if not options.class_scores:
        return options
    require_labels(explainer.model, options.position)
    asked = {"position": options.position, "reference": options.reference}
    if options.label is None:
        raise TypeError('label must be "predicted", a number or a name with class_scores=True, got None')
    return replace(options, label=known_labels(explainer.model, explainer.tokenizer, options.label, asked))


def _looked_at(source: ModelSource, gpus: bool) -> ModelSource:
    """The source of a model that only workers run: this process looks at it on the CPU, in the workers' dtype."""
    if gpus and source.dtype is None:
        source = replace(source, dtype=stored_dtype(source.name, source.revision, source.trust_remote_code))
    return replace(source, device="cpu")


def _known(source: Input) -> dict[str, Any]:
    """What is known of an input before it is read, but for a file's name: it may have been moved."""
    if source.format == "hub":
        return {"format": "hub", "name": source.name}
    return {"format": "text" if source.name == "-" else source.format, "bytes": source.size}
