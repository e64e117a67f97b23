"""Encoder families: where in each one the method's pieces are, and what a model of one is made of."""

from .encoder import accepted_inputs, family_of_config, find_family, max_length, takes_any_length
from .family import EncoderFamily
from .modules import LayerModules, find_layers, layer_list, norm_eps, norm_width
from .table import describe, register_encoder, supported_encoders

__all__ = [
    "EncoderFamily",
    "LayerModules",
    "accepted_inputs",
    "describe",
    "family_of_config",
    "find_family",
    "find_layers",
    "layer_list",
    "max_length",
    "norm_eps",
    "norm_width",
    "register_encoder",
    "supported_encoders",
    "takes_any_length",
]
