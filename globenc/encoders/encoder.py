"""A transformers model, resolved once: its family, its layers' modules, and what they allow."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..methods import METHODS
from .family import EncoderFamily
from .modules import LayerModules, find_layers
from .table import FAMILIES


@dataclass(frozen=True, eq=False)
class Encoder:
    """A transformers encoder with its family and its layers' modules, as they are at the time of `Encoder.of`.

    Nothing is cached: after a layer is replaced or the configuration changed, the next `Encoder.of` is another one.

    Attributes:
        model: the eager model, with any head.
        family: its row of the table of families.
        layers: the modules of every layer in order of execution; a shared layer stands there once per use.

    >>> import globenc
    >>> from globenc.encoders import Encoder
    >>> encoder = Encoder.of(globenc.GlobEnc.from_pretrained().model)
    >>> encoder.family.model_type, len(encoder.layers) == encoder.model.config.num_hidden_layers
    ('bert', True)
    """

    model: PreTrainedModel
    family: EncoderFamily
    layers: tuple[LayerModules, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Encoder:
        """The encoder in a model with any head, also behind `torch.compile` and `DataParallel`.

        Raises:
            TypeError: the model is not a transformers model at all.
            ValueError: it is a decoder, an encoder-decoder, or of a family that the table does not hold; a name of the
                family does not exist in it, or is of an unusable kind.
        """
        eager = unwrap(model)
        family = find_family(eager)
        return cls(eager, family, find_layers(eager.base_model, family))

    @property
    def max_length(self) -> int | None:
        """Most tokens one text may have in this model, special tokens included; None where nothing limits it.

        Where positions are relative it is the length that the model was made for, and longer texts run all the same
        (`takes_any_length`).
        """
        config = self.model.config
        positions = getattr(config, "max_position_embeddings", None)
        if positions is None or self.family.reads_images:
            return None
        padding = getattr(config, "pad_token_id", None)
        return int(positions) - (padding + 1 if self.family.positions_after_padding and padding is not None else 0)

    @property
    def takes_any_length(self) -> bool:
        """Whether no table of positions ends somewhere."""
        config: PreTrainedConfig = self.model.config
        rotary = getattr(config, "position_embedding_type", None) == "rotary"  # ESM may be either
        return self.family.relative_positions or rotary or not getattr(config, "position_biased_input", True)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods that have a meaning for the family: no LayerNorm follows the sums of a pre-LN layer."""
        return tuple(
            method.name
            for method in METHODS.values()
            if not (self.family.pre_norm and method.stage is not None and method.stage.norms == 1)
        )


def unwrap(model: Any) -> Any:
    """The eager model behind `torch.compile(model)` and `DataParallel`."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def find_family(model: nn.Module) -> EncoderFamily:
    """The family of a transformers model.

    Raises:
        TypeError: the model is not a transformers model at all.
        ValueError: it is a decoder, an encoder-decoder, or of a family the table does not hold.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(model.config, PreTrainedConfig):
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a transformers encoder (a PreTrainedModel), got {got}{_instead_of(model)}")
    # the config may differ: that of UMT5's encoder alone is the whole model's, and T5's is set by hand
    decoders = [part.decoder for part in (model, getattr(model, "base_model", model)) if hasattr(part, "decoder")]
    decodes = any(isinstance(decoder, PreTrainedModel) for decoder in decoders) or (None if decoders else False)
    return family_of_config(model.config, type(model).__name__, decodes)


def _instead_of(model: object) -> str:
    """What to pass instead of something that is no transformers model."""
    kinds = {each.__module__.split(".")[0] for each in type(model).__mro__}
    if isinstance(model, type):
        return f": pass a model that is loaded, {model.__name__}.from_pretrained(...)"
    if isinstance(model, str | os.PathLike):
        return f"; GlobEnc.from_pretrained({os.fspath(model)!r}) loads one"
    if "peft" in kinds:
        return ": merge its adapters into the model and pass that, model.merge_and_unload()"
    if isinstance(model, PreTrainedConfig):
        return ": a configuration has no weights; load the model"
    where = type(model).__module__
    if kinds & {"optimum", "onnxruntime"} or where.startswith(("torch.jit", "torch.export", "torch.fx")):
        return ": an exported model does not show its layers; pass the transformers model that it was made from"
    if isinstance(model, list | tuple):
        return "; pass one model"
    path = _encoder_inside(model)
    return "" if path is None else f": pass the model inside, its {path}"


