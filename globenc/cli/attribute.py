"""`globenc attribute`: one text or image."""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..render.console import Console
from .console import UsageError, errors_in_a_line, print_json, quiet, say, status, warnings_in_a_line
from .files import checked_text, picture_path, read_text, replacing
from .options import (
    INPUT,
    OUTPUT,
    QUESTION,
    AsJson,
    Backend,
    Device,
    Dtype,
    Label,
    MaxLength,
    Method,
    Model,
    PerLayer,
    Position,
    Reference,
    Revision,
    RowNormalize,
    TrustRemoteCode,
    model_source,
    parse_position,
)

if TYPE_CHECKING:
    from ..attribution import Attribution
    from ..explainer import GlobEnc
    from ..images import ImageAttribution


def attribute(
    text: Annotated[
        list[str] | None,
        typer.Argument(metavar="TEXT", help="The text, in quotes. One that begins with - comes after --"),
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file", "-f", metavar="FILE", rich_help_panel=INPUT, help="Read the text from a UTF-8 file; - is stdin."
        ),
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=INPUT, help="An image instead of a text, for vision encoders."),
    ] = None,
    pair: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", rich_help_panel=INPUT, help="Second text, for models that read pairs, such as NLI."
        ),
    ] = None,
    max_length: MaxLength = None,
    label: Label = "predicted",
    no_class_scores: Annotated[
        bool,
        typer.Option(
            "--no-class-scores", rich_help_panel=QUESTION, help="Leave out what speaks for and against: shares alone."
        ),
    ] = False,
    reference: Reference = "zero",
    method: Method = "N-Enc",
    position: Position = "cls",
    per_layer: PerLayer = False,
    row_normalize: RowNormalize = False,
    top: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=OUTPUT, help="How many words the printed table has.")
    ] = 15,
    as_json: AsJson = False,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Also write a web page, complete in one file."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Also draw a picture: .png, .pdf, .svg."),
    ] = None,
    model: Model = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = None,
    dtype: Dtype = None,
    backend: Backend = "auto",
) -> None:
    """Which words of a text speak for the model's answer, which against it, and how much of each is in it.

    A word's class score is what it adds to the logit of the label that the model predicts, or of --label: + for, -
    against. All class scores and a rest add up to the logit.

    Beside it stands the share of the attribution that flows from the word through all layers to the position asked
    for: normally the first token, [CLS], from which most classifiers read their answer. All shares, those of the
    special tokens included, add up to 100%. They say how much of a word went into the answer, not whether it spoke for
    or against it; a model that does not classify has them alone.

    **Examples**

    - `globenc attribute "a charming and often affecting journey"`

    - `globenc attribute "superb acting, but a bad script" --label positive`

    - `globenc attribute "He slept." --pair "He was awake." -m ./nli-model`

    - `globenc attribute -f review.txt --per-layer --html review.html --plot r.png`

    - `globenc attribute "not bad at all" --position=-2 --json`

    - `globenc attribute --image a.jpg -m google/vit-base-patch16-224 --plot a.png`
    """
    if image is not None and (text or file is not None or pair is not None or max_length is not None):
        raise UsageError("--image goes alone: without TEXT, --file, --pair and --max-length")
    if no_class_scores and (label != "predicted" or reference != "zero"):
        given = "--label" if label != "predicted" else "--reference"
        raise UsageError(
            f"{given} says what class scores explain, and --no-class-scores leaves them out: give one of both"
        )
    first: Any = read_text(text, file) if image is None else image
    second = None if pair is None else checked_text("--pair", pair)
    if html is not None and plot is not None and os.path.realpath(html) == os.path.realpath(plot):
        raise UsageError("--html and --plot are the same file")
    with errors_in_a_line(), warnings_in_a_line():
        with contextlib.ExitStack() as outputs:
            plot_part = None if plot is None else outputs.enter_context(replacing(picture_path(plot)))
            html_part = None if html is None else outputs.enter_context(replacing(html))
            with status(f"loading {model or 'the default model'}"):
                explainer = _load(model, device, dtype, backend, revision, trust_remote_code)
            _check_reads(explainer, image is not None)
            with status("reading the text" if image is None else "reading the image"):
                result = explainer(
                    first,
                    second,
                    method=method,
                    position=parse_position(position),
                    per_layer=per_layer,
                    row_normalize=row_normalize,
                    label=None if no_class_scores else label,
                    reference=reference,
                    max_length=max_length,
                )
            if plot_part is not None:
                with status("drawing"):
                    logging.getLogger("matplotlib").setLevel(logging.ERROR)
                    result.plot(plot_part)
            if html_part is not None:
                result.save_html(html_part)
        _print(result, as_json, top)  # behind the files: who reads it may not read on
    for path in (html, plot):
        if path is not None:
            say("wrote", str(path))


def _load(
    model: str | None,
    device: str | None,
    dtype: str | None,
    backend: str,
    revision: str | None,
    trust_remote_code: bool,
) -> GlobEnc:
    quiet()
    from ..explainer import GlobEnc

    return GlobEnc.from_pretrained(model_source(model, device, dtype, backend, revision, trust_remote_code))


def _check_reads(explainer: GlobEnc, image: bool) -> None:
    """Refuse an image for a model of texts, and a text for a model of images."""
    if image != explainer.reads_images:
        reads, option = ("images", "--image FILE") if explainer.reads_images else ("texts", "TEXT or --file FILE")
        raise UsageError(f"this model reads {reads}: give {option}")


def _print(result: Attribution | ImageAttribution, as_json: bool, top: int) -> None:
    from ..images import ImageAttribution

    if as_json:
        print_json(result.to_json())
        return
    if isinstance(result, ImageAttribution):
        from ..render.image import show as show_image

        show_image(result, Console(), top)
        return
    from ..render.terminal import show

    show(result, Console(), top)
