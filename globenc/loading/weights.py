"""A model's weights, read from safetensors files of its own and from nothing else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import safe_open
from transformers import PreTrainedConfig

from .files import ModelFiles, errors_of, first_names
from .private_transformers import cached_file, converted_weights
from .source import FLOATS

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_weights(files: ModelFiles, config: PreTrainedConfig, opened: contextlib.ExitStack) -> dict[str, Any]:
    """The weights by name, read when they are needed; only from safetensors files, and only from the model's own."""
    asked = getattr(config, "transformers_weights", None)
    named = [_WEIGHTS, _INDEX] if asked is None else [_checked_name(files, "its config.json", asked, index=True)]
    found = next((path for path in map(files.optional_file, named) if path is not None), None)
    revision = files.revision or "main"
    if found is None and files.folder is None and revision == "main" and not huggingface_hub.constants.HF_HUB_OFFLINE:
        found, revision = converted_weights(files.name, revision)
    if found is None:
        lacking = f"it has no {' or '.join(named)}"
        there = [] if files.folder is None else sorted(path.name for path in files.folder.iterdir())
        readable = [name for name in there if name.endswith(".safetensors")]
        if len(readable) == 1 and asked is None:
            raise files.refuse(f"{lacking}; it has {readable[0]}: rename it to {_WEIGHTS}")
        if readable:
            raise files.refuse(
                f"{lacking}; it has {first_names(readable)}: save the model once more with save_pretrained"
            )
        other = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf"))]
        raise files.refuse(
            f"{lacking}; weights are read from safetensors only"
            + (f", not from {other[0]}: save the model once more with save_pretrained" if other else "")
        )
    weights: dict[str, Any] = {}
    for name, path in _shards(files, found, revision).items():
        with errors_of(files, name):
            file = opened.enter_context(safe_open(path, framework="pt"))
            weights.update((key, file.get_slice(key)) for key in file.keys())  # noqa: SIM118
    return weights


def _checked_name(files: ModelFiles, where: str, name: Any, index: bool = False) -> str:
    """A name of a weights file in the model's own folder, as `where` gives it."""
    parts = name.replace("\\", "/").split("/") if isinstance(name, str) else []
    endings = (".safetensors", ".safetensors.index.json") if index else ".safetensors"
    if not parts or not name.endswith(endings):
        raise files.refuse(f"{where} names {name!r} as a file of weights; weights are read from safetensors only")
    if any(part in ("", ".", "..") or ":" in part for part in parts):
        raise files.refuse(f"{where} names {name!r} as a file of weights, which is outside the model's folder")
    return name


def _shards(files: ModelFiles, found: Path, revision: str) -> dict[str, Path]:
    """The files of a model by name: one, or those of an index."""
    if not found.name.endswith(".index.json"):
        return {found.name: found}
    with errors_of(files, found.name):
        places = json.loads(found.read_text(encoding="utf-8"))
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict) or not places:
        raise files.refuse(f"{found.name} has no weight_map, which says where every weight is")
    shards: dict[str, Path] = {}
    for name in places.values():
        if not isinstance(name, str) or name not in shards:
            file = _checked_name(files, found.name, name)
            if files.folder is None:
                path = cached_file(files.name, file, revision)
                if path is None:
                    raise files.refuse(f"{found.name} names the file {file!r}, which is not there")
                shards[file] = path
            elif not (files.folder / file).is_file():
                raise files.refuse(f"{found.name} names the file {file!r}, which is not there")
            else:
                shards[file] = files.folder / file
    return shards


def stored_in(config: PreTrainedConfig, weights: Mapping[str, Any]) -> torch.dtype:
    if isinstance(config.dtype, torch.dtype) and config.dtype in FLOATS.values():
        return config.dtype
    found = (FLOATS.get(weight.get_dtype()) for weight in weights.values())
    return next((dtype for dtype in found if dtype is not None), torch.float32)