def _encoder_inside(outer: object) -> str | None:
    """Where in another package's or a user's object the transformers model is, as it is written behind the object."""
    if isinstance(outer, nn.Module):
        found = next((name for name, part in outer.named_modules() if name and isinstance(part, PreTrainedModel)), None)
        if found is None:
            return None
        parts = ["[" + part + "]" if part.isdigit() else "." + part for part in found.split(".")]
        return "".join(parts)
    if isinstance(outer, list | tuple | dict) or not hasattr(outer, "__dict__"):
        return None
    for name, value in vars(outer).items():
        if isinstance(value, PreTrainedModel):
            return f".{name}"
        inside = _encoder_inside(value) if isinstance(value, nn.Module) else None
        if inside is not None:
            return f".{name}{inside}"
    return None


def family_of_config(config: PreTrainedConfig, name: str, decodes: bool | None = None) -> EncoderFamily:
    """The family of a model `name` with this config; raises ValueError as `find_family` does.

    `decodes`: whether the model has a decoder; None where that is not known.
    """
    model_type, known = config.model_type, ", ".join(FAMILIES)
    if decodes or (config.is_encoder_decoder and not (decodes is False and model_type in FAMILIES)):
        encoder = f"; load its encoder, {model_type.upper()}EncoderModel" if model_type in FAMILIES else ""
        raise ValueError(
            f"model must be an encoder, got {name} of type {model_type!r}, an encoder-decoder: GlobEnc "
            f"decomposes bidirectional encoder layers{encoder}; supported: {known}"
        )
    if f"{model_type}_vision_model" in FAMILIES:
        raise ValueError(
            f"model must be one encoder, got {name} of type {model_type!r}, which has two: pass its vision tower, "
            "model.vision_model"
        )
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"model must be an encoder, got {name} configured as a decoder (is_decoder or "
            "add_cross_attention is set in its config): load it with is_decoder=False"
        )
    if model_type not in FAMILIES:
        raise ValueError(
            f"model must be a supported encoder, got {name} of type {model_type!r}; supported: {known}. "
            f"If {model_type!r} is a bidirectional encoder on transformers' attention interface, register it in one "
            f"call: globenc.register_encoder({model_type!r}, layers=..., attention=..., output_projection=..., "
            "attention_norm=..., output_norm=...), see help(globenc.register_encoder)"
        )
    family = FAMILIES[model_type]
    reason = family.refuse(config) if family.refuse is not None else None
    if reason is not None:
        raise ValueError(f"model {name} of type {model_type!r} cannot be taken: {reason}")
    return family


def accepted_inputs(model: nn.Module) -> tuple[str, ...]:
    """Names of the inputs that a model's forward takes; one that hands all keyword arguments on takes those of the
    class it is derived from. Empty where nothing tells."""
    names: list[str] = []
    for forward in [model.forward, *(vars(kind)["forward"] for kind in type(model).__mro__ if "forward" in vars(kind))]:
        found, hands_on = _parameters(getattr(forward, "__func__", forward))
        names += found
        if not hands_on or forward.__module__.startswith("transformers."):
            break
    known = tuple(dict.fromkeys(names))
    return known if {"input_ids", "inputs_embeds", "pixel_values"} & set(known) else ()


@functools.lru_cache(maxsize=256)
def _parameters(forward: Callable) -> tuple[list[str], bool]:
    """The names of its parameters, and whether it takes any others."""
    parameters = inspect.signature(forward).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, parameter in parameters.items() if name != "self" and parameter.kind not in several]
    return named, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
