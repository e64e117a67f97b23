"""The program `globenc`: its commands, its exit codes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from .._version import __version__
from ..printing import readable_streams
from .attribute import attribute
from .console import FAILED, INTERRUPTED, TERMINATED, USAGE, UsageError, say
from .evaluate import evaluate
from .extract import extract
from .models import models

app = typer.Typer(
    name="globenc",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# older names of options: the option that a command must have, and what is said then
_RENAMED = {
    "--target": (
        "--position",
        "No such option: --target: --position says whose output vector is attributed (cls, mean, all, a token's "
        "position); a class, which is a target elsewhere, is --label of globenc attribute and globenc extract",
    ),
    "--layers": (
        "--per-layer",
        "No such option: --layers: --per-layer adds the scores up to every layer",
    ),
}


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
            raise UsageError("standard output is closed: there is nowhere to print to")
        code: int = typer.main.get_command(app).main(arguments, prog_name="globenc", standalone_mode=False)
        sys.stdout.flush()
        return code
    except UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "globenc"
        say("error", f"{_usage_sentence(error)} (see {command} --help)")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # the reader has seen enough; nothing is left to flush into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _usage_sentence(error: Any) -> str:
    """What a UsageError says; of an option's older name, which option of the command is meant."""
    option = getattr(error, "option_name", None)
    if option in _RENAMED:
        current, sentence = _RENAMED[option]
        if any(current in parameter.opts for parameter in error.ctx.command.params):
            return sentence
    message: str = error.format_message()
    return message.replace("Value error, ", "").rstrip(".")


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
    """Which words of a text did a transformer encoder's answer come from, and which speak for it or against it?

    globenc runs your classifier (or any other encoder that it knows) and follows every word's contribution through
    all layers, exactly: how much of it is in the answer by the method GlobEnc, and what it adds to a label's logit.

    **Start here**

    - `globenc attribute "a charming and often affecting journey"`

    - `globenc extract reviews.csv --output attributions`

    - `globenc evaluate reviews.csv --output evaluation`
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(USAGE)


for command in (attribute, extract, evaluate, models):
    app.command()(command)
