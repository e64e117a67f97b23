"""`globenc evaluate`: attribution methods measured on texts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table
from rich.text import Text

from ..printing import printable
from ..render.console import Console
from .console import UsageError, errors_in_a_line, quiet, say, status, warnings_in_a_line
from .options import (
    INPUT,
    OUTPUT,
    QUESTION,
    Backend,
    BatchTokens,
    Device,
    Dtype,
    Format,
    IdColumn,
    Limit,
    MaxLength,
    Model,
    PairColumn,
    Position,
    Revision,
    TextColumn,
    TrustRemoteCode,
    model_source,
    names,
    parse_position,
)

if TYPE_CHECKING:
    from ..evaluation.run import Evaluation


def evaluate(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA...",
            show_default=False,
            help="Texts, as for globenc extract: JSONL, CSV, TSV, Parquet, plain text, gzip of those, - or hf://...",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            show_default=False,
            help="Folder to write: report.html, results.json, results.csv, examples.parquet, figures/. Needed.",
        ),
    ] = None,
    rationales: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", rich_help_panel=INPUT, help="Texts with words that people marked, for plausibility."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=INPUT,
            help="The paper's checkpoint and data from the hub: paper-sst2, paper-mnli, paper-hatexplain, also with "
            "-large or -electra. DATA and --model replace them.",
        ),
    ] = None,
    text_column: TextColumn = None,
    pair_column: PairColumn = None,
    id_column: IdColumn = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=INPUT, help="Column of the gold label, for accuracy.")
    ] = None,
    tokens_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=INPUT, help="Of the rationales: the words. Default: tokens."),
    ] = None,
    marks_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=INPUT,
            help="Of the rationales: a mark from 0 to 1 for each word. Default: rationale or rationale_mean.",
        ),
    ] = None,
    format: Format = None,
    limit: Limit = None,
    max_length: MaxLength = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=QUESTION,
            help="Separated by commas: of the eight, class-scores, class-scores-model, class-scores-origin, "
            "gradient-x-input, and of these, which take long: W-Flow, HTA, HTA-Input, integrated-gradients-zero, "
            "integrated-gradients-mask, occlusion. Default: all that do not take long.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=QUESTION,
            help="Separated by commas: correlation, faithfulness, plausibility. Default: all there is data for.",
        ),
    ] = None,
    position: Position = "cls",
    saliency_of: Annotated[
        Literal["predicted", "gold"],
        typer.Option(metavar="WHICH", rich_help_panel=QUESTION, help="Class of the saliency: predicted, or gold."),
    ] = "predicted",
    saliency_output: Annotated[
        Literal["logit", "probability"],
        typer.Option(metavar="WHICH", rich_help_panel=QUESTION, help="What is derived: logit or probability."),
    ] = "logit",
    drop_special: Annotated[
        bool,
        typer.Option(
            "--drop-special",
            rich_help_panel=QUESTION,
            help="Correlation without special tokens; the paper keeps them.",
        ),
    ] = False,
    removal: Annotated[
        Literal["auto", "mask", "delete"],
        typer.Option(
            metavar="HOW",
            rich_help_panel=QUESTION,
            help="Faithfulness: mask tokens or delete them. auto masks where the tokenizer can.",
        ),
    ] = "auto",
    removal_texts: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=QUESTION,
            help="How many texts faithfulness changes.",
        ),
    ] = 200,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=QUESTION, help="Of random scores and chosen texts.")
    ] = 0,
    published: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", rich_help_panel=OUTPUT, help="With --preset: JSON of numbers to stand beside these."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace the evaluation that DIR holds.")
    ] = False,
    batch_tokens: BatchTokens = None,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
) -> None:
    """Hold attribution methods against saliency, against removed tokens and against people's marks, on your texts.

    The paper's evaluation, rank correlation with gradient saliency over the layers, and the measures of its critics:
    AOPC, comprehensiveness, sufficiency and agreement with human rationales. The report is one web page that explains
    itself.

    **Examples**

    - `globenc evaluate reviews.csv --text-column review -o evaluation`

    - `globenc evaluate dev.jsonl -o out -m ./my-model --rationales marked.jsonl`

    - `globenc evaluate --preset paper-sst2 -o sst2`
    """
    if output is None:
        raise UsageError("--output DIR is needed: the folder for the report")
    if not inputs and preset is None and rationales is None:
        raise UsageError("DATA is needed: files of texts, as for globenc extract")
    if preset is None and published is not None:
        raise UsageError("--published goes with --preset")
    columns = _columns_of(preset, rationales, text_column, pair_column, label_column, tokens_column, marks_column)
    with errors_in_a_line(), warnings_in_a_line():
        with status("importing torch and transformers"):
            quiet()
            from ..evaluation.presets import evaluate_preset
            from ..evaluation.run import evaluate as run
        source = model_source(model, device, dtype, backend, revision, trust_remote_code)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        options: dict[str, Any] = {
            "model": source,
            "methods": names(methods),
            "metrics": names(metrics),
            "limit": limit,
            "seed": seed,
            "id_column": id_column,
            "format": format,
            "max_length": max_length,
            "position": parse_position(position),
            "saliency_of": saliency_of,
            "saliency_output": saliency_output,
            "drop_special": drop_special,
            "removal": removal,
            "removal_texts": removal_texts,
            "batch_tokens": batch_tokens,
            "overwrite": overwrite,
        }
        if preset is not None:
            evaluation = evaluate_preset(preset, output, inputs=inputs or None, published=published, **options)
        else:
            evaluation = run(inputs or None, output, rationales=rationales, **options | columns)
        _print_tables(evaluation)
        _warn(evaluation, preset)
        say("wrote", str(evaluation.report))


def _columns_of(
    preset: str | None,
    rationales: str | None,
    text_column: str | None,
    pair_column: str | None,
    label_column: str | None,
    tokens_column: str | None,
    marks_column: str | None,
) -> dict[str, str]:
    """The columns that were named, by their option. A preset knows its data: it takes no columns and no rationales."""
    columns = {
        "text_column": text_column,
        "pair_column": pair_column,
        "label_column": label_column,
        "tokens_column": tokens_column,
        "marks_column": marks_column,
    }
    given = {option: column for option, column in columns.items() if column is not None}
    if preset is not None and (given or rationales is not None):
        option = next(iter(given), "rationales").replace("_", "-")
        raise UsageError(f"--{option} does not go with --preset, which knows its data")
    return given


def _print_tables(evaluation: Evaluation) -> None:
    """The main tables on standard output, and remarks on the published numbers in them."""
    from ..evaluation.tables import published_notes, tables

    console = Console()
    for title, head, rows in tables(evaluation.results):
        table = Table(
            box=None, pad_edge=False, header_style="dim", title=title, title_justify="left", title_style="bold"
        )
        for column, name in enumerate(head):
            table.add_column(name, justify="right" if column else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        console.print()
    notes = published_notes(evaluation.results) if "correlation" in evaluation.results else []
    for k, note in enumerate(notes):
        console.print(Text(f"{'- ' if k else ''}{printable(note)}", "dim"))
    if notes:
        console.print()


def _warn(evaluation: Evaluation, preset: str | None) -> None:
    """What is missing in an evaluation: published numbers, and rows that were left out or cut."""
    texts = evaluation.results["texts"]
    if preset is not None and evaluation.results["published"] is None:
        say("warning", "no published numbers of this preset are there to stand beside these: see --published")
    for name, reason in evaluation.results["settings"]["methods_left_out"].items():
        say("warning", f"{name} was left out: {reason}")
    for count, what in (
        (texts["rejected"], "rows were left out: results.json names the first"),
        (texts["truncated"], "texts were longer than the model takes, and cut"),
        (texts["rationales_left_out"], "rows of the rationales have no marks that can be used"),
    ):
        if count:
            say("warning", f"{count:,} {what}")
