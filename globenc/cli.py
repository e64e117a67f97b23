"""The command line: `globenc attribute`, `globenc extract`, `globenc evaluate` and `globenc models`.

Torch and transformers are imported where they are used, so that --help and --version answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer
from rich.table import Table
from rich.text import Text

from ._version import __version__
from .methods import METHODS, get_method
from .printing import escaped, printable, readable_streams, say
from .render.console import Console

if TYPE_CHECKING:
    from .attribution import Attribution
    from .evaluate import Evaluation
    from .explainer import GlobEnc
    from .extraction.run import ExtractSummary
    from .pictures import PictureAttribution

FAILED, USAGE, INTERRUPTED, TERMINATED = 1, 2, 130, 143
# panels of --help
_INPUT, _QUESTION, _OUTPUT, _MODEL, _ENGINE = "What is read", "What is asked", "What comes out", "Model", "How it runs"
_PACKAGE = str(Path(__file__).parent)
# what typer raises for every wrong use; it has no public name of its own
_UsageError: type[Any] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    name="globenc",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 (failed), 2 (wrong usage), 130 (interrupted).

    Args:
        arguments: instead of sys.argv[1:].
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that half-written files go away
    with readable_streams():
        sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    """The exit code of a command."""
    try:
        if sys.stdout is None:
            raise _UsageError("standard output is closed: there is nowhere to print to")
        code: int = typer.main.get_command(app).main(arguments, prog_name="globenc", standalone_mode=False)
        sys.stdout.flush()
        return code
    except _UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "globenc"
        message = error.format_message().replace("Value error, ", "").rstrip(".")
        _say("error", f"{message} (see {command} --help)")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has seen enough; nothing is left to flush into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"globenc {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Which words of a text did a transformer encoder's answer come from?

    globenc runs your classifier (or any other encoder that it knows) once and follows every word's contribution
    through attention, residual connections and LayerNorms of all layers, exactly, by the method GlobEnc.

    **Start here**

    - `globenc attribute "a charming and often affecting journey"`

    - `globenc extract reviews.csv --output attributions`

    - `globenc evaluate reviews.csv --output evaluation`
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


def _method(name: str) -> str:
    try:
        return get_method(name).name
    except ValueError as error:
        raise _UsageError(str(error)) from None


def _position_option(written: str) -> str:
    _parse_position(written)
    return written


def _parse_position(written: str) -> str | int | list[int]:
    """--position as `globenc.attribute` takes it."""
    if written in ("cls", "mean", "all"):
        return written
    try:
        positions = [int(position) for position in written.split(",")]
    except ValueError:
        raise _UsageError(
            f"position must be cls, mean, all, a token position or positions separated by commas; got {written!r}"
        ) from None
    return positions if "," in written else positions[0]


# options that several commands have
_Method = Annotated[
    str, typer.Option(metavar="NAME", callback=_method, rich_help_panel=_QUESTION, help=f"{', '.join(METHODS)}.")
]
_Position = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        callback=_position_option,
        rich_help_panel=_QUESTION,
        help="What is traced back: cls (the first token, which most classifiers read), mean (of all tokens), all, a "
        "token position such as 3 or -2, or several: 0,3,-2.",
    ),
]
_RowNormalize = Annotated[
    bool,
    typer.Option(
        "--row-normalize",
        rich_help_panel=_QUESTION,
        help="Divide the rows of every layer by their sums; the paper does not.",
    ),
]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        rich_help_panel=_MODEL,
        help="Folder or Hugging Face name, weights as safetensors. Default: the sentiment model in the package.",
    ),
]
_Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=_MODEL, help="Branch, tag or commit of a Hugging Face model."),
]
_TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=_MODEL, help="Allow code that comes with the model to run."),
]
_Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=_MODEL, help="cpu, cuda, cuda:1. Default: a GPU if there is one."),
]
_Dtype = Annotated[
    Literal["float64", "float32", "bfloat16", "float16"] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="float64, float32, bfloat16, float16. Default: as stored; on a CPU at least float32.",
    ),
]
_Backend = Annotated[
    Literal["auto", "reference", "torch", "triton"],
    typer.Option(
        metavar="NAME",
        rich_help_panel=_MODEL,
        help="auto, torch, triton, or reference: the paper's equations as they stand, slow.",
    ),
]


@app.command()
def attribute(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="The text, in quotes. One that begins with - comes after --"),
    ] = None,
    file: Annotated[
        str | None, typer.Option("--file", "-f", metavar="FILE", help="Read the text from a UTF-8 file; - is stdin.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A picture instead of a text, for vision encoders.")
    ] = None,
    pair: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Second text, for models that read pairs, such as NLI.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Read at most N tokens. Default: what the model takes.")
    ] = None,
    method: _Method = "N-Enc",
    position: _Position = "cls",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", rich_help_panel=_QUESTION, help="Also the scores up to every layer.")
    ] = False,
    row_normalize: _RowNormalize = False,
    top: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=_OUTPUT, help="How many words the printed table has.")
    ] = 15,
    as_json: Annotated[
        bool,
        typer.Option("--json", rich_help_panel=_OUTPUT, help="Print everything as one JSON object, and nothing else."),
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_OUTPUT, help="Also write a web page, complete in one file."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=_OUTPUT, help="Also draw a picture: .png, .pdf, .svg."),
    ] = None,
    model: _Model = None,
    revision: _Revision = None,
    trust_remote_code: _TrustRemoteCode = False,
    device: _Device = None,
    dtype: _Dtype = None,
    backend: _Backend = "auto",
) -> None:
    """Score every word of a text by its share in the model's answer.

    The model reads the text once. A word's score is the share of the attribution that flows from it through all layers
    to the position asked for: normally the first token, [CLS], from which most classifiers read their answer. All
    scores, those of the special tokens included, add up to 100%. They say how much a word went into the answer, not
    whether it spoke for or against it.

    **Examples**

    - `globenc attribute "a charming and often affecting journey"`

    - `globenc attribute "He slept." --pair "He was awake." -m ./nli-model`

    - `globenc attribute -f review.txt --per-layer --html review.html --plot r.png`

    - `globenc attribute "not bad at all" --position=-2 --json`

    - `globenc attribute --image cat.jpg -m google/vit-base-patch16-224 --plot c.png`
    """
    if image is not None and (text or file is not None or pair is not None or max_length is not None):
        raise _UsageError("--image goes alone: without TEXT, --file, --pair and --max-length")
    written = _read_text(text, file) if image is None else ""
    second = None if pair is None else _checked_text("--pair", pair)
    if html is not None and plot is not None and os.path.realpath(html) == os.path.realpath(plot):
        raise _UsageError("--html and --plot are the same file")
    with _errors(), _warnings(), contextlib.ExitStack() as outputs:
        picture = None if plot is None else outputs.enter_context(_replacing(_picture(plot)))
        web_page = None if html is None else outputs.enter_context(_replacing(html))
        explainer = _load(model, device, dtype, backend, revision, trust_remote_code)
        if (image is not None) != explainer.reads_pictures:
            reads, instead = (
                ("pictures", "--image FILE") if explainer.reads_pictures else ("texts", "TEXT or --file FILE")
            )
            raise _UsageError(f"this model reads {reads}: give {instead}")
        with _status("reading the text" if image is None else "looking at the picture"):
            result = explainer(
                written if image is None else image,
                second,
                method=method,
                position=_parse_position(position),
                per_layer=per_layer,
                row_normalize=row_normalize,
                max_length=max_length,
            )
        if picture is not None:
            with _status("drawing"):
                logging.getLogger("matplotlib").setLevel(logging.ERROR)
                result.plot(picture)
        if web_page is not None:
            result.save_html(web_page)
        _print(result, as_json, top)
    for path in (html, plot):
        if path is not None:
            _say("wrote", str(path))


@app.command()
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
    text_column: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Column of the text. Plain text has text.")
    ] = "text",
    pair_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Column of the second text of pairs.")
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=_INPUT, help="Column kept as id. Default: the row's number, from 0."
        ),
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Column kept as gold_label.")
    ] = None,
    format: Annotated[
        Literal["jsonl", "csv", "tsv", "parquet", "text"] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_INPUT,
            help="jsonl, csv, tsv, parquet, text. Default: by the file's ending; - is looked at.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_INPUT, help="Read the first N rows.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=_INPUT, help="Read N tokens of a text. Default: what the model takes."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", rich_help_panel=_INPUT, help="Stop at the first bad row; see rejects.jsonl.")
    ] = False,
    method: _Method = "N-Enc",
    position: _Position = "cls",
    per_layer: Annotated[
        bool, typer.Option("--per-layer", rich_help_panel=_QUESTION, help="Also layer_scores: up to every layer.")
    ] = False,
    row_normalize: _RowNormalize = False,
    words: Annotated[
        bool,
        typer.Option(
            "--words", rich_help_panel=_OUTPUT, help="Also words, word_scores, word_tokens; no special tokens."
        ),
    ] = False,
    keep_text: Annotated[bool, typer.Option("--keep-text", rich_help_panel=_OUTPUT, help="Also the text.")] = False,
    shard_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_OUTPUT,
            help="Rows of a file, which is also what a killed run may have to do again. Default: 2000.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_OUTPUT, help="Start anew where DIR holds an extraction.")
    ] = False,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_ENGINE,
            help="Most tokens at once, padding included. Default: by the free memory.",
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option(metavar="NAME", rich_help_panel=_ENGINE, help="local, or ray for many GPUs or machines."),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", rich_help_panel=_ENGINE, help="Models at once, with ray. Default: one for each GPU."
        ),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", rich_help_panel=_ENGINE, help="A running cluster. Default: this machine."),
    ] = None,
    model: _Model = None,
    revision: _Revision = None,
    trust_remote_code: _TrustRemoteCode = False,
    device: _Device = None,
    dtype: _Dtype = None,
    backend: _Backend = "auto",
) -> None:
    """Score every word of every text of a file or data set, and write the scores as Parquet files.

    Rows come out in the order of the input, each exactly once. Rows without a usable text are left out and listed in
    DIR/rejects.jsonl, with their numbers and the reasons. Whatever stops a run, the same command goes on from the last
    whole file.

    **Examples**

    - `globenc extract reviews.csv --text-column review --output attributions`

    - `globenc extract part-*.jsonl.gz -o out --words --label-column label`

    - `globenc extract "hf://stanfordnlp/imdb?split=test" -o imdb -m ./my-model`
    """
    with _errors(), _warnings():
        with _status("importing torch and transformers"):
            _quiet()
            from .extraction.run import extract as run
            from .extraction.store import done_rows
        if device is not None:
            _check_device(device)
        try:
            summary = run(
                inputs,
                output,
                model=model,
                text_column=text_column,
                pair_column=pair_column,
                id_column=id_column,
                label_column=label_column,
                format=format,
                limit=limit,
                method=method,
                position=_parse_position(position),
                per_layer=per_layer,
                row_normalize=row_normalize,
                max_length=max_length,
                words=words,
                keep_text=keep_text,
                batch_tokens=batch_tokens,
                shard_rows=shard_rows,
                strict=strict,
                overwrite=overwrite,
                engine=engine,
                ray_address=ray_address,
                workers=workers,
                device=device,
                dtype=dtype,
                backend=backend,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        except (KeyboardInterrupt, SystemExit):
            again = "the same command without --overwrite" if overwrite else "the same command"
            rows = done_rows(output)
            _say("interrupted", f"{rows:,} rows of the input are done in {str(output)!r}; {again} goes on from there")
            raise
    _report(summary)


@app.command()
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
            metavar="FILE", rich_help_panel=_INPUT, help="Texts with words that people marked, for plausibility."
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_INPUT,
            help="The paper's checkpoint and data from the hub: paper-sst2, paper-mnli, paper-hatexplain, also with "
            "-large or -electra. DATA and --model replace them.",
        ),
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Column of the text. Default: text.")
    ] = None,
    pair_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Column of the second text of pairs.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Column that names a text.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Column of the gold label, for accuracy.")
    ] = None,
    tokens_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="Of the rationales: the words. Default: tokens."),
    ] = None,
    marks_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=_INPUT,
            help="Of the rationales: a mark from 0 to 1 for each word. Default: rationale or rationale_mean.",
        ),
    ] = None,
    format: Annotated[
        Literal["jsonl", "csv", "tsv", "parquet", "text"] | None,
        typer.Option(metavar="NAME", rich_help_panel=_INPUT, help="jsonl, csv, tsv, parquet, text."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_INPUT, help="Read the first N rows.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_INPUT, help="Read N tokens of a text.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=_QUESTION,
            help="Separated by commas: of the eight, and W-Flow, HTA, HTA-Input, which take long. Default: the eight.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=_QUESTION,
            help="Separated by commas: correlation, faithfulness, plausibility. Default: all there is data for.",
        ),
    ] = None,
    position: _Position = "cls",
    saliency_of: Annotated[
        Literal["predicted", "gold"],
        typer.Option(metavar="WHICH", rich_help_panel=_QUESTION, help="Class of the saliency: predicted, or gold."),
    ] = "predicted",
    saliency_output: Annotated[
        Literal["logit", "probability"],
        typer.Option(metavar="WHICH", rich_help_panel=_QUESTION, help="What is derived: logit or probability."),
    ] = "logit",
    drop_special: Annotated[
        bool,
        typer.Option(
            "--drop-special",
            rich_help_panel=_QUESTION,
            help="Correlation without special tokens; the paper keeps them.",
        ),
    ] = False,
    removal: Annotated[
        Literal["auto", "mask", "delete"],
        typer.Option(
            metavar="HOW",
            rich_help_panel=_QUESTION,
            help="Faithfulness: mask tokens or delete them. auto masks where the tokenizer can.",
        ),
    ] = "auto",
    removal_texts: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=_QUESTION,
            help="How many texts faithfulness changes.",
        ),
    ] = 200,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", rich_help_panel=_QUESTION, help="Of random scores and chosen texts.")
    ] = 0,
    published: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", rich_help_panel=_OUTPUT, help="With --preset: JSON of numbers to stand beside these."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_OUTPUT, help="Replace the evaluation that DIR holds.")
    ] = False,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=_ENGINE, help="Most tokens at once, with padding.")
    ] = None,
    model: _Model = None,
    revision: _Revision = None,
    trust_remote_code: _TrustRemoteCode = False,
    device: _Device = None,
    dtype: _Dtype = None,
    backend: _Backend = "auto",
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
        raise _UsageError("--output DIR is needed: the folder for the report")
    if not inputs and preset is None and rationales is None:
        raise _UsageError("DATA is needed: files of texts, as for globenc extract")
    if preset is None and published is not None:
        raise _UsageError("--published goes with --preset")
    columns = {"text_column": text_column, "pair_column": pair_column, "label_column": label_column}
    columns |= {"tokens_column": tokens_column, "marks_column": marks_column}
    given = {name: column for name, column in columns.items() if column is not None}
    if preset is not None and (given or rationales is not None):
        name = next(iter(given), "rationales").replace("_", "-")
        raise _UsageError(f"--{name} does not go with --preset, which knows its data")
    with _errors(), _warnings():
        with _status("importing torch and transformers"):
            _quiet()
            from .evaluate import evaluate as run
            from .evaluate import evaluate_preset
        if device is not None:
            _check_device(device)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        options: dict[str, Any] = {
            "model": model,
            "methods": _names(methods),
            "metrics": _names(metrics),
            "limit": limit,
            "seed": seed,
            "id_column": id_column,
            "format": format,
            "max_length": max_length,
            "position": _parse_position(position),
            "saliency_of": saliency_of,
            "saliency_output": saliency_output,
            "drop_special": drop_special,
            "removal": removal,
            "removal_texts": removal_texts,
            "batch_tokens": batch_tokens,
            "overwrite": overwrite,
            "device": device,
            "dtype": dtype,
            "backend": backend,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        if preset is not None:
            found = evaluate_preset(preset, output, inputs=inputs or None, published=published, **options)
        else:
            found = run(inputs or None, output, rationales=rationales, **options | given)
        _show_evaluation(found, preset)


def _names(written: str | None) -> list[str] | None:
    """Names separated by commas."""
    return None if written is None else [name.strip() for name in written.split(",") if name.strip()]


def _show_evaluation(found: Evaluation, preset: str | None) -> None:
    """The main tables on standard output, and where the rest is."""
    from .evaluate.report import published_notes, tables

    console = Console()
    for title, head, rows in tables(found.results):
        table = Table(
            box=None, pad_edge=False, header_style="dim", title=title, title_justify="left", title_style="bold"
        )
        for column, name in enumerate(head):
            table.add_column(name, justify="right" if column else "left", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        console.print()
    notes = published_notes(found.results) if "correlation" in found.results else []
    for k, note in enumerate(notes):
        console.print(Text(f"{'- ' if k else ''}{printable(note)}", "dim"))
    if notes:
        console.print()
    texts = found.results["texts"]
    if preset is not None and found.results["published"] is None:
        _say("warning", "no published numbers of this preset are there to stand beside these: see --published")
    for count, what in (
        (texts["rejected"], "rows were left out: results.json names the first"),
        (texts["truncated"], "texts were longer than the model takes, and cut"),
        (texts["rationales_left_out"], "rows of the rationales have no marks that can be used"),
    ):
        if count:
            _say("warning", f"{count:,} {what}")
    _say("wrote", str(found.report))


@app.command()
def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead, and nothing else.")] = False,
) -> None:
    """Show which models globenc can take, and the one that it brings.

    Any checkpoint of these families works unmodified, with any head (classification, tagging, question answering,
    masked words, none), from a folder or from the Hugging Face hub. Other encoders can be taught in one call in Python:
    `globenc.register_encoder`.

    **Examples**

    - `globenc models`

    - `globenc models --json`
    """
    with _errors(), _warnings():
        with _status("importing torch and transformers"):
            from .encoders import describe, supported_encoders
        families = [describe(family) for family in supported_encoders()]
        default = _default_model()
        if as_json:
            _print_json(json.dumps({"families": families, "default": default}, ensure_ascii=False))
            return
        console = Console()
        table = Table(box=None, pad_edge=False, header_style="dim")
        columns = ["family", "for example", "layers", "kernels", "longest text", "notes"]
        if console.width < 110:
            columns.remove("notes")
        for column in columns:
            table.add_column(column, overflow="fold", no_wrap=column not in ("for example", "notes"))
        for family in families:
            rule = family["longest_text"].replace("max_position_embeddings", "positions").replace("_token_id", " id")
            cells = [family["family"], family["examples"], family["layers"], family["kernels"], rule, family["notes"]]
            table.add_row(*map(printable, cells[: len(columns)]))
        console.print(table)
        console.print()
        console.print(
            "Longest text, in tokens: positions is max_position_embeddings in the model's config, pad id its "
            "pad_token_id. What is longer is cut off, with a warning; where any length runs, --max-length goes on. "
            "Kernels: whether backend triton takes them. Pre-LN: N-ResLN has no meaning there, and N-Enc is N-Res."
        )
        more = "; ".join(f"{family['family']}: {family['tested']}" for family in families if family["tested"])
        console.print()
        console.print(
            "Tested, every family: a tiny random configuration in float64 and float32, alone and in padded batches, "
            f"against the paper's equations. Beyond that, {more}."
        )
        console.print()
        console.print(Text.assemble("without --model: ", (default["name"], "bold"), f". {default['about']}"))


def _report(summary: ExtractSummary) -> None:
    """An extraction's counts on standard error; what it wrote is for programs."""
    new = summary.input_rows - summary.resumed
    speed = f" in {summary.seconds:,.1f} s, {new / summary.seconds:,.0f} rows/s" if new else ", all done before"
    before = f" ({summary.resumed:,} done before)" if summary.resumed and new else ""
    _say("wrote", f"{summary.output}: {summary.rows:,} of {summary.input_rows:,} rows{before}{speed}")
    for count, what in (
        (summary.rejected, "rows were rejected: rejects.jsonl has the reasons"),
        (summary.truncated, "texts were longer than the model takes, and cut"),
        (summary.unknown, "texts have no word that the tokenizer knows: is it this model's?"),
    ):
        if count:
            _say("warning", f"{count:,} {what}")


