"""Exact GlobEnc token attribution for transformer encoders, at about the price of a forward pass.

>>> import globenc
>>> explainer = globenc.GlobEnc.from_pretrained()
>>> explainer("a charming and often affecting journey").label
'positive'
"""

from ._version import __version__
from .attribution import Attribution, Word
from .encoders import EncoderFamily, register_encoder, supported_encoders
from .explainer import GlobEnc
from .functional import AttributionOutput, attribute, completeness_gap, contribution_maps, mixing_ratios
from .rollout import rollout

__all__ = [
    "Attribution",
    "AttributionOutput",
    "EncoderFamily",
    "GlobEnc",
    "Word",
    "__version__",
    "attribute",
    "completeness_gap",
    "contribution_maps",
    "mixing_ratios",
    "register_encoder",
    "rollout",
    "supported_encoders",
]
