"""The files of a model, in a folder or on the hub, and errors that name the model."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .private_transformers import cached_file


class LoadingError(OSError):
    """Why a model cannot be loaded, in one sentence that names the model."""


class MissingHeadError(LoadingError):
    """All that is missing belongs to the head."""


ADAPTER = (
    "it is an adapter (adapter_config.json), not a model: load it with peft, merge it into its model "
    "(model.merge_and_unload()), and save that with save_pretrained"
)


@dataclass(frozen=True)
class ModelFiles:
    """A folder or hub name to load from."""

    name: str
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def options(self) -> dict[str, Any]:
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}

    @property
    def folder(self) -> Path | None:
        return Path(self.name) if Path(self.name).is_dir() else None

    def refuse(self, why: str) -> LoadingError:
        return LoadingError(f"model {self.name!r} cannot be loaded: {why}")

    def refuse_code(self) -> ValueError:
        return ValueError(f"model {self.name!r} brings code of its own: allow it with trust_remote_code=True")

    def optional_file(self, file: str) -> Path | None:
        """A file of the model, fetched if need be; None where it has none of that name."""
        if self.folder is not None:
            return self.folder / file if (self.folder / file).is_file() else None
        return cached_file(self.name, file, self.revision or "main")


@contextlib.contextmanager
def errors_of(files: ModelFiles, part: str, json_files: Iterable[str] = ()) -> Iterator[None]:
    """Whatever goes wrong in other packages as one sentence that names the model and the part of it.

    `json_files`: JSON files that it may be about.
    """
    try:
        yield
    except (LoadingError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # tokenizers' panics are no Exceptions
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        if "trust_remote_code" in str(error):
            raise files.refuse_code() from error
        if files.folder is None and isinstance(error, OSError):
            raise LoadingError(
                f"model {files.name!r} is no folder here and could not be fetched from the Hugging Face hub: "
                f"{sentence_of(error)}"
            ) from error
        bad = next((file for file in json_files if files.folder and not is_json_object(files.folder / file)), None)
        raise files.refuse(f"{part if bad is None else bad}: {sentence_of(error)}") from error


def is_json_object(path: Path) -> bool:
    try:
        return not path.is_file() or isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def sentence_of(error: BaseException) -> str:
    """An error of another package's in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".") if lines else ""
    if said.endswith(":") and len(lines) > 1:
        said += f" {lines[1]}"
    plain = isinstance(error, OSError | ValueError | RuntimeError) or type(error) is Exception
    if type(error).__module__ == "builtins" and not plain:
        said = f"{type(error).__name__}: {said}"
    return said[:400] or type(error).__name__


def first_names(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
