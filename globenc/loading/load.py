"""From a name or a folder to a model and its tokenizer or image processor."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedModel

from ..encoders import family_of_config
from ..errors import warn_caller
from .checkpoint import Checkpoint
from .classes import encoder_of
from .config import check_kinds, check_sizes, read_config
from .files import LoadingError, ModelFiles, errors_of, is_json_object
from .source import DEFAULT_NAME, ModelSource, check_dtype, choose_device, resolve_name
from .weights import open_weights, stored_in

_PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "preprocessor_config.json")


def load(source: ModelSource) -> tuple[PreTrainedModel, Any]:
    """The model in evaluation mode on its device, and its tokenizer or image processor.

    Raises:
        OSError, TypeError, ValueError, RuntimeError: as `GlobEnc.from_pretrained`.
    """
    files = ModelFiles(resolve_name(source.name), source.revision, source.trust_remote_code)
    device, dtype = choose_device(source.device), check_dtype(source.dtype)
    whole = read_config(files)
    encoder, config = encoder_of(whole)
    reads_images = family_of_config(config, files.name).reads_images
    check_sizes(files, config)
    with contextlib.ExitStack() as opened:
        with errors_of(files, "its weights"):
            weights = open_weights(files, whole, opened)
        if dtype is None:
            dtype = stored_in(whole, weights)
            if device.type == "cpu" and dtype.itemsize < 4:
                dtype = torch.float32
        model, warning = Checkpoint(files, whole, config, encoder, weights, dtype).model()
    if warning is not None:
        warn_caller(warning)
    reader = load_processor(files.name, reads_images, **files.options)
    if source.name is None:
        model.config.name_or_path = DEFAULT_NAME
    return model.to(device).eval(), reader  # type: ignore[arg-type]


def load_processor(name: str, reads_images: bool, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model, or its image processor.

    Raises:
        OSError, ValueError: it has none that can be used.
    """
    files = ModelFiles(name, revision, trust_remote_code)
    with errors_of(files, "its image processor" if reads_images else "its tokenizer", _PROCESSOR_FILES):
        loader = AutoImageProcessor if reads_images else AutoTokenizer
        try:
            found = loader.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            file = "preprocessor_config.json" if reads_images else "tokenizer_config.json"
            path = files.optional_file(file)
            if path is not None and is_json_object(path):
                check_kinds(files, file, json.loads(path.read_text(encoding="utf-8")))
            if "backend tokenizer" in str(error) and files.optional_file("tokenizer.json") is None:
                raise files.refuse(
                    "it has no tokenizer.json: save its tokenizer beside it, or use GlobEnc(model, tokenizer)"
                ) from error
            raise
        if reads_images:
            return found
        if len(found) <= len(found.all_special_ids):
            raise LoadingError(
                f"model {name!r} has no tokenizer: save its tokenizer beside it, or use GlobEnc(model, tokenizer)"
            )
        longest = found.model_max_length
        if not isinstance(longest, int | float) or not longest >= 1 or longest != int(longest):
            raise files.refuse(
                f"model_max_length in tokenizer_config.json must be a positive whole number, got {longest!r}"
            )
        found.model_max_length = int(longest)
        return found


def stored_dtype(name_or_path: str | Path | None, revision: str | None, trust_remote_code: bool) -> torch.dtype:
    """The dtype that a checkpoint is stored in."""
    files = ModelFiles(resolve_name(name_or_path), revision, trust_remote_code)
    config = read_config(files)
    with contextlib.ExitStack() as opened, errors_of(files, "its weights"):
        return stored_in(config, open_weights(files, config, opened))
