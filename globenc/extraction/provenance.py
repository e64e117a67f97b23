"""Provenance of a result: the model and the versions that made it, and a hash that tells one model from another."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from typing import Any

import pyarrow
import torch
import transformers

from .._version import __version__
from ..explainer import GlobEnc

_INFORMATION = ("model_name", "model_revision", "versions", "batch_tokens")


def provenance(explainer: GlobEnc, revision: str | None) -> dict[str, Any]:
    """The model by name, and the versions of what computes."""
    config = explainer.model.config
    return {
        "model_name": config._name_or_path or type(explainer.model).__name__,
        "model_revision": getattr(config, "_commit_hash", None) or revision,
        "versions": {
            "globenc": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pyarrow": pyarrow.__version__,
            "python": platform.python_version(),
        },
    }


def run_options_in(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """The options and the model of a run, out of what its shards say of it: all but what is for information."""
    return {name: value for name, value in made_by.items() if name not in _INFORMATION}


def model_hash(explainer: GlobEnc) -> dict[str, str]:
    """What tells one model from another: its class, dtype, and sha256 of its weights, configuration and tokenizer."""
    model = explainer.model
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        weights.update(f"{name} {plain.dtype} {list(plain.shape)}\n".encode())
        weights.update(plain.reshape(-1).view(torch.uint8).numpy())
    config = model.config.to_diff_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    tokenizer = explainer.tokenizer
    if tokenizer.is_fast:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        words: Any = {name: part for name, part in parts.items() if name not in ("truncation", "padding")}
    else:
        words = tokenizer.get_vocab()
    words = [words, tokenizer.model_max_length]
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weights": weights.hexdigest(),
        "configuration": _hash(config),
        "tokenizer": _hash(words),
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
