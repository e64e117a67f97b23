"""Options that several commands have: each is declared once, so that it has one name and one help text.

`Annotated` types are for a command's signature; the functions turn what was written into what the library takes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ..methods import METHODS, get_method
from .console import UsageError, check_device

if TYPE_CHECKING:
    from ..loading import ModelSource


# panels of --help
INPUT, QUESTION, OUTPUT, MODEL, ENGINE = "What is read", "What is asked", "What comes out", "Model", "How it runs"


def _method(name: str) -> str:
    try:
        return get_method(name).name
    except ValueError as error:
        raise UsageError(str(error)) from None


def _position_option(written: str) -> str:
    parse_position(written)
    return written


def parse_position(written: str) -> str | int | list[int]:
    """--position as `globenc.attribute` takes it."""
    if written in ("cls", "mean", "all"):
        return written
    try:
        positions = [int(position) for position in written.split(",")]
    except ValueError:
        raise UsageError(
            f"position must be cls, mean, all, a token position or positions separated by commas; got {written!r}"
        ) from None
    return positions if "," in written else positions[0]


def names(written: str | None) -> list[str] | None:
    """Names separated by commas."""
    return None if written is None else [name.strip() for name in written.split(",") if name.strip()]


def model_source(
    model: str | None,
    device: str | None,
    dtype: str | None,
    backend: str,
    revision: str | None,
    trust_remote_code: bool,
) -> ModelSource:
    """Which model is loaded, and how, by the six options of the panel Model; the device is there."""
    from ..loading import ModelSource

    if device is not None:
        check_device(device)
    return ModelSource(model, device, dtype, backend, revision, trust_remote_code)


TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=INPUT,
        help="Column of the text. Default: text, which is also the column of plain text.",
    ),
]
PairColumn = Annotated[
    str | None, typer.Option(metavar="NAME", rich_help_panel=INPUT, help="Column of the second text of pairs.")
]
IdColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=INPUT,
        help="Column that names a row, written as id. Default: the row's number, from 0.",
    ),
]
Format = Annotated[
    Literal["jsonl", "csv", "tsv", "parquet", "text"] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=INPUT,
        help="jsonl, csv, tsv, parquet, text. Default: by the file's ending; - is looked at.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, metavar="N", rich_help_panel=INPUT, help="Read the first N rows.")]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        rich_help_panel=INPUT,
        help="Read at most N tokens of a text. Default: what the model takes.",
    ),
]
Method = Annotated[
    str, typer.Option(metavar="NAME", callback=_method, rich_help_panel=QUESTION, help=f"{', '.join(METHODS)}.")
]
Position = Annotated[
    str,
    typer.Option(
        metavar="WHICH",
        callback=_position_option,
        rich_help_panel=QUESTION,
        help="What is traced back: cls (the first token, which most classifiers read), mean (of all tokens), all, a "
        "token position such as 3 or -2, or several: 0,3,-2.",
    ),
]
PerLayer = Annotated[
    bool,
    typer.Option("--per-layer", rich_help_panel=QUESTION, help="Also layer_scores: the scores up to every layer."),
]
RowNormalize = Annotated[
    bool,
    typer.Option(
        "--row-normalize",
        rich_help_panel=QUESTION,
        help="Divide the rows of every layer by their sums; the paper does not.",
    ),
]
Label = Annotated[
    str,
    typer.Option(
        metavar="NAME|NUMBER",
        rich_help_panel=QUESTION,
        help="Which label's logit the class scores explain: its name or number; predicted is the model's answer.",
    ),
]
Reference = Annotated[
    Literal["zero", "model", "origin"],
    typer.Option(
        metavar="NAME",
        rich_help_panel=QUESTION,
        help="Of class scores, what a word is compared with: zero (empty input), model (mask tokens; faster), "
        "origin (as DecompX).",
    ),
]
AsJson = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print everything as one JSON object, and nothing else."),
]
BatchTokens = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        rich_help_panel=ENGINE,
        help="Most tokens at once, padding included. Default: by the free memory.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        rich_help_panel=MODEL,
        help="Folder or Hugging Face name, weights as safetensors. Default: the sentiment model in the package.",
    ),
]
Revision = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=MODEL, help="Branch, tag or commit of a Hugging Face model."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", rich_help_panel=MODEL, help="Allow code that comes with the model to run."),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="NAME", rich_help_panel=MODEL, help="cpu, cuda, cuda:1. Default: a GPU if there is one."),
]
Dtype = Annotated[
    Literal["float64", "float32", "bfloat16", "float16"] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        help="float64, float32, bfloat16, float16. Default: as stored; on a CPU at least float32.",
    ),
]
Backend = Annotated[
    Literal["auto", "reference", "torch", "triton"],
    typer.Option(
        metavar="NAME",
        rich_help_panel=MODEL,
        help="auto, torch, triton, or reference: the paper's equations as they stand, slow.",
    ),
]
