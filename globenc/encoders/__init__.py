"""Encoder families, and a transformers model resolved to its family and its layers' modules."""

from .encoder import Encoder, accepted_inputs, family_of_config, find_family
from .family import EncoderFamily
from .modules import LayerModules, layer_list, norm_eps, norm_width
from .registry import describe, register_encoder, supported_encoders

__all__ = [
    "Encoder",
    "EncoderFamily",
    "LayerModules",
    "accepted_inputs",
    "describe",
    "family_of_config",
    "find_family",
    "layer_list",
    "norm_eps",
    "norm_width",
    "register_encoder",
    "supported_encoders",
]