def _default_model() -> dict[str, str]:
    """Name of the embedded model and what its card says first."""
    from .loading import DEFAULT_MODEL, DEFAULT_NAME

    card = (DEFAULT_MODEL / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    paragraphs = [part for part in re.split(r"\n\s*\n", body) if part.strip() and not part.lstrip().startswith("#")]
    about = " ".join(paragraphs[0].replace("`", "").split())
    accuracy = re.search(r"^\| this model \| ([\d.]+%) \|", card, flags=re.MULTILINE)
    if accuracy is not None:
        about += f" Accuracy on the 872 validation sentences of SST-2: {accuracy[1]}."
    return {"name": DEFAULT_NAME, "path": str(DEFAULT_MODEL), "about": about}


def _read_text(text: list[str] | None, file: str | None) -> str:
    if file is not None:
        if text:
            raise _UsageError("give TEXT or --file, not both")
        return _checked_text("--file", _read_file(file))
    if not text:
        raise _UsageError('give the text in quotes, such as globenc attribute "not bad at all", or --file FILE')
    if len(text) > 1:
        raise _UsageError(f"TEXT must be one argument, got {len(text)}: put the text in quotes")
    return _checked_text("TEXT", text[0])


def _read_file(file: str) -> str:
    with _errors():
        try:
            if file == "-" and sys.stdin is None:
                raise OSError(errno.EBADF, "standard input is closed")
            content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            return content.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"file {file!r} is not UTF-8 text: byte {error.start} is none of it") from None
        except OSError as error:
            raise OSError(f"file {file!r} cannot be read: {error.strerror}") from None


