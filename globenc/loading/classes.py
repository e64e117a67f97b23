"""Which of transformers' classes a checkpoint is loaded as."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..encoders import supported_encoders
from .files import ModelFiles, errors_of
from .private_transformers import auto_classes, class_from_code, classes_for, has_class_for

_TOWERS = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel"}


def encoder_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class of a checkpoint's encoder alone, and its configuration: of CLIP and SigLIP the vision tower, of T5 the
    encoder without its decoder."""
    if config.model_type in _TOWERS:
        return getattr(transformers, _TOWERS[config.model_type]), config.vision_config
    auto: Any = transformers.AutoModel
    if config.model_type in {family.model_type for family in supported_encoders()}:
        config.is_encoder_decoder = False  # as T5's encoder writes it when it is saved alone
        if has_decoders(config):
            auto = transformers.AutoModelForTextEncoding
    return next(iter(classes_for(auto, config)), PreTrainedModel), config


def has_decoders(config: PreTrainedConfig) -> bool:
    """Whether transformers has encoder-decoders of this kind."""
    return has_class_for(transformers.AutoModelForSeq2SeqLM, config)


def classes_of(config: PreTrainedConfig, *autos: Any) -> dict[str, type[PreTrainedModel]]:
    """Classes for this kind of configuration by name, transformers' own and registered ones."""
    return {each.__name__: each for auto in autos or auto_classes() for each in classes_for(auto, config)}


def named_class(files: ModelFiles, config: PreTrainedConfig, parts: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that config.json names first; None where it names none, or one that is unknown.

    `parts`: the configuration of the encoder inside, where that is another one.
    """
    name = next(iter(config.architectures or ()), None)
    code = getattr(config, "auto_map", None)
    code = {auto: ref for auto, ref in code.items() if isinstance(ref, str)} if isinstance(code, dict) else {}
    reference = next((ref for ref in code.values() if name is not None and ref.rpartition(".")[2] == name), None)
    if files.trust_remote_code and (reference or "AutoModel" in code):
        with errors_of(files, "its code"):
            return class_from_code(reference or code["AutoModel"], files.name, files.revision)
    if name is None:
        return None
    known = classes_of(config) | classes_of(parts)
    found = known.get(name) or getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)) or found.forward is nn.Module.forward:
        if reference is not None:
            raise files.refuse_code()
        return None
    if name in known or found.config_class in (type(config), type(parts)):
        return found
    kind = re.search("(For[A-Z]|LMHead|Encoder|Model)[A-Za-z]*$", name)
    for other, each in known.items():  # XLM-RoBERTa and CamemBERT are RoBERTa under other names
        if kind and other.endswith(kind[0]) and getattr(each, "base_model_prefix", "") == found.base_model_prefix:
            return each
    raise files.refuse(
        f"its config.json contradicts itself: model_type is {config.model_type!r}, and architectures names {name}"
    )


def on_meta(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


@dataclass(frozen=True)
class Skeleton:
    """What a class would hold, without memory for it: shapes by names inside the encoder."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: Collection[str]
    decodes: bool

    @classmethod
    def of(cls, model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Skeleton:
        try:
            model = on_meta(model_class, config)
        except Exception:  # a class that this configuration is not for
            return cls({}, (), False)
        prefix = model.base_model_prefix
        return cls(
            {without_prefix(key, prefix): tuple(weight.shape) for key, weight in model.state_dict().items()},
            {without_prefix(key, prefix) for key in getattr(model, "all_tied_weights_keys", ())},
            any(hasattr(part, "decoder") for part in (model, model.base_model)),
        )


def without_prefix(key: str, prefix: str) -> str:
    """A weight's name inside the encoder alone."""
    return key.removeprefix(f"{prefix}.")
