"""`globenc models`: the families of encoders, and the model in the package."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.table import Table
from rich.text import Text

from ..printing import printable
from ..render.console import Console
from .console import errors_in_a_line, print_json, status, warnings_in_a_line
from .options import AsJson


def models(
    as_json: AsJson = False,
) -> None:
    """Show which models globenc can take, and the one that it brings.

    Any checkpoint of these families works unmodified, with any head (classification, tagging, question answering,
    masked words, none), from a folder or from the Hugging Face hub. Other encoders can be taught in one call in Python:
    `globenc.register_encoder`.

    **Examples**

    - `globenc models`

    - `globenc models --json`
    """
    with errors_in_a_line(), warnings_in_a_line():
        with status("importing torch and transformers"):
            from ..encoders import describe, supported_encoders
        families = [describe(family) for family in supported_encoders()]
        default = _default_model()
        if as_json:
            print_json(json.dumps({"families": families, "default": default}, ensure_ascii=False))
        else:
            _print(families, default)


def _print(families: list[dict[str, Any]], default: dict[str, str]) -> None:
    """A table of the families, remarks on it, and the model in the package."""
    console = Console()
    console.print(_table(families, with_notes=console.width >= 110))
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


def _table(families: list[dict[str, Any]], with_notes: bool) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    columns = ["family", "for example", "layers", "kernels", "longest text", *["notes"] * with_notes]
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column not in ("for example", "notes"))
    for family in families:
        rule = family["longest_text"].replace("max_position_embeddings", "positions").replace("_token_id", " id")
        cells = [family["family"], family["examples"], family["layers"], family["kernels"], rule, family["notes"]]
        table.add_row(*map(printable, cells[: len(columns)]))
    return table


def _default_model() -> dict[str, str]:
    """Name of the embedded model and what its card says first."""
    from ..loading import DEFAULT_MODEL, DEFAULT_NAME

    card = (DEFAULT_MODEL / "README.md").read_text(encoding="utf-8")
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    paragraphs = [part for part in re.split(r"\n\s*\n", body) if part.strip() and not part.lstrip().startswith("#")]
    about = " ".join(paragraphs[0].replace("`", "").split())
    accuracy = re.search(r"^\| this model \| ([\d.]+%) \|", card, flags=re.MULTILINE)
    if accuracy is not None:
        about += f" Accuracy on the 872 validation sentences of SST-2: {accuracy[1]}."
    return {"name": DEFAULT_NAME, "path": str(DEFAULT_MODEL), "about": about}
