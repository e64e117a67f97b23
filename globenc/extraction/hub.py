"""Rows of Hugging Face data sets, read as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .raw_rows import RawRow, first_line, require_columns

HUB = "hf://"


def hub_rows(name: str, columns: Sequence[str], report: Callable[[float], None]) -> Iterator[RawRow]:
    """Rows of the data set hf://...; `report` is told which part of them has been read, where that is known.

    Raises:
        OSError, ValueError: there is no such data set, it breaks off, or lacks a column.
    """
    dataset, total = _dataset(name)
    if dataset.column_names is not None:
        require_columns(name, columns, dataset.column_names)
        dataset = dataset.select_columns(list(columns))
    rows, number = iter(dataset), -1
    while True:
        try:
            row = next(rows, None)
        except Exception as error:  # what the hub, its files and their readers raise has no common type
            raise OSError(f"data set {name!r} broke off behind row {number}: {first_line(error)}") from error
        if row is None:
            return
        number += 1
        if not number and dataset.column_names is None:
            require_columns(name, columns, list(row))
        if total:
            report(min(1.0, number / total))
        yield RawRow(row)


def hub_parts(name: str) -> tuple[str, dict[str, str]]:
    """The path of hf://PATH?split=...&name=...&revision=..., and its options."""
    parts = urlsplit(name)
    path = (parts.netloc + parts.path).rstrip("/")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - {"split", "name", "revision"})
    if not path or unknown:
        wrong = f"has the unknown option {unknown[0]!r}" if unknown else "names no data set"
        raise ValueError(f"input {name!r} {wrong}: write hf://OWNER/DATASET?split=train, with name= and revision= too")
    return path, options


def _dataset(name: str) -> tuple[Any, int | None]:
    """A data set as a stream of rows, and how many it has where that is known."""
    import datasets

    path, options = hub_parts(name)
    split = options.get("split")
    tries = [(path, options.get("name"))]
    if "name" not in options and not Path(path).exists() and path.count("/") in (1, 2):
        tries.append((path.rpartition("/")[0], path.rpartition("/")[2]))  # hf://glue/sst2 is configuration sst2 of glue
    load: Callable = datasets.load_dataset
    failure: Exception | None = None
    for repository, configuration in tries:
        try:
            dataset = load(
                repository, configuration, split=split, revision=options.get("revision") or None, streaming=True
            )
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
            failure = failure or error
            continue
        except Exception as error:  # what the hub, its files and their readers raise has no common type
            raise OSError(f"data set {name!r} cannot be loaded: {first_line(error)}") from error
        if isinstance(dataset, Mapping):
            raise ValueError(f"data set {name!r} has the splits {', '.join(dataset)}: choose one with ?split=")
        info = (dataset.info.splits or {}).get(split) if split else None
        return dataset, info.num_examples or None if info is not None else None
    raise OSError(f"data set {name!r} is neither here nor on the Hugging Face hub: {first_line(failure)}") from failure
