"""The paper's experiments by name: its checkpoints and data from the Hugging Face hub, with its published numbers.

Sources: the checkpoints that the authors published (huggingface.co/TehranNLP-org), GLUE and HateXplain.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..extraction.sources import inputs_of
from ..loading import ModelSource
from ..methods import get_method
from .run import Evaluation, evaluate

PUBLISHED = Path(__file__).parent / "published.json"
_LAYERS = {"paper-sst2": "table2_bert_base_sst2"}  # preset -> key of the numbers of single layers


@dataclass(frozen=True)
class Task:
    """Where a task's data is, and in which columns; words are joined to a text where `words` names their column."""

    name: str
    data: str
    text: str = "text"
    pair: str | None = None
    label: str | None = None
    words: str | None = None
    marks: str | None = None


TASKS = {
    "sst2": Task("SST-2", "hf://nyu-mll/glue?name=sst2&split=validation", "sentence", label="label"),
    "mnli": Task(
        "MNLI", "hf://nyu-mll/glue?name=mnli&split=validation_mismatched", "premise", "hypothesis", label="label"
    ),
    # the hub's own copy as Parquet: the data set itself is a script, which `datasets` does not run any more
    "hatexplain": Task(
        "HateXplain",
        "hf://Hate-speech-CNERG/hatexplain?split=validation&revision=refs/convert/parquet",
        words="post_tokens",
        marks="rationales",
    ),
}
_CHECKPOINTS = {
    "": "TehranNLP-org/bert-base-uncased-cls-{}",
    "-large": "TehranNLP-org/bert-large-{}",
    "-electra": "TehranNLP-org/electra-base-{}",
}
# preset -> (task, checkpoint); two of the names are written with a capital on the hub
PRESETS = {
    f"paper-{task}{size}": (
        task,
        name.format("hateXplain" if size and task == "hatexplain" else task),
    )
    for task in TASKS
    for size, name in _CHECKPOINTS.items()
}


def evaluate_preset(
    preset: str,
    output: str | Path,
    *,
    inputs: Any = None,
    model: Any = None,
    published: str | Path | None = None,
    metrics: list[str] | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate as the paper did.

    Args:
        preset: paper-sst2, paper-mnli, paper-hatexplain, each also with -large (BERT-large) or -electra.
        inputs, model: a local copy of the same data, another checkpoint; None, and a ModelSource without a name, take
            them from the hub.
        published: JSON as `published.json` in this package; None is that file.
        metrics: None is correlation and faithfulness, and plausibility where the data has rationales.
        output, **options: as for `evaluate`.

    Returns:
        Evaluation.

    Raises:
        OSError, TypeError, ValueError: an unknown preset, and as `evaluate`.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    name, checkpoint = PRESETS[preset]
    task = TASKS[name]
    numbers = published_numbers(preset, published)
    given: Any = task.data if inputs is None else inputs
    if model is None:
        model = checkpoint
    elif isinstance(model, ModelSource) and model.name is None:
        model = dataclasses.replace(model, name=checkpoint)
    rationales = None
    if task.words is not None:
        given = list(_joined(given, task, options.pop("format", None)))
        rationales = given if metrics is None or "plausibility" in metrics else None
        options |= {"tokens_column": task.words, "marks_column": task.marks}
    return evaluate(
        given,
        output,
        model=model,
        rationales=rationales,
        metrics=metrics,
        text_column=task.text,
        pair_column=task.pair,
        label_column=task.label,
        published=numbers,
        title=f"{preset}: {task.name} as in the GlobEnc paper",
        **options,
    )


def _joined(given: Any, task: Task, format_: str | None) -> Iterator[dict[str, Any]]:
    """Rows with their words joined to a text; a row that cannot be has none, and is rejected where rows are read."""
    columns = [name for name in (task.words, task.marks) if name is not None]
    for source in inputs_of(given, format_):
        source.check(columns)
        for raw in source.rows(columns):
            values = dict(raw.values or {})
            words = values.get(task.words or "")
            whole = isinstance(words, list) and all(isinstance(word, str) for word in words)
            yield values | {"text": " ".join(words) if whole and words else None}


def published_numbers(preset: str, path: str | Path | None = None) -> dict[str, Any] | None:
    """The published correlations of a preset, with their source and what is to be known of them; None where the file
    has none.

    Returns:
        {"source", "quantity", "of": checkpoint and data, "notes": those that name this preset, or none at all,
        "correlation": {method: {"mean", "std"}} of the whole rollout,
        "layers": {"rollout" or "layer": {method: {layer or "max": {"mean", "std"}}}}, empty where there are none}.

    Raises:
        OSError, ValueError: the file cannot be read, or is not of the form of `published.json`.
    """
    file = PUBLISHED if path is None else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        source, tables = content["source"], content["correlation"]
        made = {get_method(name).name: _mean_std(values) for name, values in tables.get(preset, {}).items()}
        notes = content.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError("notes must be a list of sentences")
        layers = {
            kind: {
                get_method(name).name: {layer: _mean_std(pair) for layer, pair in numbers.items()}
                for name, numbers in content.get(_LAYERS.get(preset), {}).get(written, {}).items()
            }
            for kind, written in (("rollout", "rollout"), ("layer", "individual"))
        }
    except OSError as error:
        raise OSError(f"published {str(file)!r} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'published {str(file)!r} must be JSON like {{"source": "...", "correlation": {{"paper-sst2": '
            f'{{"N-Enc": {{"mean": 0.5, "std": 0.1}}}}}}}}; {error}'
        ) from None
    if not made:
        return None
    task, checkpoint = PRESETS[preset]
    return {
        "source": str(source),
        "quantity": str(content.get("quantity", "")),
        "of": f"{checkpoint} on {TASKS[task].name}",
        "notes": [note for note in notes if preset in (named := _presets_in(note)) or not named],
        "correlation": made,
        "layers": {kind: table for kind, table in layers.items() if table},
    }


def _mean_std(values: Any) -> dict[str, float | None]:
    """From {"mean": ..., "std": ...} or [mean, std]."""
    mean, std = values if isinstance(values, list) else (values["mean"], values.get("std"))
    if not -1 <= float(mean) <= 1:
        raise ValueError("a mean is no correlation")
    if std is not None and not 0 <= float(std) <= 1:
        raise ValueError("a std is none of correlations")
    return {"mean": float(mean), "std": None if std is None else float(std)}


def _presets_in(note: str) -> list[str]:
    """The presets that a note names."""
    return [name for name in re.findall(r"[\w-]+", note) if name in PRESETS]
