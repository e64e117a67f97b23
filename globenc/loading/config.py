"""A model's config.json, with the fields checked that this package relies on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedConfig

from .files import ADAPTER, LoadingError, ModelFiles, errors_of, sentence_of
from .private_transformers import forget_attention

_KINDS: dict[str, tuple[Any, str]] = {
    "auto_map": ((dict, list), "an object"),  # a list in old tokenizers
    "quantization_config": (dict, "an object"),
    "tokenizer_class": (str, "the name of a class"),
    "image_processor_type": (str, "the name of a class"),
    "dtype": ((str, torch.dtype), 'the name of a dtype, such as "float32"'),
    "torch_dtype": ((str, torch.dtype), 'the name of a dtype, such as "float32"'),
}


def read_config(files: ModelFiles) -> PreTrainedConfig:
    """The configuration in config.json, with the fields checked that this package relies on."""
    with errors_of(files, "its config.json"):
        if files.folder is None and files.optional_file("adapter_config.json") is not None:
            raise files.refuse(ADAPTER)
        try:
            config = AutoConfig.from_pretrained(files.name, **files.options)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            fields, _ = transformers.PreTrainedConfig.get_config_dict(files.name, revision=files.revision)
            check_kinds(files, "its config.json", fields)
            raise naming_field(files, error, fields, lambda rest: AutoConfig.for_model(**rest)) from error
    check_kinds(files, "its config.json", vars(config))
    if getattr(config, "quantization_config", None) is not None:
        raise files.refuse(
            "its weights are quantised (quantization_config in its config.json): take the model it was made from, or "
            "dequantise it (model.dequantize()) and save that with save_pretrained"
        )
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise files.refuse(
            f"architectures in its config.json must be a list of class names, such as {['BertModel']}, got {names!r}"
        )
    forget_attention(config)
    return config


def check_kinds(files: ModelFiles, file: str, fields: Any) -> None:
    """Refuse what transformers takes on trust."""
    for name, (kinds, expected) in _KINDS.items():
        value = fields.get(name) if isinstance(fields, Mapping) else None
        if value is not None and not isinstance(value, kinds):
            raise files.refuse(f"{name} in {file} must be {expected}, got {value!r:.80}")


def check_sizes(files: ModelFiles, config: PreTrainedConfig) -> None:
    """Refuse sizes with which a model can be built but not run."""

    def refuse(name: str, value: Any, must: str) -> LoadingError:
        return files.refuse(f"{name} in its config.json cannot be {value!r:.80}: it must be {must}")

    chunk = getattr(config, "chunk_size_feed_forward", 0)
    if type(chunk) is not int or chunk < 0:
        raise refuse("chunk_size_feed_forward", chunk, "a whole number of at least 0")
    for name in ("hidden_size", "vocab_size", "num_attention_heads"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 1:
            raise refuse(name, value, "a positive whole number")
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    free = any(hasattr(config, name) for name in ("head_dim", "d_kv"))
    if not free and isinstance(heads, int) and isinstance(size, int) and size % heads:
        raise refuse("num_attention_heads", heads, f"a divisor of hidden_size, {size}")


def naming_field(files: ModelFiles, error: Exception, fields: Any, build: Callable[[dict[str, Any]], Any]) -> Exception:
    """The error of `build` with the one field of config.json that it is about: without that field there is none."""

    def fails(left_out: str | None) -> bool:
        try:
            build({name: value for name, value in fields.items() if name != left_out})
        except Exception:
            return True
        return False

    if isinstance(fields, dict) and fails(None):
        wrong = next((name for name in fields if name != "model_type" and not fails(name)), None)
        if wrong is not None:
            return files.refuse(f"{wrong} in its config.json cannot be {fields[wrong]!r:.80}: {sentence_of(error)}")
    return error
