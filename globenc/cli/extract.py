"""`globenc extract`: texts of files and data sets to Parquet files of scores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .console import UsageError, errors_in_a_line, quiet, say, status, warnings_in_a_line
from .options import (
    ENGINE,
    INPUT,
    OUTPUT,
    QUESTION,
    Backend,
    BatchTokens,
    Device,
    Dtype,
    Format,
    IdColumn,
    Label,
    Limit,
    MaxLength,
    Method,
    Model,
    PairColumn,
    PerLayer,
    Position,
    Reference,
    Revision,
    RowNormalize,
    TextColumn,
    TrustRemoteCode,
    model_source,
    parse_position,
)

if TYPE_CHECKING:
    from ..extraction.run import ExtractSummary


def extract(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT...",
            help="JSONL, CSV, TSV, Parquet or plain text (a text a line), or gzip of those; - is standard input; "
            "hf://OWNER/DATASET?split=train is a Hugging Face data set, with &name= and &revision= too.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write: data/*.parquet, manifest.json.")
    ],
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    id_column: IdColumn = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=INPUT, help="Column kept as gold_label.")
    ] = None,
    format: Format = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=INPUT, help="Stop at the first bad row; see rejects.jsonl.")
    ] = False,
    method: Method = "N-Enc",
    position: Position = "cls",
    per_layer: PerLayer = False,
    row_normalize: RowNormalize = False,
    class_scores: Annotated[
        bool,
        typer.Option(
            "--class-scores",
            rich_help_panel=QUESTION,
            help="Also class_scores: how much each token speaks for a label or against it, in logits.",
        ),
    ] = False,
    label: Label = "predicted",
    reference: Reference = "zero",
    words: Annotated[
        bool,
        typer.Option(
            "--words", rich_help_panel=OUTPUT, help="Also words, word_scores, word_tokens; no special tokens."
        ),
    ] = False,
    keep_text: Annotated[bool, typer.Option("--keep-text", rich_help_panel=OUTPUT, help="Also the text.")] = False,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=OUTPUT,
            help="Rows of a file, which is also what a killed run may have to do again. Default: 2000.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Start anew where DIR holds an extraction.")
    ] = False,
    batch_tokens: BatchTokens = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(metavar="NAME", rich_help_panel=ENGINE, help="local, or ray for many GPUs or machines."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=ENGINE, help="Models at once, with ray. Default: one for each GPU."
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", rich_help_panel=ENGINE, help="A running cluster. Default: this machine."),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
) -> None:
    """Score every word of every text of a file or data set, and write the scores as Parquet files.

    Rows come out in the order of the input, each exactly once. Rows without a usable text are left out and listed in
    DIR/rejects.jsonl, with their numbers and the reasons. Whatever stops a run, the same command goes on from the last
    whole file.

    **Examples**

    - `globenc extract reviews.csv --text-column review --output attributions`

    - `globenc extract part-*.jsonl.gz -o out --words --label-column label`

    - `globenc extract reviews.csv -o out --text-column review --class-scores --words`

    - `globenc extract "hf://stanfordnlp/imdb?split=test" -o imdb -m ./my-model`
    """
    if not class_scores and (label, reference) != ("predicted", "zero"):
        raise UsageError(f"{'--reference' if label == 'predicted' else '--label'} goes with --class-scores")
    with errors_in_a_line(), warnings_in_a_line():
        with status("importing torch and transformers"):
            quiet()
            from ..extraction.run import extract as run
        source = model_source(model, device, dtype, backend, revision, trust_remote_code)
        with _report_interrupt(output, overwrite):
            summary = run(
                inputs,
                output,
                model=source,
                text_column="text" if text_column is None else text_column,
                pair_column=pair_column,
                id_column=id_column,
                label_column=label_column,
                format=format,
                limit=limit,
                method=method,
                position=parse_position(position),
                per_layer=per_layer,
                row_normalize=row_normalize,
                max_length=max_length,
                words=words,
                keep_text=keep_text,
                class_scores=class_scores,
                label=label,
                reference=reference,
                batch_tokens=batch_tokens,
                shard_rows=shard_rows,
                strict=strict,
                overwrite=overwrite,
                engine=engine,
                ray_address=ray_address,
                workers=workers,
            )
    _report(summary)


@contextlib.contextmanager
def _report_interrupt(output: Path, overwrite: bool) -> Iterator[None]:
    """An interrupted run says how many rows are done, and how to go on."""
    from ..extraction.shards import done_rows

    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        again = "the same command without --overwrite" if overwrite else "the same command"
        rows = done_rows(output)
        say("interrupted", f"{rows:,} rows of the input are done in {str(output)!r}; {again} goes on from there")
        raise


def _report(summary: ExtractSummary) -> None:
    """An extraction's counts on standard error; what it wrote is for programs."""
    new = summary.input_rows - summary.resumed
    speed = f" in {summary.seconds:,.1f} s, {new / summary.seconds:,.0f} rows/s" if new else ", all done before"
    before = f" ({summary.resumed:,} done before)" if summary.resumed and new else ""
    say("wrote", f"{summary.output}: {summary.rows:,} of {summary.input_rows:,} rows{before}{speed}")
    for count, what in (
        (summary.rejected, "rows were rejected: rejects.jsonl has the reasons"),
        (summary.truncated, "texts were longer than the model takes, and cut"),
        (summary.unknown, "texts have no word that the tokenizer knows: is it this model's?"),
    ):
        if count:
            say("warning", f"{count:,} {what}")