def _checked_text(where: str, text: str) -> str:
    if not text.strip():
        raise _UsageError(f"{where} is empty: there is no word to score")
    if any("\ud800" <= character <= "\udfff" for character in text):
        try:
            return os.fsencode(text).decode()  # an argument, taken to pieces by a locale that is not UTF-8
        except UnicodeError:
            raise _UsageError(f"{where} is not valid UTF-8") from None
    return text


def _picture(path: Path) -> Path:
    from .render.figure import check_ending

    try:
        check_ending(path)
    except ValueError as error:
        raise _UsageError(str(error)) from None
    return path


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` at the end, or goes away if anything fails.

    It is made at once: a place that cannot be written to is known before the model runs.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {str(path)!r}: it is not a regular file")
    part = path.with_name(f".{path.stem[:100]}.{os.getpid()}{path.suffix}")
    try:
        part.open("xb").close()
    except OSError as error:
        raise OSError(f"cannot write {str(path)!r}: {error.strerror}") from None
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _load(
    model: str | None,
    device: str | None,
    dtype: str | None,
    backend: str,
    revision: str | None,
    trust_remote_code: bool,
) -> GlobEnc:
    with _status(f"loading {model or 'the default model'}"):
        _quiet()
        from .explainer import GlobEnc

        if device is not None:
            _check_device(device)
        return GlobEnc.from_pretrained(
            model, device, dtype, backend, revision=revision, trust_remote_code=trust_remote_code
        )


def _quiet() -> None:
    """Other packages' progress bars and remarks are not for the user of a command."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _check_device(device: str) -> None:
    import torch

    try:
        place = torch.device(device)
    except RuntimeError:
        raise _UsageError(f"unknown device {device!r}: use cpu, cuda or cuda:0") from None
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RuntimeError(f"no device {device!r} here: {_first_line(error)}") from None


def _print(result: Attribution | PictureAttribution, as_json: bool, top: int) -> None:
    from .pictures import PictureAttribution

    if as_json:
        _print_json(result.to_json())
        return
    if isinstance(result, PictureAttribution):
        from .render.picture import show as show_picture

        show_picture(result, Console(), top)
        return
    from .render.terminal import show

    show(result, Console(), top)


def _print_json(line: str) -> None:
    """JSON is UTF-8 whatever the terminal is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(f"{escaped(line)}\n".encode())
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    """What can be foreseen to go wrong as one sentence and exit code 1."""
    try:
        yield
    except (BrokenPipeError, _UsageError):
        raise
    except MemoryError:
        _say("error", "out of memory: try a shorter --max-length")
        raise typer.Exit(FAILED) from None
    except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        _say("error", _sentence(error))
        raise typer.Exit(FAILED) from None


def _sentence(error: Exception) -> str:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory on the GPU: try --device cpu, a shorter --max-length or --dtype float16"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _warnings() -> Iterator[None]:
    """globenc's own warnings as one line each; those of other packages are not for the user of a command."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if filename.startswith(_PACKAGE):
            _say("warning", str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        yield


@contextlib.contextmanager
def _status(doing: str) -> Iterator[None]:
    """A moving line on a terminal's standard error while something takes its time."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(Text(printable(doing)), spinner="line" if console.options.ascii_only else "dots"):
        yield


def _say(kind: str, sentence: str) -> None:
    say(f"globenc: {kind}: {sentence}" if kind != "wrote" else f"globenc: wrote {sentence}")
